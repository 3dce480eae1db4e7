"""The real `openai` client against the OpenAI-compatible server, over a small model that is written for here."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import uvicorn

from dinoexport.models.llama.prompts import LlamaPrompts
from dinoexport.serving.openai import app, sources
from dinoexport.text import generation, requests, tokenizer
from dinoexport.text.requests import OpenTextModel
from tests.text import tiny

CHATML = LlamaPrompts(bos="", eos="<|im_end|>", chat_format="chatml", system="Be brief.")


class Paced(tiny.Tiny):
    """Takes `pace_s` for each call."""

    pace_s = 0.0

    def __call__(self, arrays):
        time.sleep(self.pace_s)
        return super().__call__(arrays)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    import openai

    run = Paced()
    decoder = tiny.decoder_of(run)
    words = tokenizer.load(tiny.tokenizer_json(tmp_path_factory.mktemp("tiny")))
    model = OpenTextModel(tokenizer=words, decoder=decoder, prompts=CHATML)
    source = sources.LocalSource("tiny", model)
    with running(source) as url:
        yield SimpleNamespace(
            url=url, model=model, run=run, source=source,
            client=openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0),
        )  # fmt: skip


class running:  # noqa: N801
    """uvicorn in a thread, on a free port."""

    def __init__(self, source: sources.Source) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(app.application(source), log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __exit__(self, *_) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def written(served, **values) -> generation.Written:
    """What the model writes without a server."""
    task = served.model.task(requests.parse(values))
    return list(generation.write(served.model.tokenizer, served.model.decoder, task))[-1]


MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]


def test_a_completion(served) -> None:
    wanted = written(served, prompt="def add", max_tokens=12)
    answer = served.client.completions.create(model="tiny", prompt="def add", max_tokens=12)
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 12, 19)


def test_a_completion_of_ids(served) -> None:
    ids = served.model.tokenizer.encode("def add")
    answer = served.client.completions.create(model="tiny", prompt=ids, max_tokens=12)
    assert answer.choices[0].text == written(served, prompt="def add", max_tokens=12).text


def test_a_streamed_completion(served) -> None:
    wanted = written(served, prompt="def add", max_tokens=12)
    chunks = list(
        served.client.completions.create(
            model="tiny", prompt="def add", max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == wanted.text
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert sum(len(chunk.choices) for chunk in chunks) > 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation(served) -> None:
    wanted = written(served, messages=MESSAGES, max_tokens=9)
    answer = served.client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=9)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == wanted.prompt_tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]}]
    again = served.client.chat.completions.create(model="tiny", messages=parts, max_tokens=9)
    assert again.choices[0].message.content == wanted.text


def test_a_streamed_conversation(served) -> None:
    wanted = written(served, messages=MESSAGES, max_tokens=9)
    chunks = list(served.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_seed_and_temperature(served) -> None:
    whole = written(served, prompt="x", max_tokens=20).text
    answer = served.client.completions.create(model="tiny", prompt="x", max_tokens=20, stop=[whole[3:5]])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[: whole.index(whole[3:5])], "stop")
    drawn = [
        served.client.completions.create(model="tiny", prompt="x", max_tokens=20, temperature=2.0, seed=seed)
        for seed in (7, 7, 8)
    ]
    texts = [each.choices[0].text for each in drawn]
    assert texts[0] == texts[1] == written(served, prompt="x", max_tokens=20, temperature=2.0, seed=7).text
    assert texts[2] != texts[0] != whole


def test_many_at_once(served) -> None:
    prompts = [f"prompt {i}" * (1 + i % 3) for i in range(12)]
    found = {}

    def ask(prompt: str) -> None:
        found[prompt] = served.client.completions.create(model="tiny", prompt=prompt, max_tokens=10).choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {prompt: written(served, prompt=prompt, max_tokens=10).text for prompt in prompts}


def test_models_and_health(served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_question_without_text_is_refused(served, content: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="the last message has no text"):
        served.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])


def test_what_requests_nothing_special_changes_nothing(served) -> None:
    """Fields that frameworks always send, with their own defaults."""
    neutral = {
        "n": 1, "best_of": 1, "echo": False, "logprobs": 0, "frequency_penalty": 0, "presence_penalty": 0,
        "logit_bias": {}, "user": "someone",
    }  # fmt: skip
    plain = {"model": "tiny", "prompt": "x", "max_tokens": 4}
    first, second = (served.client.completions.create(**plain, **more) for more in ({}, neutral))
    assert first.choices[0].text == second.choices[0].text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model": "tyni"}, "no model 'tyni'. Did you mean 'tiny'"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "a" * 200}, "The prompt has 200 tokens; the model takes 96"),
        ({"prompt": ["a", "b"]}, "prompt is not a single text"),
        ({"n": 2}, "n is not supported"),
        ({"logprobs": 5}, "logprobs is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"suffix": "b"}, "not trained to fill in text"),
        ({"max_tokens": 0}, "max_tokens 0 means nothing"),
        ({"temperature": -1}, "temperature -1 means nothing"),
        ({"extra_body": {"temperature": "hot"}}, "temperature is not a number"),
        ({"extra_body": {"colour": 1}}, "colour is not supported"),
    ],
)
def test_bad_requests_say_why(served, wrong: dict, words: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 4} | wrong)
    assert words in caught.value.message
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "not a list of 1 to 1000 turns"),
        ([{"role": "assistant", "content": "x"}], "the user has the last word"),
        ([{"role": "robot", "content": "x"}], "the user has the last word; this is robot"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "has a part that is not text",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "has tool_calls"),
        ([{"role": "user", "content": 3}], "role and content are texts"),
    ],
)
def test_bad_conversations_say_why(served, messages: list, words: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(model="tiny", messages=messages)
    assert words in caught.value.message


def test_what_is_no_json(served) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    for body in (b"{", b"[]", b"[" * 100_000, b"\xff"):
        connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        assert response.status == 400
        assert "not a JSON object" in json.loads(response.read())["error"]["message"]
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_written_for_no_more(served, stream: bool) -> None:
    served.run.pace_s = 0.05
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    try:
        body = json.dumps({"prompt": "x", "max_tokens": 90, "stream": stream})
        connection.request("POST", "/v1/completions", body)
        if stream:
            assert connection.getresponse().readline().startswith(b"data:")
        else:
            time.sleep(0.3)
        assert served.source._service.load == (1, 0)
    finally:
        connection.sock and connection.sock.close()
        connection.close()
    deadline = time.monotonic() + 2
    while served.source._service.load != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    served.run.pace_s = 0.0
    assert served.source._service.load == (0, 0)


def test_a_full_queue_is_told(served) -> None:
    import openai

    served.run.pace_s = 0.2
    connections = []
    try:
        for _ in range(20):
            connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 3}))
            connections.append(connection)
        deadline = time.monotonic() + 10
        while sum(served.source._service.load) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="requests wait, as many as may") as caught:
            served.client.completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 503
        served.run.pace_s = 0.0
        assert [connection.getresponse().status for connection in connections] == [200] * 20
    finally:
        served.run.pace_s = 0.0
        for connection in connections:
            connection.close()

"""A text model on a real tritonserver: what it writes is what the bundle writes, streamed or whole, and no client that
leaves, errs or crowds keeps it from writing for the others.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from dinoexport import bundle, cli, family
from dinoexport.bundle import reference_file
from dinoexport.config import recipe
from dinoexport.errors import InputRefused, UsageError
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.stages.text import check_tokenizer
from dinoexport.runtime import text_model
from dinoexport.serving import check, text_check, transport
from dinoexport.serving.openai import sources
from dinoexport.serving.text_client import Ended, TextClient
from dinoexport.serving.transport import ServerBusy, ServerError
from dinoexport.serving.triton import model_repository
from dinoexport.text import generation, requests
from tests import llama_files
from tests.conftest import DATA
from tests.serving.test_openai import running
from tests.text import tiny
from tests.triton_server import Server

RECIPE = str(DATA / "tiny_text.toml")
PROMPTS = ("hello world", "x", "def add(a, b):\n    return", "naïve 🙂")
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged bundle with a tokenizer, from a folder as Hugging Face publishes one."""
    return tiny.bundle(tmp_path_factory.mktemp("tiny_text"))


@pytest.fixture(scope="module")
def model(built: Path) -> requests.OpenTextModel:
    return text_model.open_bundle(built)


@pytest.fixture(scope="module")
def served(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("server")
    deployed = model_repository.deploy(built, scratch / "models", name="words")
    assert deployed.models == ("words",)
    assert deployed.backend == "python"
    server = Server(scratch / "models", scratch, "--model-control-mode=explicit", "--load-model=*")
    try:
        yield server
    finally:
        server.kill(gently=True)


def written(model: requests.OpenTextModel, **values) -> generation.Written:
    return list(generation.write(model.tokenizer, model.decoder, model.task(requests.parse(values))))[-1]


# ---- in this process ----


def test_the_tokenizer_is_a_file_of_the_bundle(built: Path) -> None:
    (found,) = [file for file in bundle.read_manifest(built).files if file.stage == "text"]
    assert found.name == "tokenizer.json"
    assert "tokenizer.json" in (built / "sbom.cdx.json").read_text()


def test_it_writes_what_pytorch_chose(built: Path, model: requests.OpenTextModel) -> None:
    reference = reference_file.read(built / bundle.REFERENCE)
    case = next(e for e in reference.expectations if e.case.name == "two_prompts")
    for row, wanted in zip(case.case.inputs["tokens"], case.outputs["rollout"], strict=True):
        ids = [int(i) for i in row if i >= 0]
        assert written(model, prompt_ids=ids, max_tokens=6).ids == tuple(int(i) for i in wanted)


def test_generate(built: Path, model: requests.OpenTextModel) -> None:
    def run(*words: str, **options) -> str:
        result = CliRunner().invoke(cli.app, ["generate", str(built), *words], **options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    wanted = written(model, prompt="hello world", max_tokens=12)
    assert run("hello world", "--max-tokens", "12") == wanted.text + "\n"
    assert run("-", "--max-tokens", "12", input="hello world") == wanted.text + "\n"
    said = json.loads(run("hello world", "--max-tokens", "12", "--json"))
    assert (said["text"], said["token_ids"], said["finish_reason"]) == (wanted.text, list(wanted.ids), "length")
    chat = written(model, messages=MESSAGES, max_tokens=5).text
    assert run("What is 2 + 2?", "--chat", "--max-tokens", "5") == chat + "\n"
    drawn = [run("x", "--temperature", "1", "--top-p", "0.9", "--seed", seed, "--max-tokens", "20") for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x", "--infill", "a", "b"], "Give a prompt, or --infill"),
        (["--infill", "a", "b"], "not trained to fill in text"),
        (["x", "--system", "y"], "--system has no effect here"),
        (["x", "--suffix-first"], "--suffix-first has no effect here"),
        ([""], "The prompt is empty"),
        (["", "--chat"], "The prompt is empty"),
        (["x" * 600], "601 tokens; the model takes 512"),
        (["x", "--top-p", "2"], "top_p 2.0 means nothing"),
    ],
)
def test_generate_refuses_in_words(built: Path, words: list[str], told: str) -> None:
    result = CliRunner().invoke(cli.app, ["generate", str(built), *words])
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    arch = family.find("llama").model(recipe.load(RECIPE)).arch
    weights = llama_files.write_hf(tmp_path / "weights", arch, seed=5)
    tiny.tokenizer_json(weights, controls=(*tiny.CONTROLS, "<one>", "<two>"))
    request = pipeline.build_request(RECIPE, weights=str(weights), target="cpu", out=tmp_path / "bundle")
    for refuses in (pipeline.export_only, check_tokenizer):
        with pytest.raises(UsageError, match="262 ids, the model 260"):
            refuses(request)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_without_a_tokenizer_says_so(built: Path, tmp_path: Path) -> None:
    manifest = bundle.read_manifest(built)
    without = manifest.model_copy(update={"files": tuple(file for file in manifest.files if file.stage != "text")})
    shutil.copytree(built, tmp_path / "bundle")
    (tmp_path / "bundle" / bundle.MANIFEST).write_bytes(without.to_bytes())
    with pytest.raises(UsageError, match="no tokenizer, so it cannot take text"):
        text_model.open_bundle(tmp_path / "bundle")
    with pytest.raises(UsageError, match="there is no tokenizer in it"):
        model_repository.deploy(tmp_path / "bundle", tmp_path / "models")


# ---- on the server ----


@pytest.mark.triton
def test_generate_and_generate_stream(served: Server, model: requests.OpenTextModel) -> None:
    wanted = written(model, prompt="hello world", max_tokens=30)
    body = {"prompt": "hello world", "max_tokens": 30}
    for asked in (body, body | {"stream": False}):
        status, answer = served.ask("POST", "/v2/models/words/generate", json.dumps(asked))
        assert status == 200
        assert (answer["text"], answer["token_ids"]) == (wanted.text, list(wanted.ids))
        assert (answer["prompt_tokens"], answer["completion_tokens"]) == (12, 30)
    status, events = served.ask("POST", "/v2/models/words/generate_stream", json.dumps(body | {"stream": True}))
    texts = [json.loads(line.removeprefix("data:"))["text"] for line in events.splitlines() if line]
    assert status == 200
    assert "".join(texts) == wanted.text
    assert len(texts) > 10


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_clients(served: Server, model: requests.OpenTextModel, protocol: str) -> None:
    client = TextClient(getattr(served, protocol), model="words")
    for values in (
        {"prompt": PROMPTS[3], "max_tokens": 25},
        {"messages": MESSAGES, "max_tokens": 9},
        {"prompt": "x", "max_tokens": 25, "temperature": 1.5, "top_p": 0.8, "seed": 11},
    ):
        *texts, ended = client.stream(**values)
        wanted = written(model, **values)
        assert "".join(texts) == wanted.text
        assert ended == Ended(
            reason="length", prompt_tokens=wanted.prompt_tokens, completion_tokens=len(wanted.ids), token_ids=wanted.ids
        )
    whole = written(model, prompt="x", max_tokens=25).text
    stopped = client.answer(prompt="x", max_tokens=25, stop=[whole[5:8], "never"])
    assert (stopped.text, stopped.ended.reason) == (whole[: whole.index(whole[5:8])], "stop")
    with (
        pytest.raises(InputRefused, match="empty") if protocol == "http" else pytest.raises(ServerError, match="empty")
    ):
        client.answer(prompt="")
    with pytest.raises(InputRefused, match="temperature -1 means nothing"):
        client.answer(prompt="x", temperature=-1)


@pytest.mark.triton
def test_many_at_once(served: Server, model: requests.OpenTextModel) -> None:
    """Twelve clients, unequal prompts and lengths, over four places: each gets what it gets alone."""
    asked = [{"prompt": PROMPTS[i % 4] * (1 + i % 3), "max_tokens": 10 + 5 * (i % 5)} for i in range(12)]
    client = TextClient(served.http, model="words")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda values: client.answer(**values), asked))
    assert [answer.ended.token_ids for answer in answers] == [written(model, **values).ids for values in asked]


def cancelled(served: Server) -> int:
    found = re.search(r'dinoexport_text_answers\{.*reason="cancelled".*\} (\d+)', served.metrics())
    return int(found[1])


@contextmanager
def held(served: Server) -> Iterator[None]:
    """The model's process stands still meanwhile, so that no answer can end before its client has left."""
    (stub,) = served.stubs("words")
    os.kill(stub, signal.SIGSTOP)
    try:
        yield
        time.sleep(0.5)  # the server hears of it
    finally:
        os.kill(stub, signal.SIGCONT)


def comes_to(served: Server, count: int) -> bool:
    """Whether so many answers are cancelled within two seconds."""
    deadline = time.monotonic() + 2
    while cancelled(served) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return cancelled(served) == count


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_who_leaves_is_written_for_no_more(served: Server, protocol: str) -> None:
    before = cancelled(served)
    events = TextClient(getattr(served, protocol), model="words").stream(prompt="x", max_tokens=500)
    next(events)
    with held(served):
        events.close()
    assert comes_to(served, before + 1)


@pytest.mark.triton
def test_a_crowd_is_refused_in_words(served: Server) -> None:
    """Four are written, sixteen wait, and the rest are told at once."""
    connections = []
    for _ in range(30):
        connection = http.client.HTTPConnection("127.0.0.1", served.http_port, timeout=60)
        body = json.dumps({"prompt": "crowd", "max_tokens": 60})
        connection.request("POST", "/v2/models/words/generate", body)
        connections.append(connection)
    answers = [(response.status, json.loads(response.read())) for response in (c.getresponse() for c in connections)]
    for connection in connections:
        connection.close()
    refused = [answer["error"] for status, answer in answers if status == 400]
    assert {status for status, _ in answers} == {200, 400}  # Triton has no other status for a decoupled model
    assert all("requests wait, as many as may" in words for words in refused)
    assert len({answer["text"] for status, answer in answers if status == 200}) == 1
    assert isinstance(transport.refusal(400, json.dumps({"error": refused[0]}).encode()), ServerBusy)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "A request has a prompt, or messages"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "a" * 600}, "The prompt has 601 tokens"),
        ({"prompt": "x", "suffix": "y"}, "not trained to fill in text"),
        ({"prompt": "x", "top_p": 0}, "top_p 0.0 means nothing"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens -1 means nothing"),
        ({"messages": "[1]"}, "A message has a role"),
        ({"messages": '[{"role": "user", "content": ""}]'}, "The prompt is empty"),
        ({"messages": "[" * 5000}, "messages are not a list"),
        ({"prompt_ids": [5, 999]}, "The model has no token 999"),
        ({"messages": '[{"role": "assistant", "content": "x"}]'}, "the user has the last word"),
    ],
)
def test_bad_requests_say_why(served: Server, wrong: dict, words: str) -> None:
    for endpoint in ("generate", "generate_stream"):
        status, answer = served.ask("POST", f"/v2/models/words/{endpoint}", json.dumps(wrong))
        assert status == 400
        assert words in str(answer)
        assert "Traceback" not in str(answer)


@pytest.mark.triton
def test_check(served: Server, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, place in ((served.http, built), (served.grpc, served.repository)):
        checked = check.check(url, place, model="words")
        assert checked.report.passed
        assert [row.case for row in checked.report.rows] == ["two_prompts", "two_prompts"]
        assert all(bound.value == 0 for row in checked.report.rows for bound in row.bounds)
    told = Ended(reason="length", prompt_tokens=1, completion_tokens=6, token_ids=(3, 1, 4, 1, 5, 9))
    monkeypatch.setattr(TextClient, "answer", lambda *_, **__: SimpleNamespace(ended=told))
    assert not check.check(served.http, built).report.passed


def test_a_gap_tells_rounding_from_damage() -> None:
    logits = np.array([[0.0, 5.0, 4.99], [3.0, 0.0, 1.0], [0.0, 1.0, 7.0]])

    def gap(*ids: int, reason: str = "length") -> float:
        ended = Ended(reason=reason, prompt_tokens=1, completion_tokens=len(ids), token_ids=ids)
        return text_check.gap_at_difference(ended, [1, 0, 2], logits, frozenset({1}))

    assert gap(1, 0, 2) == 0
    assert gap(2, 0, 2) == pytest.approx(0.01)
    assert gap(1, 1, 2) == 3
    assert gap(1, 0, reason="stop") == 6
    assert gap(1, 0, reason="cancelled") == float("inf")


@pytest.mark.triton
def test_openai_in_front(served: Server, model: requests.OpenTextModel) -> None:
    import openai

    with running(sources.TritonSource(TextClient(served.http, model="words"))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        wanted = written(model, prompt="hello world", max_tokens=20)
        answer = client.completions.create(model="words", prompt="hello world", max_tokens=20)
        assert (answer.choices[0].text, answer.usage.completion_tokens) == (wanted.text, 20)
        chunks = list(client.completions.create(model="words", prompt="hello world", max_tokens=20, stream=True))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == wanted.text
        chat = client.chat.completions.create(model="words", messages=MESSAGES, max_tokens=7)
        assert chat.choices[0].message.content == written(model, messages=MESSAGES, max_tokens=7).text
        with pytest.raises(openai.BadRequestError, match="The prompt has 601 tokens"):
            client.completions.create(model="words", prompt="a" * 600)
        before = cancelled(served)
        stream = client.completions.create(model="words", prompt="x", max_tokens=500, stream=True)
        next(iter(stream))
        with held(served):
            stream.close()
        assert comes_to(served, before + 1)


@pytest.mark.triton
def test_a_killed_process_is_told_and_healed(served: Server, model: requests.OpenTextModel) -> None:
    """The server calls the model ready for ever; `check --quick` does not."""
    (stub,) = served.stubs("words")
    os.kill(stub, signal.SIGKILL)
    with pytest.raises(ServerError):
        TextClient(served.http, model="words", timeout_s=5).answer(prompt="x", max_tokens=3)
    served.unload("words")
    assert served.load("words")[0] == 200
    again = TextClient(served.http, model="words").answer(prompt="x", max_tokens=3)
    assert again.ended.token_ids == written(model, prompt="x", max_tokens=3).ids


@pytest.mark.triton
def test_other_backends_are_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keeps no cache"):
        model_repository.deploy(built, tmp_path / "models", backend="onnxruntime")
    shutil.rmtree(tmp_path / "models", ignore_errors=True)

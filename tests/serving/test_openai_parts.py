"""The OpenAI-compatible application as its server calls it, over a source of a test: whole answers, to the letter."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from dinoexport.errors import BuildError, DinoexportError, InputRefused, UsageError
from dinoexport.serving.address import Address, parse
from dinoexport.serving.openai import app, schema, sources
from dinoexport.serving.text_client import Ended
from dinoexport.serving.transport import ServerBusy, ServerError

ENDED = Ended(reason="length", prompt_tokens=3, completion_tokens=2, token_ids=(7, 8))
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.fixture(autouse=True)
def same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "time", SimpleNamespace(time=lambda: 1234.9))
    monkeypatch.setattr(schema, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="0123")))


class Source:
    """Answers with these items; an error among them is raised."""

    name = "tiny"

    def __init__(self, *items: str | Ended | DinoexportError) -> None:
        self.items, self.asked, self.closed = items, [], 0  # type: ignore[var-annotated]

    async def stream(self, values: Mapping[str, Any]) -> sources.Items:
        self.asked.append(values)
        for item in self.items:
            if isinstance(item, DinoexportError):
                raise item
            yield item

    async def close(self) -> None:
        self.closed += 1


class Waiting(Source):
    """Never answers."""

    async def stream(self, values: Mapping[str, Any]) -> sources.Items:
        await asyncio.sleep(60)
        yield ""


def asked(
    source: Source, path: str, body: Any = None, *, method: str = "POST", leaves: bool = False
) -> tuple[int, dict[str, str], str]:
    """(status, headers, text). leaves: the client closes the connection behind its request."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    pieces = [raw[:7], raw[7:]]

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        if not leaves:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.4"}, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    asyncio.run(app.application(source)(scope, receive, send))  # type: ignore[arg-type]
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(part.get("body", b"") for part in sent).decode()


def test_models_and_health() -> None:
    status, _, text = asked(Source(), "/v1/models", method="GET")
    entry = {"id": "tiny", "object": "model", "created": 0, "owned_by": "dinoexport"}
    assert (status, json.loads(text)) == (200, {"object": "list", "data": [entry]})
    assert asked(Source(), "/health", method="GET")[::2] == (200, '{"status":"ok"}')


def test_a_completion() -> None:
    source = Source("a", "é", ENDED)
    status, _, text = asked(source, "/v1/completions", {"model": "tiny", "prompt": "p", "max_tokens": 2, "n": 1})
    assert status == 200 and json.loads(text) == {
        "id": "cmpl-0123", "object": "text_completion", "created": 1234, "model": "tiny", "usage": USAGE,
        "choices": [{"index": 0, "text": "aé", "logprobs": None, "finish_reason": "length"}],
    }  # fmt: skip
    assert [{key: value for key, value in values.items() if value is not None} for values in source.asked] == [
        {"prompt": "p", "max_tokens": 2}
    ]


def test_a_conversation() -> None:
    body = {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}], "max_tokens": 9}
    source = Source("a", ENDED)
    _, _, text = asked(source, "/v1/chat/completions", body)
    message = {"role": "assistant", "content": "a"}
    assert json.loads(text) == {
        "id": "chatcmpl-0123", "object": "chat.completion", "created": 1234, "model": "tiny", "usage": USAGE,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
    }  # fmt: skip
    assert source.asked[0]["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert source.asked[0]["max_tokens"] == 9


def lines(choices: list[Any], kind: str, name: str, *more: str) -> str:
    around = {"id": f"{name}-0123", "object": kind, "created": 1234, "model": "tiny"}
    events = [json.dumps(around | {"choices": each}, ensure_ascii=False) for each in choices]
    return "".join(f"data: {event}\n\n" for event in (*events, *more, "[DONE]"))


def choice(said: Mapping[str, Any], reason: str | None = None) -> list[Any]:
    return [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]


def test_a_streamed_completion() -> None:
    """Text that is not ASCII goes as it is; nothing between may keep events back."""
    status, headers, text = asked(Source("a", "é", ENDED), "/v1/completions", {"prompt": "p", "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    choices = [choice({"text": "a"}), choice({"text": "é"}), choice({"text": ""}, "length")]
    assert text == lines(choices, "text_completion", "cmpl")


def test_a_streamed_conversation_with_its_counts() -> None:
    body = {"messages": [], "stream": True, "stream_options": {"include_usage": True}}
    _, _, text = asked(Source("a", "b", ENDED), "/v1/chat/completions", body)
    choices = [
        choice({"delta": {"role": "assistant", "content": "a"}}),
        choice({"delta": {"content": "b"}}),
        choice({"delta": {}}, "length"),
        [],
    ]
    expected = lines(choices, "chat.completion.chunk", "chatcmpl")
    counted = f'"choices": [], "usage": {json.dumps(USAGE)}'
    assert text == expected.replace('"choices": []', counted)


def test_an_error_after_the_first_words_is_an_event() -> None:
    told = ServerError("it broke.", next_step="Look.")
    _, _, text = asked(Source("a", told), "/v1/completions", {"prompt": "p", "stream": True})
    error = {"error": {"message": "it broke. Look.", "type": "server_error", "param": None, "code": None}}
    assert text == lines([choice({"text": "a"})], "text_completion", "cmpl", json.dumps(error))


@pytest.mark.parametrize(
    ("told", "status", "kind"),
    [
        (InputRefused("x", next_step="y"), 400, "invalid_request_error"),
        (UsageError("x", next_step="y"), 400, "invalid_request_error"),
        (ServerBusy("x", next_step="y"), 503, "overloaded_error"),
        (ServerError("x", next_step="y"), 500, "server_error"),
        (BuildError("x", next_step="y"), 500, "server_error"),
    ],
)
def test_an_error_before_has_a_status(told: DinoexportError, status: int, kind: str) -> None:
    error = {"error": {"message": "x y", "type": kind, "param": None, "code": None}}
    for stream in (False, True):
        found, _, text = asked(Source(told), "/v1/completions", {"prompt": "p", "stream": stream})
        assert (found, json.loads(text)) == (status, error)


def told(body: Any, source: Source | None = None) -> str:
    status, _, text = asked(source or Source(ENDED), "/v1/completions", body)
    return str(json.loads(text)["error"]["message"]) if status == 400 else ""


def test_what_is_no_request() -> None:
    for raw in (b"", b"{", b"[]", b"[" * 10**5, "é".encode("latin-1")):
        assert told(raw) == "The request is not a JSON object. Send one."
    assert told({"prompt": "p", "model": "tinny"}) == (
        "There is no model 'tinny'. Did you mean 'tiny'? Ask tiny."
    )  # fmt: skip
    assert told({"prompt": "p", "model": None}) == ""


def test_a_request_has_eight_mebibytes_at_most() -> None:
    assert told(bytes(1 << 23)) == "The request is not a JSON object. Send one."
    assert told(bytes((1 << 23) + 1)) == "The request has more than 8388608 bytes. Shorten it."


def test_who_leaves_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, wait = [], asyncio.wait  # it is looked for twice a second
    monkeypatch.setattr(asyncio, "wait", lambda them, timeout=None: looks.append(timeout) or wait(them, timeout=1e-3))
    for stream in (False, True):
        given = {"prompt": "p", "stream": stream}
        assert asked(Waiting(), "/v1/completions", given, leaves=True)[::2] == (499, "{}") and looks[0] == 0.5


def test_the_source_is_closed_with_the_server() -> None:
    source = Source()

    async def lived() -> None:
        async with app.application(source).router.lifespan_context(None):
            assert source.closed == 0

    asyncio.run(lived())
    assert source.closed == 1


# Requests


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", {"prompt": "a"}), (["a"], {"prompt": "a"}), ([[1, 2]], {"prompt_ids": [1, 2]}),
        ([1, 2], {"prompt_ids": [1, 2]}), ([1], {"prompt_ids": [1]}), ([], {"prompt_ids": []}),
        (["a", "b"], None), ([[1], [2]], None), ([["a"]], None), ({}, None), (None, None), (3, None),
    ],
)  # fmt: skip
def test_one_prompt_for_each_request(prompt: Any, expected: dict[str, Any] | None) -> None:
    if expected is None:
        with pytest.raises(InputRefused, match="prompt is not a single text"):
            schema.completion_values({"prompt": prompt})
    else:
        left_out = dict.fromkeys(("suffix", "max_tokens", "temperature", "top_p", "seed", "stop"))
        assert schema.completion_values({"prompt": prompt}) == left_out | expected


NEUTRAL = [
    ("n", 1, 2), ("best_of", 1, 2), ("echo", False, True), ("logprobs", 0, 1), ("logprobs", False, True),
    ("top_logprobs", 0, 1), ("frequency_penalty", 0, 1), ("frequency_penalty", 0.0, 0.5), ("presence_penalty", 0, 1),
    ("logit_bias", {}, {"1": 2}), ("tools", [], [{}]), ("tool_choice", "none", "auto"), ("functions", [], [{}]),
    ("response_format", {"type": "text"}, {"type": "json_object"}), ("parallel_tool_calls", True, None),
    ("parallel_tool_calls", False, "x"), ("modalities", ["text"], ["audio"]), ("unknown", None, 1),
]  # fmt: skip


@pytest.mark.parametrize(("option", "neutral", "wish"), NEUTRAL)
def test_options_that_wish_nothing_are_taken(option: str, neutral: Any, wish: Any) -> None:
    schema.completion_values({"prompt": "p", option: neutral, "user": "u", "store": True})
    if wish is not None:
        with pytest.raises(InputRefused, match=f"{option} is not supported with this value"):
            schema.chat_values({"messages": [], option: wish})


TEXT_PART = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a", "a"), ([TEXT_PART, {"type": "text", "text": "b"}], "ab"), ([], ""), (None, None),
        ([{"type": "image_url", "text": "a"}], "part"), ([{"type": "text"}], "part"), (["a"], "part"), ([None], "part"),
    ],
)  # fmt: skip
def test_parts_of_a_message_are_text(content: Any, said: str | None) -> None:
    body = {"messages": [{"role": "user", "content": content, "tool_calls": [], "refusal": None}]}
    if said == "part":
        with pytest.raises(InputRefused, match="A message has a part that is not text"):
            schema.chat_values(body)
    else:
        assert schema.chat_values(body)["messages"] == [{"role": "user", "content": said}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": "a"}, "messages are not a list"), ({}, "messages are not a list"),
        ({"messages": ["a"]}, "A message is not an object"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "A message has tool_calls"),
    ],
)  # fmt: skip
def test_a_conversation_is_a_list_of_messages(body: dict[str, Any], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        schema.chat_values(body)


@pytest.mark.parametrize(("old", "new", "limit"), [(5, None, 5), (5, 7, 7), (None, 7, 7), (5, 0, 0)])
def test_the_newer_name_of_the_limit_counts(old: int | None, new: int | None, limit: int) -> None:
    body = {"messages": [], "max_tokens": old, "max_completion_tokens": new}
    assert schema.chat_values(body)["max_tokens"] == limit


# A model on a Triton server


class Sent:
    """In place of httpx's client: what it was made with and asked for, and a response of a test."""

    made: dict[str, Any]
    asked: list[Any]
    response: Any
    closed = 0

    def __init__(self, **settings: Any) -> None:
        type(self).made, type(self).asked = settings, []

    @asynccontextmanager
    async def stream(self, method: str, url: str, *, json: Any) -> AsyncIterator[Any]:
        self.asked.append((method, url, json))
        if isinstance(self.response, Exception):
            raise self.response
        yield self.response

    async def aclose(self) -> None:
        type(self).closed += 1


def response(*pieces: bytes, status: int = 200) -> Any:
    taken: list[bytes] = []

    async def aiter_raw() -> AsyncIterator[bytes]:
        for piece in pieces:
            taken.append(piece)
            yield piece

    return SimpleNamespace(status_code=status, aiter_raw=aiter_raw, taken=taken)


def triton(where: Address) -> sources.TritonSource:
    client: Any = SimpleNamespace(address=where, name="tiny/text", served=SimpleNamespace(name="tiny"))
    return sources.TritonSource(client, timeout_s=7.0)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> type[Sent]:
    monkeypatch.setattr(httpx, "AsyncClient", Sent)
    monkeypatch.setattr(Sent, "closed", 0)
    return Sent


def whole(source: sources.TritonSource, **values: Any) -> list[str | Ended]:
    async def read() -> list[str | Ended]:
        found = [item async for item in source.stream(values)]
        await source.close()
        return found

    return asyncio.run(read())


EVENT = b'data: {"text": "a"}\n\n'
LAST = (
    b'data: {"text": "b", "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 2, "token_ids": [7, 8]}\n'
)


def test_what_is_asked_of_triton(sent: type[Sent]) -> None:
    """Without a proxy of the environment, in plain bytes, with the headers of the address; one client for all."""
    sent.response = response(EVENT[:9], EVENT[9:] + LAST)
    source = triton(Address(**{**vars(parse("http://host:8000/v")), "headers": {"x-tenant": "vision"}}))
    assert whole(source, prompt="p", seed=None) == ["a", "b", ENDED]
    limits = sent.made.pop("limits")
    assert (limits.max_connections, limits.max_keepalive_connections) == (None, None)
    assert sent.made == {
        "timeout": 7.0, "trust_env": False, "verify": False,
        "headers": {"x-tenant": "vision", "Accept-Encoding": "identity"},
    }  # fmt: skip
    url = "http://host:8000/v/v2/models/tiny%2Ftext/generate_stream"
    assert sent.asked == [("POST", url, {"prompt": "p", "stream": True})] and sent.closed == 1
    sent.response = response(LAST)
    assert whole(source, prompt="q") == ["b", ENDED] and len(sent.asked) == 2


def test_a_client_that_asked_nothing_is_closed(sent: type[Sent]) -> None:
    asyncio.run(triton(parse("http://host")).close())
    assert sent.closed == 0


def test_whose_certificates_are_trusted(sent: type[Sent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssl, "create_default_context", lambda *, cafile: f"trust {cafile.name}")
    for where, verify in (
        (parse("http://host"), False),
        (parse("https://host"), True),
        (Address(**{**vars(parse("https://host")), "ca": Path("ca.pem")}), "trust ca.pem"),
    ):
        sent.response = response(LAST)
        whole(triton(where), prompt="p")
        assert sent.made["verify"] == verify


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (response(EVENT), ServerError, "The answer broke off."),
        (response(b'{"error": "wrong"}', status=400), InputRefused, "wrong."),
        (httpx.ConnectError("x"), ServerBusy, "The model's server cannot be reached (ConnectError)."),
        (httpx.ReadTimeout("x"), ServerError, "The model did not answer in time."),
        (TimeoutError(), ServerError, "The model did not answer in time."),
    ],
)
def test_what_goes_wrong_is_one_error(answer: Any, kind: type, message: str, sent: type[Sent]) -> None:
    sent.response = answer
    with pytest.raises(DinoexportError) as told:
        whole(triton(parse("http://host")), prompt="p")
    assert type(told.value) is kind and told.value.message == message


@pytest.mark.parametrize(("sizes", "taken"), [((1 << 20, 1, 1), 2), ((1 << 20,), 1), (((1 << 20) + 1, 1), 1)])
def test_a_refusal_is_read_up_to_a_mebibyte(sizes: tuple[int, ...], taken: int, sent: type[Sent]) -> None:
    sent.response = response(*(bytes(size) for size in sizes), status=503)
    with pytest.raises(ServerBusy, match=r"status 503\."):
        whole(triton(parse("http://host")), prompt="p")
    assert len(sent.response.taken) == taken


def test_grpc_has_no_front() -> None:
    with pytest.raises(UsageError, match="grpc://host:8001 is a gRPC address"):
        triton(parse("grpc://host"))


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("model", "tiny", "A bundle holds one model."),
        ("headers", Path("headers"), "A bundle is opened here, and no request is sent."),
        ("ca", Path("ca.pem"), "A bundle is opened here, and no request is sent."),
    ],
)
def test_a_folder_is_opened_here(
    option: str, value: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinoexport import bundle
    from dinoexport.runtime import text_model

    with pytest.raises(UsageError) as refused:
        sources.open_source(str(tmp_path), **{"model": None, "timeout_s": 1.0, option: value})
    assert (refused.value.message, refused.value.next_step) == (why, f"Leave --{option} out.")
    monkeypatch.setattr(bundle, "read_manifest", lambda folder: SimpleNamespace(variant=f"of {folder.name}"))
    monkeypatch.setattr(text_model, "open_bundle", lambda folder: f"opened {folder.name}")
    monkeypatch.setattr(sources, "LocalSource", lambda name, model: (name, model))
    found = sources.open_source(str(tmp_path), model=None, timeout_s=1.0)
    assert found == (f"of {tmp_path.name}", f"opened {tmp_path.name}")


def test_what_is_no_folder_is_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def client(place: str, **settings: Any) -> Any:
        made.append((place, settings))
        return SimpleNamespace(address=parse(place), name="t", served=SimpleNamespace(name="tiny"))

    monkeypatch.setattr(sources, "TextClient", client)
    found = sources.open_source("http://h", model="tiny", timeout_s=3.0, headers=tmp_path, ca=None)
    assert isinstance(found, sources.TritonSource) and found.name == "tiny"
    assert made == [("http://h", {"model": "tiny", "timeout_s": 3.0, "headers": tmp_path, "ca": None})]


# Where it listens


def test_an_address_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first = app.bind("127.0.0.1", 0)
    with first:
        port = first.getsockname()[1]
        first.listen()
        with pytest.raises(UsageError) as refused:
            app.bind("127.0.0.1", port)
    assert refused.value.message == f"Port {port} of 127.0.0.1 cannot be listened on: Address already in use."
    with app.bind("127.0.0.1", port) as again:
        assert again.getsockname() == ("127.0.0.1", port)
    with pytest.raises(UsageError) as refused:
        app.bind("x" * 300, 1)
    assert refused.value.message.endswith("cannot be listened on: it is not a name of this machine.")

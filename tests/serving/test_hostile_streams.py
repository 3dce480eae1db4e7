"""Servers of text whose streamed answer never ends, floods, or is malformed: one error, in time, from every client."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dinoexport.errors import DinoexportError, InputRefused
from dinoexport.serving.openai import sources
from dinoexport.serving.text_client import Ended, TextClient
from dinoexport.serving.triton.signature import PARAMETER
from tests.properties import examples
from tests.serving.endpoints import JSON, SERVED, Endpoint, drip, response

pytest.importorskip("tritonclient.http")
CONFIG = {
    "name": "tiny", "parameters": {PARAMETER: {"string_value": SERVED.changed(role="text").model_dump_json()}},
}  # fmt: skip
GENERATE = "/v2/models/tiny/generate_stream"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
LAST = {"text": "", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 2, "token_ids": [7, 8]}


def line(event: Any) -> bytes:
    return b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"


RIGHT = HEAD + line({"text": "a"}) + line({"text": "b"}) + line(LAST)


@pytest.fixture
def endpoint(started: Endpoint) -> Endpoint:
    return ready(started)


def ready(endpoint: Endpoint) -> Endpoint:
    endpoint.reset()
    endpoint.answers["/v2/models/tiny/config"] = response(json.dumps(CONFIG).encode())
    endpoint.answers[GENERATE] = then_closes(RIGHT)
    return endpoint


def then_closes(raw: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(raw)


def by_client(endpoint: Endpoint, *, timeout_s: float, **values: Any) -> tuple[str, Ended]:
    answer = TextClient(f"http://127.0.0.1:{endpoint.port}", timeout_s=timeout_s).answer(**values)
    return answer.text, answer.ended


def by_front(endpoint: Endpoint, *, timeout_s: float, **values: Any) -> tuple[str, Ended]:
    """What the OpenAI front asks."""
    client = TextClient(f"http://127.0.0.1:{endpoint.port}", timeout_s=timeout_s)
    source = sources.TritonSource(client, timeout_s=timeout_s)

    async def whole() -> tuple[str, Ended]:
        text, ended = "", None
        async for item in source.stream(values):
            if isinstance(item, Ended):
                ended = item
            else:
                text += item
        await source.close()
        assert ended is not None
        return text, ended

    return asyncio.run(whole())


CLIENTS = [by_client, by_front]
Asks = Callable[..., tuple[str, Ended]]


@pytest.mark.parametrize("asks", CLIENTS)
def test_it_can_be_right(endpoint: Endpoint, asks: Asks) -> None:
    text, ended = asks(endpoint, timeout_s=5.0, prompt="x", max_tokens=2)
    assert text == "ab" and ended.reason == "stop" and ended.token_ids == (7, 8)


ENDLESS = {
    "events": line({"text": "a"}), "empty events": line({"text": ""}), "comments": b": still here\n", "lines": b"\n",
    "half a line": b"data", "bytes": b"x",
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("asks", CLIENTS)
def test_a_stream_that_drips_for_ever_ends(endpoint: Endpoint, asks: Asks, kind: str) -> None:
    endpoint.answers[GENERATE] = drip(HEAD, ENDLESS[kind])
    began = time.monotonic()
    with pytest.raises(DinoexportError, match=r"in time|more events"):
        asks(endpoint, timeout_s=0.2, prompt="x", max_tokens=2)
    assert time.monotonic() - began < 6  # 0.2 s and twice 0.2 s, and what a loaded machine adds


@pytest.mark.parametrize("asks", CLIENTS)
@pytest.mark.parametrize("piece", [b"x" * (1 << 16), line({"text": "y" * 60_000}), b": z\n" * 20_000])
def test_a_flood_is_cut_off(endpoint: Endpoint, asks: Asks, piece: bytes) -> None:
    sent = [0]

    def flood(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        while sent[0] < 1 << 30:
            connection.sendall(piece)
            sent[0] += len(piece)

    endpoint.answers[GENERATE] = flood
    with pytest.raises(DinoexportError, match=r"more bytes|more events"):
        asks(endpoint, timeout_s=30.0, prompt="x", max_tokens=20)
    assert sent[0] < 1 << 25


WRONG: dict[str, bytes] = {
    "no JSON": line(b"{"), "a list": line([]), "an error": line({"error": "out of memory"}),
    "an error that is none": line({"error": {"a": [1]}}), "a text that is none": line({"text": [1]}),
    "a reason that is none": line({**LAST, "finish_reason": 3}), "another reason": line({**LAST, "finish_reason": "x"}),
    "no counts": line({"text": "", "finish_reason": "stop"}), "counts of words": line({**LAST, "prompt_tokens": "one"}),
    "a count that is true": line({**LAST, "completion_tokens": True}), "negative": line({**LAST, "prompt_tokens": -1}),
    "ids of words": line({**LAST, "token_ids": ["a"]}), "huge ids": line({**LAST, "token_ids": [10**40]}),
    "ids that are none": line({**LAST, "token_ids": {"a": 1}}), "nested": line(b"[" * 100_000),
    "no UTF-8": line(b"\xff"),
    "nothing": b"", "it breaks off": line({"text": "a"}), "half an event": b'data: {"text"',
    "NaN": line({"text": float("nan")}),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("asks", CLIENTS)
def test_a_malformed_stream_is_one_error(endpoint: Endpoint, asks: Asks, kind: str) -> None:
    endpoint.answers[GENERATE] = then_closes(HEAD + WRONG[kind])
    with pytest.raises(DinoexportError) as caught:
        asks(endpoint, timeout_s=5.0, prompt="x", max_tokens=4)
    assert caught.value.message and caught.value.next_step


@pytest.mark.parametrize("status", ["500 Oops", "302 Found", "400 Bad"])
@pytest.mark.parametrize("asks", CLIENTS)
def test_a_refusal_without_end_is_one_error(endpoint: Endpoint, asks: Asks, status: str) -> None:
    endpoint.answers[GENERATE] = drip(f"HTTP/1.1 {status}\r\n\r\n".encode(), b"x" * 10_000)
    with pytest.raises(DinoexportError):
        asks(endpoint, timeout_s=0.2, prompt="x", max_tokens=4)


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(JSON, max_size=4), field=st.sampled_from(["", *LAST]), asks=st.sampled_from(CLIENTS))
def test_any_json_is_one_error_or_an_answer(started: Endpoint, events: list[Any], field: str, asks: Asks) -> None:
    endpoint = ready(started)
    wrong = [{**LAST, field: event} if field else event for event in events]
    endpoint.answers[GENERATE] = then_closes(HEAD + b"".join(map(line, wrong)))
    with suppress(DinoexportError):
        asks(endpoint, timeout_s=5.0, prompt="x", max_tokens=4)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "half \ud800"}, {"messages": [{"role": "user", "content": "\udfff"}]}, {"prompt": "x",
        "stop": ["\ud8ff"]},
        {"prompt": "x", "seed": 2**63}, {"prompt": "x", "temperature": float("nan")}, {"prompt": "x",
        "top_p": float("inf")},
    ],
)  # fmt: skip
@pytest.mark.parametrize("asks", CLIENTS)
def test_what_cannot_be_sent_is_refused(endpoint: Endpoint, asks: Asks, values: dict[str, Any]) -> None:
    with pytest.raises(InputRefused):
        asks(endpoint, timeout_s=5.0, **values)


# ---- gRPC ----


@pytest.fixture(scope="module")
def grpc_server() -> Iterator[tuple[int, dict[str, Any]]]:
    """A gRPC server whose stream sends what `told["events"]` gives."""
    grpc = pytest.importorskip("grpc")
    from tritonclient.grpc import service_pb2 as pb

    told: dict[str, Any] = {}
    models = pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(name="tiny", state="READY")])
    config = pb.ModelConfigResponse()
    config.config.name = "tiny"
    config.config.parameters[PARAMETER].string_value = SERVED.changed(role="text").model_dump_json()
    whole = {"RepositoryIndex": models.SerializeToString(), "ModelConfig": config.SerializeToString()}

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            method = details.method.rpartition("/")[2]
            if method == "ModelStreamInfer":
                return grpc.stream_stream_rpc_method_handler(lambda requests, context: told["events"](context))
            return grpc.unary_unary_rpc_method_handler(lambda request, context: whole[method])

    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port, told
    server.stop(None)


def grpc_event(text: str) -> bytes:
    from tritonclient.grpc import service_pb2 as pb

    answer = pb.ModelStreamInferResponse()
    answer.infer_response.outputs.add(name="text", datatype="BYTES", shape=[1])
    answer.infer_response.raw_output_contents.append(len(text).to_bytes(4, "little") + text.encode())
    return bytes(answer.SerializeToString())


@pytest.mark.parametrize(("text", "pause_s"), [("a", 0.05), ("", 0.05), ("y" * 60_000, 0.0)])
def test_a_grpc_stream_without_end_ends(grpc_server: tuple[int, dict[str, Any]], text: str, pause_s: float) -> None:
    port, told = grpc_server

    def events(context: Any) -> Iterator[bytes]:
        while context.is_active():
            time.sleep(pause_s)
            yield grpc_event(text)

    told["events"] = events
    with pytest.raises(DinoexportError, match=r"in time|more events|more bytes"):
        TextClient(f"grpc://127.0.0.1:{port}", timeout_s=2.0).answer(prompt="x", max_tokens=8)


def test_numbers_that_the_protocol_cannot_hold(grpc_server: tuple[int, dict[str, Any]]) -> None:
    port, _ = grpc_server
    client = TextClient(f"grpc://127.0.0.1:{port}", timeout_s=2.0)
    for values in ({"prompt": "x", "max_tokens": 2**40}, {"prompt_ids": [2**70]}):
        with pytest.raises(InputRefused, match="too large a number"):
            client.answer(**values)

"""Servers that answer anything at all: every malformed answer is one error that names it, in time and in bounds."""

from __future__ import annotations

import base64
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dinoexport.errors import DinoexportError, UsageError
from dinoexport.serving import address, answers, http_transport
from dinoexport.serving.client import DinoClient
from dinoexport.serving.triton.signature import PARAMETER
from tests.properties import examples
from tests.serving.endpoints import GRAPH, INPUT, JSON, RIGHT, SERVED, Endpoint, drip, inferred, response

pytest.importorskip("tritonclient.http")


@pytest.fixture
def endpoint(started: Endpoint) -> Endpoint:
    started.reset()
    return started


def ask(endpoint: Endpoint, *, timeout_s: float = 5.0, url: str = "") -> dict[str, Any]:
    return DinoClient(url or f"http://127.0.0.1:{endpoint.port}", timeout_s=timeout_s)(INPUT)


def test_the_endpoint_can_be_right(endpoint: Endpoint) -> None:
    found = ask(endpoint)
    assert {name: array.shape for name, array in found.items()} == {"y": (1, 4), "z": (1, 3, 2)}


def outputs(**changes: Any) -> dict[str, Any]:
    first = RIGHT["outputs"][0] | changes
    return {"outputs": [{k: v for k, v in first.items() if v != "gone"}, RIGHT["outputs"][1]]}


WRONG = {
    "not JSON": inferred(b"{", b""),
    "an array": inferred([], b""),
    "no outputs": inferred({}, b""),
    "outputs that are none": inferred({"outputs": 3}, b""),
    "an output that is none": inferred({"outputs": [3]}, b""),
    "no name": inferred(outputs(name="gone")),
    "another name": inferred(outputs(name="w")),
    "a dtype nobody knows": inferred(outputs(datatype="FP99")),
    "a dtype that is none": inferred(outputs(datatype=[1])),
    "another dtype": inferred(outputs(datatype="INT32")),
    "half the bytes": inferred(outputs(datatype="FP16")),
    "no size": inferred(outputs(parameters={})),
    "a negative size": inferred(outputs(parameters={"binary_data_size": -16})),
    "a size that is true": inferred(outputs(parameters={"binary_data_size": True})),
    "a size beyond the end": inferred(outputs(parameters={"binary_data_size": 10**12})),
    "a shape that is none": inferred(outputs(shape="gone")),
    "a shape of words": inferred(outputs(shape=["1", "4"])),
    "a negative shape": inferred(outputs(shape=[-1, -4])),
    "another shape": inferred(outputs(shape=[4, 1])),
    "another rank": inferred(outputs(shape=[4])),
    "a huge shape": inferred(outputs(shape=[2**40, 2**40])),
    "a rank of thousands": inferred(outputs(shape=[1] * 3000)),
    "two batches of one": inferred(outputs(shape=[2, 4], parameters={"binary_data_size": 32}), bytes(56)),
    "bytes left over": inferred(data=bytes(48)),
    "bytes missing": inferred(data=bytes(8)),
    "a length of words": inferred(length="many"),
    "a negative length": inferred(length=-1),
    "a length of 5,000 digits": inferred(length="9" * 5000),
    "a length beyond the end": inferred(length=10**6),
    "no length": response(json.dumps(RIGHT).encode() + bytes(40)),
    "compressed": response(b"x", headers="Content-Encoding: gzip\r\n"),
    "nested without end": inferred(b"[" * 200_000, b""),
    "no HTTP": b"SSH-2.0-OpenSSH\r\n",
    "nothing": b"",
    "a redirect": response(b"", status="302 Found", headers="Location: http://169.254.169.254/\r\n"),
    "an error that is none": response(b"[[", status="500 Oops"),
    "an error with controls": response(b'{"error": "\\u001b[2J"}', status="500 Oops"),
    "a header of a megabyte": b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    "a body larger than any": response(bytes(2 << 24)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("path", ["/v2/repository/index", "/v2/models/tiny/config", "/v2/models/tiny/infer"])
def test_a_malformed_answer_is_one_error(endpoint: Endpoint, path: str, kind: str) -> None:
    endpoint.answers[path] = (lambda c: c.close()) if kind == "nothing" else WRONG[kind]
    with pytest.raises(DinoexportError) as caught:
        ask(endpoint, timeout_s=0.2)
    assert caught.value.message and caught.value.next_step


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=JSON, data=st.binary(max_size=64), where=st.sampled_from(["index", "config", "infer", "parameter"]))
def test_any_json_is_one_error_or_an_answer(endpoint: Endpoint, header: Any, data: bytes, where: str) -> None:
    endpoint.reset()
    raw = json.dumps(header).encode()
    if where == "infer":
        endpoint.answers["/v2/models/tiny/infer"] = inferred(header, data)
    elif where == "parameter":
        config = {"parameters": {PARAMETER: {"string_value": raw.decode()}}}
        endpoint.answers["/v2/models/tiny/config"] = response(json.dumps(config).encode())
    else:
        endpoint.answers["/v2/repository/index" if where == "index" else "/v2/models/tiny/config"] = response(raw)
    with pytest.raises(DinoexportError):
        ask(endpoint, timeout_s=0.2)


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"", b"H"), drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"), lambda connection: time.sleep(10),
    ],
)  # fmt: skip
def test_a_dripped_answer_ends_at_the_deadline(endpoint: Endpoint, answer: Callable[[socket.socket], None]) -> None:
    endpoint.answers["/v2/models/tiny/infer"] = answer
    client = DinoClient(f"http://127.0.0.1:{endpoint.port}", timeout_s=0.4)
    started = time.monotonic()
    with pytest.raises(DinoexportError, match="did not answer in time"):
        client(INPUT)
    assert time.monotonic() - started < 4
    endpoint.reset()
    assert client(INPUT).keys() == {"y", "z"}, "the client goes on, on another connection"


def test_an_endless_body_is_cut_off(endpoint: Endpoint) -> None:
    sent = [0]

    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while sent[0] < 1 << 30:
            connection.sendall(bytes(1 << 20))
            sent[0] += 1 << 20

    endpoint.answers["/v2/models/tiny/infer"] = flood
    with pytest.raises(DinoexportError, match=r"more than the .* bytes that an answer can have"):
        ask(endpoint, timeout_s=30)
    assert sent[0] < 1 << 26


def test_no_answer_is_larger_than_the_graph_allows() -> None:
    assert answers.signature(GRAPH) == 8 * (2 * 4 + 2 * 24 * 2) + answers.HEADER_MAX_BYTES


# ---- gRPC ----


@pytest.fixture(scope="module")
def grpc_server() -> Iterator[tuple[int, dict[str, Any]]]:
    """A gRPC server that answers every method with the bytes it is told."""
    grpc = pytest.importorskip("grpc")
    told: dict[str, Any] = {}

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            method = details.method.rpartition("/")[2]
            told.setdefault("metadata", []).append(dict(details.invocation_metadata))
            return grpc.unary_unary_rpc_method_handler(lambda request, context: told.get(method, b""))

    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port, told
    server.stop(None)


def told_rightly(told: dict[str, Any]) -> Any:
    from tritonclient.grpc import service_pb2 as pb

    told.clear()
    told["RepositoryIndex"] = pb.RepositoryIndexResponse(
        models=[pb.RepositoryIndexResponse.ModelIndex(name="tiny", state="READY")]
    ).SerializeToString()
    config = pb.ModelConfigResponse()
    config.config.name = "tiny"
    config.config.parameters[PARAMETER].string_value = SERVED.model_dump_json()
    told["ModelConfig"] = config.SerializeToString()
    answer = pb.ModelInferResponse(model_name="tiny")
    for name, shape in (("y", [1, 4]), ("z", [1, 3, 2])):
        answer.outputs.add(name=name, datatype="FP32", shape=shape)
        answer.raw_output_contents.append(bytes(4 * math.prod(shape)))
    told["ModelInfer"] = answer.SerializeToString()
    return answer


def test_grpc_can_be_right(grpc_server: tuple[int, dict[str, Any]]) -> None:
    port, told = grpc_server
    told_rightly(told)
    assert DinoClient(f"grpc://127.0.0.1:{port}", timeout_s=5)(INPUT).keys() == {"y", "z"}


GRPC_WRONG: dict[str, Callable[[Any], object]] = {
    "another dtype": lambda a: setattr(a.outputs[0], "datatype", "INT32"),
    "no dtype": lambda a: setattr(a.outputs[0], "datatype", ""),
    "strings": lambda a: setattr(a.outputs[0], "datatype", "BYTES"),
    "another name": lambda a: setattr(a.outputs[0], "name", "w"),
    "no bytes": lambda a: a.raw_output_contents.__delitem__(slice(None)),
    "odd bytes": lambda a: a.raw_output_contents.__setitem__(0, b"123"),
    "fewer bytes": lambda a: a.raw_output_contents.__setitem__(0, bytes(8)),
    "another shape": lambda a: a.outputs[0].shape.__setitem__(1, 5),
    "a negative shape": lambda a: a.outputs[0].shape.__setitem__(0, -1),
    "more bytes than any": lambda a: a.raw_output_contents.__setitem__(0, bytes(40 << 20)),
    "no outputs": lambda a: a.outputs.__delitem__(slice(None)),
}


@pytest.mark.parametrize("kind", GRPC_WRONG)
def test_a_malformed_grpc_answer_is_one_error(grpc_server: tuple[int, dict[str, Any]], kind: str) -> None:
    port, told = grpc_server
    answer = told_rightly(told)
    GRPC_WRONG[kind](answer)
    told["ModelInfer"] = answer.SerializeToString()
    with pytest.raises(DinoexportError) as caught:
        DinoClient(f"grpc://127.0.0.1:{port}", timeout_s=2)(INPUT)
    assert caught.value.next_step


@pytest.mark.parametrize("method", ["RepositoryIndex", "ModelConfig", "ModelInfer"])
@pytest.mark.parametrize("raw", [b"\xff" * 9, b"\x0a\x7f", b""])
def test_bytes_that_are_no_message_are_one_error(
    grpc_server: tuple[int, dict[str, Any]], method: str, raw: bytes
) -> None:
    port, told = grpc_server
    told_rightly(told)
    told[method] = raw
    with pytest.raises(DinoexportError):
        DinoClient(f"grpc://127.0.0.1:{port}", timeout_s=2)(INPUT)


# ---- addresses and what is sent along ----


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("host:8000", "http://host:8000"), ("http://host", "http://host:8000"), ("https://host", "https://host:443"),
        ("https://host/prefix/", "https://host:443/prefix"), ("grpc://host", "grpc://host:8001"),
        ("http://[::1]:9", "http://[::1]:9"), ("https://user:secret@host", "https://host:443"),
    ],
)  # fmt: skip
def test_addresses(url: str, expected: str) -> None:
    assert str(address.parse(url)) == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1", "http://", "ftp://host", "http://host:99999", "http://host:port", "http://ho st", "", "http://host?x",
        "grpc://host/path", "http://user:pw@", "http://\x00", "http://host\r\nX: y", "//", "http://[]:8000",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="not an address of a server") as caught:
        DinoClient(url)
    assert "pw" not in caught.value.message


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(url: str) -> None:
    with suppress(UsageError):
        address.parse(url)


def test_what_is_sent_along(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = tmp_path / "headers"
    headers.write_text("# for the gateway\nX-Tenant: vision\n\nx-trace:  a b \n")
    monkeypatch.setenv(address.TOKEN_VARIABLE, "s3cret\n")
    DinoClient(f"http://127.0.0.1:{endpoint.port}", headers=headers)(INPUT)
    assert len(endpoint.requests) == 3
    for request in endpoint.requests:
        for line in (b"x-tenant: vision\r\n", b"x-trace: a b\r\n", b"authorization: Bearer s3cret\r\n"):
            assert line in request
    endpoint.reset()
    DinoClient(f"http://user%40corp:p%3Aw@127.0.0.1:{endpoint.port}")(INPUT)
    pair = base64.b64encode(b"user@corp:p:w")
    assert all(b"authorization: Basic " + pair + b"\r\n" in request for request in endpoint.requests)


def test_grpc_sends_it_too(grpc_server: tuple[int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    port, told = grpc_server
    told_rightly(told)
    monkeypatch.setenv(address.TOKEN_VARIABLE, "s3cret")
    DinoClient(f"grpc://127.0.0.1:{port}", timeout_s=5)(INPUT)
    assert all(sent["authorization"] == "Bearer s3cret" for sent in told["metadata"])


@pytest.mark.parametrize("line", ["not a header", "A: b\x00", "A b: c", ": x", "A:\x1b[2J"])
def test_a_header_that_is_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "headers").write_text(line)
    with pytest.raises(UsageError, match="Line 1 of"):
        address.parse("http://host", headers=tmp_path / "headers")


def test_secrets_are_not_shown(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(address.TOKEN_VARIABLE, "two words")
    with pytest.raises(UsageError) as caught:
        address.parse("http://host")
    assert "two words" not in caught.value.message
    monkeypatch.delenv(address.TOKEN_VARIABLE)
    endpoint.answers["/v2/repository/index"] = response(b"[]")
    with pytest.raises(UsageError) as caught:
        DinoClient(f"http://me:hidden@127.0.0.1:{endpoint.port}")
    assert "hidden" not in caught.value.message + caught.value.next_step
    assert "hidden" not in repr(address.parse("http://me:hidden@host"))


def test_an_answer_that_comes_with_the_deadline_leaves_no_connection(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = DinoClient(f"http://127.0.0.1:{endpoint.port}", timeout_s=5.0)
    pool, answered = client._transport._pool, []
    request = pool.request

    def late(*words: Any, **settings: Any) -> Any:
        answered.append(request(*words, **settings))
        return answered[-1]

    class Over(http_transport.Deadline):
        expired = property(lambda _: bool(answered), lambda *_: None)

    monkeypatch.setattr(pool, "request", late)
    monkeypatch.setattr(http_transport, "Deadline", Over)
    with pytest.raises(DinoexportError, match="did not answer in time"):
        client(INPUT)
    assert answered[-1].connection is None or answered[-1].closed

"""HTTP requests as they are sent, and bodies as they are read: against a pool of connections that a test holds."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import urllib3

from dinoexport.serving import deadline, http_transport
from dinoexport.serving.address import Address, parse
from dinoexport.serving.answers import Malformed
from dinoexport.serving.deadline import Deadline
from dinoexport.serving.http_transport import Http

pytest.importorskip("tritonclient.http")
MIB = 1 << 20


class Response:
    """A response whose body comes in pieces of at most what is asked for; `sizes` are those."""

    connection = None

    def __init__(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.headers, self._body, self._at = 200, dict(headers or {}), body, 0
        self.sizes: list[int] = []

    def read(self, size: int) -> bytes:
        self.sizes.append(size)
        piece = self._body[self._at : self._at + size]
        self._at += len(piece)
        return piece

    read1 = read

    def shutdown(self) -> None: ...

    def release_conn(self) -> None: ...


class Pool:
    """In place of urllib3's PoolManager: what it was made with, what was sent, and one answer for all."""

    answer = Response(b"")
    made: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        type(self).made = settings
        self.pool_classes_by_scheme: dict[str, Any] = {}
        self.sent: list[tuple[str, str, dict[str, Any]]] = []

    def request(self, method: str, url: str, **settings: Any) -> Response:
        self.sent.append((method, url, settings))
        return self.answer


def opened(
    monkeypatch: pytest.MonkeyPatch, answer: Response, *, url: str = "http://host:8000/v", **how: Any
) -> tuple[Http, Any]:
    monkeypatch.setattr(urllib3, "PoolManager", Pool)
    monkeypatch.setattr(Pool, "answer", answer)
    transport = Http(Address(**{**vars(parse(url)), **how}), 60.0)
    return transport, transport._pool


def test_how_connections_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Five seconds to connect; nothing is sent twice; a CA only where one was given."""
    opened(monkeypatch, Response(b""))
    timeout = Pool.made.pop("timeout")
    assert (timeout.connect_timeout, timeout.read_timeout) == (5.0, 60.0)
    assert Pool.made == {"maxsize": 32, "retries": False}
    opened(monkeypatch, Response(b""), url="https://host", ca=tmp_path / "ca.pem")
    assert Pool.made["ca_certs"] == str(tmp_path / "ca.pem")


def test_a_batch_is_sent_in_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    header = json.dumps(
        {"outputs": [{"name": "y", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 4}}]}
    ).encode()
    answer = Response(header + b"\x07\0\0\0", {"Inference-Header-Content-Length": str(len(header))})
    transport, pool = opened(monkeypatch, answer, headers={"x-tenant": "vision"})
    found = transport.infer("a/b", {"x": np.array([[5]], np.int32)}, ["y"], shared={})
    assert found["y"].tolist() == [7]
    ((method, url, settings),) = pool.sent
    assert (method, url) == ("POST", "http://host:8000/v/v2/models/a%2Fb/infer")
    body, sent = settings.pop("body"), settings.pop("headers")
    assert settings == {"preload_content": False, "redirect": False, "decode_content": False}
    length = int(sent["Inference-Header-Content-Length"])
    assert sent == {"x-tenant": "vision", "Inference-Header-Content-Length": str(length)}
    assert body[length:] == b"\x05\0\0\0"
    asked = json.loads(body[:length])
    assert asked["inputs"] == [
        {"name": "x", "shape": [1, 1], "datatype": "INT32", "parameters": {"binary_data_size": 4}}
    ]
    assert asked["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]


def test_inputs_in_shared_memory_have_no_bytes_behind_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, pool = opened(monkeypatch, Response(b"{}", {"Inference-Header-Content-Length": "2"}))
    with pytest.raises(Malformed, match="lists no outputs"):
        transport.infer("m", {"x": np.zeros((1, 1), np.int32)}, [], shared={"x": ("region", 4, 8)})
    ((_, _, settings),) = pool.sent
    assert settings["headers"] == {}
    assert json.loads(settings["body"])["inputs"][0]["parameters"] == {
        "shared_memory_region": "region", "shared_memory_byte_size": 4, "shared_memory_offset": 8,
    }  # fmt: skip


def test_a_region_begins_at_the_start_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, pool = opened(monkeypatch, Response(b""))
    transport.register("a b", "/key", 77)
    transport.unregister("a b")
    (_, first, settings), (_, second, _) = pool.sent
    assert json.loads(settings["body"]) == {"key": "/key", "offset": 0, "byte_size": 77}
    assert first.endswith("/v2/systemsharedmemory/region/a%20b/register") and second.endswith("/a%20b/unregister")


def test_a_body_is_read_up_to_what_an_answer_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MiB at a time, and of the byte that is too many no more than that one."""
    assert http_transport.METADATA_MAX_BYTES == 16 * MIB
    monkeypatch.setattr(http_transport, "METADATA_MAX_BYTES", 2 * MIB)
    body = b'{"x": 1}'.ljust(2 * MIB)
    transport, pool = opened(monkeypatch, Response(body))
    assert transport.config("m") == {"x": 1} and pool.answer.sizes == [MIB, MIB, 1]
    transport, pool = opened(monkeypatch, Response(body + b" \n"))
    with pytest.raises(Malformed, match="more than the 2,097,152 bytes"):
        transport.config("m")
    assert pool.answer.sizes == [MIB, MIB, 1]
    transport, pool = opened(monkeypatch, Response(body + b" "))
    transport.limit(2 * MIB + 1)
    assert transport.config("m") == {"x": 1} and pool.answer.sizes == [MIB, MIB, 2, 1]
    transport.limit(5)
    pool.answer = Response(body)
    assert transport.config("m") == {"x": 1}, "an index or a configuration may have as much as before"


def test_a_stream_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, pool = opened(monkeypatch, Response(b'data: {"text": "a"}\n\n: note\ndata: {"text": "b"}\n'))
    assert list(transport.stream("m", {"prompt": "p", "max_tokens": 3})) == [{"text": "a"}, {"text": "b"}]
    ((method, url, settings),) = pool.sent
    assert (method, url) == ("POST", "http://host:8000/v/v2/models/m/generate_stream")
    assert json.loads(settings["body"]) == {"prompt": "p", "max_tokens": 3}
    assert settings["headers"] == {"Content-Type": "application/json"}
    assert pool.answer.sizes == [1 << 16] * 2


def test_a_connection_that_is_used_again_is_shut_at_the_deadline_too() -> None:
    """It tells the deadline of the thread that uses it, if there is one."""
    shut: list[int] = []

    class Plain:
        def __init__(self) -> None:
            self.sock = SimpleNamespace(shutdown=shut.append)
            self.requests: list[Any] = []

        def request(self, *words: Any, **how: Any) -> None:
            self.requests.append((words, how))

    class PlainPool:
        ConnectionCls = Plain

    pool = deadline.watched(PlainPool)
    used = pool.ConnectionCls()
    assert issubclass(pool, PlainPool) and pool.__name__ == "PlainPool"
    with Deadline(60.0) as ends:
        used.request("GET", "/", body=b"")
        assert shut == []
        ends._shut()
    assert shut == [socket.SHUT_RDWR] and used.requests == [(("GET", "/"), {"body": b""})]
    used.request("GET", "/2")
    assert len(used.requests) == 2 and len(shut) == 1


def test_no_deadline_keeps_the_process_alive() -> None:
    assert Deadline(60.0)._timer.daemon is True


@pytest.mark.parametrize("found", [[], None, "text"])
def test_a_configuration_is_an_object(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, _ = opened(monkeypatch, Response(json.dumps(found).encode()))
    with pytest.raises(Malformed, match="the configuration of 'm' is not an object"):
        transport.config("m")

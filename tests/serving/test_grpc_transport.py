"""gRPC requests as they are sent, and results as they are read: against a client of Triton's that a test holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import DinoexportError, InputRefused, UsageError
from dinoexport.serving import deadline
from dinoexport.serving.address import Address, parse
from dinoexport.serving.answers import Malformed
from dinoexport.serving.grpc_transport import Grpc
from dinoexport.serving.transport import ServerBusy, ServerError

triton = pytest.importorskip("tritonclient.grpc")


class Result:
    """A result with these outputs. shape: what the server says of every output, in place of its own."""

    def __init__(self, *, last: bool = False, shape: Any = None, **outputs: Any) -> None:
        self._outputs, self._shape = outputs, shape
        self._response = SimpleNamespace(
            outputs=[SimpleNamespace(name=name) for name in outputs],
            parameters={"triton_final_response": SimpleNamespace(bool_param=last)},
            ByteSize=lambda: 100,
        )

    def get_response(self) -> Any:
        return self._response

    def as_numpy(self, name: str) -> Any:
        return self._outputs.get(name)

    def get_output(self, name: str) -> Any:
        return SimpleNamespace(shape=self._outputs[name].shape if self._shape is None else self._shape)


class Client:
    """In place of tritonclient's. events: (result, error) of a stream; answer: of `infer`, raised if it is an error."""

    made: list[tuple[tuple[Any, ...], dict[str, Any]]]
    events: list[tuple[Any, Any]]
    answer: Any
    asked: dict[str, Any]

    def __init__(self, *words: Any, **settings: Any) -> None:
        type(self).made.append((words, settings))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def close(self) -> None: ...

    def start_stream(self, *, callback: Any, headers: Any) -> None:
        type(self).asked = {"headers": headers}
        self._callback = callback

    def async_stream_infer(self, model: str, inputs: Any, **settings: Any) -> None:
        values = {each.name(): (each.datatype(), each.shape()) for each in inputs}
        type(self).asked |= {"model": model, "inputs": values, "settings": settings}
        for event in self.events:
            self._callback(*event)

    def stop_stream(self, *, cancel_requests: bool) -> None:
        type(self).asked["cancelled"] = cancel_requests

    def infer(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    monkeypatch.setattr(triton, "InferenceServerClient", Client)
    Client.made, Client.events, Client.answer, Client.asked = [], [], None, {}
    return Client


def transport(url: str = "grpc://host:8001", timeout_s: float = 5.0, **how: Any) -> Grpc:
    return Grpc(Address(**{**vars(parse(url)), **how}), timeout_s)


def options(largest: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", largest),
        ("grpc.enable_http_proxy", 0),
    ]


def test_how_a_channel_is_opened(client: type[Client], tmp_path: Any) -> None:
    """With a limit of an answer's size, which protobuf's own ends; a CA only where one was given."""
    opened = transport()
    for size in (1 << 25, 1 << 40, 5):
        opened.limit(size)
    plain = {"ssl": False, "root_certificates": None}
    assert client.made == [
        (("host:8001",), plain | {"channel_args": options(largest)})
        for largest in (1 << 24, 1 << 25, (1 << 31) - 1, 1 << 24)
    ]
    client.made.clear()
    transport("grpcs://host", ca=tmp_path / "ca.pem")
    assert client.made[0][1]["ssl"] is True and client.made[0][1]["root_certificates"] == str(tmp_path / "ca.pem")


def failed(message: str, status: str) -> Exception:
    return triton.InferenceServerException(message, status=f"StatusCode.{status}")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("status", "words", "kind", "message"),
    [
        ("DEADLINE_EXCEEDED", "late", ServerError, "grpc://host:8001 did not answer in time."),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 4)", Malformed, "larger than an answer can be"),
        ("RESOURCE_EXHAUSTED", "no memory", ServerError, "no memory."),
        ("INTERNAL", "it is larger than max", ServerError, "it is larger than max."),
        ("INVALID_ARGUMENT", "wrong shape", InputRefused, "wrong shape."),
        ("NOT_FOUND", "no model", UsageError, "no model."),
        ("UNAVAILABLE", "connection refused", ServerBusy, "connection refused."),
        ("UNKNOWN", "x" * 2000, ServerError, "x" * 1000 + "."),
    ],
)
def test_a_status_is_one_error(status: str, words: str, kind: type, message: str, client: type[Client]) -> None:
    client.answer = failed(words, status)
    with pytest.raises(DinoexportError) as told:
        transport().infer("m", {"x": np.zeros((1, 1), np.int32)}, ["y"], shared={})
    assert type(told.value) is kind
    assert told.value.message == message if kind is not Malformed else message in told.value.message


def test_shapes_of_an_answer(client: type[Client]) -> None:
    """A dimension of zero is none that is negative."""
    none = np.zeros((0, 4), np.float32)
    for shape in ((0, 4), (1,)):
        client.answer = Result(y=none, shape=shape)
        assert transport().infer("m", {}, ["y"], shared={})["y"] is none
    client.answer = Result(y=none, shape=(-1, 4))
    with pytest.raises(Malformed, match="y has a negative shape"):
        transport().infer("m", {}, ["y"], shared={})
    with pytest.raises(Malformed, match="it lacks z"):
        transport().infer("m", {}, ["z"], shared={})


def text(*parts: bytes) -> Any:
    return np.array(parts, dtype=object).reshape(1, -1)


def test_a_stream(client: type[Client]) -> None:
    """One value is a value, several are a list; the last response ends it, and the request is cancelled."""
    ids = np.array([[7, 8]], np.int64)
    client.events = [
        (Result(text=text(b"a\xff"), seen=np.array([3], np.int32)), None),
        (Result(text=text(b"", b"b"), ids=ids), None),
        (Result(last=True), None),
        (Result(text=text(b"after the end")), None),
    ]
    asked = {"prompt": "héllo", "max_tokens": 4, "temperature": 0.5, "prompt_ids": [1, 2], "stream": True}
    found = list(transport(headers={"X-Tenant": "vision"}).stream("m", asked))
    assert found == [{"text": "a\N{REPLACEMENT CHARACTER}", "seen": 3}, {"text": ["", "b"], "ids": [7, 8]}, {}]
    assert client.asked == {
        "headers": {"x-tenant": "vision"},
        "model": "m",
        "inputs": {
            "prompt": ("BYTES", [1]), "max_tokens": ("INT32", [1]), "temperature": ("FP32", [1]),
            "prompt_ids": ("INT64", [2]), "stream": ("BOOL", [1]),
        },
        "settings": {"enable_empty_final_response": True},
        "cancelled": True,
    }  # fmt: skip


def test_an_error_in_a_stream_ends_it(client: type[Client]) -> None:
    """What comes after it is read by nobody."""
    client.events = [(None, failed("broke", "INTERNAL")), (Result(text=text(b"a")), None)]
    with pytest.raises(ServerError) as told:
        list(transport().stream("m", {"prompt": "p"}))
    assert told.value.message == "broke." and client.asked["cancelled"]


@pytest.mark.parametrize(("size", "more"), [(100, False), (1 << 21, True)])
def test_events_and_bytes_of_a_stream_are_counted(size: int, more: bool, client: type[Client]) -> None:
    """Two tokens are four events at most, and 1 MiB and 8 KiB; an error has no size."""
    events = [Result(text=text(b"a")) for _ in range(4)]
    events[-1].get_response().ByteSize = lambda: size
    client.events = [*((event, None) for event in events), (None, failed("the fifth", "INTERNAL"))]
    found: list[Any] = []
    with pytest.raises(Malformed, match="more bytes than" if more else "more events than an answer of 2 tokens"):
        found += transport().stream("m", {"prompt": "p", "max_tokens": 2})


def test_a_stream_that_stops_is_not_waited_for(client: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline.StreamBounds, "next_s", 1e-3)
    with pytest.raises(ServerError, match=r"did not answer in time"):
        list(transport().stream("m", {"prompt": "p"}))
    assert client.asked["cancelled"]


@pytest.mark.parametrize("values", [{"max_tokens": 1 << 31}, {"seed": 1 << 63}, {"prompt": "\ud800"}])
def test_what_the_protocol_cannot_hold(values: dict[str, Any], client: type[Client]) -> None:
    (name,) = values
    with pytest.raises(InputRefused, match=f"^{name} cannot be sent"):
        list(transport().stream("m", values))
    assert client.asked == {}

"""Triton's two protocols, HTTP and gRPC, behind one small interface: named arrays in, named arrays or one error out.

tritonclient builds HTTP bodies; urllib3 sends them, because tritonclient's own connection works in one thread only.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

from dinoexport.errors import DinoexportError, InputRefused, MissingRequirement, UsageError, require
from dinoexport.serving import answers
from dinoexport.serving.address import Address, parse
from dinoexport.serving.answers import Malformed
from dinoexport.serving.deadline import Deadline, StreamBounds, watched
from dinoexport.serving.triton import text_signature
from dinoexport.spec import Array, Arrays

_TRITON_DTYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "object": "BYTES",
}  # fmt: skip
# An index of ten thousand models or a configuration with a recipe is far smaller than this.
_METADATA_MAX_BYTES = 1 << 24
_MODELS_MAX = 10_000
# The largest part of a server's own message that is shown.
_WORDS_MAX = 1000
_PROTOBUF_MAX_BYTES = (1 << 31) - 1
_KINDS = {400: "invalid", 404: "missing", 503: "busy"}
# The place of an input in a registered region of shared memory: (region's name, size in bytes, offset in bytes).
Place = tuple[str, int, int]


class ServerError(MissingRequirement):
    """The server cannot be reached, does not answer in time, or failed on the request."""


class ServerBusy(ServerError):
    """The server is starting, stopping, or its queue is full: the same request may succeed later."""


class Transport(Protocol):
    """A client's requests to a server. Every method may raise ServerError and may be called from any thread."""

    def limit(self, max_bytes: int) -> None:
        """The largest size of an answer; a larger one is not read."""

    def models(self) -> tuple[str, ...]:
        """The names of the models that are ready."""

    def config(self, model: str) -> dict[str, Any]:
        """A model's configuration in Triton's JSON form."""

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, Place]
    ) -> dict[str, Array]:
        """The model's named outputs. shared: input -> its place in shared memory."""

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The responses of a decoupled model as they arrive: output -> value. Closing it cancels the request."""

    def register(self, region: str, key: str, size_bytes: int) -> None:
        """Lets the server map the system shared memory `key` as `region`."""

    def unregister(self, region: str) -> None:
        """Makes the server unmap it."""


def connect(url: str | Address, *, timeout_s: float) -> Transport:
    """The transport for an address. timeout_s: for one whole answer, however slowly the server sends it."""
    address = url if isinstance(url, Address) else parse(url)
    if not 0 < timeout_s < threading.TIMEOUT_MAX:
        raise UsageError(f"{timeout_s} s is not a valid timeout.", next_step="Give seconds, more than 0.")
    require("triton", "tritonclient")
    return (_Http if address.scheme.startswith("http") else _Grpc)(address, timeout_s)


class _Http:
    def __init__(self, address: Address, timeout_s: float) -> None:
        import urllib3

        self._address, self._timeout_s, self._max_bytes = address, timeout_s, _METADATA_MAX_BYTES
        trust: dict[str, Any] = {"ca_certs": str(address.ca)} if address.ca is not None else {}
        self._pool = urllib3.PoolManager(
            maxsize=32,
            retries=False,
            timeout=urllib3.Timeout(connect=min(5.0, timeout_s), read=timeout_s),
            **trust,
        )
        self._pool.pool_classes_by_scheme = {
            scheme: watched(found) for scheme, found in self._pool.pool_classes_by_scheme.items()
        }

    def limit(self, max_bytes: int) -> None:
        self._max_bytes = max(max_bytes, _METADATA_MAX_BYTES)

    def models(self) -> tuple[str, ...]:
        index = answers.parsed_json(self._ask("POST", "/v2/repository/index", b'{"ready": true}').body, "its index")
        return _names(index)

    def config(self, model: str) -> dict[str, Any]:
        asked = self._ask("GET", f"/v2/models/{quote(model, safe='')}/config")
        found = answers.parsed_json(asked.body, f"the configuration of {model!r}")
        if not isinstance(found, dict):
            raise Malformed(f"the configuration of {model!r} is not an object")
        return found

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, Place]
    ) -> dict[str, Array]:
        import tritonclient.http as triton

        wanted = [triton.InferRequestedOutput(name, binary_data=True) for name in outputs]
        inputs = _inputs(triton, arrays, shared)
        body, json_size = triton.InferenceServerClient.generate_request_body(inputs, outputs=wanted)
        headers = {} if json_size is None else {"Inference-Header-Content-Length": str(json_size)}
        answer = self._ask("POST", f"/v2/models/{quote(model, safe='')}/infer", body, headers)
        return answers.decoded(answer.body, answer.header_length, outputs)

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        path, body = f"/v2/models/{quote(model, safe='')}/generate_stream", json.dumps(values).encode()
        deadline, bounds = Deadline(self._timeout_s), StreamBounds(values, self._timeout_s)
        with ExitStack() as whole:
            with deadline:
                json_form = {"Content-Type": "application/json"}
                response = whole.enter_context(self._begun("POST", path, body, json_form, deadline))
            for line in self._events(response, bounds):
                yield event_of(line)

    def _events(self, response: Any, bounds: StreamBounds) -> Iterator[bytes]:
        """The lines of events in a response that is still being sent. Other lines do not move an event's deadline."""
        rest = b""
        while True:
            line = b""
            with Deadline(bounds.next_s, response.shutdown) as deadline, self._errors(deadline):
                while not line.startswith(b"data:"):
                    line, end, after = rest.partition(b"\n")
                    if end:
                        rest = after
                        continue
                    line = b""
                    piece = response.read1(1 << 16)
                    if not piece:
                        return
                    bounds.count(size_bytes=len(piece))
                    rest += piece
            bounds.count(events=1)
            yield line

    def register(self, region: str, key: str, size_bytes: int) -> None:
        body = json.dumps({"key": key, "offset": 0, "byte_size": size_bytes}).encode()
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/register", body)

    def unregister(self, region: str) -> None:
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/unregister")

    def _ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> _Answer:
        """The whole answer within one deadline; a body that is larger than an answer can be is not read."""
        with Deadline(self._timeout_s) as deadline, self._begun(method, path, body, headers, deadline) as response:
            with self._errors(deadline):
                answer = _Answer(
                    body=self._body(response), header_length=response.headers.get("Inference-Header-Content-Length")
                )
            response.release_conn()
        return answer

    @contextmanager
    def _begun(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None, deadline: Deadline
    ) -> Iterator[Any]:
        """A response whose body is still to be read; an unread rest is never taken for the next answer."""
        url, sent = f"{self._address}{path}", {**self._address.headers, **(headers or {})}
        with self._errors(deadline):
            response = self._pool.request(
                method, url, body=body, headers=sent, preload_content=False, redirect=False, decode_content=False
            )
        try:
            with self._errors(deadline):
                deadline.also(response.shutdown)  # a body without a length has left its connection
                if response.status != HTTPStatus.OK:
                    raise refusal(response.status, self._body(response))
            yield response
        finally:
            if (
                response.connection is not None
            ):  # not back into the pool, so that the server sees that the client has left
                response.close()

    @contextmanager
    def _errors(self, deadline: Deadline) -> Iterator[None]:
        import urllib3

        try:
            yield
        except urllib3.exceptions.ReadTimeoutError:
            raise _no_answer(self._address) from None
        except urllib3.exceptions.SSLError as error:
            raise ServerError(
                f"{self._address} is not trusted: {error}.", next_step="Give its CA's certificates (--ca FILE)."
            ) from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # ValueError: a URL, a closed file
            if deadline.expired:
                raise _no_answer(self._address) from None
            raise _unreachable(self._address, error) from None
        if deadline.expired:
            raise _no_answer(self._address)

    def _body(self, response: Any) -> bytes:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Malformed("it is compressed, which was not requested")
        pieces, left = [], self._max_bytes + 1
        while left and (piece := response.read(min(left, 1 << 20))):
            pieces.append(piece)
            left -= len(piece)
        if not left:
            raise Malformed(f"its body has more than the {self._max_bytes:,} bytes that an answer can have")
        return b"".join(pieces)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The body of an HTTP response, and the length of its JSON header as the server gave it."""

    body: bytes
    header_length: str | None


class _Grpc:
    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._headers = {name.lower(): value for name, value in address.headers.items()}
        self._client = self._opened(_METADATA_MAX_BYTES)

    def _opened(self, max_bytes: int) -> Any:
        import tritonclient.grpc as triton

        # By default gRPC waits up to two minutes before it connects again to a server that restarts, and refuses
        # messages over 4 MB, which a batch of images exceeds.
        options = [
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", min(max_bytes, _PROTOBUF_MAX_BYTES)),
            ("grpc.enable_http_proxy", 0),
        ]
        ca = None if self._address.ca is None else str(self._address.ca)
        return triton.InferenceServerClient(
            self._address.netloc, ssl=self._address.secure, root_certificates=ca, channel_args=options
        )

    def limit(self, max_bytes: int) -> None:
        self._client.close()
        self._client = self._opened(max(max_bytes, _METADATA_MAX_BYTES))

    def models(self) -> tuple[str, ...]:
        with self._errors():
            index = self._client.get_model_repository_index(headers=self._headers, client_timeout=self._timeout_s)
        return _names([{"name": entry.name} for entry in index.models if entry.state == "READY"])

    def config(self, model: str) -> dict[str, Any]:
        with self._errors():
            found = self._client.get_model_config(
                model, headers=self._headers, as_json=True, client_timeout=self._timeout_s
            )
        config = found.get("config") if isinstance(found, dict) else None
        if not isinstance(config, dict):
            raise Malformed(f"the configuration of {model!r} is not an object")
        return config

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, Place]
    ) -> dict[str, Array]:
        import tritonclient.grpc as triton

        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        with self._errors():
            result = self._client.infer(
                model,
                _inputs(triton, arrays, shared),
                outputs=wanted,
                headers=self._headers,
                client_timeout=self._timeout_s,
            )
        return {name: _array_of(result, name) for name in outputs}

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        import tritonclient.grpc as triton

        arrays = {name: _array(name, value) for name, value in values.items()}
        inputs, bounds = _inputs(triton, arrays, {}), StreamBounds(values, self._timeout_s)
        events: queue.Queue[tuple[Any, Any]] = queue.Queue()
        broken = threading.Event()

        def arrived(result: Any, error: Any) -> None:
            if broken.is_set():  # nobody reads what comes after it
                return
            try:
                bounds.count(events=1, size_bytes=0 if result is None else result.get_response().ByteSize())
            except Malformed as found:
                result, error = None, found
            if error is not None:
                broken.set()
            events.put((result, error))

        # A client has one stream; several answers at once need one each.
        with self._opened(_METADATA_MAX_BYTES) as client:
            client.start_stream(callback=arrived, headers=self._headers)
            try:
                client.async_stream_infer(model, inputs, enable_empty_final_response=True)
                while True:
                    event, last = self._next(events, bounds)
                    yield event
                    if last:
                        return
            finally:
                client.stop_stream(cancel_requests=True)

    def _next(self, events: queue.Queue[tuple[Any, Any]], bounds: StreamBounds) -> tuple[dict[str, Any], bool]:
        """The next response of a stream, and whether it is the last."""
        try:
            result, error = events.get(timeout=bounds.next_s)
        except queue.Empty:
            raise _no_answer(self._address) from None
        with self._errors():
            if error is not None:
                raise error
        response = result.get_response()
        event: dict[str, Any] = {}
        for output in response.outputs:
            plain = _array_of(result, output.name).reshape(-1).tolist()
            plain = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in plain]
            event[output.name] = plain[0] if len(plain) == 1 else plain
        return event, bool(response.parameters["triton_final_response"].bool_param)

    def register(self, region: str, key: str, size_bytes: int) -> None:
        with self._errors():
            self._client.register_system_shared_memory(region, key, size_bytes, headers=self._headers)

    def unregister(self, region: str) -> None:
        with self._errors():
            self._client.unregister_system_shared_memory(region, headers=self._headers)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            status = str(error.status()).removeprefix("StatusCode.")
            words = str(error.message())[:_WORDS_MAX]
            if status == "DEADLINE_EXCEEDED":
                raise _no_answer(self._address) from None
            if status == "RESOURCE_EXHAUSTED" and "larger than max" in words:
                raise Malformed("it is larger than an answer can be") from None
            kinds = {"INVALID_ARGUMENT": "invalid", "NOT_FOUND": "missing", "UNAVAILABLE": "busy"}
            raise _refused(kinds.get(status, "broken"), words) from None
        except (ValueError, TypeError, KeyError, AttributeError, UnicodeError) as error:  # what protobuf and it make
            raise Malformed(f"{type(error).__name__}: {error}"[:_WORDS_MAX]) from None


def _array_of(result: Any, name: str) -> Array:
    """An output of tritonclient's result. tritonclient trusts the server's shape and dtype and fails on wrong ones."""
    try:
        array = result.as_numpy(name)
    except Exception as error:  # NumPy and struct raise half a dozen kinds
        raise Malformed(f"{name!r} cannot be read: {error}"[:_WORDS_MAX]) from None
    if array is None:
        raise Malformed(f"it lacks {name}")
    if any(size < 0 for size in result.get_output(name).shape):
        raise Malformed(f"{name} has a negative shape")
    return array  # type: ignore[no-any-return]


def _names(index: Any) -> tuple[str, ...]:
    """The models' names in a repository's index."""
    entries = index if isinstance(index, list) and len(index) <= _MODELS_MAX else [None]
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(name, str) and name for name in names):
        raise Malformed("its index of models is invalid")
    return tuple(str(name) for name in names)


def refusal(status: int, body: bytes) -> DinoexportError:
    """The error for an HTTP refusal: the server's own sentence, or its status."""
    try:
        # In a streamed answer, the refusal is also an event.
        message = str(json.loads(body.strip().removeprefix(b"data:"))["error"])[:_WORDS_MAX]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"status {status}"
    return _refused(_KINDS.get(status, "broken"), message)


def event_of(line: bytes) -> dict[str, Any]:
    """The content of a streamed answer's line `data: {...}`. An error in it is raised: its status was sent before."""
    event = answers.parsed_json(line.removeprefix(b"data:"), "an event")
    if not isinstance(event, dict):
        raise Malformed("an event is not an object")
    if "error" in event:
        raise _refused("broken", str(event["error"])[:_WORDS_MAX])
    return event


def _array(name: str, value: Any) -> Array:
    """A value of a text request as an array for its input."""
    import numpy as np

    values = value if isinstance(value, list | tuple) else [value]
    dtype = {"TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}
    try:
        if text_signature.INPUTS[name].data_type == "TYPE_STRING":
            return np.array([text.encode() for text in values], dtype=object)
        return np.array(values, dtype[text_signature.INPUTS[name].data_type])
    except (OverflowError, UnicodeError):
        raise InputRefused(f"{name} cannot be sent: it is too large a number, or half a character.") from None


def _inputs(triton: Any, arrays: Arrays, shared: Mapping[str, Place]) -> list[Any]:
    inputs = []
    for name, array in arrays.items():
        each = triton.InferInput(name, list(array.shape), _TRITON_DTYPES[str(array.dtype)])
        if name in shared:
            each.set_shared_memory(*shared[name])
        else:
            each.set_data_from_numpy(array)
        inputs.append(each)
    return inputs


def _refused(kind: str, message: str) -> DinoexportError:
    """The error for the server's own sentence.

    For a decoupled model Triton reports every error as an invalid request, so the text of the message decides.
    """
    if text_signature.QUEUE_FULL in message:
        kind = "busy"
    elif "Stub process" in message:  # the Python backend's process has died
        kind = "broken"
    message = (message.strip() or "The server gave no reason").rstrip(".") + "."
    if kind == "invalid":
        return InputRefused(message, next_step="The server refused the input; send another.")
    if kind == "missing":
        return UsageError(message, next_step="Deploy the model, or name another.")
    if kind == "busy":
        return ServerBusy(message, next_step="Try again in a moment, or serve with more instances.")
    return ServerError(message, next_step="Read the server's log.")


def _no_answer(address: Address) -> ServerError:
    return ServerError(f"{address} did not answer in time.", next_step="Check its load, or wait longer.")


def _unreachable(address: Address, error: Exception) -> ServerBusy:
    return ServerBusy(
        f"{address} cannot be reached ({type(error).__name__}).", next_step="Check the address, and that it runs."
    )

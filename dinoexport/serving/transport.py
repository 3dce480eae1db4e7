"""Triton's two protocols, HTTP and gRPC, as one small interface: named arrays in, named arrays out, one error each.

HTTP bodies are tritonclient's; urllib3 carries them, because tritonclient's own connection belongs to one thread.
"""

from __future__ import annotations

import json
import math
import queue
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from dinoexport.errors import DinoexportError, InputRefused, MissingRequirement, UsageError, require
from dinoexport.spec import Array, Arrays

_TRITON_DTYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "object": "BYTES",
}  # fmt: skip
# Where an input lies in a registered region of shared memory: (region's name, size in bytes, offset in bytes).
Place = tuple[str, int, int]


class ServerError(MissingRequirement):
    """The server cannot be reached, does not answer in time, or broke on the request."""


class ServerBusy(ServerError):
    """The server is starting, stopping, or its queue is full: the same request may do better in a moment."""


class Transport(Protocol):
    """What a client asks of a server. Every method may raise ServerError, and may be called from any thread."""

    def models(self) -> tuple[str, ...]:
        """The names of the models that are ready."""

    def config(self, model: str) -> dict[str, Any]:
        """A model's configuration in Triton's JSON form."""

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, Place]
    ) -> dict[str, Array]:
        """The model's named outputs. shared: input -> where it lies already."""

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """What a text model says to `values`, response by response, as JSON has it. Closing it lets the server stop."""

    def register(self, region: str, key: str, size_bytes: int) -> None:
        """Lets the server map the system shared memory `key` as `region`."""

    def unregister(self, region: str) -> None:
        """Makes the server let go of it."""


def connect(url: str, *, timeout_s: float) -> Transport:
    """The transport `url` names: http://HOST:8000 or grpc://HOST:8001, with an s for TLS; a bare HOST:PORT is HTTP."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https", "grpc", "grpcs"):
        raise UsageError(
            f"{url!r} is no address of a server.", next_step="Use http://HOST:8000 or grpc://HOST:8001; https, grpcs."
        )
    if not 0 < timeout_s < math.inf:
        raise UsageError(f"A time-out of {timeout_s} s is none.", next_step="Give seconds, more than 0.")
    require("triton", "tritonclient")
    if parts.scheme.startswith("http"):
        return _Http(f"{parts.scheme}://{host}:{port or 8000}{parts.path.rstrip('/')}", timeout_s)
    return _Grpc(f"{host}:{port or 8001}", timeout_s, tls=parts.scheme == "grpcs")


class _Http:
    def __init__(self, address: str, timeout_s: float) -> None:
        import urllib3

        self._address = address
        self._pool = urllib3.PoolManager(
            maxsize=32, retries=False, timeout=urllib3.Timeout(connect=min(5.0, timeout_s), read=timeout_s)
        )

    def models(self) -> tuple[str, ...]:
        index = json.loads(self._ask("POST", "/v2/repository/index", b'{"ready": true}').data)
        return tuple(entry["name"] for entry in index)

    def config(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._ask("GET", f"/v2/models/{quote(model)}/config").data)
        return found

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, Place]
    ) -> dict[str, Array]:
        import tritonclient.http as triton

        wanted = [triton.InferRequestedOutput(name, binary_data=True) for name in outputs]
        inputs = _inputs(triton, arrays, shared)
        body, json_size = triton.InferenceServerClient.generate_request_body(inputs, outputs=wanted)
        headers = {} if json_size is None else {"Inference-Header-Content-Length": str(json_size)}
        response = self._ask("POST", f"/v2/models/{quote(model)}/infer", body, headers)
        length = response.headers.get("Inference-Header-Content-Length")
        result = triton.InferenceServerClient.parse_response_body(
            response.data, header_length=None if length is None else int(length)
        )
        return {name: result.as_numpy(name) for name in outputs}

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        path, body = f"/v2/models/{quote(model)}/generate_stream", json.dumps(values).encode()
        response = self._ask("POST", path, body, {"Content-Type": "application/json"}, streamed=True)
        try:
            for line in _lines(response, self._address):
                if not line.startswith(b"data:"):
                    continue
                event: dict[str, Any] = json.loads(line.removeprefix(b"data:"))
                if "error" in event:  # the status was sent with the first response
                    raise _refused("broken", str(event["error"]))
                yield event
        finally:
            response.close()  # not back into the pool: the server sees that nobody reads

    def register(self, region: str, key: str, size_bytes: int) -> None:
        body = json.dumps({"key": key, "offset": 0, "byte_size": size_bytes}).encode()
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/register", body)

    def unregister(self, region: str) -> None:
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/unregister")

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        streamed: bool = False,
    ) -> Any:
        import urllib3

        try:
            response = self._pool.request(
                method, self._address + path, body=body, headers=dict(headers or {}), preload_content=not streamed
            )
        except urllib3.exceptions.ReadTimeoutError:
            raise _no_answer(self._address) from None
        except urllib3.exceptions.HTTPError as error:
            raise _unreachable(self._address, error) from None
        if response.status == 200:
            return response
        raise refusal(response.status, response.data)


class _Grpc:
    def __init__(self, address: str, timeout_s: float, *, tls: bool) -> None:
        import tritonclient.grpc as triton

        self._address, self._timeout_s, self._tls = address, timeout_s, tls
        # gRPC would wait up to two minutes before it looks again for a server that restarts; a batch of images is
        # larger than the 4 MB it takes by default.
        options = [
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
        ]
        self._client = triton.InferenceServerClient(address, ssl=tls, channel_args=options)

    def models(self) -> tuple[str, ...]:
        with self._errors():
            index = self._client.get_model_repository_index(client_timeout=self._timeout_s)
            return tuple(entry.name for entry in index.models if entry.state == "READY")

    def config(self, model: str) -> dict[str, Any]:
        with self._errors():
            found: dict[str, Any] = self._client.get_model_config(model, as_json=True, client_timeout=self._timeout_s)
            return found["config"]  # type: ignore[no-any-return]

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, Place]
    ) -> dict[str, Array]:
        import tritonclient.grpc as triton

        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        with self._errors():
            result = self._client.infer(
                model, _inputs(triton, arrays, shared), outputs=wanted, client_timeout=self._timeout_s
            )
        return {name: result.as_numpy(name) for name in outputs}

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        import tritonclient.grpc as triton

        arrays = {name: _array(name, value) for name, value in values.items()}
        inputs = _inputs(triton, arrays, {})
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        # A client has one stream; several answers at once need one each.
        with triton.InferenceServerClient(self._address, ssl=self._tls) as client:
            client.start_stream(callback=lambda result, error: answers.put((result, error)))
            try:
                client.async_stream_infer(model, inputs, enable_empty_final_response=True)
                while True:
                    event, last = self._next(answers)
                    yield event
                    if last:
                        return
            finally:
                client.stop_stream(cancel_requests=True)

    def _next(self, answers: queue.Queue[tuple[Any, Any]]) -> tuple[dict[str, Any], bool]:
        """The next response of a stream, and whether it is the last."""
        try:
            result, error = answers.get(timeout=self._timeout_s)
        except queue.Empty:
            raise _no_answer(self._address) from None
        with self._errors():
            if error is not None:
                raise error
        response = result.get_response()
        event: dict[str, Any] = {}
        for output in response.outputs:
            plain = result.as_numpy(output.name).reshape(-1).tolist()
            plain = [value.decode() if isinstance(value, bytes) else value for value in plain]
            event[output.name] = plain[0] if len(plain) == 1 else plain
        return event, bool(response.parameters["triton_final_response"].bool_param)

    def register(self, region: str, key: str, size_bytes: int) -> None:
        with self._errors():
            self._client.register_system_shared_memory(region, key, size_bytes)

    def unregister(self, region: str) -> None:
        with self._errors():
            self._client.unregister_system_shared_memory(region)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            status = str(error.status()).removeprefix("StatusCode.")
            if status == "DEADLINE_EXCEEDED":
                raise _no_answer(self._address) from None
            kinds = {"INVALID_ARGUMENT": "invalid", "NOT_FOUND": "missing", "UNAVAILABLE": "busy"}
            raise _refused(kinds.get(status, "broken"), error.message()) from None


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


def _array(name: str, value: Any) -> Array:
    """A value of a text request as the array its input takes."""
    import numpy as np

    from dinoexport.serving.triton.text_signature import INPUTS

    values = value if isinstance(value, list | tuple) else [value]
    dtype = {"TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}
    if INPUTS[name].data_type == "TYPE_STRING":
        return np.array([text.encode() for text in values], dtype=object)
    return np.array(values, dtype[INPUTS[name].data_type])


def _lines(response: Any, address: str) -> Iterator[bytes]:
    """The lines of a response that is still being sent."""
    import urllib3

    rest = b""
    try:
        for piece in response.stream(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    except urllib3.exceptions.ReadTimeoutError:
        raise _no_answer(address) from None
    except urllib3.exceptions.HTTPError as error:
        raise _unreachable(address, error) from None


def refusal(status: int, body: bytes) -> DinoexportError:
    """An HTTP answer that is none, as one of our errors."""
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"status {status}"
    return _refused({400: "invalid", 404: "missing", 503: "busy"}.get(status, "broken"), message)


def _refused(kind: str, message: str) -> DinoexportError:
    """The server's own sentence as one of our errors."""
    message = message.strip().rstrip(".") + "."
    if kind == "invalid":
        return InputRefused(message, next_step="The server refused the input; send another.")
    if kind == "missing":
        return UsageError(message, next_step="Deploy the model, or name another.")
    if kind == "busy":
        return ServerBusy(message, next_step="Try again in a moment, or serve with more instances.")
    return ServerError(message, next_step="Look into the server's log.")


def _no_answer(address: str) -> ServerError:
    return ServerError(f"{address} did not answer in time.", next_step="Look at its load, or wait longer.")


def _unreachable(address: str, error: Exception) -> ServerBusy:
    return ServerBusy(
        f"{address} cannot be reached ({type(error).__name__}).", next_step="Check the address, and that it runs."
    )

"""Triton over gRPC, by tritonclient."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dinoexport.errors import InputRefused
from dinoexport.serving.address import Address
from dinoexport.serving.answers import Malformed
from dinoexport.serving.deadline import StreamBounds
from dinoexport.serving.transport import (
    METADATA_MAX_BYTES,
    WORDS_MAX,
    MemoryPlace,
    inputs_of,
    names_of,
    no_answer,
    refused,
)
from dinoexport.serving.triton import text_signature
from dinoexport.spec import Array, Arrays

_PROTOBUF_MAX_BYTES = (1 << 31) - 1


class Grpc:
    """gRPC calls on one channel."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._headers = {name.lower(): value for name, value in address.headers.items()}
        self._client = self._opened(METADATA_MAX_BYTES)

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
        """The largest size of a message; gRPC takes it when a channel is opened."""
        self._client.close()
        self._client = self._opened(max(max_bytes, METADATA_MAX_BYTES))

    def models(self) -> tuple[str, ...]:
        """From the repository's index."""
        with self._errors():
            index = self._client.get_model_repository_index(headers=self._headers, client_timeout=self._timeout_s)
        return names_of([{"name": entry.name} for entry in index.models if entry.state == "READY"])

    def config(self, model: str) -> dict[str, Any]:
        """As JSON."""
        with self._errors():
            found = self._client.get_model_config(
                model, headers=self._headers, as_json=True, client_timeout=self._timeout_s
            )
        config = found.get("config") if isinstance(found, dict) else None
        if not isinstance(config, dict):
            raise Malformed(f"the configuration of {model!r} is not an object")
        return config

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, MemoryPlace]
    ) -> dict[str, Array]:
        """One request."""
        import tritonclient.grpc as triton

        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        with self._errors():
            result = self._client.infer(
                model,
                inputs_of(triton, arrays, shared),
                outputs=wanted,
                headers=self._headers,
                client_timeout=self._timeout_s,
            )
        return {name: _array_of(result, name) for name in outputs}

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Responses on a stream of their own, until the server says that one is the last."""
        import tritonclient.grpc as triton

        arrays = {name: _array(name, value) for name, value in values.items()}
        inputs, bounds = inputs_of(triton, arrays, {}), StreamBounds(values, self._timeout_s)
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
        with self._opened(METADATA_MAX_BYTES) as client:
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
            raise no_answer(self._address) from None
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
        """A region begins at the start of its memory."""
        with self._errors():
            self._client.register_system_shared_memory(region, key, size_bytes, headers=self._headers)

    def unregister(self, region: str) -> None:
        """The region's name is free again."""
        with self._errors():
            self._client.unregister_system_shared_memory(region, headers=self._headers)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            status = str(error.status()).removeprefix("StatusCode.")
            words = str(error.message())[:WORDS_MAX]
            if status == "DEADLINE_EXCEEDED":
                raise no_answer(self._address) from None
            if status == "RESOURCE_EXHAUSTED" and "larger than max" in words:
                raise Malformed("it is larger than an answer can be") from None
            kinds = {"INVALID_ARGUMENT": "invalid", "NOT_FOUND": "missing", "UNAVAILABLE": "busy"}
            raise refused(kinds.get(status, "broken"), words) from None
        except (ValueError, TypeError, KeyError, AttributeError, UnicodeError) as error:  # what protobuf and it make
            raise Malformed(f"{type(error).__name__}: {error}"[:WORDS_MAX]) from None


def _array_of(result: Any, name: str) -> Array:
    """An output of tritonclient's result. tritonclient trusts the server's shape and dtype and fails on wrong ones."""
    try:
        array = result.as_numpy(name)
    except Exception as error:  # NumPy and struct raise half a dozen kinds
        raise Malformed(f"{name!r} cannot be read: {error}"[:WORDS_MAX]) from None
    if array is None:
        raise Malformed(f"it lacks {name}")
    if any(size < 0 for size in result.get_output(name).shape):
        raise Malformed(f"{name} has a negative shape")
    return array  # type: ignore[no-any-return]


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

"""Triton's two protocols, HTTP and gRPC, behind one small interface: named arrays in, named arrays or one error out.

This is the interface, its errors, and what both protocols share; see `http_transport`, `grpc_transport`, `connection`.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from dinoexport.errors import DinoexportError, InputRefused, MissingRequirement, UsageError
from dinoexport.serving.address import Address
from dinoexport.serving.answers import Malformed, parsed_json
from dinoexport.serving.triton import text_signature
from dinoexport.spec import Array, Arrays

_TRITON_DTYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "object": "BYTES",
}  # fmt: skip
# An index of ten thousand models or a configuration with a recipe is far smaller than this.
METADATA_MAX_BYTES = 1 << 24
_MODELS_MAX = 10_000
# The largest part of a server's own message that is shown.
WORDS_MAX = 1000
_KINDS = {400: "invalid", 404: "missing", 503: "busy"}
# The place of an input in a registered region of shared memory: (region's name, size in bytes, offset in bytes).
MemoryPlace = tuple[str, int, int]


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
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, MemoryPlace]
    ) -> dict[str, Array]:
        """The model's named outputs. shared: input -> its place in shared memory."""

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The responses of a decoupled model as they arrive: output -> value. Closing it cancels the request."""

    def register(self, region: str, key: str, size_bytes: int) -> None:
        """Lets the server map the system shared memory `key` as `region`."""

    def unregister(self, region: str) -> None:
        """Makes the server unmap it."""


def names_of(index: Any) -> tuple[str, ...]:
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
        message = str(json.loads(body.strip().removeprefix(b"data:"))["error"])[:WORDS_MAX]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"status {status}"
    return refused(_KINDS.get(status, "broken"), message)


def event_of(line: bytes) -> dict[str, Any]:
    """The content of a streamed answer's line `data: {...}`. An error in it is raised: its status was sent before."""
    event = parsed_json(line.removeprefix(b"data:"), "an event")
    if not isinstance(event, dict):
        raise Malformed("an event is not an object")
    if "error" in event:
        raise refused("broken", str(event["error"])[:WORDS_MAX])
    return event


def inputs_of(triton: Any, arrays: Arrays, shared: Mapping[str, MemoryPlace]) -> list[Any]:
    """The inputs of a request, of either kind of tritonclient."""
    inputs = []
    for name, array in arrays.items():
        each = triton.InferInput(name, list(array.shape), _TRITON_DTYPES[str(array.dtype)])
        if name in shared:
            each.set_shared_memory(*shared[name])
        else:
            each.set_data_from_numpy(array)
        inputs.append(each)
    return inputs


def refused(kind: str, message: str) -> DinoexportError:
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


def no_answer(address: Address) -> ServerError:
    """The error for a server that is too slow."""
    return ServerError(f"{address} did not answer in time.", next_step="Check its load, or wait longer.")


def unreachable(address: Address, error: Exception) -> ServerBusy:
    """The error for a server that nothing can be sent to."""
    return ServerBusy(
        f"{address} cannot be reached ({type(error).__name__}).", next_step="Check the address, and that it runs."
    )

"""Parse and check a server's answers: first their form, then their signature. A server is not trusted.

Triton's binary form of a response (https://github.com/kserve/kserve, docs/predict-api/v2, binary tensor data extension)
is a JSON header, followed by the outputs' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dinoexport.errors import MissingRequirement
from dinoexport.spec import Array, Arrays, Graph, Tensor

# Triton's names of dtypes -> NumPy's.
DTYPES: Mapping[str, str] = {
    "BOOL": "bool", "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32",
    "BYTES": "object",
}  # fmt: skip
# What one encoded file in an answer may have.
_FILE_MAX_BYTES = 1 << 26
# Names, shapes and sizes of a few outputs take a few hundred bytes.
HEADER_MAX_BYTES = 1 << 20
_RANK_MAX = 16


class Malformed(MissingRequirement):
    """A server's answer that is not what its protocol or the model's signature promises."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"The server's answer is malformed: {problem}.",
            next_step="Check that it is a Triton server that serves this model; its log may say more.",
        )


def parsed_json(raw: bytes, what: str) -> Any:
    """The JSON in an answer."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise Malformed(f"{what} is not JSON") from None


def decoded(body: bytes, header_length: str | None, names: Sequence[str]) -> dict[str, Array]:
    """The outputs `names` in the body of an HTTP response. header_length: of its JSON header, as the server says."""
    import numpy as np

    if header_length is None or not header_length.isascii() or not header_length.isdecimal() or len(header_length) > 10:
        raise Malformed("it has no length of its JSON header")
    length = int(header_length)
    if not 0 < length <= min(len(body), HEADER_MAX_BYTES):
        raise Malformed(f"its JSON header has {length} of {len(body)} bytes")
    found, offset = {}, length
    for name, dtype, shape, size in _listed(parsed_json(body[:length], "its header")):
        if dtype == "object":
            if offset + size > len(body):
                raise Malformed(f"{name!r} declares {size} bytes")
            found[name] = _texts(name, body[offset : offset + size], math.prod(shape)).reshape(shape)
            offset += size
            continue
        if math.prod(shape) * np.dtype(dtype).itemsize != size or offset + size > len(body):
            raise Malformed(f"{name!r} of {dtype} and shape {list(shape)} declares {size} bytes")
        found[name] = np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape)
        offset += size
    if offset != len(body):
        raise Malformed(f"{len(body) - offset} bytes follow its outputs")
    return _wanted(found, names)


def _texts(name: str, raw: bytes, count: int) -> Array:
    """The byte strings of an output, each with its length before it; there are `count`."""
    import numpy as np

    found: list[bytes] = []
    at = 0
    while at + 4 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        found.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(raw) or len(found) != count:
        raise Malformed(f"{name!r} does not hold {count} byte strings")
    array = np.empty(count, dtype=object)
    array[:] = found
    return array


def _listed(header: Any) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, size in bytes) of each output in a header."""
    outputs = header.get("outputs") if isinstance(header, dict) else None
    if not isinstance(outputs, list):
        raise Malformed("its header lists no outputs")
    listed = []
    for output in outputs:
        try:
            name, dtype, shape = output["name"], DTYPES[output["datatype"]], tuple(output["shape"])
            size = output["parameters"]["binary_data_size"]
        except (KeyError, TypeError):
            raise Malformed("an output lacks its name, a known datatype, its shape or its size") from None
        whole = all(type(number) is int and number >= 0 for number in (*shape, size))
        if not isinstance(name, str) or not whole or len(shape) > _RANK_MAX:
            raise Malformed("an output's name, shape or size is invalid")
        listed.append((name, dtype, shape, size))
    return listed


def _wanted(found: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    if missing := [name for name in names if name not in found]:
        raise Malformed(f"it lacks {', '.join(missing)}")
    return {name: found[name] for name in names}


def signature(graph: Graph) -> int:
    """The largest size of an answer of `graph` in bytes: every dimension at its largest.

    A dimension that follows from the inputs, such as a count of patches, is at most the number of an input's elements.
    """
    largest = {dim.name: dim.max for dim in graph.dims}
    elements = max((_elements(tensor, largest, 1) for tensor in graph.inputs), default=1)
    return HEADER_MAX_BYTES + sum(
        (_FILE_MAX_BYTES if tensor.dtype == "bytes" else 8) * math.prod(_sizes(tensor, largest, elements))
        for tensor in graph.outputs
    )


def _elements(tensor: Tensor, largest: Mapping[str, int], otherwise: int) -> int:
    return math.prod(_sizes(tensor, largest, otherwise)[1:])


def _sizes(tensor: Tensor, largest: Mapping[str, int], otherwise: int) -> list[int]:
    return [size if isinstance(size, int) else largest.get(size, otherwise) for size in tensor.shape]


def check_outputs(graph: Graph, arrays: Mapping[str, Array], asked: Arrays) -> None:
    """Raises Malformed for outputs with another dtype, rank, fixed or shared dimension than `graph` has."""
    bound: dict[str, int] = {}
    for tensor in graph.inputs:
        if tensor.name in asked:
            bound |= {w: n for w, n in zip(tensor.shape, asked[tensor.name].shape, strict=False) if isinstance(w, str)}
    for tensor in graph.outputs:
        array = arrays.get(tensor.name)
        if array is None:
            raise Malformed(f"it lacks {tensor.name}")
        if str(array.dtype) != tensor.dtype.replace("bytes", "object") or array.ndim != len(tensor.shape):
            raise Malformed(f"{tensor.name} is {array.dtype} of rank {array.ndim}")
        for word, size in zip(tensor.shape, array.shape, strict=True):
            wanted = bound.setdefault(word, size) if isinstance(word, str) else word
            if size != wanted:
                raise Malformed(f"{tensor.name} has shape {list(array.shape)}, where {word} is {wanted}")

"""A weight in ONNX's layout, computed block by block while it is being written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from dinoexport.errors import ValidationFailed
from dinoexport.spec import Array, Weight

# A block and its cast copy fit a core's cache, and their pages are reused for the next block. Writing ViT-g in fp16
# took 6.4 s with this size, 9.7 s with whole tensors, and 10 s or more with a quarter of it or sixteen times as many.
_BLOCK_NUMBERS = 1 << 18
# Columns that are transposed at a time. A whole block at once takes 2.6 times as long because its rows leave the cache.
_TILE = 64
# Of float32: the bits of the exponent, and those of 2**-14, the smallest normal number of fp16.
_EXPONENT_BITS = np.uint32(0xFF << 23)
_SMALLEST_NORMAL = np.uint32(113 << 23)


class StreamedTensor:
    """`weight` cast to `dtype`, an ONNX dtype number; read again each time.

    Raises ValidationFailed if `dtype` cannot hold it.
    """

    def __init__(self, weight: Weight, dtype: int, name: str) -> None:
        self.name, self.dtype, self.shape, self._weight = name, dtype, weight.shape, weight

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in a file."""
        return math.prod(self.shape) * self._as.itemsize

    @property
    def working_bytes(self) -> int:
        """As many; the values it is made of are as many or twice as many."""
        return self.nbytes

    def tobytes(self) -> bytes:
        """All of them."""
        return b"".join(block.tobytes() for block in self._blocks())

    def tofile(self, file: BinaryIO) -> None:
        """Writes the bytes without ever holding all of them."""
        file.writelines(block.view(np.uint8).data for block in self._blocks())

    @property
    def _as(self) -> np.dtype[Any]:
        import onnx

        return onnx.helper.tensor_dtype_to_np_dtype(self.dtype)

    def _blocks(self) -> Iterator[Array]:
        """The numbers in order, (N,) each, cast and finite."""
        values = self._weight.read()
        assert values.shape == self._weight.shape, (self.name, values.shape, self._weight.shape)
        rows, dtype = np.atleast_1d(values), self._as
        step = max(1, _BLOCK_NUMBERS // max(1, rows[0].size))
        for begin in range(0, len(rows), step):
            block = _in_order(rows[begin : begin + step])
            ends = np.array([block.min(), block.max()])
            with np.errstate(over="ignore"):
                if not all(math.isfinite(end) for end in ends.astype(dtype)):
                    raise ValidationFailed(
                        f"The weight {self.name} reaches {np.abs(values).max():,.0f}, more than {dtype} can hold.",
                        next_step="--precision auto finds the parts that must stay fp32.",
                    )
            yield _cast(block, dtype).reshape(-1)


def _in_order(block: Array) -> Array:
    """The block with its numbers in the order of its axes."""
    if block.flags.c_contiguous:
        return block
    if block.ndim != 2:
        return np.ascontiguousarray(block)
    made: Array = np.empty(block.shape, block.dtype)
    for begin in range(0, block.shape[1], _TILE):
        made[:, begin : begin + _TILE] = block[:, begin : begin + _TILE]
    return made


def _cast(block: Array, dtype: np.dtype[Any]) -> Array:
    """The finite float32 numbers, rounded to nearest, ties to even."""
    return _to_float16(block) if dtype == np.float16 else block.astype(dtype, copy=False)


def _to_float16(block: Array) -> Array:
    """The same numbers as `astype(float16)`, which takes 4 ns a number, and 15 where fp16 is subnormal; this takes 2.

    The sum of |x| and a power of two that is 2**13 times that of x ends with the bit that fp16 ends with, so float32's
    addition rounds as fp16 does (Dekker, "A floating-point technique for extending the available precision", 1971).
    Below 2**-14 fp16's last bit stays where it is.
    """
    bits = block.view(np.uint32)
    power = np.maximum(bits & _EXPONENT_BITS, _SMALLEST_NORMAL)
    power += np.uint32(13 << 23)
    rounded = np.abs(block)
    rounded += power.view(np.float32)
    half = rounded.view(np.uint32)
    half -= power  # the significand as a whole number, up to 2**11
    power -= np.uint32(126 << 23)  # fp16's exponent, less one: a normal number's leading bit adds it
    half += power >> np.uint32(13)
    half |= (bits >> np.uint32(16)) & np.uint32(1 << 15)
    return half.astype(np.uint16).view(np.float16)

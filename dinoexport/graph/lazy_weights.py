"""A weight in ONNX's layout, computed block by block while it is being written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dinoexport.errors import ValidationFailed
from dinoexport.spec import Array, Weight

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# A block and its cast copy fit a core's cache, and their pages are reused for the next block. Writing ViT-g in fp16
# took 6.4 s with this size, 9.7 s with whole tensors, and 10 s or more with a quarter of it or sixteen times as many.
_BLOCK_NUMBERS = 1 << 18
# Rows and columns that are transposed at a time: a copy of them stays in a core's first cache, and the space after each
# of its rows keeps a column from falling on a few lines of that cache. ViT-g's matrices took 0.8 to 1.4 ns a number,
# read from where they are 2.4 to 3.0.
_TILE, _APART = 128, 16
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
        """All bytes."""
        return b"".join(block.tobytes() for block in self._blocks())

    def tofile(self, file: SupportsWrite[bytes | memoryview]) -> None:
        """Writes the bytes without ever holding all of them."""
        for block in self._blocks():
            file.write(block.view(np.uint8).data)

    @property
    def _as(self) -> np.dtype[Any]:
        import onnx

        return onnx.helper.tensor_dtype_to_np_dtype(self.dtype)

    def _blocks(self) -> Iterator[Array]:
        """The numbers in order, (N,) each, cast and finite."""
        values = self._weight.read()
        assert values.shape == self._weight.shape, (self.name, values.shape, self._weight.shape)
        dtype = self._as
        for numbers in _in_order(values):
            for begin in range(0, len(numbers), _BLOCK_NUMBERS):
                block = numbers[begin : begin + _BLOCK_NUMBERS]
                ends = np.array([block.min(), block.max()])
                with np.errstate(over="ignore"):
                    if not all(math.isfinite(end) for end in ends.astype(dtype)):
                        raise ValidationFailed(
                            f"The weight {self.name} reaches {np.abs(values).max():,.0f}, more than {dtype} can hold.",
                            next_step="--precision auto finds the parts that must stay fp32.",
                        )
                yield _cast(block, dtype)


def _in_order(values: Array) -> Iterator[Array]:
    """The numbers in the order of their axes, (N,) each; a transposed matrix in parts."""
    if values.flags.c_contiguous or values.ndim != 2:
        yield values.reshape(-1)
        return
    stored = values.T
    tile: Array = np.empty((_TILE, _TILE + _APART), values.dtype)
    for begin in range(0, len(values), _TILE):
        strip = stored[:, begin : begin + _TILE]
        made: Array = np.empty((strip.shape[1], len(stored)), values.dtype)
        for at in range(0, len(stored), _TILE):
            part = strip[at : at + _TILE]
            copied = tile[: len(part), : part.shape[1]]
            copied[...] = part
            made[:, at : at + _TILE] = copied.T
        yield made.reshape(-1)


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

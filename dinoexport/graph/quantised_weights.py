"""Quantise weights of products to eight or four bits while they are written: codes, scales and offsets of blocks.

A product's weight (I, O) is cut into blocks of `block` rows; each block of each column has a scale and may have an
offset that is added to all of its numbers. They are those of a few candidates with the smallest squared error in the
block. The first candidate rounds to nearest over the block's whole range. Smaller ranges clip the extremes and are
finer for other numbers; larger ones find the grid of weights that were in four bits before, which stay as they are.
Only one weight is held at a time, so memory is that of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from dinoexport.errors import ValidationFailed
from dinoexport.spec import Array, Weight

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# The share of a block's range that the codes span. 22 candidates were hardly better (SmolLM2-135M, four bits).
_SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
# The same for blocks with an offset, whose steps and offsets are then fitted to the codes: more candidates lower the
# error of normally distributed weights from 0.0739 to 0.0734.
_FITTED_SHRINKS = (0.94, 0.88, 0.8)
# A block's squared error, relative to the square of its step, below which it is kept as it was.
_EXACT = 1e-8
# Numbers of a weight that are quantised at a time: a part and its candidates stay in the CPU's cache.
_PART_NUMBERS = 1 << 20
_TINY = 1e-30


class QuantisedWeight:
    """The tensors of one quantised weight. Scales and offsets are kept; codes are computed when written.

    number_dtype: ONNX's number of the scales' and offsets' dtype. offsets_name: empty for blocks without an offset.
    """

    def __init__(self, weight: Weight, name: str, *, number_dtype: int, offsets_name: str = "") -> None:
        assert weight.bits == 4 or (weight.bits == 8 and not offsets_name), (name, weight.bits)
        self._weight, self._name, self._lock = weight, name, Lock()
        self._with_offsets = bool(offsets_name)
        self._numbers: dict[int, Array] = {}
        rows, columns = weight.shape
        assert rows % weight.block == 0, (name, weight.shape, weight.block)
        code_type = {8: ir.DataType.INT8, 4: ir.DataType.INT4}[weight.bits]
        self.codes = _Made(
            self._codes,
            working_bytes=self._working_bytes,
            dtype=code_type,
            shape=ir.Shape(weight.shape),
            name=f"{name}_codes",
        )
        self.scales, self.offsets = (
            _Made(
                partial(self._of_blocks, which),
                working_bytes=lambda: 0 if self._numbers else self._working_bytes(),
                dtype=ir.DataType(number_dtype),
                shape=ir.Shape((rows // weight.block, columns)),
                name=its_name,
            )
            for which, its_name in enumerate((f"{name}_scales", offsets_name))
        )

    def _working_bytes(self) -> int:
        """Its values in fp32, and its codes before and after they are packed."""
        return 6 * math.prod(self._weight.shape)

    def _codes(self) -> ir.Tensor[np.ndarray]:
        with self._lock:
            codes = self._made()
        return ir.Tensor(codes.astype(self.codes.dtype.numpy()), dtype=self.codes.dtype, name=self.codes.name)

    def _of_blocks(self, which: int) -> ir.Tensor[np.ndarray]:
        like = (self.scales, self.offsets)[which]
        with self._lock:
            if which not in self._numbers:
                self._made()
            # Written once, so that the numbers of a whole model are not kept.
            numbers = self._numbers.pop(which).astype(like.dtype.numpy())
        if which == 0:
            numbers = np.maximum(numbers, np.finfo(numbers.dtype).smallest_subnormal)  # TensorRT refuses a scale of 0
        return ir.Tensor(numbers, name=like.name)

    def _made(self) -> Array:
        """The codes (I, O); scales and offsets are kept until they are written."""
        values = self._weight.read()
        rows, columns = values.shape
        codes = np.empty((rows, columns), np.int8)
        found = []
        step = self._weight.block * max(1, _PART_NUMBERS // (self._weight.block * columns))
        for begin in range(0, rows, step):
            part = torch.from_numpy(np.ascontiguousarray(values[begin : begin + step]))
            if not bool(torch.isfinite(part).all()):
                raise ValidationFailed(f"The weight {self._name} holds NaN or Inf.", next_step="Get finite weights.")
            blocks = part.reshape(-1, self._weight.block, columns)
            made, *numbers = with_offset(blocks) if self._with_offsets else symmetric(blocks, self._weight.bits)
            codes[begin : begin + step] = made.reshape(-1, columns).numpy()
            found.append(numbers)
        self._numbers = {which: torch.cat(parts).numpy() for which, parts in enumerate(zip(*found, strict=True))}
        return codes


class _Made(ir.LazyTensor):
    """A tensor that is made when it is written. Two codes of four bits share a byte; the first is its lower half."""

    def __init__(
        self, make: Callable[[], ir.TensorProtocol], *, working_bytes: Callable[[], int], **facts: Any
    ) -> None:
        super().__init__(make, **facts)
        self._working_bytes = working_bytes

    @property
    def working_bytes(self) -> int:
        """How many bytes are held while it is made and written."""
        return max(self.nbytes, self._working_bytes())

    def tofile(self, file: SupportsWrite[bytes | memoryview]) -> None:
        """Writes the bytes."""
        file.write(self._evaluate().tobytes())


def symmetric(blocks_NBO: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales (N, O), no offsets. Scales are positive, as TensorRT requires."""
    high = 2 ** (bits - 1) - 1
    whole = (blocks_NBO.abs().amax(dim=1) / high).clamp(min=_TINY)
    best, scale = torch.full_like(whole, float("inf")), whole
    for shrink in _SHRINKS:
        tried = whole * shrink
        error = _rounded(blocks_NBO, tried, high).mul_(tried.unsqueeze(1)).sub_(blocks_NBO).square_().sum(dim=1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        if bool((best <= _EXACT * whole.square()).all()):
            break
    return _rounded(blocks_NBO, scale, high).to(torch.int8), scale, torch.zeros(0)


def _rounded(blocks_NBO: torch.Tensor, scale_NO: torch.Tensor, high: int) -> torch.Tensor:
    return (blocks_NBO / scale_NO.unsqueeze(1)).round_().clamp_(-high, high)


def with_offset(blocks_NBO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from -8 to 7, scales and offsets (N, O): a number is its code times the scale, plus the offset."""
    least, most = blocks_NBO.amin(dim=1), blocks_NBO.amax(dim=1)
    span = most - least
    mean = blocks_NBO.mean(dim=1)
    centred = blocks_NBO - mean.unsqueeze(1)
    best = torch.full_like(span, float("inf"))
    codes, scale, offset = torch.zeros_like(blocks_NBO), best, best
    for share, steps in ((1.0, 15), *((1.0, n) for n in range(14, 7, -1)), *((s, 15) for s in _FITTED_SHRINKS)):
        step = (span * (share / steps)).clamp(min=_TINY)
        start = least + span * ((1 - share) / 2)
        tried = ((blocks_NBO - start.unsqueeze(1)) / step.unsqueeze(1)).round_().clamp_(0, 15).sub_(8)
        # The scale and offset with the least squared error for these codes.
        middle = tried.mean(dim=1)
        spread = tried - middle.unsqueeze(1)
        fitted = (spread * centred).sum(dim=1) / spread.square().sum(dim=1).clamp(min=_TINY)
        fitted = torch.where(fitted > 0, fitted, step)
        error = spread.mul_(fitted.unsqueeze(1)).sub_(centred).square_().sum(dim=1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, fitted, scale)
        offset = torch.where(better, mean - fitted * middle, offset)
        codes = torch.where(better.unsqueeze(1), tried, codes)
        if bool((best <= _EXACT * scale.square()).all()):
            break
    flat = span == 0
    codes = torch.where(flat.unsqueeze(1), 0.0, codes)
    return codes.to(torch.int8), scale, torch.where(flat, least, offset)

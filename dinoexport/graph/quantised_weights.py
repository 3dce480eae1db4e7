"""Quantise weights of products to eight or four bits while they are written: codes, block scales, zero points.

A product's weight (I, O) is cut into blocks of `block` rows; each block of each column has a scale, and a zero point in
four bits. The scale is the one of a few candidates with the smallest squared error in its block. The first candidate is
nearest rounding over the whole range of a block; smaller ranges clip the extremes and are finer for other values.
Only one weight is held at a time, so memory is that of the largest.
"""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from dinoexport.errors import ValidationFailed
from dinoexport.spec import Array, Weight

# The share of a block's range that the codes span. 22 candidates were hardly better (SmolLM2-135M, four bits).
_SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
# Numbers of a weight that are quantised at a time: a part and its candidates stay in the CPU's cache.
_PART_NUMBERS = 1 << 20


class QuantisedWeight:
    """The tensors of one quantised weight. Scales and zero points are kept; codes are computed when written."""

    def __init__(self, weight: Weight, name: str, *, scale_dtype: int) -> None:
        assert weight.bits in (4, 8), weight.bits
        self._weight, self._name, self._lock = weight, name, Lock()
        self._scales: Array | None = None
        self._zeros: Array | None = None
        rows, columns = weight.shape
        assert rows % weight.block == 0, (name, weight.shape, weight.block)
        blocks = (rows // weight.block, columns)
        code_type = {8: ir.DataType.INT8, 4: ir.DataType.UINT4 if weight.zero_points else ir.DataType.INT4}[weight.bits]
        self.codes = _Codes(self._codes, dtype=code_type, shape=ir.Shape(weight.shape), name=f"{name}_codes")
        self.scales = ir.LazyTensor(
            partial(self._small, ir.DataType(scale_dtype)),
            dtype=ir.DataType(scale_dtype),
            shape=ir.Shape(blocks),
            name=f"{name}_scales",
        )
        self.zeros: ir.LazyTensor | None = None
        if weight.zero_points:
            self.zeros = _Codes(self._zero_codes, dtype=code_type, shape=ir.Shape(blocks), name=f"{name}_zeros")

    def _codes(self) -> ir.Tensor[np.ndarray]:
        with self._lock:
            codes = self._made()
        return _tensor(codes, self.codes)

    def _zero_codes(self) -> ir.Tensor[np.ndarray]:
        with self._lock:
            if self._zeros is None:
                self._made()
        assert self._zeros is not None and self.zeros is not None
        return _tensor(self._zeros, self.zeros)

    def _small(self, dtype: ir.DataType) -> ir.Tensor[np.ndarray]:
        with self._lock:
            if self._scales is None:
                self._made()
        assert self._scales is not None
        return ir.Tensor(self._scales.astype(dtype.numpy()), name=self.scales.name)

    def _made(self) -> Array:
        """The codes (I, O); scales and zero points are kept."""
        values = torch.from_numpy(np.ascontiguousarray(self._weight.read()))
        if not bool(torch.isfinite(values).all()):
            raise ValidationFailed(f"The weight {self._name} holds NaN or Inf.", next_step="Get finite weights.")
        rows, columns = values.shape
        blocks = values.reshape(rows // self._weight.block, self._weight.block, columns)
        parts = blocks.split(max(1, _PART_NUMBERS // (self._weight.block * columns)))
        choose = _asymmetric if self._weight.zero_points else _symmetric
        found = [choose(part, self._weight.bits) for part in parts]
        self._scales = torch.cat([scale for _, scale, _ in found]).numpy()
        if self._weight.zero_points:
            self._zeros = torch.cat([zero for _, _, zero in found]).numpy()
        return torch.cat([codes for codes, _, _ in found]).reshape(rows, columns).numpy()


class _Codes(ir.LazyTensor):
    """Codes of any width; two of four bits share a byte, the first the lower half."""

    def tofile(self, file: BinaryIO) -> None:
        """Writes the bytes."""
        file.write(self._evaluate().tobytes())


def _tensor(codes: Array, like: ir.LazyTensor) -> ir.Tensor[np.ndarray]:
    return ir.Tensor(codes.astype(like.dtype.numpy()), dtype=like.dtype, name=like.name)


def _symmetric(blocks_NBO: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales (N, O), None. Scales are positive, as TensorRT requires."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = torch.maximum(blocks_NBO.amax(dim=1) / high, blocks_NBO.amin(dim=1) / low).clamp(min=1e-30)
    scale, codes = _searched(blocks_NBO, whole, torch.zeros_like(whole), low, high)
    return codes.to(torch.int8), scale, torch.empty(0)


def _asymmetric(blocks_NBO: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points (N, O)."""
    high = 2**bits - 1
    least, most = blocks_NBO.amin(dim=1).clamp(max=0), blocks_NBO.amax(dim=1).clamp(min=0)
    whole = ((most - least) / high).clamp(min=1e-30)
    zero = (-least / whole).round().clamp(0, high)
    scale, codes = _searched(blocks_NBO, whole, zero, 0, high)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def _searched(
    blocks_NBO: torch.Tensor, whole_NO: torch.Tensor, zero_NO: torch.Tensor, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale of each block, and the codes it gives."""
    zero = zero_NO.unsqueeze(1)
    best = torch.full_like(whole_NO, float("inf"))
    scale = whole_NO.clone()
    for shrink in _SHRINKS:
        tried = (whole_NO * shrink).unsqueeze(1)
        codes = (blocks_NBO / tried + zero).round_().clamp_(low, high)
        error = ((codes - zero) * tried - blocks_NBO).square().sum(dim=1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried.squeeze(1), scale)
    codes = (blocks_NBO / scale.unsqueeze(1) + zero).round_().clamp_(low, high)
    return scale, codes

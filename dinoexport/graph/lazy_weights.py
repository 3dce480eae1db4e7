"""A weight in ONNX's layout, computed block by block while it is being written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from dinoexport.errors import ValidationFailed
from dinoexport.spec import Weight

# A block and its cast copy fit a core's cache, and their pages are reused for the next block. Writing ViT-g in fp16
# took 6.4 s with this size, 9.7 s with whole tensors, and 10 s or more with a quarter of it or sixteen times as many.
_BLOCK_NUMBERS = 1 << 18


class StreamedTensor(ir.LazyTensor):
    """`weight` cast to `dtype`, read again each time; raises ValidationFailed if `dtype` cannot hold it."""

    def __init__(self, weight: Weight, dtype: ir.DataType, name: str) -> None:
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(weight.shape), name=name)
        self._weight = weight

    def tofile(self, file: BinaryIO) -> None:
        """Writes the bytes without ever holding all of them."""
        file.writelines(block.view(torch.uint8).numpy().data for block in self._blocks())

    def _whole(self) -> ir.Tensor[np.ndarray]:
        bytes_ = torch.cat([block.view(torch.uint8) for block in self._blocks()]).numpy()
        return ir.Tensor(bytes_.view(self.dtype.numpy()).reshape(self._weight.shape), name=self.name)

    def _blocks(self) -> Iterator[torch.Tensor]:
        """Blocks (N,) of the numbers in order, cast and finite. PyTorch transposes and rounds faster than NumPy."""
        values = self._weight.read()
        assert values.shape == self._weight.shape, (self.name, values.shape, self._weight.shape)
        rows = torch.from_numpy(np.atleast_1d(values))
        for block in rows.split(max(1, _BLOCK_NUMBERS // max(1, rows[0].numel()))):
            cast = block.to(getattr(torch, self.dtype.numpy().name)).contiguous()
            if not all(math.isfinite(end) for end in cast.aminmax()):
                raise ValidationFailed(
                    f"The weight {self.name} reaches {np.abs(values).max():,.0f}, "
                    f"more than {self.dtype.name.lower()} can hold.",
                    next_step="--precision auto finds the parts that must stay fp32.",
                )
            yield cast.reshape(-1)

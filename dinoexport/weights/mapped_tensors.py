"""Tensors whose numbers are mapped from a weight file: nothing is copied until it is used in a computation."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.spec import Array


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of the file: where its numbers begin, in bytes, and what they are. dtype: NumPy's name."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


def mapped(path: Path, places: Mapping[str, Stored]) -> Callable[[str], Array]:
    """Maps the file again; returns a function that gives a tensor's numbers as stored, by its name in `places`."""
    import numpy as np

    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # PyTorch warns about read-only arrays

    def numbers(name: str) -> Array:
        tensor = places[name]
        array: Array = np.frombuffer(whole, numpy_dtype(tensor.dtype), tensor.count, tensor.start)
        return array.reshape(tensor.shape)

    return numbers


def numpy_dtype(name: str) -> Any:
    """NumPy's dtype of this name, bfloat16 included."""
    import numpy as np

    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # onnx depends on it; it has the dtypes that NumPy lacks

    return np.dtype(ml_dtypes.bfloat16)

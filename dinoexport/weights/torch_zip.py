"""Read a plain state dict of `torch.save` without torch.

Its pickle names an ordered dict, the function that makes a tensor from a part of a storage, and kinds of storages. The
numbers are stored uncompressed in the same zip and are mapped. No other name in a pickle is looked up: torch reads all
other files, with its own checks and messages.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.weights.mapped_tensors import Stored, numpy_dtype

# Storage class -> NumPy's name of its numbers, for those that are floating point.
_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_START = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class _Storage:
    dtype: str
    start: int
    count: int


class _NotPlain(Exception):
    """The file holds objects that only torch can read, or that nobody should load."""


def content_of(path: Path) -> Any | None:
    """The saved object, with a `Stored` for each tensor; None if only torch can read it.

    The zip and its pickle have been checked before: see `formats` and `pickle_check`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (pickled,) = (name for name in entries if name.rpartition("/")[2] == "data.pkl")
            folder = pickled.removesuffix("data.pkl")
            order = entries.get(f"{folder}byteorder")
            if order is not None and archive.read(order) != b"little":
                return None
            raw = archive.read(pickled)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return _Unpickler(raw, {name.removeprefix(folder): e for name, e in entries.items()}, whole).load()
    except Exception:  # a damaged or hostile pickle can make an unpickler raise anything
        return None


class _Unpickler(pickle.Unpickler):
    """Finds four names only; any other name ends the reading."""

    def __init__(self, raw: bytes, entries: dict[str, zipfile.ZipInfo], whole: mmap.mmap) -> None:
        super().__init__(io.BytesIO(raw))
        self._entries, self._whole = entries, whole

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _DTYPES:
            return name  # a string, not a class: it cannot be called
        raise _NotPlain

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, storage, key, _device, count = pid
        entry = self._entries[f"data/{key}"]
        if kind != "storage" or storage not in _DTYPES or not isinstance(count, int):
            raise _NotPlain
        start, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(self._whole, entry.header_offset)
        begin = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        size = count * numpy_dtype(_DTYPES[storage]).itemsize
        if start != _LOCAL_START or entry.compress_type != zipfile.ZIP_STORED or not 0 <= size <= entry.file_size:
            raise _NotPlain
        if begin + size > len(self._whole):
            raise _NotPlain
        return _Storage(dtype=_DTYPES[storage], start=begin, count=count)


def _tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _grad: Any,
    _hooks: Any,
    *_rest: Any,
) -> Stored:
    """A tensor whose numbers lie in the order of its axes within the storage."""
    import numpy as np

    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise _NotPlain
    in_order = all(
        size == 1 or stride == math.prod(shape[axis + 1 :])
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
    if not in_order or offset + math.prod(shape) > storage.count:
        raise _NotPlain
    item = int(np.dtype(numpy_dtype(storage.dtype)).itemsize)
    return Stored(dtype=storage.dtype, shape=tuple(shape), start=storage.start + offset * item)


def _parameter(data: Stored, *_rest: Any) -> Stored:
    if not isinstance(data, Stored):
        raise _NotPlain
    return data

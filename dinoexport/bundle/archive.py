"""Read an untrusted .npz: the declared sizes are added up before anything is read, and nothing is unpickled."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

from dinoexport.spec import Array
from dinoexport.system import untrusted

# PyTorch's outputs for the cases of the largest model take a tenth of this.
MAX_BYTES = 1 << 32
_ENTRIES_MAX = 100_000
_HEADER_MAX_BYTES = 1 << 14


def read(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Array]:
    """The arrays in `path` by name; for any other file raises `untrusted.Unreadable`, ValueError or a zipfile error.

    NumPy's `savez` compresses nothing, so the arrays together are never larger than the file.
    """
    with untrusted.opened(path, max_bytes=max_bytes, links=False) as file:
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as stored:
            entries = stored.infolist()
            if len(entries) > _ENTRIES_MAX or len({entry.filename for entry in entries}) != len(entries):
                raise ValueError("it has too many entries, or two with one name")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, and dinoexport writes no compressed arrays")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its entries are larger than the file")
            return {entry.filename.removesuffix(".npy"): _array(stored, entry) for entry in entries}


def _array(stored: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Array:
    """One entry; its declared shape must take exactly the bytes that it has."""
    import numpy as np
    from numpy.lib import format as npy

    with stored.open(entry) as file:
        source: Any = file
        version = npy.read_magic(source)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename} has an unknown version")
        shape, fortran, dtype = read_header(source, max_header_size=_HEADER_MAX_BYTES)
        if dtype.hasobject or dtype.subdtype is not None or dtype.names is not None:
            raise ValueError(f"{entry.filename} does not hold plain numbers")
        wanted = math.prod(shape) * dtype.itemsize
        if wanted != entry.file_size - source.tell():
            raise ValueError(f"{entry.filename} declares {wanted} bytes and has another number")
        flat = np.frombuffer(bytearray(file.read(wanted)), dtype)
    return flat.reshape(shape[::-1]).transpose() if fortran else flat.reshape(shape)

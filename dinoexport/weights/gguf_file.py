"""Read GGUF files: tensors are mapped, and each is widened to float32 when it is read."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from dinoexport.errors import DinoexportError, WeightsError, require
from dinoexport.family import Read, Shapes
from dinoexport.spec import Array
from dinoexport.system import untrusted

START = b"GGUF"
# Bytes of each type of value that has a fixed size, by its number; a string and an array begin with their lengths.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ENTRIES_MAX, _DIMS_MAX, _ARRAYS_DEEP_MAX = 100_000, 8, 2
# Types that are widened without further loss; other types would need their own kernel to compare with.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


class _Header:
    """Reads the header of an open file, and refuses counts and lengths that the file cannot hold.

    Counts, lengths and types are as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has them. The package's
    own reader trusts them, and may not end.
    """

    def __init__(self, file: BinaryIO) -> None:
        raw: Any = file  # an unbuffered file is a raw stream
        self._source, self._left = io.BufferedReader(raw), os.fstat(file.fileno()).st_size

    def check(self) -> None:
        """Raises ValueError for a header that claims more than the file holds."""
        self._take(8)  # the mark and the version
        tensors, keys = self._number("<Q"), self._number("<Q")
        if max(tensors, keys) > _ENTRIES_MAX:
            raise ValueError(f"it has {tensors} tensors and {keys} keys")
        for _ in range(keys):
            self._take(self._number("<Q"))
            self._skip_value(self._number("<I"), 0)
        for _ in range(tensors):
            self._take(self._number("<Q"))
            if (dims := self._number("<I")) > _DIMS_MAX:
                raise ValueError(f"a tensor has {dims} dimensions")
            self._take(8 * dims + 12)

    def release(self) -> None:
        """Leaves the file open; its opener closes it."""
        self._source.detach()

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self._take(_SIZES[kind])
        elif kind == _STRING:
            self._take(self._number("<Q"))
        elif kind == _ARRAY and depth < _ARRAYS_DEEP_MAX:
            inner, count = self._number("<I"), self._number("<Q")
            if count > self._left:
                raise ValueError(f"an array has {count} entries")
            if inner in _SIZES:
                self._take(_SIZES[inner] * count)
                return
            for _ in range(count):
                self._skip_value(inner, depth + 1)
        else:
            raise ValueError(f"a value is of type {kind}")

    def _number(self, form: str) -> int:
        (found,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(found)

    def _take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0 or len(piece := self._source.read(size)) != size:
            raise ValueError("it ends early")
        return piece


@dataclass(frozen=True, kw_only=True)
class _Content:
    """A file's metadata as plain values, and its tensors, mapped."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]


def _content(path: Path) -> _Content:
    """The content of the file at `path`, whose header was checked.

    For a damaged file it raises any exception of the package or of the check, or `untrusted.Unreadable`.
    """
    require("export", "gguf")
    with untrusted.opened(path) as file:
        header = _Header(file)
        try:
            header.check()
        finally:
            header.release()
        stat = os.fstat(file.fileno())
    return _parsed(path, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))


# The package takes seconds for a vocabulary of 50,000 pieces, and a build reads recipe, tokenizer and weights of it.
@lru_cache(maxsize=1)
def _parsed(path: Path, _identity: tuple[int, ...]) -> _Content:
    import gguf

    reader = gguf.GGUFReader(path, "r")
    return _Content(
        metadata={str(name): field.contents() for name, field in reader.fields.items()},
        tensors={str(tensor.name): tensor for tensor in reader.tensors},
    )


def is_gguf(path: Path) -> bool:
    """Whether `path` is a regular file that begins as a GGUF file does."""
    if not untrusted.is_regular(path):
        return False
    with untrusted.opened(path) as file:
        return file.read(len(START)) == START


def metadata(path: Path) -> dict[str, Any]:
    """The file's metadata by key, as plain values. Raises WeightsError for a damaged file."""
    try:
        return dict(_content(path).metadata)
    except DinoexportError:
        raise
    except Exception as error:  # whatever its parser meets in a damaged file
        raise WeightsError(f"{path} cannot be read as GGUF: {error}.", next_step="Get the file again.") from None


def types(path: Path) -> dict[str, str]:
    """The type of each tensor, such as Q4_1. Raises WeightsError for a damaged file."""
    try:
        return {name: str(tensor.tensor_type.name) for name, tensor in _content(path).tensors.items()}
    except DinoexportError:
        raise
    except Exception as error:  # whatever its parser meets in a damaged file
        raise WeightsError(f"{path} cannot be read as GGUF: {error}.", next_step="Get the file again.") from None


def open_gguf(path: Path) -> tuple[Shapes, Read]:
    """Shapes of the tensors of `path`, outermost dimension first, and a function that reads one.

    Raises WeightsError for a damaged file and for tensors of a type that is not in `TYPES`.
    """
    require("export", "gguf")
    import gguf

    try:
        tensors = _content(path).tensors
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        raise WeightsError(
            f"{path} is damaged or no GGUF file ({type(error).__name__}: {error}).", next_step="Get the file again."
        ) from None
    for name, tensor in tensors.items():
        if tensor.tensor_type.name not in TYPES:
            raise WeightsError(
                f"The tensor {name} of {path} is {tensor.tensor_type.name}.",
                next_step=f"Give a file of {', '.join(TYPES)} tensors.",
            )

    def read(name: str) -> Array:
        import numpy as np

        tensor = tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            widened: Array = np.array(values, np.float32).reshape(shapes[name])  # a copy: the map cannot be written
        except Exception as error:
            raise WeightsError(
                f"The tensor {name} of {path} cannot be read ({error}).", next_step="Get the file again."
            ) from None
        return widened

    return shapes, read

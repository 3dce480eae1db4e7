"""Sources of images: a folder, a glob, an object store, or a column of Parquet files."""

from __future__ import annotations

import bisect
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dinoexport.errors import MissingRequirement, UsageError, require
from dinoexport.images import SUFFIXES
from dinoexport.system import store, untrusted

# An encoded image of 64 Mpx is far smaller; a video or a disk image is refused without reading it into memory.
_ITEM_MAX_BYTES = 1 << 28
_MAGIC = frozenset("*?[")
# Errors that concern a single file. Every other error, such as a mount that is gone, ends the run.
_OF_THE_FILE = (PermissionError, NotADirectoryError)


class Unusable(Exception):
    """Why this item cannot be embedded; the text names no folder of this machine."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image to embed. name: unique; the row's `path`. key: items with the same key are in the same shard."""

    name: str
    size_bytes: int
    key: str


ReadImage = Callable[[], bytes]


class ImageSource(Protocol):
    """A listing and a way to read what it lists."""

    def items(self) -> Iterator[Item]:
        """All items, in the same order on every machine."""

    def readers(self, names: Sequence[str]) -> Iterator[tuple[str, ReadImage]]:
        """For each of `names` in order, a function that reads its bytes on any thread, or raises Unusable."""

    @property
    def samples(self) -> Path | None:
        """A local folder of such images, if there is one."""


def open_source(images: str) -> ImageSource:
    """The images that DIR, GLOB, URL or FILE.parquet[:COLUMN] names; raises UsageError if there are none."""
    place, column = _column_of(images)
    if column is not None:
        require("embed", "pyarrow")
        return ParquetColumn(_parquet_files(place), column)
    if store.is_url(place):
        return RemoteFolder(place)
    if _MAGIC & set(place):
        return LocalFiles(_fixed_part(place), pattern=place)
    folder = Path(place)
    if not folder.is_dir():
        raise UsageError(
            f"There is no folder {place}.",
            next_step="Give --images a folder, a quoted glob, a URL, or FILE.parquet:COLUMN.",
        )
    return LocalFiles(folder)


def _column_of(images: str) -> tuple[str, str | None]:
    """(place, column) of `FILE.parquet[:COLUMN]`; the column is None for what is not Parquet."""
    if images.endswith(".parquet"):
        return images, ""
    place, found, column = images.rpartition(":")
    return (place, column) if found and place.endswith(".parquet") else (images, None)


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    return Path(*parts[:fixed]) if fixed else Path()


class LocalFiles:
    """The files in a folder and its subfolders, or those that match a pattern; without hidden ones."""

    def __init__(self, folder: Path, *, pattern: str = "") -> None:
        self._folder, self._pattern = folder, pattern
        self._inside = os.path.realpath(folder)

    @property
    def samples(self) -> Path | None:
        """The folder."""
        return self._folder

    def items(self) -> Iterator[Item]:
        """Sorted by name, one folder in memory at a time. Links are listed; `readers` reports unusable ones."""
        if self._pattern:
            for path in map(Path, sorted(glob.glob(self._pattern, recursive=True))):  # noqa: PTH207 (it may be absolute)
                if path.is_symlink() or not path.is_dir():
                    yield self._item(path.relative_to(self._folder).as_posix(), path.lstat().st_size)
        else:
            yield from self._below("")

    def _below(self, prefix: str) -> Iterator[Item]:
        try:
            with os.scandir(self._folder / prefix) as found:
                entries = sorted(
                    (entry.name, entry.is_dir(follow_symlinks=False)) for entry in found if entry.name[0] != "."
                )
        except PermissionError as error:
            raise MissingRequirement(
                f"{self._folder / prefix} cannot be listed: {error.strerror}.", next_step="Check its permissions."
            ) from None
        for name, is_folder in entries:
            if is_folder:
                yield from self._below(f"{prefix}{name}/")
            else:
                yield self._item(f"{prefix}{name}", (self._folder / prefix / name).lstat().st_size)

    def _item(self, name: str, size_bytes: int) -> Item:
        untrusted.check_name(name)
        return Item(name=name, size_bytes=size_bytes, key=name)

    def readers(self, names: Sequence[str]) -> Iterator[tuple[str, ReadImage]]:
        """Each reader opens one file."""
        for name in names:
            yield name, lambda name=name: self._read(name)  # type: ignore[misc]

    def _read(self, name: str) -> bytes:
        path = self._folder / name
        try:
            real = os.path.realpath(path, strict=True)
            if real != self._inside and not real.startswith(self._inside.rstrip("/") + "/"):
                raise Unusable("a link that leads out of the folder")
            # So that a pipe in the folder does not block the run.
            with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise Unusable("not a regular file")
                _check_size(found.st_size)
                _check_suffix(name)
                return file.read()
        except FileNotFoundError:
            raise Unusable("a link to nothing" if path.is_symlink() else "no longer there") from None
        except IsADirectoryError:
            raise Unusable("a link to a folder") from None
        except _OF_THE_FILE as error:
            raise Unusable(f"cannot be read: {error.strerror}") from None
        except OSError as error:
            if error.strerror and "symbolic links" in error.strerror:
                raise Unusable("a link to itself") from None
            raise MissingRequirement(
                f"{self._folder} cannot be read from: {error.strerror}.",
                next_step="Check the disk, and run it again: finished shards are kept.",
            ) from None


class RemoteFolder:
    """The objects below a prefix of an object store."""

    def __init__(self, url: str) -> None:
        self._place = store.open_place(url)

    @property
    def samples(self) -> Path | None:
        """None: sizes are learnt from local files only."""
        return None

    def items(self) -> Iterator[Item]:
        """Sorted by name. Stores list objects by name, but none guarantees it."""
        found = ((name, size) for name, size in self._place.files() if not _is_hidden(name))
        for name, size_bytes in sorted(found):
            yield Item(name=name, size_bytes=size_bytes, key=name)

    def readers(self, names: Sequence[str]) -> Iterator[tuple[str, ReadImage]]:
        """Each reader sends one request."""
        for name in names:
            yield name, lambda name=name: self._read(name)  # type: ignore[misc]

    def _read(self, name: str) -> bytes:
        _check_suffix(name)
        try:
            return self._place.read(name, max_bytes=_ITEM_MAX_BYTES)
        except FileNotFoundError:
            raise Unusable("no longer there") from None
        except ValueError:
            raise Unusable(f"more than any image's {_ITEM_MAX_BYTES} bytes") from None


class ParquetColumn:
    """A column of encoded images in Parquet files: binary, or a struct with a field `bytes` as Hugging Face writes it.

    An item is called FILE#ROW. A shard holds whole row groups, because a row group is the smallest unit to read.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._paths = {path.name: path for path in paths}
        if len(self._paths) < len(paths):
            raise UsageError("Two of the Parquet files have one name.", next_step="Embed them one after the other.")
        self._files: dict[str, Any] = {}
        try:
            for name, path in self._paths.items():
                self._files[name] = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UsageError(f"{path} is not a readable Parquet file: {error}", next_step="Check the file.") from None
        self._column = column or self._only_candidate()
        for name, file in self._files.items():
            if self._column not in file.schema_arrow.names or not _holds_bytes(
                file.schema_arrow.field(self._column).type
            ):
                raise UsageError(
                    f"{name} has no column {self._column!r} of encoded images.",
                    next_step=f"It has: {', '.join(f'{f.name} ({f.type})' for f in file.schema_arrow)}.",
                )

    def _only_candidate(self) -> str:
        schema = next(iter(self._files.values())).schema_arrow
        fitting = [field.name for field in schema if _holds_bytes(field.type)]
        if len(fitting) != 1:
            raise UsageError(
                f"Which column holds the images? {len(fitting)} could: {', '.join(fitting) or 'none is binary'}.",
                next_step="Name it: FILE.parquet:COLUMN.",
            )
        return str(fitting[0])

    @property
    def samples(self) -> Path | None:
        """None: sizes are learnt from local files only."""
        return None

    def items(self) -> Iterator[Item]:
        """Row by row. A row's size is its row group's divided by its rows: the footer has no lengths of single rows."""
        for name, file in self._files.items():
            row = 0
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                size = group.total_byte_size // max(1, group.num_rows)
                for _ in range(group.num_rows):
                    yield Item(name=f"{name}#{row}", size_bytes=size, key=f"{name}#{index}")
                    row += 1

    def readers(self, names: Sequence[str]) -> Iterator[tuple[str, ReadImage]]:
        """A row group is read with its first row and released after its last."""
        for file_name, of_file in groupby(names, key=lambda name: name.rpartition("#")[0]):
            file = self._files.get(file_name)
            if file is None:
                raise UsageError(f"{file_name} of the plan does not exist.", next_step="Give the same --images.")
            starts = [0]
            for index in range(file.metadata.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(index).num_rows)

            def group_of(name: str, starts: list[int] = starts) -> int:
                return bisect.bisect_right(starts, int(name.rpartition("#")[2])) - 1

            for index, of_group in groupby(of_file, key=group_of):
                column = file.read_row_group(index, columns=[self._column]).column(0).combine_chunks()
                for name in of_group:
                    value = column[int(name.rpartition("#")[2]) - starts[index]].as_py()
                    yield name, lambda value=value: _bytes_of(value)  # type: ignore[misc]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _bytes_of(value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise Unusable("the column holds nothing in this row")
    _check_size(len(content))
    return bytes(content)


def _parquet_files(place: str) -> list[Path]:
    if store.is_url(place):
        raise UsageError(
            f"{place}: Parquet is read from a local disk only.", next_step="Copy the file here, or mount the bucket."
        )
    found = glob.glob(place, recursive=True) if _MAGIC & set(place) else [place]  # noqa: PTH207 (it may be absolute)
    paths = sorted(map(Path, found))
    if not paths or not all(path.is_file() for path in paths):
        raise UsageError(f"There is no Parquet file {place}.", next_step="Check the path.")
    return paths


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _check_suffix(name: str) -> None:
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        raise Unusable("not an image by its name")


def _check_size(size_bytes: int) -> None:
    if size_bytes > _ITEM_MAX_BYTES:
        raise Unusable(f"{size_bytes} bytes are more than any image's {_ITEM_MAX_BYTES}")

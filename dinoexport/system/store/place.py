"""The interface of a place where files are kept, and what its two kinds share."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

# How much of a file is copied at once.
PIECE_BYTES = 8 << 20


class Place(Protocol):
    """Where files are read from and written to, by names relative to it with `/` between their parts."""

    @property
    def local(self) -> Path | None:
        """The folder, if it is on disk."""

    def files(self, under: str = "") -> Iterator[tuple[str, int]]:
        """(name, size in bytes) of every file below `under`, in any order."""

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """A file's content. Raises FileNotFoundError if it is missing, ValueError if it is larger than `max_bytes`."""

    def fetch(self, name: str, target: Path, *, max_bytes: int | None = None) -> None:
        """Copies a file to the new local file `target`. Raises as `read`."""

    def size(self, name: str) -> int | None:
        """A file's size in bytes; None if it is missing."""

    def write(self, name: str, content: bytes, *, new: bool = False) -> None:
        """Writes a whole file at once. new: raises FileExistsError if it exists already."""

    def draft(self, name: str) -> Path:
        """A local path to write to; `publish` then puts the file at `name`."""

    def publish(self, draft: Path, name: str) -> None:
        """Puts the finished draft at `name` and replaces an older file; the draft is removed."""

    def upload(self, source: Path, name: str, *, new: bool = False) -> None:
        """Puts a copy of the local file `source` at `name`. new: raises FileExistsError if `name` exists."""

    def remove(self, name: str) -> None:
        """Removes a file; a missing file is no error."""


def check_size(name: str, size_bytes: int, max_bytes: int | None) -> None:
    """Raises ValueError for a file that is larger than `max_bytes`."""
    if max_bytes is not None and size_bytes > max_bytes:
        raise ValueError(f"{name} has {size_bytes} bytes, more than {max_bytes}")


def draft_name(name: str) -> str:
    """The hidden name of an unfinished file, with the process that writes it."""
    return f".{name}.{host()}.{os.getpid()}.partial"


def host() -> str:
    """This machine's name, as it may stand in the name of a file."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"

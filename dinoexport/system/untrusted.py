"""Open files that are not trusted: of a bundle or a repository, checkpoints, recipes, keys. All code uses this module.

Only regular files are opened, so a pipe cannot block and a device is not touched; only files of a plausible size; and
inside an untrusted folder no links, because a link could lead to any file of this machine.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dinoexport.errors import UsageError

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link",
}  # fmt: skip


class Unreadable(UsageError):
    """A file that cannot or must not be opened. problem: why, as the end of a sentence."""

    def __init__(self, path: Path, problem: str, *, is_link: bool = False, absent: bool = False) -> None:
        super().__init__(f"{path} cannot be read: {problem}.", next_step="Check the path and its permissions.")
        self.problem, self.is_link, self.absent = problem, is_link, absent


@contextmanager
def opened(path: Path, *, max_bytes: int | None = None, links: bool = True) -> Iterator[BinaryIO]:
    """The regular file at `path`, opened for reading, unbuffered; raises Unreadable for anything else.

    max_bytes: the largest size of a file of this kind. links: whether `path` itself may be a link.
    """
    descriptor = _open(path, max_bytes, links)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        yield file


# (device, inode, size, times of the last change of content and of the inode in ns): of a file that was changed, or
# exchanged for another one and back, it is another.
Identity = tuple[int, int, int, int, int]


def identity(file: BinaryIO) -> Identity:
    """Which file an open one is, and as which it was last written, renamed or linked."""
    found = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_bytes(path: Path, *, max_bytes: int, links: bool = True) -> bytes:
    """The content of the regular file at `path`; raises Unreadable for anything else, or for more than `max_bytes`."""
    pieces, left = [], max_bytes + 1  # a file in /proc reports 0 bytes
    with opened(path, max_bytes=max_bytes, links=links) as file:
        try:
            while left and (piece := file.read(min(left, 1 << 24))):
                pieces.append(piece)
                left -= len(piece)
        except OSError as error:
            raise Unreadable(path, _reason(error)) from None
    if not left:
        raise _too_large(path, max_bytes + 1, max_bytes)
    return b"".join(pieces)


def read_text(path: Path, *, max_bytes: int, links: bool = True) -> str:
    """The same as text; raises Unreadable if it is not UTF-8."""
    try:
        return read_bytes(path, max_bytes=max_bytes, links=links).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(path, f"it is not UTF-8 ({error.reason} at byte {error.start})") from None


def check_name(name: str) -> str:
    """The name of a file, if it can be written into another file; raises UsageError for bytes that are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="replace").decode()
        raise UsageError(f"The file name {shown} is not UTF-8.", next_step="Rename it, or leave it out.") from None
    return name


def is_regular(path: Path, *, links: bool = True) -> bool:
    """Whether `opened` would try to open it."""
    try:
        found = path.stat(follow_symlinks=links)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(found.st_mode)


def _open(path: Path, max_bytes: int | None, links: bool) -> int:
    """A descriptor. The kind of file is checked before it is opened, because opening a device may have an effect."""
    try:
        found = path.stat(follow_symlinks=links)
        _check(path, found, max_bytes)
        # O_NONBLOCK: a file that became a pipe in the meantime does not block.
        follow = 0 if links else os.O_NOFOLLOW
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | follow)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unreadable(path, _reason(error), absent=True) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise Unreadable(path, _reason(error)) from None
    try:
        _check(path, os.fstat(descriptor), max_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(path: Path, found: os.stat_result, max_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = stat.S_IFMT(found.st_mode)
        raise Unreadable(
            path, f"it is {_KINDS.get(kind, 'something')}, not a regular file", is_link=kind == stat.S_IFLNK
        )
    if max_bytes is not None and found.st_size > max_bytes:
        raise _too_large(path, found.st_size, max_bytes)


def _too_large(path: Path, size: int, max_bytes: int) -> Unreadable:
    return Unreadable(path, f"it has {size:,} bytes or more, and no such file has more than {max_bytes:,}")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

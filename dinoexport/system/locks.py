"""Locks between processes: a file that one process holds, and a folder that many read and one changes.

The kernel drops a lock with the process that held it, so a killed process blocks nobody.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinoexport.errors import BuildError, UsageError
from dinoexport.spec import Progress, silent

_POLL_S = 0.05
# Network file systems without locks report one of these. There the user must keep two processes apart.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@contextmanager
def exclusive(path: Path, *, doing: str, wait_s: float = 0.0, progress: Progress = silent) -> Iterator[None]:
    """Locks the file `path`, which is created if it is absent, against other processes.

    Raises BuildError if another process is `doing` it and does not end within `wait_s` seconds, UsageError if `path` is
    a link or not a regular file. The holder may remove the file at the end: a process that then holds the removed
    file tries again.
    """
    deadline = time.monotonic() + wait_s
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # its folder was removed by the holder
            continue
        try:
            if not _taken(descriptor, write=True):
                if time.monotonic() >= deadline:
                    raise BuildError(f"Another process is {doing}.", next_step="Wait for it, or choose another place.")
                progress(f"waiting for another process that is {doing}", 0, 0)
                time.sleep(_POLL_S)
                continue
            if _is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor of the lock file. It never follows a link and never truncates the file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _no_lock(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_lock(path)
    return descriptor


def _no_lock(path: Path) -> UsageError:
    return UsageError(
        f"{path} is a link or not a regular file, so it is not a lock of dinoexport.", next_step="Move it away."
    )


@contextmanager
def folder(path: Path, *, write: bool, wait_s: float, doing: str, progress: Progress = silent) -> Iterator[None]:
    """Locks the folder `path`: shared with other readers, or exclusively with `write`. Nothing is written for it.

    Waits for conflicting locks, and raises BuildError after `wait_s` seconds. If the folder at `path` was exchanged in
    the meantime, the new one is locked.
    """
    deadline = time.monotonic() + wait_s
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _taken(descriptor, write=write):
                if time.monotonic() >= deadline:
                    raise BuildError(f"Another process is {doing}.", next_step="Run it again when that has ended.")
                progress(f"waiting for another process that is {doing}", 0, 0)
                time.sleep(_POLL_S)
                continue
            if _is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path`."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


def _taken(descriptor: int, *, write: bool) -> bool:
    """Whether this process has the lock; also true if the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True

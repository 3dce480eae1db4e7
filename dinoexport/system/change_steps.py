"""The steps of a change; each can be repeated after it was begun or done."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV})
StepKind = Literal["move", "link", "remove"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a change. Every path is in the place or in its work folder.

    move: the file or folder `source` appears at `target`; what was there goes, a folder by exchange. link: the file
    `source` is `target` too. remove: `target` goes.
    """

    kind: StepKind
    target: Path
    source: Path | None = None


def move(source: Path, target: Path) -> Step:
    """The step that puts the file or folder `source` at `target`."""
    return Step(kind="move", source=source, target=target)


def link(source: Path, target: Path) -> Step:
    """The step that makes the file `source` be `target` too, until one of them goes in the same change."""
    return Step(kind="link", source=source, target=target)


def remove(target: Path) -> Step:
    """The step that removes the file or folder `target`."""
    return Step(kind="remove", target=target)


def discard(path: Path) -> None:
    """Removes a file or folder of dinoexport; never the target of a link."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return


def _move(step: Step, inode: int | None, old: Path) -> None:
    """Puts `source` at `target`; what was there goes to `old`. Once `source` is gone it is done."""
    source, target = step.source, step.target
    assert source is not None
    if not os.path.lexists(source):
        return
    target.parent.mkdir(exist_ok=True)
    if not os.path.lexists(target):
        os.rename(source, target)
        return
    if not target.is_dir() or target.is_symlink():
        os.replace(source, target)
        return
    if os.lstat(target).st_ino != inode and not _exchange(source, target):
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(old, target)  # the old one is better than none
            raise
        return
    os.rename(source, old)  # what was exchanged


def _link(step: Step, _inode: int | None, _old: Path) -> None:
    source, target = step.source, step.target
    assert source is not None
    if os.path.lexists(target) or not target.parent.is_dir():  # its folder has already been moved into place
        return
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_name(f"{target.name}.partial")
        shutil.copyfile(source, partial)
        os.rename(partial, target)


def _remove(step: Step, _inode: int | None, _old: Path) -> None:
    discard(step.target)


STEPS: dict[StepKind, Callable[[Step, int | None, Path], None]] = {"move": _move, "link": _link, "remove": _remove}


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one system call, so that each path always has one; False if it is not available."""
    rename = _renameat2()
    if rename is None:
        return False
    sys.audit("dinoexport.exchange", str(one), str(other))  # reported like os.rename to audit hooks
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _renameat2() -> Any:
    """The C library's renameat2; None if it has none: Linux only, in glibc since 2.28."""
    with suppress(OSError, AttributeError):
        function = ctypes.CDLL(None, use_errno=True).renameat2
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        return function
    return None

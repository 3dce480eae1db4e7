"""Files that are complete or absent: hashing, renaming, locking. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dinoexport.errors import BuildError, DinoexportError, MissingRequirement
from dinoexport.spec import Progress, silent

# Between two pieces the interpreter's lock is asked for, which a thread that traces gives up after 5 ms: as long as it
# takes to hash the 4 MB that were one piece once.
_HASHED_BYTES = 1 << 25


def sha256(path: Path, *, progress: Progress = silent) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    chunk = memoryview(bytearray(min(_HASHED_BYTES, max(1, total))))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            done += size
            progress(f"hashing {path.name}", done, total)
    return digest.hexdigest()


@contextmanager
def lock(path: Path, *, doing: str) -> Iterator[None]:
    """Holds `path` against other processes; a BuildError at once when another one is `doing` it.

    The holder may remove the file when it is done: who then holds a file that is no longer there tries again.
    """
    import fcntl

    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held, suppress(FileNotFoundError):
            file = held.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BuildError(
                    f"Another process is {doing}.", next_step="Wait for it, or choose another place."
                ) from None
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                kept = held.pop_all()
                break
    with kept:
        yield


def replace_folder(new: Path, old: Path) -> None:
    """Puts the folder `new` at `old`; what was there is gone afterwards, and back if the exchange fails.

    POSIX renames no folder onto a full one, so the old one steps aside first; `recover` undoes a crash in between.
    """
    aside = _aside(old)
    if old.exists():
        os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        recover(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(folder: Path) -> None:
    """Brings back what `replace_folder` had moved aside when it was killed between its two renames."""
    aside = _aside(folder)
    if aside.exists():
        if folder.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def link_or_copy(source: Path, destination: Path) -> None:
    """The same content at `destination`, without a second copy where the file system allows it."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


@contextmanager
def disk_errors(where: Path, *, elsewhere: str = "choose a place you may write to") -> Iterator[None]:
    """Turns an OSError met while writing below `where` into one sentence; `elsewhere` says where else to write."""
    try:
        yield
    except OSError as error:
        raise _disk_error(where, error, elsewhere) from error


def _disk_error(where: Path, error: OSError, elsewhere: str) -> DinoexportError:
    # NumPy's tofile reports a short write in words only: "56448 requested and 50000 written".
    short_write = error.errno is None and "requested and" in str(error)
    if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return MissingRequirement(
            f"No room left while writing to {where}: {error.strerror or error}.",
            next_step=f"Free some space, or {elsewhere}; what is finished is kept and reused.",
        )
    # EEXIST: where a folder is needed lies a file.
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return MissingRequirement(
            f"{where} cannot be written: {error.strerror}.", next_step=f"{elsewhere[0].upper()}{elsewhere[1:]}."
        )
    return BuildError(f"Writing to {where} failed: {error}.", next_step="Look at the disk, then run it again.")

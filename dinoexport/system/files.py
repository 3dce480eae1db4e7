"""Write files that are complete or absent; hash and copy; report disk errors. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dinoexport.errors import BuildError, DinoexportError, MissingRequirement, UsageError
from dinoexport.spec import Progress, silent
from dinoexport.system import untrusted

# Each piece needs the interpreter's lock, which a tracing thread gives up after 5 ms. Hashing 4 MB takes about as long,
# so larger pieces wait less often. A piece of 32 MB leaves the CPU's cache before it is hashed: 1.2 s per GB, not 0.85.
_HASHED_BYTES = 1 << 24
# The beginning of a file that is searched for dinoexport's mark.
_LOOKED_AT_BYTES = 1 << 16


def sha256(path: Path, *, links: bool = True, progress: Progress = silent) -> str:
    """The SHA-256 in hex of a regular file, read in pieces; raises `untrusted.Unreadable` for anything else."""
    with untrusted.opened(path, links=links) as file:
        try:
            return sha256_of(file, doing=f"hashing {path.name}", progress=progress)
        except OSError as error:
            raise untrusted.Unreadable(path, error.strerror or str(error)) from None


def sha256_of(file: BinaryIO, *, doing: str, progress: Progress = silent) -> str:
    """The same of what is left of an open file."""
    return _hashed(file, None, doing, progress)


def _hashed(file: BinaryIO, copy_to: BinaryIO | None, doing: str, progress: Progress) -> str:
    """The SHA-256 of the rest of `file`, which is written to `copy_to` while it is read."""
    digest, done, total = hashlib.sha256(), 0, os.fstat(file.fileno()).st_size
    chunk = memoryview(bytearray(min(_HASHED_BYTES, max(1, total))))
    while size := file.readinto(chunk):  # type: ignore[attr-defined]  # unbuffered files have it
        digest.update(chunk[:size])
        if copy_to is not None:
            copy_to.write(chunk[:size])
        done += size
        progress(doing, done, total)
    return digest.hexdigest()


def hash_more(digest: hashlib._Hash, file: BinaryIO, nbytes: int) -> None:
    """Adds the next `nbytes` of an unbuffered file; raises OSError if there are fewer."""
    chunk = memoryview(bytearray(min(_HASHED_BYTES, nbytes)))
    while nbytes:
        size = file.readinto(chunk[:nbytes])  # type: ignore[attr-defined]  # unbuffered files have it
        if not size:
            raise OSError(errno.EIO, "it became shorter while it was read")
        digest.update(chunk[:size])
        nbytes -= size


def copy(
    source: Path,
    destination: Path,
    *,
    sha256: str = "",
    size_bytes: int | None = None,
    progress: Progress = silent,
) -> str:
    """Copies a regular file to the new file `destination`; returns the SHA-256 of the new content of `destination`.

    With `size_bytes`, raises ValueError for a file of another size before anything is written: it could fill the disk.

    The two may share blocks if the file system supports that, but are never one file under two names, because changing
    one would change the other. With `sha256`, raises ValueError for a copy with another hash and removes that copy.
    """
    doing = f"copying {source.name}"
    with ExitStack() as files:
        found = files.enter_context(untrusted.opened(source, links=False))
        if size_bytes is not None and (size := os.fstat(found.fileno()).st_size) != size_bytes:
            raise ValueError(f"{source.name} has {size} bytes, not {size_bytes}")
        made = files.enter_context(destination.open("xb+", buffering=0))
        if _copied_by_kernel(found, made):
            made.seek(0)
            digest = _hashed(made, None, doing, progress)
        else:
            digest = _hashed(found, made, doing, progress)
    if sha256 and digest != sha256:
        destination.unlink()
        raise ValueError(f"{source.name} does not have the SHA-256 {sha256}")
    return digest


def _copied_by_kernel(found: BinaryIO, made: BinaryIO) -> bool:
    """Copies the file with copy_file_range, which shares blocks on XFS and Btrfs; False if that is not possible."""
    if not hasattr(os, "copy_file_range"):
        return False
    try:
        while os.copy_file_range(found.fileno(), made.fileno(), 1 << 30):
            pass
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
        found.seek(0)
        made.seek(0)
        made.truncate()
        return False
    return True


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place. Unlike `Path.resolve`, this does not fail for links that form a circle."""
    return os.path.realpath(one) == os.path.realpath(other)


def check_output(path: Path, *, ours: bytes) -> None:
    """Raises UsageError unless a file may appear at `path`: nothing is there, or a regular file that holds `ours`."""
    elsewhere = "Give a file's name in a folder that exists."
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: its folder does not exist.", next_step=elsewhere) from None
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be a file: {error}.", next_step=elsewhere) from None
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path} is there already and is not a regular file.", next_step=elsewhere)
    with untrusted.opened(path, links=False) as file:
        if ours not in file.read(_LOOKED_AT_BYTES):
            raise UsageError(
                f"{path} is there already and was not written by dinoexport.",
                next_step="Choose another name, or move it away.",
            )


def write_output(path: Path, content: bytes, *, ours: bytes) -> None:
    """Writes a file that the user named, by rename; an existing file is checked by `check_output` again."""
    check_output(path, ours=ours)
    with disk_errors(path.parent):
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.chmod(partial, 0o666 & ~_umask())  # noqa: PTH101 (a name, not a Path)
            os.replace(partial, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)  # noqa: PTH108


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def disk_errors(where: Path, *, elsewhere: str = "choose a place that is writable") -> Iterator[None]:
    """Turns an OSError while writing below `where` into one sentence; `elsewhere` names another place to write to."""
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
    # EEXIST: there is a file where a folder is needed.
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return MissingRequirement(
            f"{where} cannot be written: {error.strerror}.", next_step=f"{elsewhere[0].upper()}{elsewhere[1:]}."
        )
    return BuildError(f"Writing to {where} failed: {error}.", next_step="Check the disk, then run it again.")

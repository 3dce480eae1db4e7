"""A folder on disk as a place: a file appears by rename."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dinoexport.errors import UsageError
from dinoexport.system import files, untrusted
from dinoexport.system.store.place import PIECE_BYTES, check_size, draft_name, host

_DRAFT = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.partial$")


class LocalPlace:
    """A folder on disk. It and the folders inside it are made when something is written to them."""

    def __init__(self, folder: Path) -> None:
        self.local: Path | None = folder
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def files(self, under: str = "") -> Iterator[tuple[str, int]]:
        """Every regular file; links are not followed."""
        pending = [self._folder / under]
        while pending:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(pending.pop()) as found:
                for entry in found:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        name = Path(entry.path).relative_to(self._folder).as_posix()
                        yield name, entry.stat(follow_symlinks=False).st_size

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """The file's content. Like `fetch` it opens only regular files: somebody else may write to the folder."""
        with self._opened(name) as found:
            check_size(name, os.fstat(found.fileno()).st_size, max_bytes)
            return found.read()

    def fetch(self, name: str, target: Path, *, max_bytes: int | None = None) -> None:
        """Copies its bytes."""
        with self._opened(name) as found, target.open("xb") as made:
            check_size(name, os.fstat(found.fileno()).st_size, max_bytes)
            shutil.copyfileobj(found, made, PIECE_BYTES)

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        try:
            with untrusted.opened(self._folder / name, links=False) as found:
                yield found
        except untrusted.Unreadable as error:
            if error.absent:
                raise FileNotFoundError(name) from None
            raise

    def names(self) -> list[str]:
        """What is in the folder itself; nothing where there is none. Raises UsageError for what is not a folder."""
        try:
            return [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            if self._folder.is_symlink():
                raise UsageError(
                    f"{self} is a link to nothing.", next_step="Make the folder that it leads to, or remove it."
                ) from None
            return []
        except OSError as error:
            raise UsageError(
                f"{self} is not a folder that can be read: {error.strerror}.", next_step="Name another folder."
            ) from None

    def size(self, name: str) -> int | None:
        """The file system's."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return (self._folder / name).stat().st_size
        return None

    def write(self, name: str, content: bytes, *, new: bool = False) -> None:
        """By rename; a new file by a link, which fails if the name exists."""
        draft, taken = self.draft(name), False
        with files.disk_errors(self._folder):
            try:
                with draft.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if new:
                    try:
                        os.link(draft, self._folder / name)
                    except FileExistsError:
                        taken = True
                    except OSError:  # a file system without links cannot detect two writers at once
                        taken = (self._folder / name).exists()
                        if not taken:
                            os.replace(draft, self._folder / name)
                else:
                    os.replace(draft, self._folder / name)
            finally:
                draft.unlink(missing_ok=True)
        if taken:  # no error of the disk: the caller decides
            raise FileExistsError(name)

    def draft(self, name: str) -> Path:
        """A hidden file beside the final one, named after the process, so that a dead process's file is recognised."""
        path = self._folder / name
        with files.disk_errors(self._folder):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(draft_name(path.name))

    def publish(self, draft: Path, name: str) -> None:
        """By rename, after the bytes are written to the disk."""
        with files.disk_errors(self._folder):
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, self._folder / name)

    def upload(self, source: Path, name: str, *, new: bool = False) -> None:
        """By a copy beside its final name, and a rename."""
        if new:
            self.write(name, source.read_bytes(), new=True)
            return
        draft = self.draft(name)
        try:
            shutil.copyfile(source, draft)
            self.publish(draft, name)
        finally:
            draft.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes the file."""
        (self._folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes drafts of this machine's dead processes."""
        for path in self._folder.rglob(".*.partial"):
            found = _DRAFT.match(path.name)
            if found and found["host"] == host() and not _alive(int(found["pid"])):
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    """Whether a process runs. A dead one that nobody has waited for does not: PID 1 of a container may never do so."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

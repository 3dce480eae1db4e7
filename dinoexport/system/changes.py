"""Change several files atomically, even if the process is killed while it changes them.

    PLACE                     what changes: a bundle, a model repository
    .PLACE.work/lock          held by the one process that changes PLACE
    .PLACE.work/new/          new files; nothing temporary is ever inside PLACE
    .PLACE.work/change.json   the steps of the change; the change happens when this file appears by one rename
    .PLACE.work/old/          what was replaced, until the change is complete

Until `change.json` exists, nothing has changed. From then on every step is carried out, by this process or by the next
one; steps can be repeated. A change therefore either did not begin or will be finished, and a step needs only the
record. Ctrl-C and SIGTERM wait for the end of the change.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from dinoexport.errors import BuildError, MissingRequirement, UsageError
from dinoexport.spec import Progress, silent
from dinoexport.system import locks
from dinoexport.system.change_steps import STEPS, Step, StepKind, discard

_LOCK, _NEW, _OLD, _RECORD = "lock", "new", "old", "change.json"
# Other folders that a build keeps beside its bundle: a finished stage, named by the beginning of its key, or a new one.
_OURS = re.compile(r"lock|new|old|change\.json(\.partial)?|[a-z0-9_]+-[0-9a-f]{16}|[a-z0-9_]+\.partial")
# A record of a hundred models takes 50 kB.
_RECORD_BYTES_MAX = 1 << 24
# How long a change waits for readers of the place, and readers for a change that is being carried out.
WAIT_S = 600.0

_done: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Change:
    """A place that only this process may change. folder: its work folder; new: an empty folder for new files."""

    place: Path
    folder: Path
    progress: Progress = field(default=silent)

    @property
    def new(self) -> Path:
        """The folder for files that will appear in the place. It is empty at first and removed at the end."""
        return self.folder / _NEW

    def commit(self, steps: Sequence[Step], *, done: str) -> None:
        """Carries out all of `steps`, in this order, or none of them.

        `done` is a sentence that is true from then on; it is shown if the user interrupts afterwards. Waits until
        nobody reads the place.
        """
        if self.place.exists() and self.place.stat().st_dev != self.folder.stat().st_dev:
            raise UsageError(
                f"{self.place} is a separate mount, so nothing can appear in it by rename.",
                next_step=f"Use a folder inside it, such as {self.place / self.place.name}.",
            )
        record = {"steps": [_to_json(self, step) for step in steps]}
        with _alone(self.place, self.progress), _uninterrupted():
            partial = self.folder / f"{_RECORD}.partial"
            partial.write_text(json.dumps(record), encoding="utf-8")
            os.rename(partial, self.folder / _RECORD)
            _carry_out(self, begins_here=True)
            _done.append(done)


@contextmanager
def changing(place: Path, *, doing: str, progress: Progress = silent) -> Iterator[Change]:
    """Locks `place`, which need not exist, for a change; first finishes a change that an earlier process began.

    Raises BuildError if another process is `doing` it. Whatever happens inside, nothing temporary is left except the
    finished stages of a build.
    """
    if place.is_symlink() and not place.exists():
        raise UsageError(f"{place} is a link to nothing.", next_step="Make the folder that it leads to, or remove it.")
    place = Path(os.path.realpath(place))  # a link stays a link, and its target has one lock under every name
    folder = work_folder(place)
    _check_ours(folder)
    with locks.exclusive(folder / _LOCK, doing=doing):
        change = Change(place=place, folder=folder, progress=progress)
        try:
            _check_ours(folder)
            _finish(change)
            discard(change.new)
            change.new.mkdir()
            yield change
        finally:
            if not _begun(place):  # if begun, the next process needs all of it
                discard(change.new)
                discard(folder / _OLD)
                if not any(path.name != _LOCK for path in folder.iterdir()):
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reading(place: Path, *, progress: Progress = silent) -> Iterator[Path]:
    """Locks the folder `place` against changes, after a change that was begun is finished.

    Others may read it at the same time. Yields its real path.
    """
    place = Path(os.path.realpath(place))
    with ExitStack() as stack:
        while True:
            settle(place, progress=progress)
            # A place that is absent or unreadable is not locked: opening it gives the better error.
            with suppress(OSError):
                wait = f"changing {place}"
                stack.enter_context(locks.folder(place, write=False, wait_s=WAIT_S, doing=wait, progress=progress))
            if not _begun(place):
                break
            stack.close()  # begun in the meantime
        yield place


def settle(place: Path, *, progress: Progress = silent) -> None:
    """Finishes the change of `place` that a killed process began, if there is one."""
    place = Path(os.path.realpath(place))
    deadline = time.monotonic() + WAIT_S
    while _begun(place):
        folder = work_folder(place)
        try:
            _check_ours(folder)
            with locks.exclusive(
                folder / _LOCK,
                doing=f"changing {place}",
                wait_s=max(0.0, deadline - time.monotonic()),
                progress=progress,
            ):
                _finish(Change(place=place, folder=folder, progress=progress))
                if not any(path.name != _LOCK for path in folder.iterdir()):
                    shutil.rmtree(folder, ignore_errors=True)
        except PermissionError as error:
            raise MissingRequirement(
                f"A change of {place} was begun and not finished, and this user may not finish it: {error.strerror}.",
                next_step="Run the same command as the user who began it.",
            ) from None


def _begun(place: Path) -> bool:
    return bool(place.name) and os.path.lexists(work_folder(place) / _RECORD)


def work_folder(place: Path) -> Path:
    """The hidden folder beside `place`, on its file system, where its changes are made."""
    if not place.name:
        raise UsageError(f"{place} is not a place for this.", next_step="Name a folder below it.")
    return place.with_name(f".{place.name}.work")


def done() -> tuple[str, ...]:
    """The changes of this process so far, one sentence each, to be shown when it is interrupted."""
    return tuple(_done)


@contextmanager
def of_a_draft() -> Iterator[None]:
    """What is changed while the block runs is not shown: it is in a folder that nobody reads and that is removed."""
    count = len(_done)
    try:
        yield
    finally:
        del _done[count:]


def note_done(sentence: str) -> None:
    """Adds a change that was made by other means, as in an object store."""
    _done.append(sentence)


def _check_ours(folder: Path) -> None:
    """Raises UsageError for a folder with files that dinoexport does not write: they may be the user's."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{folder} is a link or not a folder; changes are made there.", next_step="Move it away.")
    strange = sorted(path.name for path in folder.iterdir() if path.is_symlink() or not _OURS.fullmatch(path.name))
    if strange:
        raise UsageError(
            f"{folder} holds files that dinoexport did not write: {', '.join(strange[:5])}.",
            next_step="Move that folder away: changes are made there, and it would be removed.",
        )


@contextmanager
def _alone(place: Path, progress: Progress) -> Iterator[None]:
    """Locks the place, which may be absent or a file, against readers."""
    if not place.is_dir():
        yield
        return
    with locks.folder(place, write=True, wait_s=WAIT_S, doing=f"reading {place}", progress=progress):
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the end of the block. Only the main thread receives them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = [number for number, handler in before.items() if callable(handler)]
    for number in held:
        signal.signal(number, lambda number, _frame: heard.append(number))
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, before[number])
        if heard:
            signal.raise_signal(heard[0])


# ---- the record ----


def _to_json(change: Change, step: Step) -> list[Any]:
    """The step for the record, with the facts that show whether a folder was already exchanged."""
    source = None if step.source is None else _written(change, step.source)
    entry: list[Any] = [step.kind, source, _written(change, step.target), None]
    if step.kind == "move" and step.source is not None and step.source.exists():
        entry[3] = os.lstat(step.source).st_ino
    _parse(change, entry)
    return entry


def _written(change: Change, path: Path) -> str:
    for word, root in (("work", change.folder), ("place", change.place)):
        if path == root or root in path.parents:
            return "/".join((word, *path.relative_to(root).parts))
    raise AssertionError(f"{path} is neither in {change.place} nor in its work folder")


def _parse(change: Change, entry: Any) -> tuple[Step, int | None]:
    """The step in `entry` of a record; raises ValueError for one that this module does not write."""
    kind, source, target, inode = entry
    if kind not in get_args(StepKind) or (source is None) != (kind == "remove") or not isinstance(inode, int | None):
        raise ValueError(f"{entry!r} is not a step")
    found = [_inside(change, word) for word in (source, target) if word is not None]
    return Step(kind=kind, target=found[-1], source=found[0] if len(found) == 2 else None), inode


def _inside(change: Change, written: Any) -> Path:
    """The path in the place or in the work folder; raises ValueError for a path that could lead elsewhere."""
    word, *parts = str(written).split("/")
    if word not in ("work", "place") or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{written!r} is not a path of a step")
    path = change.folder if word == "work" else change.place
    for part in parts:
        if path.is_symlink():
            raise ValueError(f"{path} is a link")
        path = path / part
    return path


def _finish(change: Change) -> None:
    """Carries out a change that an earlier process began."""
    if _begun(change.place):
        with _alone(change.place, change.progress), _uninterrupted():
            _carry_out(change)


def _carry_out(change: Change, *, begins_here: bool = False) -> None:
    record = change.folder / _RECORD
    try:
        if not stat.S_ISREG(os.lstat(record).st_mode) or record.stat().st_size > _RECORD_BYTES_MAX:
            raise ValueError("it is not a regular file of a sensible size")
        steps = [_parse(change, entry) for entry in json.loads(record.read_bytes())["steps"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            f"{record} is not a record of a change by dinoexport ({error}).",
            next_step=f"It changed nothing. Move {change.folder} away.",
        ) from None
    (change.folder / _OLD).mkdir(exist_ok=True)
    try:
        for number, (step, inode) in enumerate(steps):
            STEPS[step.kind](step, inode, change.folder / _OLD / str(number))
    except OSError as error:
        if begins_here and number == 0:
            record.unlink()  # nothing was done yet, so nothing has to be finished
            raise
        raise BuildError(
            f"The change of {change.place} was begun and could not be finished: {error}.",
            next_step="The next dinoexport command there finishes it first. Fix the cause and run it again.",
        ) from error
    discard(change.folder / _OLD)
    discard(change.new)
    record.unlink()

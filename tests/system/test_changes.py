"""Several files change as one: killed or interrupted before any file operation, the change is done or was not begun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dinoexport.errors import BuildError, DinoexportError, UsageError
from dinoexport.system import change_steps, changes, locks
from tests.kills import ENDED, INTERRUPTED, dies_at, every_moment

OLD = {"a": "old a", "b": "old b", "gone": "old", "sub/c": "old c"}
NEW = {"a": "new a", "b": "new b", "sub/c": "old c", "deep/d": "new d", "folder/e": "new e"}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def files_in(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def several_files(place: Path) -> None:
    """Two files replaced, one removed, one and a folder added."""
    with changes.changing(place, doing="changing it") as change:
        written(change.new, {"a": "new a", "b": "new b", "d": "new d", "folder/e": "new e"})
        steps = [change_steps.move(change.new / name, place / name) for name in ("a", "b", "folder")]
        steps += [change_steps.move(change.new / "d", place / "deep" / "d"), change_steps.remove(place / "gone")]
        change.commit(steps, done="changed")


def whole_folder(place: Path) -> None:
    """The folder exchanged for another, which takes one file over."""
    with changes.changing(place, doing="changing it") as change:
        ready = written(change.new / "ready", {"a": "new a", "b": "new b", "deep/d": "new d", "folder/e": "new e"})
        (ready / "sub").mkdir()
        steps = [change_steps.link(place / "sub" / "c", ready / "sub" / "c"), change_steps.move(ready, place)]
        change.commit(steps, done="changed")


@pytest.fixture(params=["one system call", "two renames"])
def _exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(change_steps, "_renameat2", lambda: None)


@pytest.mark.usefixtures("_exchanging")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", [several_files, whole_folder])
def test_killed_at_every_file_operation(tmp_path: Path, work: Callable[[Path], None], by: signal.Signals) -> None:
    place = tmp_path / "place"
    seen = set()
    written(place, OLD)
    for number in every_moment(lambda: work(place), by=by, stride=1 if by == signal.SIGKILL else 3):
        before_repair = files_in(place) if place.is_dir() else None
        changes.settle(place)  # what any verb that only reads does first
        found = files_in(place)
        assert found in (OLD, NEW), f"neither at operation {number}"
        seen.add(found == NEW)
        if by != signal.SIGKILL:  # nothing is left to be mended
            assert before_repair == found
        work(place)
        assert files_in(place) == NEW, f"done again after operation {number}"
        assert [p.name for p in tmp_path.iterdir()] == ["place"], "nothing else is left"
        assert all(p.stat().st_nlink == 1 for p in place.rglob("*") if p.is_file())
        shutil.rmtree(place)
        written(place, OLD)
    assert by != signal.SIGKILL or seen == {True, False}, "some deaths came before the change and some after"


def test_a_folder_is_there_at_every_moment(tmp_path: Path) -> None:
    """Looked at without a pause from another process while it is exchanged a hundred times."""
    place = written(tmp_path / "place", OLD)
    watch = "import os, sys\nwhile os.getppid() == int(sys.argv[2]):\n    os.stat(sys.argv[1])\n"
    watcher = subprocess.Popen([sys.executable, "-c", watch, place / "a", str(os.getpid())], stderr=subprocess.PIPE)
    time.sleep(0.2)
    for _ in range(100):
        whole_folder(place)
    assert watcher.poll() is None, watcher.communicate()[1]
    watcher.kill()
    watcher.communicate()


def test_an_interrupt_waits_for_the_end_and_is_not_lost(tmp_path: Path) -> None:
    place = written(tmp_path / "place", OLD)
    codes = {dies_at(n, lambda: several_files(place), by=signal.SIGINT) for n in range(0, 40, 3)}
    assert codes == {INTERRUPTED, ENDED}


def test_what_was_done_is_known(tmp_path: Path) -> None:
    several_files(written(tmp_path / "place", OLD))
    assert changes.done()[-1] == "changed"


def test_a_reader_finishes_what_was_begun_and_sees_one_state(tmp_path: Path) -> None:
    place = written(tmp_path / "place", OLD)
    for _number in every_moment(lambda: several_files(place)):
        with changes.reading(place) as held:
            assert held == place and files_in(place) in (OLD, NEW)
        shutil.rmtree(place)
        shutil.rmtree(tmp_path / ".place.work", ignore_errors=True)
        written(place, OLD)


def test_a_change_waits_for_readers_and_readers_for_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path / "place", OLD)
    with changes.reading(place), changes.reading(place):  # two at once
        changer = threading.Thread(target=several_files, args=(place,))
        changer.start()
        time.sleep(0.3)
        assert files_in(place) == OLD and changer.is_alive()
    changer.join(10)
    assert files_in(place) == NEW
    monkeypatch.setattr(changes, "WAIT_S", 0.2)
    with changes.reading(place), pytest.raises(BuildError, match="reading"):
        whole_folder(place)
    assert files_in(place) == NEW and [p.name for p in tmp_path.iterdir()] == ["place"]


def test_two_changes_at_once_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "place", OLD)
    with changes.changing(place, doing="changing it"), pytest.raises(BuildError, match="Another process is"):
        several_files(place)


@pytest.mark.parametrize("kind", ["folder", "file", "link to a folder", "our files and others", "nested"])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    place, work = written(tmp_path / "place", OLD), tmp_path / ".place.work"
    other = written(tmp_path / "other", {"thesis": "five years"})
    if kind == "folder":
        written(work, {"thesis": "five years"})
    elif kind == "file":
        work.write_text("mine")
    elif kind == "link to a folder":
        work.symlink_to(other)
    elif kind == "nested":
        written(work, {"lock": ""})
        (work / "new").symlink_to(other)
    else:
        written(work, {"lock": "", "thesis": "five years"})
    before = files_in(tmp_path)
    with pytest.raises(UsageError) as caught:
        several_files(place)
    assert "Move" in caught.value.next_step and files_in(tmp_path) == before


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("victim"), os.mkdir])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "victim").write_text("mine")
    make(tmp_path / "lock")
    with pytest.raises(UsageError, match="not a lock of dinoexport"), locks.exclusive(tmp_path / "lock", doing="it"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize(
    "record",
    [
        b"", b"{}", b"[", b'{"steps": 3}', b'{"steps": [["move", "work/new/a", "place/../victim", null]]}',
        b'{"steps": [["remove", null, "place/..", null]]}', b'{"steps": [["remove", null, "/etc/passwd", null]]}',
        b'{"steps": [["remove", null, "place//a", null]]}', b'{"steps": [["remove", null, "place/link/victim", null]]}',
        b'{"steps": [["run", "work/new/a", "place/a", null]]}', b'{"steps": [["move", null, "place/a", null]]}',
        b'{"steps": [["move", "work/new/a", "place/a", "1"]]}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_record_that_is_none_does_nothing(tmp_path: Path, record: bytes) -> None:
    place = written(tmp_path / "place", OLD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "victim").write_text("mine")
    (place / "link").symlink_to(tmp_path / "elsewhere")
    written(tmp_path, {"victim": "mine", ".place.work/lock": "", ".place.work/new/a": "forged"})
    (tmp_path / ".place.work" / "change.json").write_bytes(record)
    before = files_in(tmp_path)
    for verb in (lambda: changes.settle(place), lambda: several_files(place)):
        with pytest.raises(UsageError, match="not a record of a change"):
            verb()
        assert files_in(tmp_path) == before


def test_a_record_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "place", OLD)
    (tmp_path / ".place.work").mkdir()
    os.mkfifo(tmp_path / ".place.work" / "change.json")
    with pytest.raises(UsageError, match="not a record of a change"):
        changes.settle(place)


@pytest.mark.parametrize("place", ["/", "."])
def test_a_place_without_a_name_is_refused_or_resolved(place: str, tmp_path: Path) -> None:
    if place == "/":
        with pytest.raises(UsageError, match="not a place"), changes.changing(Path(place), doing="it"):
            pass
    changes.settle(Path(place))


def test_a_change_that_cannot_go_on_is_finished_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path / "place", OLD)
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "b":
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(BuildError, match="could not be finished") as caught:
            several_files(place)
        assert "finishes it first" in caught.value.next_step
        with pytest.raises(DinoexportError, match="could not be finished"), changes.reading(place):
            pass
    changes.settle(place)
    assert files_in(place) == NEW and [p.name for p in tmp_path.iterdir()] == ["place"]


def test_a_change_whose_first_step_fails_was_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path / "place", OLD)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            several_files(place)
    assert files_in(place) == OLD and [p.name for p in tmp_path.iterdir()] == ["place"]


def test_the_record_says_what_is_to_be(tmp_path: Path) -> None:
    """The format is read by whoever comes next, another version too."""
    place = written(tmp_path / "place", OLD)
    dies_at(20, lambda: several_files(place))
    record = json.loads((tmp_path / ".place.work" / "change.json").read_bytes())
    assert record["steps"][0][:3] == ["move", "work/new/a", "place/a"]
    assert record["steps"][-1][:3] == ["remove", None, "place/gone"]

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
from types import SimpleNamespace
from typing import Any

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


def interrupted_after_one_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of a change whose second step failed."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(BuildError, match="could not be finished"), changes.changing(place, doing="it") as change:
            written(change.new, {"folder/e": "new e", "a": "new a"})
            steps = [
                change_steps.move(change.new / "folder", place / "folder"),
                change_steps.move(change.new / "a", place / "a"),
                change_steps.move(change.new / "later", place / "later"),
                change_steps.link(place / "b", change.new / "c"),
                change_steps.remove(place / "gone"),
            ]
            change.commit(steps, done="changed")
    return place.with_name(".place.work") / "change.json"


def test_the_record_tells_what_was_exchanged_by_the_folders_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = written(tmp_path / "place", OLD)
    record = interrupted_after_one_step(place, monkeypatch)
    assert json.loads(record.read_bytes()) == {
        "steps": [
            ["move", "work/new/folder", "place/folder", (place / "folder").stat().st_ino],
            ["move", "work/new/a", "place/a", (record.parent / "new" / "a").stat().st_ino],
            ["move", "work/new/later", "place/later", None],
            ["link", "place/b", "work/new/c", None],
            ["remove", None, "place/gone", None],
        ]
    }


def test_a_record_is_read_up_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen mebibytes; white space at its end changes nothing."""
    place, most = written(tmp_path / "place", OLD), 16 * 1024 * 1024
    record = interrupted_after_one_step(place, monkeypatch)
    record.write_bytes(record.read_bytes().ljust(most + 1))
    with pytest.raises(UsageError, match="not a regular file of a sensible size"):
        changes.settle(place)
    os.truncate(record, most)
    changes.settle(place)
    assert files_in(place)["a"] == "new a" and "gone" not in files_in(place)


def test_a_place_may_be_a_link_to_a_folder_and_not_to_nothing(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("place")
    with pytest.raises(UsageError, match=r"link is a link to nothing\.$"), changes.changing(link, doing="it"):
        pass
    written(tmp_path / "place", OLD)
    with changes.changing(link, doing="it") as change:
        assert change.place == tmp_path.resolve() / "place"
    assert link.is_symlink()


@pytest.mark.parametrize(("taken_s", "wait_s"), [(0.0, 600.0), (10.0, 590.0), (599.5, 0.5), (700.0, 0.0)])
def test_a_reader_waits_ten_minutes_in_all(
    taken_s: float, wait_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = written(tmp_path / "place", OLD)
    interrupted_after_one_step(place, monkeypatch)
    times = iter((1000.0, 1000.0 + taken_s))
    waits, exclusive = [], locks.exclusive

    def recorded(path: Path, **options: Any) -> Any:
        waits.append(options.pop("wait_s"))
        return exclusive(path, **options)

    monkeypatch.setattr(locks, "exclusive", recorded)
    monkeypatch.setattr(changes, "time", SimpleNamespace(monotonic=lambda: next(times)))
    changes.settle(place)
    assert waits == [wait_s]


@pytest.mark.parametrize("settles", [False, True])
def test_a_work_folder_that_somebody_looks_into_stays(
    settles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a folder whose files are open elsewhere."""
    place, rmdir = written(tmp_path / "place", OLD), os.rmdir

    def busy(path: Any, **options: Any) -> None:
        if Path(os.fsdecode(path)).name == ".place.work":
            raise OSError(16, "Device or resource busy")
        rmdir(path, **options)

    if settles:
        interrupted_after_one_step(place, monkeypatch)
    monkeypatch.setattr(os, "rmdir", busy)
    if settles:
        changes.settle(place)
    else:
        several_files(place)
    assert files_in(place)["a"] == "new a" and (tmp_path / ".place.work").is_dir()


def test_five_strange_files_are_named(tmp_path: Path) -> None:
    written(tmp_path / ".place.work", dict.fromkeys("fedcba", ""))
    with pytest.raises(UsageError, match=r"holds files that dinoexport did not write: a, b, c, d, e\.$"):
        several_files(tmp_path / "place")


def test_a_signal_in_the_middle_is_heard_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, replace = written(tmp_path / "place", OLD), os.replace
    heard: list[tuple[int, dict[str, str]]] = []

    def terminated(source: Path, target: Path) -> None:
        if target.name == "a":
            signal.raise_signal(signal.SIGTERM)
        replace(source, target)

    monkeypatch.setattr(os, "replace", terminated)
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append((number, files_in(place))))
    try:
        several_files(place)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [(signal.SIGTERM, NEW)]


def test_a_change_that_an_earlier_process_began_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when its first step, which was done already, fails."""
    place = written(tmp_path / "place", OLD)
    record = interrupted_after_one_step(place, monkeypatch)

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setitem(change_steps.STEPS, "move", broken)
        with pytest.raises(BuildError, match="Input/output error"):
            changes.settle(place)
    assert record.is_file()
    changes.settle(place)
    assert files_in(place)["a"] == "new a"

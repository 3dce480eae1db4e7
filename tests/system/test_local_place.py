"""A folder as a place: whose unfinished files are removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinoexport.system.store import LocalPlace, local
from dinoexport.system.store.place import host


def test_only_drafts_of_dead_processes_are_swept(tmp_path: Path) -> None:
    """A killed process that nobody waits for, as under a container's PID 1, is dead too."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    names = {whose: f".part.{host()}.{pid}.partial" for whose, pid in (("its", ended.pid), ("ours", os.getpid()))}
    names["elsewhere"] = f".part.another-machine.{ended.pid}.partial"
    for name in names.values():
        (tmp_path / name).touch()
    try:
        if not sys.platform.startswith("linux"):
            pytest.skip("a dead process that was not waited for is recognised on Linux only")
        LocalPlace(tmp_path).sweep()
    finally:
        ended.wait()
    assert {path.name for path in tmp_path.iterdir()} == {names["ours"], names["elsewhere"]}


@pytest.mark.parametrize(
    ("stat", "killed", "alive"),
    [
        ("7 (a b) S 1 7", None, True),
        ("7 (a) R 1 7", None, True),
        ("7 (a) Z 1 7", None, False),
        ("7 (Z) X) S Z 7", None, True),
        ("7 (a) X 1 7", None, False),
        (None, None, True),
        (None, ProcessLookupError(), False),
        (None, PermissionError(), True),
    ],
)
def test_which_processes_are_dead(
    stat: str | None, killed: OSError | None, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not show a process, a signal that does nothing tells whether there is one."""
    asked: list[Any] = []

    def read_text(path: Path) -> str:
        asked.append(str(path))
        if stat is None:
            raise FileNotFoundError
        return stat

    def kill(*what: int) -> None:
        asked.append(what)
        if killed is not None:
            raise killed

    draft, names = f".part.{host()}.7.partial", (f".part.{host()}-2.8.partial", ".part.partial", "part")
    for name in (draft, *names):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        patch.setattr(os, "kill", kill)
        LocalPlace(tmp_path).sweep()
    assert asked == ["/proc/7/stat", *([(7, 0)] if stat is None else [])]
    assert {path.name for path in tmp_path.iterdir()} == {*names, *([draft] if alive else [])}


def test_a_draft_that_another_process_removes_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tmp_path / f".part.{host()}.7.partial"
    draft.touch()
    monkeypatch.setattr(local, "_alive", lambda _pid: bool(draft.unlink()))
    LocalPlace(tmp_path).sweep()
    LocalPlace(tmp_path).remove("none")
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_file_is_new_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    place = LocalPlace(tmp_path / "place")
    place.upload(tmp_path / "file", "a", new=True)
    (tmp_path / "file").write_bytes(b"2")
    with pytest.raises(FileExistsError):
        place.upload(tmp_path / "file", "a", new=True)
    assert place.read("a") == b"1"
    place.upload(tmp_path / "file", "a")
    assert place.read("a") == b"2" and place.names() == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_written_by_one(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes later is told so, which is no error of the disk; also on file systems without links."""

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    place = LocalPlace(tmp_path)
    place.write("a/b", b"first", new=True)
    with pytest.raises(FileExistsError, match=r"^a/b$"):
        place.write("a/b", b"second", new=True)
    assert place.read("a/b") == b"first"
    place.write("a/b", b"third")
    assert place.read("a/b") == b"third"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_files_are_listed_with_their_sizes_and_links_are_not(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "deep" / "er" / "b").write_bytes(b"4567")
    (tmp_path / "to a").symlink_to("a")
    (tmp_path / "to deep").symlink_to("deep")
    place = LocalPlace(tmp_path)
    assert sorted(place.files()) == [("a", 3), ("deep/er/b", 4)]
    assert list(place.files("deep")) == [("deep/er/b", 4)] and list(place.files("none")) == []

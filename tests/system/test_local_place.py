"""A folder as a place: whose unfinished files are removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinoexport.system.store import LocalPlace
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

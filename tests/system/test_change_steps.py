"""The steps of a change repeated by another process after they were begun or done, with and without an exchange."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path
from typing import Any

import pytest

from dinoexport.system import change_steps
from dinoexport.system.change_steps import STEPS


def folder(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(content)
    return path


def moved(tmp_path: Path, *, exchanged: bool = False) -> tuple[str, str]:
    """What is in the target and what was put away after a folder was moved onto another.

    exchanged: as after a process that was killed between the exchange and the end of the step.
    """
    source, target, old = folder(tmp_path / "new", "new"), folder(tmp_path / "place", "old"), tmp_path / "old"
    inode = source.lstat().st_ino
    if exchanged:
        source.rename(tmp_path / "between")
        target.rename(source)
        (tmp_path / "between").rename(target)
    STEPS["move"](change_steps.move(source, target), inode, old)
    assert not source.exists()
    return (target / "file").read_text(), (old / "file").read_text()


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_folder_is_moved_once_however_often_it_is_tried(exchanged: bool, tmp_path: Path) -> None:
    assert moved(tmp_path, exchanged=exchanged) == ("new", "old")


def test_a_system_without_an_exchange_gets_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_steps, "_renameat2", lambda: None)
    assert moved(tmp_path) == ("new", "old")


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def rename(*_: Any) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(change_steps, "_renameat2", lambda: rename)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV])
def test_a_file_system_that_cannot_exchange_gets_two_renames(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, number)
    assert moved(tmp_path) == ("new", "old")


def test_any_other_fault_of_an_exchange_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        change_steps._exchange(tmp_path / "none", tmp_path / "no other")
    failing(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        moved(tmp_path)
    assert (tmp_path / "place" / "file").read_text() == "old"


def test_a_link_that_is_there_or_whose_folder_has_gone_on_is_done(tmp_path: Path) -> None:
    source, target = folder(tmp_path / "place", "old") / "file", folder(tmp_path / "new", "there") / "file"
    STEPS["link"](change_steps.link(source, target), None, tmp_path / "old")
    assert target.read_text() == "there"
    STEPS["link"](change_steps.link(source, tmp_path / "gone" / "file"), None, tmp_path / "old")
    assert not (tmp_path / "gone").exists()

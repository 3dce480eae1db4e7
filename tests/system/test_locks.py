"""Locks of this process against itself: how long they are waited for, what is told meanwhile, and odd file systems."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import BuildError
from dinoexport.system import locks


def of_a_file(place: Path, **options: Any) -> AbstractContextManager[None]:
    return locks.exclusive(place / "lock", doing="building it", **options)


def of_a_folder(place: Path, **options: Any) -> AbstractContextManager[None]:
    return locks.folder(place, write=True, doing="building it", **options)


@pytest.mark.parametrize("lock", [of_a_file, of_a_folder])
@pytest.mark.parametrize(("wait_s", "told"), [(0.0, 0), (0.5, 2), (0.51, 3)])
def test_a_lock_is_waited_for_so_long_and_no_longer(
    lock: Callable[..., AbstractContextManager[None]],
    wait_s: float,
    told: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tried every quarter of a second: at half a second it is over, and somebody was told each time before."""
    pauses: list[float] = []
    clock: Any = SimpleNamespace(monotonic=lambda: 100.0 + sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(locks, "time", clock)
    monkeypatch.setattr(locks, "_POLL_S", 0.25)
    heard: list[tuple[str, int, int]] = []
    with (
        lock(tmp_path, wait_s=0.0),
        pytest.raises(BuildError, match=r"^Another process is building it\."),
        lock(tmp_path, wait_s=wait_s, progress=lambda *what: heard.append(what)),
    ):
        pass
    assert heard == [("waiting for another process that is building it", 0, 0)] * told
    assert pauses == [0.25] * told


def test_a_lock_is_tried_twenty_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is made where there is none."""
    pauses: list[float] = []
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append))
    place = tmp_path / "deep" / "er"
    with of_a_file(place), pytest.raises(BuildError), of_a_file(place, wait_s=0.125):
        pass
    assert pauses == [0.05] * 3


def test_a_file_is_not_waited_for_unless_somebody_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.time, "sleep", lambda _s: pytest.fail("it waits"))
    with of_a_file(tmp_path), pytest.raises(BuildError), of_a_file(tmp_path):
        pass


def test_a_file_that_its_holder_removed_is_made_and_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, flock = tmp_path / "lock", fcntl.flock
    removed: list[bool] = []

    def removes_it_once(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if not removed:
            place.unlink()
            removed.append(True)

    monkeypatch.setattr(fcntl, "flock", removes_it_once)
    with of_a_file(tmp_path):
        assert removed and place.is_file()


def test_who_may_use_the_place_may_lock_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with of_a_file(tmp_path):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


@pytest.mark.parametrize("lock", [of_a_file, of_a_folder])
def test_a_file_system_without_locks_keeps_nobody_out_and_a_broken_one_is_an_error(
    lock: Callable[..., AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(number: int) -> None:
        def flock(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        answers(number)
        with lock(tmp_path, wait_s=0.0), lock(tmp_path, wait_s=0.0):
            pass
    answers(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), lock(tmp_path, wait_s=0.0):
        pass

"""Work in a child process, with a stand-in of the child: what it is given, and what is made of its messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import BuildError
from dinoexport.system import subprocess_job
from dinoexport.system.subprocess_job import Finished

PROGRESS = b'{"phase": "parsing", "done": 1, "total": 4}\n'


class Child:
    """Each round it writes a message or closes its end (None); after the last one it ends with `code`.

    A quarter of a second passes from each look at the clock to the next, the first of which is at 100 s.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *rounds: bytes | None, code: int | None = 0) -> None:
        self.rounds, self.code = list(rounds), code
        self.pid, self.returncode, self.ended_by = 7, None, []  # type: ignore[var-annotated]
        self.waits: list[Any] = []
        self.looks = 0
        popen = SimpleNamespace(Popen=self.begin, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(subprocess_job, "subprocess", popen)
        monkeypatch.setattr(subprocess_job, "select", SimpleNamespace(select=self.select))
        monkeypatch.setattr(subprocess_job, "time", SimpleNamespace(monotonic=self.now, sleep=self.waits.append))
        monkeypatch.setattr(os, "wait4", self.wait4)

    def begin(self, words: list[str], **how: Any) -> Any:
        self.words, self.how = words, how
        (end,) = how["pass_fds"]
        assert how["env"]["DINOEXPORT_REPORT"] == str(end)
        self.end: int | None = os.dup(end)
        how["stdout"].write(b"the log\n")
        return self

    def now(self) -> float:
        self.looks += 1
        return 99.75 + self.looks / 4

    def select(self, pipes: list[int], *_: Any) -> Any:
        self.waits.append(("select", _[-1]))
        message = self.rounds.pop(0) if self.rounds else b""
        if message is None and self.end is not None:
            os.close(self.end)
            self.end = None
        if message and self.end is not None:
            os.write(self.end, message)
        return (pipes if message or self.end is None else []), [], []

    def wait4(self, pid: int, options: int) -> Any:
        assert (pid, options) == (7, os.WNOHANG)
        if self.rounds or self.code is None:
            return 0, 0, None
        return 7, self.code << 8, SimpleNamespace(ru_maxrss=3)

    def kill(self) -> None:
        self.ended_by.append("kill")

    def wait(self) -> None:
        self.ended_by.append("wait")


def ran(tmp_path: Path, *, timeout_s: float = 60.0) -> tuple[Finished, list[Any]]:
    steps: list[Any] = []
    found = subprocess_job.run(
        "package.module", {"a": 1}, tmp_path / "log", environment={"ONE": "1"}, doing="compiling", timeout_s=timeout_s,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    return found, steps


def test_a_child_that_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages may come in pieces, several at once, and before a pause. Memory is in KiB."""
    first, rest = PROGRESS[:9], PROGRESS[9:] + b'{"said": {"x": 1}}\n{"said": {"y": 2}, "phase": "p", "do'
    child = Child(monkeypatch, first, b"", rest, b'ne": 0, "total": 0}\n', None, b"")
    found, steps = ran(tmp_path)
    assert found == Finished(said={"x": 1, "y": 2}, peak_memory_bytes=3072)
    assert steps == [("compiling: parsing", 1, 4), ("compiling: p", 0, 0)]
    assert child.words == [sys.executable, "-m", "package.module", json.dumps({"a": 1})]
    assert child.how["env"]["ONE"] == "1" and child.how["env"].keys() > os.environ.keys() - {"ONE"}
    assert (child.how["stdin"], child.how["stderr"]) == (subprocess.DEVNULL, subprocess.STDOUT)
    look = ("select", 0.1)
    assert child.waits == [look, look, look, look, look, 0.1, look, 0.1], "a closed pipe is always ready"
    assert child.ended_by == [] and (tmp_path / "log").read_bytes() == b"the log\n"


def test_a_child_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch, PROGRESS, code=3)
    with pytest.raises(BuildError) as failed:
        ran(tmp_path)
    assert failed.value.message == "compiling failed: the log" and child.ended_by == []


def test_a_child_that_takes_too_long_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not yet where exactly that time has passed, which is at the fifth look."""
    child = Child(monkeypatch, code=None)
    with pytest.raises(BuildError) as failed:
        ran(tmp_path, timeout_s=1.0)
    assert failed.value.message == "compiling took more than 1 s and was stopped."
    assert child.looks == 6 and child.ended_by == ["kill", "wait"]


def test_a_child_does_not_outlive_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch, PROGRESS, b"", code=None)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subprocess_job.run(
            "m", {}, tmp_path / "log", environment={}, doing="it", timeout_s=9.0, progress=interrupted
        )  # fmt: skip
    assert child.ended_by == ["kill", "wait"]

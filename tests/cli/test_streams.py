"""Standard input, output and error that are full, closed, without end or not UTF-8: one error, no traceback."""

from __future__ import annotations

import errno
import gc
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from dinoexport import cli
from dinoexport.cli.streams import OutputLost, guarded

LOST = OSError(errno.ENOSPC, "No space left on device")


class Raw(io.RawIOBase):
    """A file of its own; each write fails with `error` where there is one."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        if self.error is not None:
            raise self.error
        self.written += bytes(piece)
        return len(piece)


class Streams:
    """Standard output and error of a test, with a buffer of text as Python's own have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, encoding: str = "utf-8") -> None:
        self.out, self.err = Raw(), Raw()
        for name, raw in (("stdout", self.out), ("stderr", self.err)):
            made = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, line_buffering=False)
            monkeypatch.setattr(sys, name, made)


def test_output_is_buffered_and_messages_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are the caller's own again afterwards, whole and open. What they cannot show is shown by its code."""
    made = Streams(monkeypatch, encoding="ascii")
    before = sys.stdout, sys.stderr
    with guarded():
        assert sys.stdout is not before[0] and sys.stderr is not before[1]
        assert (sys.stdout.write(""), sys.stdout.write("é\n"), sys.stderr.write("ü\n")) == (0, 2, 2)
        assert (made.out.written, made.err.written) == (b"", b"\\xfc\n")
    assert (sys.stdout, sys.stderr) == before and made.out.written == b"\\xe9\n"
    before[0].buffer.write(b"still open")
    before[0].buffer.flush()
    assert made.out.written == b"\\xe9\nstill open"


def test_a_stream_that_is_no_file_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made, memory = Streams(monkeypatch), io.StringIO()
    monkeypatch.setattr(sys, "stderr", memory)
    with guarded():
        assert sys.stderr is memory
        sys.stdout.write("x")
    assert made.out.written == b"x" and sys.stderr is memory


def test_lost_output_is_an_error_and_lost_messages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loss is told again, though the next write would go to the null device."""
    made = Streams(monkeypatch)
    made.out.error = made.err.error = LOST
    with guarded():
        assert sys.stderr.write("message\n") == 8
        assert sys.stderr.write("another\n") == 8
        sys.stderr.flush()
        sys.stdout.write("result")
        with pytest.raises(OutputLost) as lost:
            sys.stdout.flush()
        assert lost.value.message == "The output cannot be written: No space left on device."
        assert not lost.value.reader_left
        assert sys.stdout.write("") == 0
        with pytest.raises(OutputLost):
            sys.stdout.write("more")


def test_the_command_line_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bench leaves PyTorch's threads as its users have them; the collector walks what is loaded seldom."""
    set_to: list[Any] = []
    monkeypatch.setattr("dinoexport.cli.interrupts.leave_at_once", lambda: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(gc, "set_threshold", lambda *levels: set_to.append(levels))
    monkeypatch.setattr(gc, "freeze", lambda: set_to.append("frozen"))
    for words, policy in (
        (["list"], "PASSIVE"),
        (["bench", "B"], None),
        (["list", "bench"], "PASSIVE"),
        ([], "PASSIVE"),
    ):
        monkeypatch.setattr(sys, "argv", ["dinoexport", *words])
        monkeypatch.setattr(cli, "app", lambda: set_to.append(os.environ.get("OMP_WAIT_POLICY")))
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert set_to == [(100_000, 50, 100), policy, "frozen"]
        set_to.clear()
    assert warnings.formatwarning("a\x1b[2J", UserWarning, "file", 1) == "UserWarning: a\\x1b[2J\n"


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


def run(words: str, shell: str, *, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """`dinoexport WORDS` with a shell's redirections."""
    command = f'exec "$0" -m dinoexport {words} {shell}'
    env = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    return subprocess.run(
        ["bash", "-c", command, sys.executable], capture_output=True, text=True, timeout=120, env=env, check=False
    )


@needs_full
@pytest.mark.parametrize("words", ["list", "schema", "--help", "--version"])
def test_output_that_cannot_be_written_is_one_error(words: str) -> None:
    for unbuffered in (False, True):
        ran = run(words, ">/dev/full", unbuffered=unbuffered)
        assert ran.returncode == 4
        assert ran.stderr.startswith("error: The output cannot be written: No space left on device.\n  next: ")
        assert ran.stderr.count("\n") == 2


@needs_full
def test_lost_messages_do_not_change_the_exit_code() -> None:
    for shell in ("2>/dev/full", "2>&-", ">/dev/full 2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"):
        assert run("inspect nowhere", shell).returncode == 2, shell


def test_a_reader_that_leaves_is_told_nothing() -> None:
    ran = run("schema", "| (exec head -c 1 >/dev/null; exit 0)")
    assert "Traceback" not in ran.stderr and "error" not in ran.stderr


def test_a_closed_output_is_never_taken_by_a_file(tmp_path: Path) -> None:
    """A file that is opened first would get the number 1 or 2, and what a library prints would be written into it."""
    code = (
        "from dinoexport.cli.streams import three_descriptors as d; d(); import os; "
        "print(os.open(os.devnull, 0), file=open('n', 'w'))"
    )
    subprocess.run(["bash", "-c", f'exec "$0" -c "{code}" <&- >&- 2>&-', sys.executable], cwd=tmp_path, check=True)
    assert int((tmp_path / "n").read_text()) > 2


@pytest.mark.parametrize(
    ("source", "told"),
    [("</dev/zero", "stdin has more than"), ("<<<$'caf\\xe9'", "stdin is not UTF-8"), ("<&-", "error: ")],
)
def test_a_prompt_on_stdin_that_is_none(source: str, told: str) -> None:
    ran = run("generate nowhere -", source)
    assert ran.returncode == 2 and told in ran.stderr and "Traceback" not in ran.stderr

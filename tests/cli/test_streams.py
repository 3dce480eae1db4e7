"""Standard input, output and error that are full, closed, without end or not UTF-8: one error, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

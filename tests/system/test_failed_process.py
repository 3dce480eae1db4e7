"""The one error for a process that failed, by its exit code and the last lines of its log."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.system import subprocess_job


@pytest.mark.parametrize(
    ("code", "log", "kind", "message"),
    [
        (1, "first\nlast\n", BuildError, "it failed: last"),
        (1, "", BuildError, "it failed: Its log is empty."),
        (
            1,
            "[E] one\nbetween\n[!] two  \n[E] three\n[E] four\nlast\n",
            BuildError,
            "it failed: [E] one [!] two [E] three",
        ),
        (1, "x" * 700, BuildError, "it failed: " + "x" * 600),
        (-signal.SIGSEGV, "last", BuildError, "it died of SIGSEGV: last"),
        (-signal.SIGHUP, "last", BuildError, "it died of SIGHUP: last"),
        (-signal.SIGKILL, "last", MissingRequirement, "it was killed, most likely because memory ran out. last"),
    ],
)
def test_a_failure_is_told_by_what_the_log_says(
    code: int, log: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(log)
    found = subprocess_job._failure(code, "it", tmp_path / "log")
    assert type(found) is kind and found.message == message

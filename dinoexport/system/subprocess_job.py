"""Run work in a subprocess: with a log, a time limit, peak memory, progress, and one error if it fails.

For compilers: they may crash, and some read their settings at import. The subprocess is always terminated with its
parent.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.spec import Progress, silent

REPORT = "DINOEXPORT_REPORT"
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The messages of a child that ended without error, and its peak memory."""

    said: Mapping[str, Any]
    peak_memory_bytes: int


def run(
    module: str,
    job: Mapping[str, Any],
    log: Path,
    *,
    environment: Mapping[str, str],
    doing: str,
    timeout_s: float,
    progress: Progress = silent,
) -> Finished:
    """Runs `python -m module JOB`, JOB as JSON, with its output in `log`; raises one error if it fails, dies or hangs.

    On the file descriptor DINOEXPORT_REPORT the child writes one JSON object per line: `{"phase", "done", "total"}` for
    progress, and `{"said"}` with its result at the end.
    """
    reports, childs_end = os.pipe()
    with log.open("wb") as out, os.fdopen(childs_end, "wb") as end:
        process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
            [sys.executable, "-m", module, json.dumps(job)],
            env={**os.environ, **environment, REPORT: str(end.fileno())},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=[end.fileno()],
        )
    started = time.monotonic()
    said: dict[str, Any] = {}
    heard = b""
    try:
        while process.returncode is None:
            heard += _read(reports)
            *lines, heard = heard.split(b"\n")
            for message in map(json.loads, lines):
                said |= message.get("said", {})
                if "phase" in message:
                    progress(f"{doing}: {message['phase']}", message["done"], message["total"])
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - started > timeout_s:
                raise BuildError(
                    f"{doing} took more than {timeout_s:.0f} s and was stopped.",
                    next_step="Use fewer or narrower profiles, or a faster preset.",
                )
    finally:
        os.close(reports)
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise _failure(process.returncode, doing, log)
    return Finished(said=said, peak_memory_bytes=usage.ru_maxrss * 1024)


def _read(pipe: int) -> bytes:
    """The content of the pipe, after a wait if it is empty or closed."""
    ready, _, _ = select.select([pipe], [], [], _POLL_S)
    found = os.read(pipe, 1 << 20) if ready else b""
    if ready and not found:  # closed: the child is about to end
        time.sleep(_POLL_S)
    return found


def _failure(code: int, doing: str, log: Path) -> BuildError | MissingRequirement:
    """One error for a child that failed or died, with the last lines of its log."""
    lines = log.read_text(errors="replace").splitlines()
    useful = [line.strip() for line in lines if line.startswith(("[E]", "[!]"))] or lines[-1:]
    said = " ".join(useful[:3])[:600] or "Its log is empty."
    if code == -signal.SIGKILL:
        return MissingRequirement(
            f"{doing} was killed, most likely because memory ran out. {said}",
            next_step="Give it more memory: 1.1 billion weights in fp16 need 8 GB.",
        )
    cause = f"died of {signal.Signals(-code).name}" if code < 0 else "failed"
    return BuildError(f"{doing} {cause}: {said}", next_step="Report it with the recipe.")

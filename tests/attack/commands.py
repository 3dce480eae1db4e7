"""A command line in a forked process that is watched: how it ended, what it said, its time and its memory."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# What a shell and a user know; see `dinoexport --help`.
EXIT_CODES = frozenset({0, 1, 2, 3, 4, 5, 130})
_TRACEBACK = 70
# A longer step means that this process was stopped, and the one it watches with it: that is no time it took.
_STEP_MAX_S = 1.0
# C0 without line end and tab, C1, marks of direction: what no line may hold.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command line ended. status: the exit code, or minus the signal. grown_bytes: of its memory, at most."""

    status: int
    words: str
    seconds: float
    grown_bytes: int
    too_long: bool
    too_large: bool

    @property
    def faults(self) -> list[str]:
        """What no command line may do, whatever it is given."""
        found = []
        if self.status == _TRACEBACK or "Traceback (most recent" in self.words:
            found.append("traceback")
        elif self.too_long:
            found.append("hangs")
        elif self.too_large:
            found.append("memory")
        elif self.status not in EXIT_CODES:
            found.append("dies")
        if self.status in EXIT_CODES - {0, 130} and "error:" not in self.words and "Usage:" not in self.words:
            found.append("no error said")
        if _STEERS.search(self.words):
            found.append("steers the terminal")
        return found


def run(arguments: Sequence[str], folder: Path, *, limit_s: float = 60.0, limit_bytes: int = 3 << 29) -> Ended:
    """Runs `dinoexport ARGUMENTS` in `folder`; a process that takes longer or more memory is killed.

    Its time is that of a machine without other load: a process that is starved or stopped does not hang.
    """
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            _become(arguments, folder, said.fileno())
        seen, grown, first = time.monotonic(), 0, _resident_bytes(child)
        waited = 0.0
        too_long = too_large = False
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            grown = max(grown, _resident_bytes(child) - first)
            now = time.monotonic()
            waited, seen = waited + _share() * min(now - seen, _STEP_MAX_S), now
            too_long, too_large = waited > limit_s, grown > limit_bytes
            if too_long or too_large:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.005)
        said.seek(0)
        words = said.read(1 << 22).decode("utf-8", errors="surrogateescape")
    return Ended(
        status=os.waitstatus_to_exitcode(status), words=words, seconds=waited, grown_bytes=grown,
        too_long=too_long, too_large=too_large,
    )  # fmt: skip


def _measure_briefly() -> None:
    """What `bench` does is attacked, not how long: a measurement of half a minute is cut to a second."""
    from dinoexport import bench

    bench._BUDGET_S, bench._ROUNDS, bench._GEMM_ROUNDS = 0.1, 2, 1


def _share() -> float:
    """Which part of a processor a process gets: on a loaded machine everything takes longer and nothing hangs."""
    return min(1.0, (os.cpu_count() or 1) / max(1.0, os.getloadavg()[0]))


def _become(arguments: Sequence[str], folder: Path, said: int) -> None:
    code = _TRACEBACK
    try:
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(source, target)
        sys.stdout, sys.stderr = _writer(1), _writer(2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        sys.argv = ["dinoexport", *arguments]
        if "bench" in arguments:
            _measure_briefly()
        from dinoexport.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _writer(descriptor: int) -> TextIO:
    return open(descriptor, "w", closefd=False, errors="backslashreplace")


def _resident_bytes(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def load() -> None:
    """Loads what command lines load, so that each of a thousand is a fork; no runtime is opened here, nothing run."""
    import onnx  # noqa: F401
    import torch

    import dinoexport.cli
    import dinoexport.embed.run
    import dinoexport.pipeline.build
    import dinoexport.pipeline.fit.flow
    import dinoexport.report.html_report
    import dinoexport.serving.check
    import dinoexport.serving.triton.model_repository
    import dinoexport.text.service
    import dinoexport.validation.validate_bundle  # noqa: F401
    from dinoexport.runtime import telemetry

    telemetry.onnxruntime()
    telemetry.openvino()
    torch.set_num_threads(1)

"""The command line: the only package that prints or exits. Heavy packages are imported when a command needs them."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from typing import Any, NoReturn

from dinoexport.cli import build, embed, engines, fit, inspect, registry, serve, streams, text
from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.escaping import printable
from dinoexport.cli.terminal import output_lost
from dinoexport.system import interrupts

__all__ = ["EXIT_CODES", "app", "build", "embed", "engines", "fit", "inspect", "main", "registry", "serve", "text"]


def main() -> NoReturn:
    """Runs the command line. SIGTERM ends like Ctrl-C, so that it too leaves nothing half written."""
    interrupts.leave_at_once()
    warnings.formatwarning = _warning
    # The objects of PyTorch and its tracer live until the end. Garbage collection walked them repeatedly: a quarter
    # of the time of tracing, and 1.2 s at the end of every command that had imported them.
    gc.set_threshold(100_000, 50, 100)
    # PyTorch's threads spin where they wait for each other: beside a dozen other processes a decoder's reference took
    # ten times the CPU time that one thread needs. `bench` times PyTorch as its users have it.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with streams.guarded():
            try:
                app()
            except streams.OutputLost as lost:
                output_lost(lost)
    finally:
        gc.freeze()
    sys.exit(0)


def _warning(message: Any, category: type[Warning], *_place: Any, **_named: Any) -> str:
    """A library's warning as one line of visible characters, for it may quote a file."""
    return f"{category.__name__}: {printable(str(message))}\n"

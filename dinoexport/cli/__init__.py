"""The command line: the only package that prints or exits. Heavy packages are imported when a command needs them."""

from __future__ import annotations

import gc
import io
import sys
from typing import NoReturn

from dinoexport.cli import build, embed, engines, fit, inspect, serve, text
from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.system import interrupts

__all__ = ["EXIT_CODES", "app", "build", "embed", "engines", "fit", "inspect", "main", "serve", "text"]


def main() -> NoReturn:
    """Runs the command line. SIGTERM ends like Ctrl-C, so that it too leaves nothing half written."""
    interrupts.leave_at_once()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no letter for is shown as its code
            stream.reconfigure(errors="backslashreplace")
    # PyTorch and its tracer are objects that live to the end. Walking them again and again took a quarter of the time
    # of tracing, and once more at the end 1.2 s of every command that had imported them.
    gc.set_threshold(100_000, 50, 100)
    try:
        app()
    finally:
        gc.freeze()
    sys.exit(0)

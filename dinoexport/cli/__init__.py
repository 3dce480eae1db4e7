"""The verbs. The only package that prints or exits; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import gc
import signal
import sys
from typing import Any, NoReturn

from dinoexport.cli import build, fit, inspect, serve
from dinoexport.cli.app import EXIT_CODES, app

__all__ = ["EXIT_CODES", "app", "build", "fit", "inspect", "main", "serve"]


def main() -> NoReturn:
    """The console entry point. SIGTERM ends like Ctrl-C, so that it too leaves nothing half written."""
    signal.signal(signal.SIGTERM, _interrupt)
    # PyTorch and its tracer are objects that live to the end. Walking them again and again took a quarter of the time
    # of tracing, and once more at the end 1.2 s of every command that had imported them.
    gc.set_threshold(100_000, 50, 100)
    try:
        app()
    finally:
        gc.freeze()
    sys.exit(0)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt

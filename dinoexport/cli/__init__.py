"""The verbs. The only package that prints or exits; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

from dinoexport.cli import looking, making, serving
from dinoexport.cli.app import EXIT_CODES, app

__all__ = ["EXIT_CODES", "app", "looking", "main", "making", "serving"]


def main() -> NoReturn:
    """The console entry point. SIGTERM ends like Ctrl-C, so that it too leaves nothing half written."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()
    sys.exit(0)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt

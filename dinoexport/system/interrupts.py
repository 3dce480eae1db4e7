"""Handle Ctrl-C and SIGTERM: end cleanly at any moment, with a true last message. Standard library only."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 130  # what a shell reports for Ctrl-C
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
# A compiled library may ask an object for its text, and drop the interrupt that is raised then: pydantic-core does.
_dropped: list[type[BaseException]] = []


def last_words() -> str:
    """The state that an interrupted process leaves behind, in one sentence."""
    changes = sys.modules.get("dinoexport.system.changes")  # loading it now would take time
    done = " ".join(changes.done()) if changes is not None else ""
    if done:
        return f"Interrupted. It came after this was done: {done}"
    return "Interrupted. Nothing was changed; finished stages of a build are kept and reused."


def leave_at_once() -> None:
    """From now on either signal ends the process with a message and no traceback, because no work is in progress."""
    _handle(_leave)


@contextmanager
def raised() -> Iterator[None]:
    """While the block runs either signal raises KeyboardInterrupt, if `leave_at_once` was called before.

    One that a library dropped is raised when the block ends, in place of its result.
    """
    if signal.getsignal(signal.SIGTERM) is not _leave:
        yield
        return
    _dropped.clear()
    _handle(_raise)
    before, sys.unraisablehook = sys.unraisablehook, _keep
    try:
        yield
    finally:
        sys.unraisablehook = before
        _handle(_leave)
        if _dropped:
            raise KeyboardInterrupt


def _handle(handler: Any) -> None:
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background jobs ignore Ctrl-C
            signal.signal(number, handler)


def _raise(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _keep(dropped: Any) -> None:
    """Python's hook for an exception that cannot reach its caller."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        _dropped.append(dropped.exc_type)
    else:
        sys.__unraisablehook__(dropped)


def _leave(_number: int, _frame: Any) -> None:
    words = last_words().encode(errors="backslashreplace")
    os.write(2, b"\n" + bytes(byte if byte >= 0x20 else 0x3F for byte in words) + b"\n")
    os._exit(EXIT_CODE)

"""Processes that die, or are interrupted, before the n-th of their file operations: rename, link, remove, write.

The work runs in a forked process, so that a whole program's run costs milliseconds, and CPython's own audit events say
when an operation is about to happen.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_CHANGING = frozenset(
    {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "dinoexport.exchange"}
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ENDED, FAILED, INTERRUPTED = 0, 1, 130
_LIMIT = 2000


def dies_at(number: int, work: Callable[[], object], *, by: signal.Signals = signal.SIGKILL) -> int:
    """The exit status of `work` in a process that gets the signal before its `number`-th file operation, from 0.

    ENDED when it had fewer; minus the signal when that ended it; INTERRUPTED when it raised KeyboardInterrupt.
    """
    child = os.fork()
    if child == 0:
        _run(number, work, by)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _run(number: int, work: Callable[[], object], by: signal.Signals) -> None:
    left = number

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _CHANGING or (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
            left -= 1
            if left == -1:
                os.kill(os.getpid(), by)

    code = FAILED
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.addaudithook(hook)
        work()
        code = ENDED
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def every_moment(work: Callable[[], object], *, by: signal.Signals = signal.SIGKILL, stride: int = 1) -> Iterator[int]:
    """Lets `work` die once before each of its file operations; yields after each death, for the place to be looked at.

    The caller puts the place back to what it was in between. stride: 3 takes every third operation, from a chance one,
    where all of them would take too long for a test; `make attack` takes them all.
    """
    first = 0 if stride == 1 else random.randrange(stride)
    for number in range(first, _LIMIT, stride):
        status = dies_at(number, work, by=by)
        if status == ENDED:
            assert number > first, "it did nothing"
            return
        assert status in (-by, INTERRUPTED), f"it ended with {status} at operation {number}"
        yield number
    raise AssertionError(f"more than {_LIMIT} operations")

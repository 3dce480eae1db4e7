"""One deadline for a whole HTTP answer, even if the server sends it byte by byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self


class Deadline:
    """Shuts down its connection when the time is up, so that a blocked reader returns.

    A timeout of urllib3 applies to one read: a server that sends single bytes never exceeds it. expired: whether the
    time was up.
    """

    def __init__(self, seconds: float, *shuts: Callable[[], object]) -> None:
        self.expired = False
        self._shuts = list(shuts)
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        _asking.deadline = self
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        _asking.deadline = None

    def also(self, shut: Callable[[], object]) -> None:
        """Adds a function that shuts the connection down."""
        self._shuts.append(shut)
        if self.expired:
            self._shut()

    def _shut(self) -> None:
        self.expired = True
        for shut in self._shuts:
            with suppress(Exception):  # it may not be open yet, or already be closed
                shut()


# The deadline of the request that each thread is waiting for.
_asking = threading.local()


def watched(pool_class: Any) -> Any:
    """A class of urllib3's pools whose connections register with the thread's deadline when they are used."""

    class Connection(pool_class.ConnectionCls):  # type: ignore[misc]
        def request(self, *args: Any, **how: Any) -> None:
            if (deadline := getattr(_asking, "deadline", None)) is not None:
                deadline.also(lambda: self.sock.shutdown(socket.SHUT_RDWR))
            super().request(*args, **how)

    return type(pool_class.__name__, (pool_class,), {"ConnectionCls": Connection})

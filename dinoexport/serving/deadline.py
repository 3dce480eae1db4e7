"""One deadline for a whole answer over HTTP, however a server drips it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self


class Deadline:
    """Shuts the connection it is told of when its time is up, so that whoever reads from it goes on.

    A time-out of urllib3's is for one read: a server that sends a byte now and then never meets it. expired: whether
    the time was up.
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
        """One more way to shut what is waited for."""
        self._shuts.append(shut)
        if self.expired:
            self._shut()

    def _shut(self) -> None:
        self.expired = True
        for shut in self._shuts:
            with suppress(Exception):  # it may not be open yet, or just have been closed
                shut()


# The deadline of the request that each thread is waiting for.
_asking = threading.local()


def watched(pool_class: Any) -> Any:
    """A class of urllib3's pools whose connections tell the thread's deadline when they are used."""

    class Connection(pool_class.ConnectionCls):  # type: ignore[misc]
        def request(self, *args: Any, **how: Any) -> None:
            if (deadline := getattr(_asking, "deadline", None)) is not None:
                deadline.also(lambda: self.sock.shutdown(socket.SHUT_RDWR))
            super().request(*args, **how)

    return type(pool_class.__name__, (pool_class,), {"ConnectionCls": Connection})

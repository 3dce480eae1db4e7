"""One deadline for a whole answer, even if the server sends it byte by byte, and bounds for one that is streamed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from dinoexport.serving.answers import Malformed
from dinoexport.text.sampling import Sampling

# A model that takes longer for a token is of no use to anybody who waits.
_TOKEN_S = 5.0
# No model writes more; a larger number in a request bounds nothing.
_TOKENS_MAX = 1 << 20
# Around a token: its text, at most escaped, and the names of an event's fields; around them all: headers, the ids.
_TOKEN_BYTES, _AROUND_BYTES = 4096, 1 << 20


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


class StreamBounds:
    """The limits of a streamed answer, from the number of requested tokens: events, bytes, and total time.

    A deadline for each event alone would never end an answer whose server keeps sending events.
    """

    def __init__(self, values: Mapping[str, Any], timeout_s: float) -> None:
        self._tokens = min(int(values.get("max_tokens") or Sampling.max_tokens), _TOKENS_MAX)
        self._timeout_s = timeout_s
        self._events_left = self._tokens + 2  # the end, and the protocol's own last message
        self._bytes_left = _AROUND_BYTES + self._tokens * _TOKEN_BYTES
        self._ends = time.monotonic() + timeout_s + self._tokens * min(timeout_s, _TOKEN_S)

    @property
    def next_s(self) -> float:
        """How long to wait for the next event, more than 0."""
        return max(1e-3, min(self._timeout_s, self._ends - time.monotonic()))

    def count(self, *, events: int = 0, size_bytes: int = 0) -> None:
        """Raises Malformed if there is more than the requested answer can have."""
        self._events_left -= events
        self._bytes_left -= size_bytes
        if self._events_left < 0 or self._bytes_left < 0:
            what = "events" if self._events_left < 0 else "bytes"
            raise Malformed(f"it has more {what} than an answer of {self._tokens} tokens")


class EventLines:
    """The lines of events in a response that is still being sent, from the pieces that are read."""

    def __init__(self, bounds: StreamBounds) -> None:
        self._bounds, self._rest = bounds, b""

    def add(self, piece: bytes) -> None:
        """The next piece. Raises Malformed if the response is longer than the requested answer can be."""
        self._bounds.count(size_bytes=len(piece))
        self._rest += piece

    def next(self) -> bytes | None:
        """The next event's line without its end, or None while it is not complete. Other lines are dropped."""
        while b"\n" in self._rest:
            line, _, self._rest = self._rest.partition(b"\n")
            if line.startswith(b"data:"):
                self._bounds.count(events=1)
                return line
        return None

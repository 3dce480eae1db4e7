"""Handle standard output and error that are full, closed, or a pipe without a reader: one error and no traceback.

A command whose output is lost fails with an error. Lost progress lines and messages on stderr do not stop a build: its
exit code still tells how it ended.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dinoexport.errors import MissingRequirement


class OutputLost(MissingRequirement):
    """Standard output cannot be written. reader_left: it is a pipe whose reader has ended, such as `| head`."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"The output cannot be written: {error.strerror or error}.", next_step="Write it to another place."
        )
        self.reader_left = error.errno == errno.EPIPE


def three_descriptors() -> None:
    """Opens each of standard input, output and error that is closed.

    Without this, the next file that is opened gets the descriptor's number, and printed text is written into that file:
    a native library's warnings would corrupt a graph.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


@contextmanager
def guarded() -> Iterator[None]:
    """While the block runs, a write to stdout that fails raises OutputLost, and one to stderr is left out.

    Characters that the terminal cannot show are printed as their codes.
    """
    before = sys.stdout, sys.stderr
    made = [_Stream(stream) if isinstance(stream, io.TextIOWrapper) else None for stream in before]
    sys.stdout, sys.stderr = (new or old for new, old in zip(made, before, strict=True))
    try:
        yield
    finally:
        for stream in made:
            if stream is not None:
                with suppress(OSError, OutputLost, ValueError):
                    stream.flush()
                with suppress(OSError, OutputLost, ValueError):
                    stream.detach()
        sys.stdout, sys.stderr = before


class _Stream(io.TextIOWrapper):
    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering or stream is sys.stderr,
            write_through=stream.write_through,
        )
        self._is_error = stream is sys.stderr
        self._error: OSError | None = None

    def write(self, text: str, /) -> int:
        if text == "":  # libraries write this to find out what a stream takes, and ignore the answer
            return 0
        try:
            if self._error is not None:
                raise self._error
            return super().write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Redirects the stream to the null device, so that flushing its buffer when Python ends does not fail again."""
        self._error = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        if not self._is_error:
            raise OutputLost(error) from None

"""One thread that writes many answers: a bounded queue, a batch, and clients that may leave at any time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dinoexport.errors import BuildError, DinoexportError, MissingRequirement
from dinoexport.text.decoder import TextDecoder
from dinoexport.text.generation import SLOTS, Answer, Batch, Task, Written
from dinoexport.text.tokenizer import Tokenizer

QUEUE = 16
FULL = "as many as may"


class QueueFull(MissingRequirement):
    """The queue is full."""


class Reader(Protocol):
    """The receiver of an answer. The writing thread calls all methods, and none may raise."""

    def text(self, text: str) -> None:
        """The next piece of the answer."""

    def done(self, written: Written) -> None:
        """The answer is complete; nothing follows."""

    def failed(self, error: DinoexportError) -> None:
        """The answer failed; nothing follows."""

    def gone(self) -> bool:
        """Whether the client has left; called before every token."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    answer: Answer
    reader: Reader


class Service:
    """Writes the requested answers, at most `slots` at a time, until it is closed.

    queue: the number of requests that may wait. broken: called with an exception in the model itself, for a log; the
    answers that were being written fail, and later ones are written normally.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        decoder: TextDecoder,
        *,
        slots: int = SLOTS,
        queue: int = QUEUE,
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._tokenizer, self._decoder = tokenizer, decoder
        self._slots, self._queue, self._broken = slots, queue, broken
        self._waiting: deque[_Asked] = deque()
        self._writing: list[_Asked] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="dinoexport-text", daemon=True)
        self._thread.start()

    def submit(self, task: Task, reader: Reader) -> None:
        """Queues a task; raises QueueFull if the queue is full."""
        asked = _Asked(answer=Answer(self._tokenizer, task), reader=reader)
        with self._changed:
            if self._closed:
                raise QueueFull("The model is being unloaded.", next_step="Try again in a moment.")
            if len(self._waiting) + len(self._writing) >= self._slots + self._queue:
                raise QueueFull(
                    f"{len(self._writing)} answers are being written and {len(self._waiting)} requests wait, {FULL}.",
                    next_step="Try again in a moment.",
                )
            self._waiting.append(asked)
            self._changed.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the thread; unfinished answers fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    @property
    def load(self) -> tuple[int, int]:
        """(answers being written, requests that wait)."""
        with self._changed:
            return len(self._writing), len(self._waiting)

    def _work(self) -> None:
        batch = Batch(self._decoder, slots=self._slots)
        while self._admit(batch):
            try:
                steps = batch.iterate()
            except Exception as error:
                self._broken()
                batch = Batch(self._decoder, slots=self._slots)
                self._fail_all(error)
                continue
            readers = {id(asked.answer): asked.reader for asked in self._writing}
            for answer, text in steps:
                if text and answer.error is None:
                    readers[id(answer)].text(text)
            self._finish()
        self._fail_all(None)

    def _admit(self, batch: Batch) -> bool:
        """Waits for work and accepts it; drops clients that have left. False if the service is closed."""
        with self._changed:
            while not (self._closed or self._waiting or self._writing):
                self._changed.wait()
            if self._closed:
                return False
            for asked in (*self._writing, *self._waiting):
                if asked.reader.gone():
                    asked.answer.cancel()
            left = [asked for asked in self._waiting if asked.answer.reason is not None]
            self._waiting = deque(asked for asked in self._waiting if asked.answer.reason is None)
            while self._waiting and len(batch) < self._slots:
                asked = self._waiting.popleft()
                batch.add(asked.answer)
                self._writing.append(asked)
        for asked in left:
            asked.reader.done(asked.answer.written())
        self._finish()
        return True

    def _finish(self) -> None:
        ended = [asked for asked in self._writing if asked.answer.reason is not None]
        with self._changed:
            self._writing = [asked for asked in self._writing if asked.answer.reason is None]
        for asked in ended:
            if asked.answer.error is not None:
                asked.reader.failed(asked.answer.error)
            else:
                asked.reader.done(asked.answer.written())

    def _fail_all(self, error: Exception | None) -> None:
        if error is None:
            told: DinoexportError = QueueFull("The model was unloaded.", next_step="Try again in a moment.")
        elif isinstance(error, DinoexportError):
            told = error
        else:
            told = BuildError("The model broke on this request.", next_step="The server's log says why.")
        with self._changed:
            failed = [*self._writing, *(self._waiting if error is None else ())]
            self._writing = []
            if error is None:
                self._waiting.clear()
        for asked in failed:
            asked.reader.failed(told)

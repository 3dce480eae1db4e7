"""Generate text: a prompt's ids in, text out as it becomes certain, for one answer or several at a time.

A `Batch` does one iteration at a time. A new prompt is read separately, one chunk per iteration, so that a long prompt
does not delay other answers. Then it joins the answers that are being written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dinoexport.errors import DinoexportError, InputRefused, ValidationFailed
from dinoexport.spec import Array
from dinoexport.system import memory
from dinoexport.text import prompts
from dinoexport.text.decoder import Rows, TextDecoder
from dinoexport.text.detokenise import Detokeniser, StopStrings
from dinoexport.text.prompts import Prompt
from dinoexport.text.sampling import Sampling, choose
from dinoexport.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

SLOTS = 4  # twice the tokens per second of one answer; eight gave one seventh more
# stop: the model or a stop string ended the answer; length: its limit or the context did.
Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One requested answer, checked against the model. end_ids: ids that end it; limit: of its tokens."""

    prompt_ids: tuple[int, ...]
    end_ids: frozenset[int]
    continuing: bool
    sampling: Sampling
    limit: int


@dataclass(frozen=True, kw_only=True)
class Written:
    """How an answer ended. ids: its tokens without those that ended it. first_s: seconds until the first token."""

    text: str
    reason: Reason
    prompt_tokens: int
    ids: tuple[int, ...]
    first_s: float
    seconds: float


def task_of(tokenizer: Tokenizer, decoder: TextDecoder, prompt: Prompt, sampling: Sampling) -> Task:
    """The prompt as ids. Raises InputRefused if it is empty, spells a control token or leaves no room for an answer."""
    ids = prompts.ids_of(tokenizer, prompt)
    if not any(not isinstance(part, prompts.Control) and part.text for part in prompt.parts):
        raise InputRefused("The prompt is empty.", next_step="Give some text.")
    return task_of_ids(decoder, ids, prompts.end_ids(tokenizer, prompt), sampling, continuing=prompt.continuing)


def task_of_ids(
    decoder: TextDecoder, ids: Sequence[int], end_ids: frozenset[int], sampling: Sampling, *, continuing: bool
) -> Task:
    """The same for a prompt given as ids; raises InputRefused if the model does not have these ids."""
    room = decoder.context - len(ids)
    if not ids:
        raise InputRefused("The prompt is empty.", next_step="Give some text.")
    if room < 1:
        raise InputRefused(
            f"The prompt has {len(ids)} tokens; the model takes {decoder.context}, the answer included.",
            next_step="Shorten it.",
        )
    if wrong := [i for i in ids if not 0 <= i < decoder.vocabulary]:
        raise InputRefused(f"The model has no token {wrong[0]}.", next_step="Give the tokenizer of this model.")
    limit = min(sampling.max_tokens, room)
    _check_memory(decoder, len(ids), limit)
    return Task(
        prompt_ids=tuple(ids),
        end_ids=end_ids,
        continuing=continuing,
        sampling=sampling,
        limit=limit,
    )


def _check_memory(decoder: TextDecoder, read: int, limit: int) -> None:
    """Raises InputRefused if the cache of a prompt of `read` tokens and an answer of `limit` fits no free memory."""
    free, needed = memory.available_bytes(), decoder.token_bytes * (read + limit)
    if free is None or needed <= free:
        return
    fits = free // decoder.token_bytes - read
    raise InputRefused(
        f"The cache of a prompt of {read} tokens and an answer of up to {limit} takes {needed / 1e9:.2f} GB; "
        f"{free / 1e9:.2f} GB of memory are free.",
        next_step=f"Set max_tokens to {fits} or less." if fits > 0 else "Shorten the prompt, or free memory.",
    )


class Answer:
    """One answer being written. pending: the prompt's ids that are still to be read. error: why it failed."""

    def __init__(self, tokenizer: Tokenizer, task: Task) -> None:
        self.task = task
        self.pending: tuple[int, ...] = task.prompt_ids
        self.reason: Reason | None = None
        self.error: DinoexportError | None = None
        self.ids: list[int] = []
        self._size = tokenizer.size
        self._detokeniser = Detokeniser(tokenizer, continuing=task.continuing)
        self._stops = StopStrings(task.sampling.stop)
        self._generator: np.random.Generator = task.sampling.generator()
        self._text: list[str] = []
        self._started, self._first_s = time.monotonic(), 0.0

    def accept(self, logits_V: Array) -> str:
        """Chooses a token; returns the text that it adds. Sets `reason` if the answer ends with it."""
        # Rows of the output matrix past the vocabulary are padding, not tokens.
        token_id = choose(logits_V[: self._size], self.task.sampling, self._generator)
        if not self.ids:
            self._first_s = time.monotonic() - self._started
        if token_id in self.task.end_ids:
            return self._end("stop")
        self.ids.append(token_id)
        text = self._show(self._stops.push(self._detokeniser.push(token_id)))
        if self._stops.stopped:
            self.reason = "stop"
        elif len(self.ids) == self.task.limit:
            text += self._end("length")
        return text

    def cancel(self, error: DinoexportError | None = None) -> None:
        """Ends the answer at its current length."""
        self.reason, self.error = self.reason or "cancelled", error

    def written(self) -> Written:
        """The result of the ended answer. Raises its error if it failed."""
        assert self.reason is not None, "the answer has ended"
        if self.error is not None:
            raise self.error
        return Written(
            text="".join(self._text),
            reason=self.reason,
            prompt_tokens=len(self.task.prompt_ids),
            ids=tuple(self.ids),
            first_s=self._first_s,
            seconds=time.monotonic() - self._started,
        )

    def _end(self, reason: Reason) -> str:
        text = self._stops.push(self._detokeniser.finish()) + self._stops.finish()
        self.reason = "stop" if self._stops.stopped else reason
        return self._show(text)

    def _show(self, text: str) -> str:
        if text:
            self._text.append(text)
        return text


class Batch:
    """Answers of one model that are written together, at most `slots` at a time. One thread may use it."""

    def __init__(self, decoder: TextDecoder, *, slots: int = SLOTS) -> None:
        self._decoder, self.slots = decoder, slots
        self._rows: Rows | None = None
        self._writing: list[tuple[Answer, int]] = []  # and the id with which each continues
        self._reading: tuple[Answer, Rows] | None = None
        self._waiting: list[Answer] = []

    def __len__(self) -> int:
        """The answers that are not finished."""
        return len(self._writing) + len(self._waiting) + (self._reading is not None)

    def add(self, answer: Answer) -> None:
        """Adds an answer; there must be room."""
        assert len(self) < self.slots, "there is room"
        self._waiting.append(answer)

    def iterate(self) -> list[tuple[Answer, str]]:
        """One step of all answers: returns those that advanced, and the text that each added.

        An answer whose `reason` is set is finished and no longer in the batch.
        """
        self._drop_ended()
        return self._step() + self._read()

    def _step(self) -> list[tuple[Answer, str]]:
        import numpy as np

        if self._rows is None:
            return []
        logits_BV = self._rows.extend(np.array([[token_id] for _, token_id in self._writing], np.int64))
        steps = [(answer, _accepted(answer, row)) for (answer, _), row in zip(self._writing, logits_BV, strict=True)]
        self._writing = [(answer, answer.ids[-1] if answer.ids else 0) for answer, _ in steps]
        self._drop_ended()
        return steps

    def _read(self) -> list[tuple[Answer, str]]:
        """Reads a chunk of the next prompt."""
        import numpy as np

        if self._reading is None and self._waiting:
            self._reading = (self._waiting.pop(0), self._decoder.begin())
        if self._reading is None:
            return []
        answer, rows = self._reading
        chunk, answer.pending = answer.pending[: self._decoder.chunk], answer.pending[self._decoder.chunk :]
        logits_BV = rows.extend(np.array([chunk], np.int64))
        if answer.pending:
            return []
        self._reading = None
        text = _accepted(answer, logits_BV[0])
        if answer.reason is None:
            self._writing.append((answer, answer.ids[-1]))
            if self._rows is None:
                self._rows = rows
            else:
                self._rows.join(rows)
        return [(answer, text)]

    def _drop_ended(self) -> None:
        """Removes ended and cancelled answers."""
        self._waiting = [answer for answer in self._waiting if answer.reason is None]
        if self._reading is not None and self._reading[0].reason is not None:
            self._reading = None
        left = [place for place, (answer, _) in enumerate(self._writing) if answer.reason is None]
        if len(left) < len(self._writing):
            self._writing = [self._writing[place] for place in left]
            if not left:
                self._rows = None
            elif self._rows is not None:
                self._rows.keep(left)


def _accepted(answer: Answer, logits_V: Array) -> str:
    """The text that one more token adds; NaN or Inf in the logits ends only this answer."""
    import numpy as np

    if np.isfinite(logits_V).all():
        return answer.accept(logits_V)
    answer.cancel(
        ValidationFailed("The model's output has NaN or Inf.", next_step="dinoexport validate BUNDLE shows where.")
    )
    return ""


def write(tokenizer: Tokenizer, decoder: TextDecoder, task: Task) -> Iterator[str | Written]:
    """The text of one answer as it becomes certain, and at the end its result."""
    answer, batch = Answer(tokenizer, task), Batch(decoder, slots=1)
    batch.add(answer)
    while answer.reason is None:
        for _, text in batch.iterate():
            if text:
                yield text
    yield answer.written()

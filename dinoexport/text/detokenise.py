"""Text out of token ids that come one at a time: nothing is shown that a later id could still change.

A character may be spread over several ids, and a piece's leading space depends on what stands before it. So ids are
decoded together with those before them, and only what this adds is given out.
"""

from __future__ import annotations

from collections.abc import Sequence

from dinoexport.text.tokenizer import Tokenizer

_UNFINISHED = "�"  # what bytes that are not characters (yet) are decoded to


class Detokeniser:
    """The text of one answer. continuing: it goes on where another text ended, so a leading space stays."""

    def __init__(self, tokenizer: Tokenizer, *, continuing: bool) -> None:
        self._tokenizer = tokenizer
        # Only the ids from the last boundary but one on are decoded again: a long answer costs no more than a short.
        self._ids: list[int] = list(tokenizer.anchor) if continuing else []
        self._shown = len(self._ids)

    def push(self, token_id: int) -> str:
        """What is now certain of the text; empty while a character lacks bytes."""
        self._ids.append(token_id)
        added = self._added()
        if not added or added.endswith(_UNFINISHED):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return added

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        added = self._added()
        self._shown = len(self._ids)
        return added

    def _added(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]


class StopStrings:
    """Text held back while it may be the beginning of a string that ends the answer; none of that string is shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown; after the first stop string nothing, and `stopped` is true."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and is not a stop string after all."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that a stop string could begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

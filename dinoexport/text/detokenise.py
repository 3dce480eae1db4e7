"""Turn token ids into text one at a time, and hold back text that a later id could still change.

A character may be spread over several ids, and a piece's leading space depends on the text before it. Ids are therefore
decoded together with those before them, and only the added text is returned.
"""

from __future__ import annotations

from collections.abc import Sequence

from dinoexport.text.tokenizer import Tokenizer

_UNFINISHED = "�"  # what bytes that are not characters (yet) are decoded to


class Detokeniser:
    """The text of one answer. continuing: it directly continues another text, so a leading space stays."""

    def __init__(self, tokenizer: Tokenizer, *, continuing: bool) -> None:
        self._tokenizer = tokenizer
        # Only ids since the last boundary but one are decoded again: the cost per id does not grow with the answer.
        self._ids: list[int] = list(tokenizer.anchor) if continuing else []
        self._shown = len(self._ids)

    def push(self, token_id: int) -> str:
        """The new text that is certain; empty while a character lacks bytes."""
        self._ids.append(token_id)
        added = self._added()
        if not added or added.endswith(_UNFINISHED):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return added

    def finish(self) -> str:
        """The text that was held back: bytes that never became a character."""
        added = self._added()
        self._shown = len(self._ids)
        return added

    def _added(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]


class StopStrings:
    """Holds text back while it may be the beginning of a stop string, so that no part of a stop string is shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown; nothing after the first stop string, and `stopped` is true then."""
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
        """The text that was held back and did not become a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that a stop string could begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""The decoder interface for the generation loop: sequences that advance together, each with its own past.

`PaddedRows` implements it with a runtime's decoder, whose sequences have equal lengths: rows of unequal length are
padded on the left, and the attention mask marks the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from dinoexport.spec import Array, Arrays


class Rows(Protocol):
    """Sequences that advance together. B is their number, V the vocabulary."""

    def extend(self, input_ids_BT: Array) -> Array:
        """Reads T more tokens of every sequence; returns the logits (B, V) after the last of them, float32."""

    def join(self, other: Self) -> None:
        """Appends the sequences of `other` to its own."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the sequences at these places."""


class TextDecoder(Protocol):
    """A model that generates text."""

    @property
    def context(self) -> int:
        """The largest number of tokens of a prompt and its answer together."""

    @property
    def vocabulary(self) -> int:
        """The number of logits."""

    @property
    def token_bytes(self) -> int:
        """Bytes of the cache for each token of one sequence."""

    @property
    def chunk(self) -> int:
        """The largest number of tokens that one call reads."""

    def begin(self) -> Rows:
        """One empty sequence."""


class Steps(Protocol):
    """A runtime's batch of sequences of one length, padding included, and their cache."""

    def step(self, input_ids_BT: Array, attention_mask_BS: Array) -> Array:
        """Adds T tokens to each sequence; returns the logits (B, V), float32, after the last."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Continues with these sequences."""

    def carried(self) -> dict[str, Array]:
        """The cache, (B, heads, past, width) by name."""

    def resume(self, carried: Arrays) -> None:
        """Continues from such a cache."""


@dataclass(frozen=True, kw_only=True)
class SteppedDecoder:
    """A `TextDecoder` that uses a runtime's decoder. begin_steps: makes an empty batch."""

    begin_steps: Callable[[], Steps]
    vocabulary: int
    context: int
    token_bytes: int
    chunk: int = 512

    def begin(self) -> PaddedRows:
        """One sequence with an empty cache."""
        return PaddedRows(self.begin_steps())


class PaddedRows:
    """`Rows` whose cache is padded on the left if they differ in length."""

    def __init__(self, steps: Steps) -> None:
        import numpy as np

        self._steps = steps
        self._past = 0
        self._padding_B = np.zeros(1, np.int64)

    def extend(self, input_ids_BT: Array) -> Array:
        """One call of the graph."""
        import numpy as np

        total = self._past + input_ids_BT.shape[1]
        mask_BS = (np.arange(total) >= self._padding_B[:, None]).astype(np.int64)
        logits_BV = self._steps.step(np.ascontiguousarray(input_ids_BT, np.int64), mask_BS)
        self._past = total
        return logits_BV

    def join(self, other: PaddedRows) -> None:
        """Pads the shorter past on the left with zeros, which the attention mask excludes."""
        import numpy as np

        past = max(self._past, other._past)
        ours, theirs = self._steps.carried(), other._steps.carried()
        self._steps.resume(
            {name: np.concatenate([_padded(ours[name], past), _padded(theirs[name], past)]) for name in ours}
        )
        self._padding_B = np.concatenate([rows._padding_B + past - rows._past for rows in (self, other)])
        self._past = past

    def keep(self, rows: Sequence[int]) -> None:
        """Selects rows, and drops the padding they all have."""
        import numpy as np

        chosen = np.asarray(rows, np.int64)
        self._padding_B = self._padding_B[chosen]
        common = int(self._padding_B.min())
        if not common:
            self._steps.reorder(list(rows))
            return
        carried = self._steps.carried()
        self._steps.resume({name: np.ascontiguousarray(array[chosen, :, common:]) for name, array in carried.items()})
        self._padding_B = self._padding_B - common
        self._past -= common


def _padded(cache_BGPK: Array, past: int) -> Array:
    import numpy as np

    more = past - cache_BGPK.shape[2]
    return np.pad(cache_BGPK, ((0, 0), (0, 0), (more, 0), (0, 0))) if more else cache_BGPK

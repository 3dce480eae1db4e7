"""What the writing loop asks of a model: sequences that go on together, each with its own past.

`PaddedRows` is that over a graph that takes its past as arrays and gives it back longer, in any runtime. Rows of
unequal length are padded on the left; the attention mask says where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from dinoexport.spec import Array, Graph, Runner

INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"
_PAST, _PRESENT = "past_key_values.", "present."


class Rows(Protocol):
    """Sequences that go on together. B is their number, V the vocabulary."""

    def extend(self, input_ids_BT: Array) -> Array:
        """Reads T more tokens of every sequence; the logits (B, V) behind the last of them, float32."""

    def join(self, other: Self) -> None:
        """Takes over the sequences of `other`, behind its own."""

    def keep(self, rows: Sequence[int]) -> None:
        """Lets go of all sequences but those in these places; none left is allowed."""


class Decoder(Protocol):
    """A model that writes. context: the most tokens of prompt and answer together; vocabulary: entries of a logit row.

    chunk: the most tokens that are read in one call.
    """

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""

    @property
    def vocabulary(self) -> int:
        """The number of logits."""

    @property
    def chunk(self) -> int:
        """The most tokens one call reads."""

    def begin(self) -> Rows:
        """One sequence that has read nothing."""


@dataclass(frozen=True, kw_only=True)
class RunnerDecoder:
    """A `Decoder` over a runner of a graph whose cache goes in and out as arrays."""

    run: Runner
    graph: Graph
    context: int
    chunk: int = 512

    @property
    def vocabulary(self) -> int:
        """The last dimension of the graph's logits."""
        size = next(tensor.shape[-1] for tensor in self.graph.outputs if tensor.name == LOGITS)
        assert isinstance(size, int)
        return size

    def begin(self) -> PaddedRows:
        """One sequence with an empty cache."""
        import numpy as np

        cache = {}
        for tensor in self.graph.inputs:
            if tensor.name.startswith(_PAST):
                _, heads, _, width = tensor.shape
                assert isinstance(heads, int)
                assert isinstance(width, int)
                cache[tensor.name] = np.zeros((1, heads, 0, width), np.dtype(tensor.dtype))
        return PaddedRows(self.run, cache)


class PaddedRows:
    """`Rows` with their cache as arrays (B, heads, past, width), padded on the left."""

    def __init__(self, run: Runner, cache: Mapping[str, Array]) -> None:
        import numpy as np

        self._run, self._cache = run, dict(cache)
        self._padding_B = np.zeros(1, np.int64)

    def extend(self, input_ids_BT: Array) -> Array:
        """One call of the graph; its present becomes the past."""
        import numpy as np

        batch, length = input_ids_BT.shape
        total = self._past + length
        mask_BP = (np.arange(total) >= self._padding_B[:, None]).astype(np.int64)
        assert mask_BP.shape[0] == batch
        answer = self._run(
            {INPUT_IDS: np.ascontiguousarray(input_ids_BT, np.int64), ATTENTION_MASK: mask_BP, **self._cache}
        )
        self._cache = {name: answer[name.replace(_PAST, _PRESENT, 1)] for name in self._cache}
        logits_BTV = answer[LOGITS]
        return np.asarray(logits_BTV[:, -1], np.float32)

    def join(self, other: Self) -> None:
        """Pads the shorter past on the left, with zeros that nobody looks at."""
        import numpy as np

        past = max(self._past, other._past)
        paddings = []
        for rows in (self, other):
            more = past - rows._past
            paddings.append(rows._padding_B + more)
        self._cache = {
            name: np.concatenate([_padded(self._cache[name], past), _padded(other._cache[name], past)])
            for name in self._cache
        }
        self._padding_B = np.concatenate(paddings)

    def keep(self, rows: Sequence[int]) -> None:
        """Selects rows, and drops the padding they all have."""
        import numpy as np

        chosen = np.asarray(rows, np.int64)
        padding_B = self._padding_B[chosen]
        common = int(padding_B.min()) if len(chosen) else 0
        self._cache = {name: np.ascontiguousarray(array[chosen, :, common:]) for name, array in self._cache.items()}
        self._padding_B = padding_B - common

    @property
    def _past(self) -> int:
        return int(next(iter(self._cache.values())).shape[2])


def _padded(cache_BGPK: Array, past: int) -> Array:
    import numpy as np

    more = past - cache_BGPK.shape[2]
    return np.pad(cache_BGPK, ((0, 0), (0, 0), (more, 0), (0, 0))) if more else cache_BGPK

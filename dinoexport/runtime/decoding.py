"""Feed sequences of tokens to a graph that carries state: a decoder and its cache, the same for all runtimes.

The graph's names are those of Hugging Face's exporters and onnxruntime-genai: inputs `input_ids` and
`attention_mask`, output `logits`, and the carried values that its signature names. Two inputs are optional:
`logits_to_keep`, as in Hugging Face's models, and `first_position`, where a sequence begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from dinoexport.errors import InputRefused
from dinoexport.runtime import Opened, check_inputs
from dinoexport.spec import Array, Arrays, Graph, Runner

INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
LOGITS_TO_KEEP, FIRST_POSITION = "logits_to_keep", "first_position"
LOGITS = "logits"


@runtime_checkable
class Decoder(Protocol):
    """A batch of sequences and their cache, empty at first. Two threads must not use it at once."""

    @property
    def past_tokens(self) -> int:
        """How many tokens of each sequence the cache holds, padding included."""

    @property
    def inside(self) -> Arrays:
        """Outputs of the last call besides the signature's, if the graph was opened with inner values as outputs."""

    def step(self, input_ids_BT: Array, attention_mask_BS: Array) -> Array:
        """Adds T tokens to each sequence and returns the logits (B, V), float32, that follow the last of them.

        attention_mask_BS: int64, 0 for padding on the left and 1 for every other token, the past ones too. Raises
        InputRefused for shapes and types that are not the graph's.
        """

    def rows(self, input_ids_BT: Array, attention_mask_BS: Array, *, keep: int = 1, first_position: int = 0) -> Array:
        """The same with the logits (B, keep, V) of the last `keep` tokens, 0 for all of them.

        first_position: of each sequence's first token that is not padding.
        """

    def reset(self) -> None:
        """Forgets all sequences; the next ones may be another number of them."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Continues with these sequences of the batch, in this order; one may occur twice or not at all."""

    def carried(self) -> dict[str, Array]:
        """The cache as the graph's carried inputs, (B, heads, past, width); they may share the decoder's memory."""

    def resume(self, carried: Arrays) -> None:
        """Continues from such a cache instead of its own: with other sequences, or another number of them."""


def begin(opened: Runner, graph: Graph) -> Decoder:
    """A decoder with an empty cache on a graph that is open; several may use one.

    If the runtime keeps state itself, the decoder uses that; any other runner gets the cache with every call.
    """
    if isinstance(opened, Opened) and opened.begin is not None:
        return opened.begin()
    return ArrayDecoder(opened, graph)


class ArrayDecoder:
    """A decoder whose cache is passed in and out as arrays with every call, so that it works with any runner."""

    def __init__(self, run: Runner, graph: Graph) -> None:
        self._run, self._graph, self._step = run, graph, step_of(graph)
        self._names = frozenset(tensor.name for tensor in graph.outputs)
        self._cache: dict[str, Array] = {}
        self.past_tokens = 0
        self.inside: dict[str, Array] = {}

    def step(self, input_ids_BT: Array, attention_mask_BS: Array) -> Array:
        """See `Decoder`."""
        logits: Array = self.rows(input_ids_BT, attention_mask_BS)[:, -1]
        return logits

    def rows(self, input_ids_BT: Array, attention_mask_BS: Array, *, keep: int = 1, first_position: int = 0) -> Array:
        """See `Decoder`."""
        inputs = inputs_of(input_ids_BT, attention_mask_BS, keep, first_position)
        check_step(self._step, inputs, len(next(iter(self._cache.values()), ())), self.past_tokens)
        answers = self._run(inputs | (self._cache or empty_cache(self._graph, len(input_ids_BT))))
        self._cache = {taken: answers.pop(given) for taken, given in self._graph.carried.items()}
        self.inside = {name: array for name, array in answers.items() if name not in self._names}
        self.past_tokens += input_ids_BT.shape[1]
        return answers[LOGITS]

    def reset(self) -> None:
        """See `Decoder`."""
        self._cache, self.past_tokens = {}, 0

    def reorder(self, rows: Sequence[int]) -> None:
        """See `Decoder`."""
        self._cache = {name: array[list(rows)] for name, array in self._cache.items()}

    def carried(self) -> dict[str, Array]:
        """See `Decoder`."""
        return dict(self._cache)

    def resume(self, carried: Arrays) -> None:
        """See `Decoder`."""
        self._cache, self.past_tokens = dict(carried), past_of(carried)


def inputs_of(
    input_ids_BT: Array, attention_mask_BS: Array, keep: int = 0, first_position: int = 0
) -> dict[str, Array]:
    """All inputs of one call except the carried ones."""
    import numpy as np

    return {
        INPUT_IDS: input_ids_BT,
        ATTENTION_MASK: attention_mask_BS,
        LOGITS_TO_KEEP: np.array([keep], np.int64),
        FIRST_POSITION: np.array([first_position], np.int64),
    }


def step_of(graph: Graph) -> Graph:
    """The graph without its carried inputs: what a step is given."""
    return replace(graph, inputs=tuple(tensor for tensor in graph.inputs if tensor.name not in graph.carried))


def check_step(step: Graph, inputs: Arrays, batch: int, past_tokens: int) -> None:
    """Raises InputRefused if a step's inputs are not those of `step_of` its graph, or do not continue such a cache.

    batch: of the sequences in the cache; 0 for an empty one. past_tokens: in each of them.
    """
    check_inputs(step, inputs)
    rows, new = inputs[INPUT_IDS].shape
    if batch and rows != batch:
        raise InputRefused(f"The cache holds {batch} sequences, not {rows}.", next_step="Reset or reorder it first.")
    if inputs[ATTENTION_MASK].shape[1] != past_tokens + new:
        raise InputRefused(
            f"{ATTENTION_MASK} covers {inputs[ATTENTION_MASK].shape[1]} tokens; the cache and {INPUT_IDS} have "
            f"{past_tokens + new}.",
            next_step="Give a mask of all tokens so far.",
        )


def past_of(carried: Arrays) -> int:
    """How many tokens a cache holds."""
    return int(next(iter(carried.values())).shape[2])


def padded(prompts: Sequence[Array], padding_id: int = 0) -> tuple[Array, Array]:
    """Prompts (T,) of unequal lengths as ids and mask (B, T), int64, padded on the left."""
    import numpy as np

    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), padding_id, np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids[row, start:], mask[row, start:] = prompt, 1
    return ids, mask


def empty_cache(graph: Graph, batch: int) -> dict[str, Array]:
    """The carried inputs before the first token: their first axis is the batch, another dynamic one has no entries."""
    import numpy as np

    tensors = {tensor.name: tensor for tensor in graph.inputs}
    return {
        name: np.zeros(
            [batch, *(0 if isinstance(size, str) else size for size in tensors[name].shape[1:])], tensors[name].dtype
        )
        for name in graph.carried
    }

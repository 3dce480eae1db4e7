"""A decoder in ONNX Runtime, which writes each new token into the cache where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError, require
from dinoexport.runtime import (
    check_inputs,
    decoding,
    ort_joined_products,
    ort_rotated_attention,
    ort_shared_cache,
    telemetry,
)
from dinoexport.runtime.ort_rotated_attention import COSINES, POSITIONS, SINES
from dinoexport.runtime.ort_shared_cache import ALL_TOKENS, LAST_TOKEN
from dinoexport.spec import Array, Arrays, Graph

# A cache that is full is copied to one with room for so many tokens more; the portable graph copies it at every token.
_MORE_TOKENS = 256
# The cache begins with one entry that no token sees: ONNX Runtime takes a call without a past for a prompt, and rotates
# all of its sequences as the first one, whatever their padding.
_UNSEEN = 1


@dataclass(frozen=True, kw_only=True)
class DecoderGraphs:
    """A decoder's graph with its cache in place, as the bytes of an ONNX file whose weights lie elsewhere.

    tables: the graph that computes the tables of `rotate_in_attention`; None if the first one rotates by itself.
    """

    model: bytes
    tables: bytes | None


def with_shared_cache(path: Path, graph: Graph) -> DecoderGraphs | None:
    """The file at `path` with its cache in place and operators joined; None if it has another form.

    Weights stay in their file, except for a copy of those that are joined.
    """
    require("text", "onnx")
    import onnx

    model = onnx.load(path, load_external_data=False)
    if not ort_shared_cache.share_cache(model, graph):
        return None
    ort_joined_products.join_products(model, path.parent)
    ort_joined_products.join_norms(model)
    tables = ort_rotated_attention.rotate_in_attention(model)
    return DecoderGraphs(model=model.SerializeToString(), tables=tables and tables.SerializeToString())


class OrtDecoder:
    """A `decoding.Decoder` of a session `with_shared_cache`; several may use one session.

    tables: a session of `DecoderGraphs.tables`, if there is one.
    """

    def __init__(self, session: Any, graph: Graph, tables: Any = None) -> None:
        self._session, self._graph, self._tables = session, graph, tables
        self._step = decoding.step_of(graph)
        (logits,) = (tensor for tensor in graph.outputs if tensor.name == decoding.LOGITS)
        self._vocabulary, self._dtype = int(logits.shape[-1]), logits.dtype
        self._bound: _Bound | None = None
        self._buffers: dict[str, Array] = {}
        self._rotations: dict[str, Array] = {}  # the tables, for all entries of the buffers
        self._first_position = 0
        self.past_tokens = 0
        self.inside: dict[str, Array] = {}

    def step(self, input_ids_BT: Array, attention_mask_BS: Array) -> Array:
        """See `Decoder`."""
        logits: Array = self.rows(input_ids_BT, attention_mask_BS)[:, -1]
        return logits

    def rows(self, input_ids_BT: Array, attention_mask_BS: Array, *, keep: int = 1, first_position: int = 0) -> Array:
        """See `Decoder`."""
        import numpy as np

        inputs = decoding.inputs_of(input_ids_BT, attention_mask_BS, keep, first_position)
        decoding.check_step(self._step, inputs, self._batch, self.past_tokens)
        (batch, new), total = input_ids_BT.shape, attention_mask_BS.shape[1]
        bound = self._with_room(batch, total, first_position)
        if batch == 1 or new == 1:
            logits = self._run(bound, inputs)
        else:  # the operator adds several tokens to a past only for one sequence
            each = []
            for row in range(batch):
                ids, mask = input_ids_BT[row : row + 1], attention_mask_BS[row : row + 1]
                cache = {name: buffer[row : row + 1] for name, buffer in self._buffers.items()}
                each.append(self._run(self._bind(cache), decoding.inputs_of(ids, mask, keep, first_position)))
            logits = np.concatenate(each)
        self.past_tokens = total
        return logits

    def whole(self, arrays: Arrays) -> dict[str, Array]:
        """A call of the graph as it is in the file: the cache is an input, and an output with the new tokens."""
        check_inputs(self._graph, arrays)
        self.resume({name: arrays[name] for name in self._graph.carried})
        keep, first_position = (
            int(arrays[name][0]) if name in arrays else 0 for name in (decoding.LOGITS_TO_KEEP, decoding.FIRST_POSITION)
        )
        logits = self.rows(
            arrays[decoding.INPUT_IDS], arrays[decoding.ATTENTION_MASK], keep=keep, first_position=first_position
        )
        return {decoding.LOGITS: logits} | {self._graph.carried[name]: array for name, array in self.carried().items()}

    @property
    def _batch(self) -> int:
        """The sequences in the cache; 0 for an empty one."""
        return len(next(iter(self._buffers.values()), ()))

    def _run(self, bound: _Bound, inputs: Arrays) -> Array:
        """Runs the session on these inputs of the portable graph; the logits have memory of their own."""
        import numpy as np

        mask = inputs[decoding.ATTENTION_MASK]
        (batch, new), total = inputs[decoding.INPUT_IDS].shape, _UNSEEN + mask.shape[1]
        seen = np.zeros((batch, total), mask.dtype)
        seen[:, _UNSEEN:] = mask
        lengths = {LAST_TOKEN: np.full(batch, total - 1, np.int32), ALL_TOKENS: np.array([total], np.int32)}
        # The rows of the tables begin with the first position, so that the graph counts from there.
        counted = {decoding.FIRST_POSITION: np.zeros(1, np.int64)} if self._tables else {}
        for name, array in {**inputs, decoding.ATTENTION_MASK: seen, **lengths, **counted}.items():
            bound.give(name, array)
        kept = len(range(new)[-int(inputs[decoding.LOGITS_TO_KEEP][0]) :])
        # Of the caller's own memory: asked for its outputs, the binding wraps all of them, those of the cache too.
        logits = np.empty((batch, kept, self._vocabulary), self._dtype)
        bound.take(decoding.LOGITS, logits)
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:  # its exception classes share no public base but Exception
            shapes = {name: array.shape for name, array in inputs.items()}
            raise BuildError(f"ONNX Runtime failed on {shapes}: {error}", next_step="Report it.") from error
        return logits

    def _with_room(self, batch: int, total: int, first_position: int) -> _Bound:
        """The binding to buffers for this many sequences and tokens, with the cache in them."""
        import numpy as np

        entries = _UNSEEN + total
        if self._bound is None or next(iter(self._buffers.values())).shape[2] < entries:
            past = self.carried() or decoding.empty_cache(self._graph, batch)
            self._bound = None
            for name in list(past):
                array = past.pop(name)  # and with it the last buffer: at most one is held twice
                heads, width = array.shape[1], array.shape[3]
                buffer = np.zeros((batch, heads, entries + _MORE_TOKENS, width), array.dtype)
                buffer[:, :, _UNSEEN : _UNSEEN + self.past_tokens] = array
                self._buffers[name] = buffer
        if self._bound is None or first_position != self._first_position:
            self._first_position = first_position
            if self._tables:
                room = next(iter(self._buffers.values())).shape[2]
                positions_N1 = np.arange(first_position, first_position + room, dtype=np.float32)[:, None]
                tables = self._tables.run(None, {POSITIONS: positions_N1})
                self._rotations = dict(zip((COSINES, SINES), tables, strict=True))
            self._bound = self._bind(self._buffers)
        return self._bound

    def _bind(self, buffers: Arrays) -> _Bound:
        """The buffers, bound as input and output, and the tables of positions."""
        bound = _Bound(self._session)
        for name, buffer in buffers.items():
            bound.share(name, self._graph.carried[name], buffer)
        for name, table in self._rotations.items():
            bound.lend(name, table)
        return bound

    def reset(self) -> None:
        """See `Decoder`."""
        self._bound, self._buffers, self.past_tokens = None, {}, 0

    def reorder(self, rows: Sequence[int]) -> None:
        """See `Decoder`."""
        self.resume({name: array[list(rows)] for name, array in self.carried().items()})

    def carried(self) -> dict[str, Array]:
        """See `Decoder`."""
        start = _UNSEEN if self._bound else 0
        return {name: buffer[:, :, start : start + self.past_tokens] for name, buffer in self._buffers.items()}

    def resume(self, carried: Arrays) -> None:
        """See `Decoder`."""
        self._bound, self._buffers = None, dict(carried)
        self.past_tokens = decoding.past_of(carried) if carried else 0


class _Bound:
    """A session's inputs and outputs in memory of ours."""

    def __init__(self, session: Any) -> None:
        self.binding = session.io_binding()
        self._value = telemetry.onnxruntime().OrtValue.ortvalue_from_numpy  # the same memory
        self._arrays: dict[str, Array] = {}

    def give(self, name: str, array: Array) -> None:
        """A copy of the array as an input, where the last one of its shape was."""
        import numpy as np

        old = self._arrays.get(name)
        if old is not None and old.shape == array.shape:
            old[...] = array
            return
        self._arrays[name] = np.array(array, order="C")
        self.lend(name, self._arrays[name])

    def lend(self, name: str, array: Array) -> None:
        """The array as an input: the session reads its memory, which its owner keeps."""
        # Bound as a value: for an input with a default the binding knows no type for an array.
        self.binding.bind_ortvalue_input(name, self._value(array))

    def take(self, name: str, array: Array) -> None:
        """The array as an output: the session writes into its memory."""
        self.binding.bind_ortvalue_output(name, self._value(array))

    def share(self, given: str, taken: str, array: Array) -> None:
        """The array as an input and an output at once."""
        value = self._value(array)
        self.binding.bind_ortvalue_input(given, value)
        self.binding.bind_ortvalue_output(taken, value)

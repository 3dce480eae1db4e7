"""A decoder in ONNX Runtime, which writes each new token into the cache where it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError, require
from dinoexport.runtime import check_inputs, decoding, ort_joined_products, ort_shared_cache, telemetry
from dinoexport.runtime.ort_shared_cache import ALL_TOKENS, LAST_TOKEN
from dinoexport.spec import Array, Arrays, Graph

# A cache that is full is copied to one with room for so many tokens more; the portable graph copies it at every token.
_MORE_TOKENS = 256


def with_shared_cache(path: Path, graph: Graph) -> bytes | None:
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
    return bytes(model.SerializeToString())


class OrtDecoder:
    """A `decoding.Decoder` of a session `with_shared_cache`; several may use one session."""

    def __init__(self, session: Any, graph: Graph) -> None:
        self._session, self._graph = session, graph
        self._step = decoding.step_of(graph)
        (logits,) = (tensor for tensor in graph.outputs if tensor.name == decoding.LOGITS)
        self._vocabulary, self._dtype = int(logits.shape[-1]), logits.dtype
        self._binding: Any = None
        self._bound: dict[str, Array] = {}  # inputs whose memory the binding reads, besides the cache
        self._buffers: dict[str, Array] = {}
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
        batch, new = input_ids_BT.shape
        if batch == 1 or new == 1 or not self.past_tokens:
            return self._run(inputs)
        # The operator adds several tokens to a past only for one sequence.
        one_by_one = [
            self._run(decoding.inputs_of(ids, attention_mask_BS[:, : self.past_tokens + 1], 1, first_position))
            for ids in np.split(input_ids_BT, new, axis=1)
        ]
        return np.concatenate(one_by_one[-keep:], axis=1)

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

    def _run(self, inputs: Arrays) -> Array:
        import numpy as np

        onnxruntime = telemetry.onnxruntime()

        (batch, new), total = inputs[decoding.INPUT_IDS].shape, inputs[decoding.ATTENTION_MASK].shape[1]
        self._make_room(batch, total)
        lengths = {LAST_TOKEN: np.full(batch, total - 1, np.int32), ALL_TOKENS: np.array([total], np.int32)}
        for name, array in {**inputs, **lengths}.items():
            if name in self._bound and self._bound[name].shape == array.shape:
                self._bound[name][...] = array
                continue
            self._bound[name] = np.array(array, order="C")
            # Bound as a value: for an input with a default the binding knows no type for an array.
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(self._bound[name]))
        kept = len(range(new)[-int(inputs[decoding.LOGITS_TO_KEEP][0]) :])
        # Of the caller's own memory: asked for its outputs, the binding wraps all of them, those of the cache too.
        logits = np.empty((batch, kept, self._vocabulary), self._dtype)
        self._binding.bind_ortvalue_output(decoding.LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # its exception classes share no public base but Exception
            shapes = {name: array.shape for name, array in inputs.items()}
            raise BuildError(f"ONNX Runtime failed on {shapes}: {error}", next_step="Report it.") from error
        self.past_tokens = total
        return logits

    def _make_room(self, batch: int, total: int) -> None:
        """Provides buffers for this many sequences and tokens, bound as input and output, with the cache in them."""
        import numpy as np

        if self._binding is not None and next(iter(self._buffers.values())).shape[2] >= total:
            return
        past = self.carried() or decoding.empty_cache(self._graph, batch)
        onnxruntime = telemetry.onnxruntime()

        self._binding, self._bound = self._session.io_binding(), {}
        for name in list(past):
            array = past.pop(name)  # and with it the last buffer: at most one is held twice
            heads, width = array.shape[1], array.shape[3]
            buffer = np.zeros((batch, heads, total + _MORE_TOKENS, width), array.dtype)
            buffer[:, :, : self.past_tokens] = array
            self._buffers[name] = buffer
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)  # the same memory
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(self._graph.carried[name], value)

    def reset(self) -> None:
        """See `Decoder`."""
        self._binding, self._buffers, self.past_tokens = None, {}, 0

    def reorder(self, rows: Sequence[int]) -> None:
        """See `Decoder`."""
        self.resume({name: array[list(rows)] for name, array in self.carried().items()})

    def carried(self) -> dict[str, Array]:
        """See `Decoder`."""
        return {name: buffer[:, :, : self.past_tokens] for name, buffer in self._buffers.items()}

    def resume(self, carried: Arrays) -> None:
        """See `Decoder`."""
        self._binding, self._buffers = None, dict(carried)
        self.past_tokens = decoding.past_of(carried) if carried else 0

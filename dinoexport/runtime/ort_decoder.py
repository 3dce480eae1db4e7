"""A decoder in ONNX Runtime whose cache stays in the runtime's own tensors from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinoexport.errors import BuildError
from dinoexport.runtime import decoding, telemetry
from dinoexport.spec import Array, Arrays, Graph


class OrtDecoder:
    """A `decoding.Decoder` that binds the outputs that carry state as the next call's inputs, without a copy."""

    def __init__(self, session: Any, graph: Graph) -> None:
        self._session, self._graph = session, graph
        self._cache: dict[str, Any] = {}
        self._batch = 0
        self.past_tokens = 0
        self.inside: dict[str, Array] = {}

    def step(self, input_ids_BT: Array, attention_mask_BS: Array) -> Array:
        """See `Decoder`."""
        logits: Array = self.rows(input_ids_BT, attention_mask_BS)[:, -1]
        return logits

    def rows(self, input_ids_BT: Array, attention_mask_BS: Array, *, keep: int = 1, first_position: int = 0) -> Array:
        """See `Decoder`."""
        onnxruntime = telemetry.onnxruntime()

        inputs = decoding.inputs_of(input_ids_BT, attention_mask_BS, keep, first_position)
        decoding.check_step(self._graph, inputs, self._batch, self.past_tokens)
        if not self._cache:
            self._cache = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
                for name, array in decoding.empty_cache(self._graph, len(input_ids_BT)).items()
            }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            # Bound as a value: for an input with a default the binding knows no type for an array.
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in (decoding.LOGITS, *self._graph.carried.values()):
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its exception classes share no public base but Exception
            shapes = {name: array.shape for name, array in inputs.items()}
            raise BuildError(f"ONNX Runtime failed on {shapes}: {error}", next_step="Report it.") from error
        logits, *presents = binding.get_outputs()
        self._cache = dict(zip(self._graph.carried, presents, strict=True))
        self._batch = len(input_ids_BT)
        self.past_tokens += input_ids_BT.shape[1]
        answer: Array = logits.numpy()
        return answer

    def reset(self) -> None:
        """See `Decoder`."""
        self._cache, self._batch, self.past_tokens = {}, 0, 0

    def reorder(self, rows: Sequence[int]) -> None:
        """See `Decoder`."""
        onnxruntime = telemetry.onnxruntime()

        chosen = list(rows)
        self._cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()[chosen]) for name, value in self._cache.items()
        }
        self._batch = len(chosen) if self._cache else 0

    def carried(self) -> dict[str, Array]:
        """See `Decoder`."""
        return {name: value.numpy() for name, value in self._cache.items()}

    def resume(self, carried: Arrays) -> None:
        """See `Decoder`."""
        onnxruntime = telemetry.onnxruntime()

        self._cache = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in carried.items()}
        self._batch, self.past_tokens = len(next(iter(carried.values()))), decoding.past_of(carried)

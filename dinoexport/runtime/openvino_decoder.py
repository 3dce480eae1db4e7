"""Make a graph that carries state stateful for OpenVINO, and run a decoder whose cache stays in the compiled model.

OpenVINO has a kernel that combines attention and its cache, for graphs of a certain form: the cache is a variable, an
input selects its rows, and Broadcast repeats grouped heads. Its ONNX front end gives plain tensors and Tile instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dinoexport.errors import BuildError
from dinoexport.runtime import check_inputs, decoding, telemetry
from dinoexport.spec import Array, Arrays, Graph, Tensor

_ROWS = "beam_idx"
# What a token that is not seen adds to its score; bfloat16 has the number too.
_UNSEEN = -3e38


def make_stateful(model: Any, graph: Graph) -> None:
    """Turns the carried inputs and outputs of `model` into variables, empty at first."""
    openvino = telemetry.openvino()
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    _heads_by_broadcast(model)
    _masks_as_numbers(model)
    for tensor in graph.inputs:
        if tensor.default is not None:
            _as_parameter(model, tensor)
    rows = ops.parameter([-1], openvino.Type.i32, name=_ROWS)
    rows.output(0).get_tensor().add_names({_ROWS})
    for name in graph.carried:
        past = model.input(name)
        consumers = past.get_target_inputs()
        chosen = ops.gather(past, rows, ops.constant(0, openvino.Type.i64))
        for consumer in consumers:
            consumer.replace_source_output(chosen.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, dict(graph.carried))
    first = graph.inputs[0].name
    batch = ops.gather(
        ops.shape_of(model.input(first), output_type="i64"),
        ops.constant([0], openvino.Type.i64),
        ops.constant(0, openvino.Type.i64),
    )
    for operator in model.get_ops():
        if operator.get_type_name() == "ReadValue":
            rest = [dim.min_length for dim in operator.get_output_partial_shape(0)][1:]
            shape = ops.concat([batch, ops.constant(rest, openvino.Type.i64)], 0)
            empty = ops.broadcast(ops.constant(0.0, operator.get_output_element_type(0)), shape)
            operator.set_arguments([empty])
    model.validate_nodes_and_infer_types()


def _heads_by_broadcast(model: Any) -> None:
    """The front end repeats grouped heads by Tile, which the kernel's pattern does not know."""
    openvino = telemetry.openvino()
    from openvino import opset13 as ops

    for tile in [operator for operator in model.get_ops() if operator.get_type_name() == "Tile"]:
        source, repeats = tile.input_value(0), tile.input_value(1)
        if source.get_node().get_type_name() != "Unsqueeze":
            continue
        wide = ops.broadcast(source, ops.convert(repeats, openvino.Type.i64), broadcast_spec="BIDIRECTIONAL")
        for consumer in tile.output(0).get_target_inputs():
            consumer.replace_source_output(wide.output(0))


def _masks_as_numbers(model: Any) -> None:
    """The kernel converts a mask of truth values one by one in each block, which takes most of a prompt's time.

    SmolLM2-135M, a prompt of 512 tokens, two threads: 20 of the 21 ms of a block's attention.
    """
    openvino = telemetry.openvino()
    from openvino import opset13 as ops

    added: dict[str, Any] = {}
    for attention in [o for o in model.get_ops() if o.get_type_name() == "ScaledDotProductAttention"]:
        if attention.get_input_size() < 4 or attention.get_input_element_type(3) != openvino.Type.boolean:
            continue
        mask = attention.input_value(3)
        name = f"{mask.get_node().get_name()}:{mask.get_index()}"
        if name not in added:
            seen, unseen = (ops.constant(number, openvino.Type.f32) for number in (0.0, _UNSEEN))
            added[name] = ops.select(mask, seen, unseen)
        attention.input(3).replace_source_output(added[name].output(0))


def _as_parameter(model: Any, tensor: Tensor) -> None:
    """The front end treats an input with a default as a constant."""
    openvino = telemetry.openvino()
    from openvino import opset13 as ops

    constant = next(operator for operator in model.get_ops() if operator.get_friendly_name() == tensor.name)
    parameter = ops.parameter(list(tensor.shape), openvino.Type(tensor.dtype), name=tensor.name)
    parameter.output(0).get_tensor().add_names({tensor.name})
    for consumer in constant.output(0).get_target_inputs():
        consumer.replace_source_output(parameter.output(0))
    model.add_parameters([parameter])


class OpenVinoDecoder:
    """A `decoding.Decoder` with its own infer request."""

    def __init__(self, compiled: Any, graph: Graph) -> None:
        self._request, self._graph = compiled.create_infer_request(), graph
        self._step = decoding.step_of(graph)
        # A state has the name of its variable, which joins the names of two tensors.
        self._states = {
            name: next(s for s in self._request.query_state() if s.name in (name + given, name, given))
            for name, given in graph.carried.items()
        }
        self._next: list[int] | None = None
        self._batch = 0
        self.past_tokens = 0
        self.inside: dict[str, Array] = {}

    def step(self, input_ids_BT: Array, attention_mask_BS: Array) -> Array:
        """See `Decoder`."""
        logits: Array = self.rows(input_ids_BT, attention_mask_BS)[:, -1]
        return logits

    def rows(self, input_ids_BT: Array, attention_mask_BS: Array, *, keep: int = 1, first_position: int = 0) -> Array:
        """See `Decoder`."""
        inputs = decoding.inputs_of(input_ids_BT, attention_mask_BS, keep, first_position)
        decoding.check_step(self._step, inputs, self._batch, self.past_tokens)
        return self._infer(inputs)

    def _infer(self, inputs: Arrays) -> Array:
        import numpy as np

        batch, new = inputs[decoding.INPUT_IDS].shape
        rows = np.arange(batch, dtype=np.int32) if self._next is None else np.array(self._next, np.int32)
        try:
            self._request.infer({**inputs, _ROWS: rows}, share_inputs=True)
        except RuntimeError as error:
            given = {name: array.shape for name, array in inputs.items()}
            raise BuildError(f"OpenVINO failed on {given}: {error}", next_step="Report it.") from error
        self._next, self._batch = None, batch
        self.past_tokens += new
        # Copied, because the request writes its next answer to the same memory.
        answer: Array = self._request.get_tensor(decoding.LOGITS).data.copy()
        return answer

    def reset(self) -> None:
        """See `Decoder`."""
        self._request.reset_state()
        self._next, self._batch, self.past_tokens = None, 0, 0

    def reorder(self, rows: Sequence[int]) -> None:
        """See `Decoder`."""
        chosen = list(rows)
        self._next = chosen if self._next is None else [self._next[row] for row in chosen]
        self._batch = len(chosen) if self.past_tokens else 0

    def carried(self) -> dict[str, Array]:
        """See `Decoder`."""
        types = {tensor.name: tensor.dtype for tensor in self._graph.inputs}
        rows = slice(None) if self._next is None else self._next
        return {name: state.state.data.astype(types[name])[rows] for name, state in self._states.items()}

    def resume(self, carried: Arrays) -> None:
        """See `Decoder`."""
        openvino = telemetry.openvino()

        self.reset()
        for name, state in self._states.items():
            state.state = openvino.Tensor(carried[name])
        self._batch, self.past_tokens = len(next(iter(carried.values()))), decoding.past_of(carried)

    def call(self, arrays: Arrays) -> dict[str, Array]:
        """One call with the carried values as inputs and outputs, like any runner; they are copied to the state."""
        openvino = telemetry.openvino()

        check_inputs(self._graph, arrays)
        self.reset()
        for name, state in self._states.items():
            if arrays[name].size:
                state.state = openvino.Tensor(arrays[name])
        defaults = {tensor.name: _filled(tensor) for tensor in self._graph.inputs if tensor.default is not None}
        inputs = {name: array for name, array in arrays.items() if name not in self._graph.carried}
        answers = {decoding.LOGITS: self._infer(defaults | inputs)}
        types = {tensor.name: tensor.dtype for tensor in self._graph.inputs}
        for name, state in self._states.items():
            answers[self._graph.carried[name]] = state.state.data.astype(types[name])
        return answers


def states(compiled: Any) -> Mapping[str, str]:
    """The precision in which a stateful model keeps its carried values: name -> the runtime's name of the precision."""
    request = compiled.create_infer_request()
    return {state.name: state.state.get_element_type().get_type_name() for state in request.query_state()}


def _filled(tensor: Tensor) -> Array:
    import numpy as np

    return np.full(tensor.shape, tensor.default, tensor.dtype)

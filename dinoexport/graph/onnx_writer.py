"""Write traced pieces to one typed ONNX file with streamed external weights.

A deep model is the same block many times, so each piece is traced once (`tracer`), or was before (`traces`), and is
repeated by graph surgery: tracing forty blocks costs what tracing twelve does. Weights are stand-ins while tracing;
they go from the checkpoint to the external data file one at a time, folded and cast on the way, so memory is that of
one tensor. The graph is put together in ONNX's own protobuf classes: onnx_ir would import sympy, half a second of an
export that takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from dinoexport.errors import BuildError, require
from dinoexport.family import Call, Piece
from dinoexport.graph import tracer, weights_file
from dinoexport.graph.weights_file import Constant, Held
from dinoexport.spec import Graph, Progress, Tensor, silent

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

    from dinoexport.graph.quantised_weights import QuantisedWeight

# ONNX's codes of a signature's types, without importing onnx.
_DTYPES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
}

# Piece name -> its traced graph, as the content of an ONNX file.
Traces = dict[str, bytes]
Trace = Callable[[Piece], bytes]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The files of a graph. data_sha256: of the file of its weights, hashed while it was written."""

    onnx: Path
    data: Path
    data_sha256: str


# What is appended to a graph later, a fitted head's operators, is of this one.
_OPSET_MIN = 18
# Packages that an export needs besides the base dependencies.
PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript")


def export(
    graph: Graph,
    calls: Sequence[Call],
    folder: Path,
    *,
    metadata: Mapping[str, str],
    traces: Traces | None = None,
    trace: Trace = tracer.trace,
    progress: Progress = silent,
) -> Exported:
    """Writes `{graph.name}.onnx` and its `.onnx.data` into `folder`.

    traces: traces by piece from earlier exports of other forms of the graph; this export's are added. trace: makes the
    trace of a piece that is not in `traces`.

    The same inputs give the same bytes. Raises BuildError when a piece cannot be traced or the file is not valid ONNX.
    """
    require("export", *PACKAGES)
    import onnx

    pieces = {call.piece.name: call.piece for call in calls}
    known = {} if traces is None else traces
    for done, (name, piece) in enumerate(pieces.items(), start=1):
        if name not in known:
            known[name] = traced(piece, trace)
        progress("tracing", done, len(pieces))
    whole = _Whole(graph, {name: onnx.ModelProto.FromString(known[name]).graph for name in pieces})
    for call in calls:
        whole.add(call)
    path = folder / f"{graph.name}.onnx"
    data = path.with_name(f"{path.name}.data")
    model = whole.model(metadata)
    data_sha256 = weights_file.write(model.graph, whole.held, data, progress=progress)
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(
            f"The exported {path.name} is not valid ONNX: {str(error)[:300]}", next_step="Report it."
        ) from error
    return Exported(onnx=path, data=data, data_sha256=data_sha256)


@contextmanager
def tracing(
    calls: Callable[[], Sequence[Call]], *, trace: Trace, ahead: Sequence[str] = ()
) -> Iterator[Callable[[], Traces]]:
    """Traces the pieces of `calls` in a thread; yields a function that waits for the traces and returns them.

    No weight is read, so another core can hash the checkpoint meanwhile, which for ViT-g takes as long. Pieces that are
    not begun at the end of the block are not traced. One thread traces everything, because only that thread can reuse
    the memory that it has freed. ahead: modules that the thread imports first because later code needs them.
    """
    traces: Traces = {}
    ended = Event()

    def trace_all() -> Traces:
        for module in ahead:
            if not ended.is_set():
                import_module(module)
        for call in () if ended.is_set() else calls():
            if not ended.is_set() and call.piece.name not in traces:
                traces[call.piece.name] = trace(call.piece)
        return traces

    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(trace_all)
        try:
            yield begun.result
        finally:
            ended.set()


def traced(piece: Piece, trace: Trace = tracer.trace) -> bytes:
    """The piece's trace; a BuildError when it cannot be traced."""
    try:
        return trace(piece)
    except Exception as error:
        # The tracer's own kind cannot be named here: that would import it.
        if type(error).__module__.partition(".")[0] != "torch":
            raise
        raise BuildError(f"The piece {piece.name} cannot be traced: {error}", next_step="Report it.") from error


class _Whole:
    """The calls' graphs in a row, with the recipe's names outside and the weights inside."""

    def __init__(self, graph: Graph, pieces: Mapping[str, GraphProto]) -> None:
        self._graph, self._pieces = graph, pieces
        self._names = {tensor.name: tensor.name for tensor in graph.inputs}
        self._outputs = {tensor.name for tensor in graph.outputs}
        self._constants: dict[tuple[object, ...], Constant] = {}
        self._weights: list[Held] = []
        self._quantised: dict[str, QuantisedWeight] = {}
        self._nodes: list[NodeProto] = []
        self._infos: list[ValueInfoProto] = []
        self._opsets: set[int] = set()

    @property
    def held(self) -> list[Held]:
        """The initializers. The bytes of weights are made when the file is written."""
        defaults = [_default(tensor) for tensor in self._graph.inputs if tensor.default is not None]
        return [*self._constants.values(), *defaults, *self._weights]

    def add(self, call: Call) -> None:
        """The nodes of one call, and the weights they read."""
        piece = self._pieces[call.piece.name]
        self._opsets.add(call.piece.opset)
        own, parameters = piece.input[: len(call.inputs)], piece.input[len(call.inputs) :]
        inner = {value.name: self._names[name] for value, name in zip(own, call.inputs, strict=True)}
        for parameter in parameters:
            inner[parameter.name] = self._weight(call, parameter)
        for constant in piece.initializer:
            inner[constant.name] = self._shared(constant)
        results = {value.name: name for value, name in zip(piece.output, call.outputs, strict=True)}
        types = {value.name: value.type.tensor_type.elem_type for value in (*piece.value_info, *piece.output)}
        for node in piece.node:
            inner |= {name: results.get(name, f"{call.scope}/{name}") for name in node.output if name}
            self._nodes.append(_copied(node, inner, call.scope))
            self._infos += [
                _info(inner[name], types[name])
                for name in node.output
                if types.get(name) and inner[name] not in self._outputs
            ]
        self._names |= {name: inner[value] for value, name in results.items()}
        assert all(self._names[name] == name for name in call.outputs), call.scope

    def model(self, metadata: Mapping[str, str]) -> ModelProto:
        """The model without its initializers."""
        import onnx

        (opset,) = self._opsets
        needed = _lowest_opset(self._nodes, opset)
        model = onnx.ModelProto(ir_version=_ir_version(needed), producer_name="dinoexport")
        model.opset_import.add(domain="", version=needed)
        for key in sorted(metadata):
            model.metadata_props.add(key=key, value=metadata[key])
        graph = model.graph
        graph.name = self._graph.name
        graph.input.extend(_signature(tensor) for tensor in self._graph.inputs)
        graph.output.extend(_signature(tensor) for tensor in self._graph.outputs)
        inputs = {tensor.name for tensor in self._graph.inputs}
        graph.value_info.extend(
            _info(str(t.name), int(t.dtype), tuple(t.shape)) for t in self.held if t.name not in inputs
        )
        graph.value_info.extend(self._infos)
        graph.node.extend(self._nodes)
        return model

    def _weight(self, call: Call, parameter: ValueInfoProto) -> str:
        """The value that is the parameter: an initializer, or what a quantised one is widened to."""
        from dinoexport.graph.lazy_weights import StreamedTensor

        dtype = parameter.type.tensor_type.elem_type
        shape = tuple(dim.dim_value for dim in parameter.type.tensor_type.shape.dim)
        weight, name = call.weights[parameter.name], f"{call.scope}.{parameter.name}"
        assert shape == weight.shape, name
        if weight.offsets_of:
            self._weights.append(self._in_few_bits(call, weight.offsets_of, dtype).offsets)
            return name
        if not weight.bits:
            self._weights.append(StreamedTensor(weight, dtype, name))
            return name
        import onnx

        parts = self._in_few_bits(call, parameter.name, dtype)
        self._weights += [parts.codes, parts.scales]
        inputs = [str(parts.codes.name), str(parts.scales.name)]
        self._nodes.append(
            onnx.helper.make_node(
                "DequantizeLinear", inputs, [name], name=f"{name}/widened", axis=0, block_size=weight.block
            )
        )
        self._infos.append(_info(name, dtype, shape))
        return name

    def _in_few_bits(self, call: Call, parameter: str, dtype: int) -> QuantisedWeight:
        """The quantised tensors of a parameter, the same ones each time."""
        from dinoexport.graph.quantised_weights import QuantisedWeight

        name = f"{call.scope}.{parameter}"
        if name not in self._quantised:
            offsets = next((other for other, w in call.weights.items() if w.offsets_of == parameter), "")
            self._quantised[name] = QuantisedWeight(
                call.weights[parameter],
                name,
                number_dtype=dtype,
                offsets_name=f"{call.scope}.{offsets}" if offsets else "",
            )
        return self._quantised[name]

    def _shared(self, constant: TensorProto) -> str:
        """One initializer for all equal small constants of all pieces."""
        import onnx

        values = onnx.numpy_helper.to_array(constant)
        key = (constant.data_type, tuple(constant.dims), values.tobytes())
        if key not in self._constants:
            self._constants[key] = Constant(
                name=f"constant_{len(self._constants)}",
                dtype=constant.data_type,
                shape=tuple(constant.dims),
                content=values.tobytes(),
            )
        return self._constants[key].name


def _copied(node: NodeProto, inner: Mapping[str, str], scope: str) -> NodeProto:
    """The node in its place in the whole graph."""
    import onnx

    subgraphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    if any(attribute.type in subgraphs for attribute in node.attribute):
        raise BuildError(f"{scope}: {node.op_type} holds a subgraph, which cannot be repeated.", next_step="Report it.")
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.name = f"{scope}/{node.output[0]}"
    made.input[:] = [inner[name] if name else "" for name in node.input]
    made.output[:] = [inner[name] if name else "" for name in node.output]
    return made


def _ir_version(opset: int) -> int:
    """The file format version that belongs to an operator set, because older runtimes read no newer version."""
    since = {23: 11, 21: 10, 19: 9}
    return next((version for first, version in since.items() if opset >= first), 8)


def _lowest_opset(nodes: Sequence[NodeProto], traced: int) -> int:
    """The lowest operator set in which every operator is defined as in the one that was traced to."""
    import onnx

    own = {node.op_type for node in nodes if node.domain in ("", "ai.onnx")}
    return max(_OPSET_MIN, *(onnx.defs.get_schema(name, traced).since_version for name in own))


def _info(name: str, dtype: int, shape: Sequence[int | str] | None = None) -> ValueInfoProto:
    """A value's name and type. shape: None where it is left to shape inference."""
    import onnx

    made = onnx.ValueInfoProto(name=name)
    made.type.tensor_type.elem_type = dtype
    if shape is not None:
        made.type.tensor_type.shape.SetInParent()
        for size in shape:
            dim = made.type.tensor_type.shape.dim.add()
            if isinstance(size, str):
                dim.dim_param = size
            else:
                dim.dim_value = size
    return made


def _signature(tensor: Tensor) -> ValueInfoProto:
    return _info(tensor.name, _type_of(tensor), tensor.shape)


def _type_of(tensor: Tensor) -> int:
    import onnx

    return int(onnx.TensorProto.DataType.Value(_DTYPES[tensor.dtype]))


def _default(tensor: Tensor) -> Constant:
    """The value of an input that may be left out: an initializer of the same name."""
    import numpy as np
    import onnx

    assert tensor.default is not None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(_type_of(tensor))
    shape = tuple(int(size) for size in tensor.shape)
    content = np.full(shape, tensor.default, dtype).tobytes()
    return Constant(name=tensor.name, dtype=_type_of(tensor), shape=shape, content=content)

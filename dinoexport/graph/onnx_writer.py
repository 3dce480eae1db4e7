"""Traced pieces to one typed ONNX file with streamed external weights.

A deep model is the same block many times, so each piece is traced once (`torch.export` -> `torch.onnx`) and repeated by
graph surgery: tracing forty blocks costs what tracing twelve does. Weights are stand-ins while tracing; they go from
the checkpoint to the external data file one at a time, folded and cast on the way, so memory is that of one tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from dinoexport.errors import BuildError, require
from dinoexport.family import Call, Piece
from dinoexport.graph import tracer
from dinoexport.spec import Graph, Progress, Tensor, silent

if TYPE_CHECKING:
    import onnx_ir as ir

# A signature's types as ONNX has them, without importing it.
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

# Shapes and axes stay in the file itself: shape inference does not read external data.
INLINE_BYTES = 256
# One tensor is read and folded while another is being written, unless both are as large as ViT-g's widest in fp32.
WRITERS = 2
IN_FLIGHT_BYTES = 64 * 2**20
# What an export needs besides the base dependencies.
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
) -> tuple[Path, ...]:
    """Writes `{graph.name}.onnx` and its `.onnx.data` into `folder`; returns their paths.

    traces: what earlier exports of forms of the same graph have traced, by piece; this one's are added. trace: gives
    that of a piece that is not among them.

    The same inputs give the same bytes. Raises BuildError when a piece cannot be traced or the file is not valid ONNX.
    """
    require("export", *PACKAGES)
    import onnx
    import onnx_ir as ir

    pieces = {call.piece.name: call.piece for call in calls}
    known = {} if traces is None else traces
    for done, (name, piece) in enumerate(pieces.items(), start=1):
        if name not in known:
            known[name] = traced(piece, trace)
        progress("tracing", done, len(pieces))
    model = _assemble(
        graph, calls, {name: ir.from_proto(onnx.ModelProto.FromString(known[name])).graph for name in pieces}, metadata
    )
    path = folder / f"{graph.name}.onnx"
    written = itertools.count(1)
    ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=INLINE_BYTES,
        # In whatever order they are done.
        callback=lambda _tensor, info: progress(f"writing {path.name}.data", next(written), info.total),
        max_workers=WRITERS,
        max_in_flight_bytes=IN_FLIGHT_BYTES,
    )
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(
            f"The exported {path.name} is not valid ONNX: {str(error)[:300]}", next_step="Report it."
        ) from error
    return path, path.with_name(f"{path.name}.data")


@contextmanager
def tracing(
    calls: Callable[[], Sequence[Call]], *, trace: Trace, ahead: Sequence[str] = ()
) -> Iterator[Callable[[], Traces]]:
    """Traces what an export of `calls` needs in a thread; yields what waits for it and gives the traces.

    No weight is read for it, so that another core can hash the checkpoint meanwhile, which for ViT-g takes as long.
    What is not begun by the end is left out. One thread does it all: what it has freed it alone can use again.
    ahead: modules that it imports first, for whoever will need them later.
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
        traced = pool.submit(trace_all)
        try:
            yield traced.result
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


def _assemble(
    graph: Graph, calls: Sequence[Call], traced: Mapping[str, ir.Graph], metadata: Mapping[str, str]
) -> ir.Model:
    """The calls' graphs in a row, with the recipe's names outside and external weights inside."""
    import onnx_ir as ir

    values = {tensor.name: _value(tensor) for tensor in graph.inputs}
    inputs = list(values.values())
    constants: dict[tuple[object, ...], ir.Value] = {}
    initializers = [values[tensor.name] for tensor in graph.inputs if tensor.default is not None]
    (opset,) = {call.piece.opset for call in calls}
    nodes: list[ir.Node] = []
    for call in calls:
        piece = traced[call.piece.name]
        own_inputs = piece.inputs[: len(call.inputs)]
        inner: dict[ir.Value, ir.Value] = dict(zip(own_inputs, (values[name] for name in call.inputs), strict=True))
        for parameter in piece.inputs[len(call.inputs) :]:
            stored, widening, inner[parameter] = _weight(call, parameter)
            initializers.extend(stored)
            nodes.extend(widening)
        for constant in piece.initializers.values():
            inner[constant] = _shared(constant, constants)
        nodes.extend(_copied(node, inner, call.scope) for node in piece)
        for name, output in zip(call.outputs, piece.outputs, strict=True):
            values[name] = inner[output]
            values[name].name = name
    outputs = [values[tensor.name] for tensor in graph.outputs]
    for value, tensor in zip(outputs, graph.outputs, strict=True):
        value.shape, value.type = ir.Shape(tensor.shape), _value(tensor).type
    ir_graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=[*constants.values(), *initializers],
        opset_imports={"": opset},
        name=graph.name,
    )
    return ir.Model(ir_graph, ir_version=_ir_version(opset), producer_name="dinoexport", metadata_props=dict(metadata))


def _ir_version(opset: int) -> int:
    """The version of the file format that came with an operator set: older runtimes read no newer one."""
    if opset >= 23:
        return 11
    return 10 if opset >= 21 else 9


def _value(tensor: Tensor) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    dtype = ir.DataType[_DTYPES[tensor.dtype]]
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype))
    if tensor.default is not None:
        # An input that is an initializer too may be left out.
        content = np.full([int(size) for size in tensor.shape], tensor.default, dtype.numpy())
        value.const_value = ir.Tensor(content, name=tensor.name)
    return value


def _weight(call: Call, parameter: ir.Value) -> tuple[list[ir.Value], list[ir.Node], ir.Value]:
    """The initializers that hold a parameter, the nodes that widen it where it is quantised, and the value to use.

    The bytes are made when the file is written.
    """
    import onnx_ir as ir

    from dinoexport.graph.lazy_weights import StreamedTensor

    assert parameter.name is not None and parameter.dtype is not None
    weight, name = call.weights[parameter.name], f"{call.scope}.{parameter.name}"
    assert parameter.shape is not None and tuple(parameter.shape) == weight.shape, name
    if not weight.bits:
        stored = _initializer(StreamedTensor(weight, parameter.dtype, name))
        return [stored], [], stored
    from dinoexport.graph.quantised_weights import QuantisedWeight

    parts = QuantisedWeight(weight, name, scale_dtype=parameter.dtype)
    held = [_initializer(part) for part in (parts.codes, parts.scales, parts.zeros) if part is not None]
    widened = ir.Node(
        "",
        "DequantizeLinear",
        held,
        [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", weight.block)],
        outputs=[ir.Value(name=name, shape=parameter.shape, type=ir.TensorType(parameter.dtype))],
        name=f"{name}/widened",
    )
    return held, [widened], widened.outputs[0]


def _initializer(tensor: ir.LazyTensor) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _shared(constant: ir.Value, constants: dict[tuple[object, ...], ir.Value]) -> ir.Value:
    """One initializer for all equal small constants of all pieces."""
    import onnx_ir as ir

    tensor = constant.const_value
    assert tensor is not None and constant.dtype is not None
    key = (constant.dtype, tuple(tensor.shape), tensor.tobytes())
    if key not in constants:
        name = f"constant_{len(constants)}"
        constants[key] = ir.Value(
            name=name,
            shape=ir.Shape(tensor.numpy().shape),
            type=ir.TensorType(constant.dtype),
            const_value=ir.Tensor(tensor.numpy(), name=name),
        )
    return constants[key]


def _copied(node: ir.Node, inner: dict[ir.Value, ir.Value], scope: str) -> ir.Node:
    """The node in its place in the whole graph; without the tracer's notes, which name files of this machine."""
    import onnx_ir as ir

    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise BuildError(f"{scope}: {node.op_type} holds a subgraph, which cannot be repeated.", next_step="Report it.")
    outputs = [
        ir.Value(name=f"{scope}/{out.name}", shape=None, type=out.type) if out.name else ir.Value(name="")
        for out in node.outputs
    ]
    inner.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else inner[value] for value in node.inputs],
        node.attributes.values(),
        outputs=outputs,
        version=node.version,
        name=f"{scope}/{node.outputs[0].name}",
    )

"""Write traced pieces to one typed ONNX file with streamed external weights.

A deep model repeats the same block, so each piece is traced once (`torch.export` -> `torch.onnx`) and repeated by graph
surgery: tracing forty blocks costs as much as tracing twelve. Placeholders stand for the weights while tracing. Weights
are copied from the checkpoint to the external data file one at a time, folded and cast: memory is that of one tensor.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from dinoexport.errors import BuildError, DinoexportError, require
from dinoexport.family import Call, Piece
from dinoexport.spec import Graph, Progress, Tensor, silent

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

# ONNX's codes of a signature's types, without importing onnx.
_DTYPES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
}

# Piece name -> its traced graph.
Traces = dict[str, "ir.Graph"]

# Shapes and axes stay in the file itself: shape inference does not read external data.
INLINE_BYTES = 256
# One tensor is read and folded while another is being written, unless both are as large as ViT-g's widest in fp32.
WRITERS = 2
IN_FLIGHT_BYTES = 64 * 2**20
# What is appended to a graph later, a fitted head's operators, is of this one.
_OPSET_MIN = 18
# Packages that an export needs besides the base dependencies.
PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript")
# Modules whose import takes two seconds of the first trace.
_IMPORTS = ("torch", "onnxscript.optimizer", "torch._dynamo")


def export(
    graph: Graph,
    calls: Sequence[Call],
    folder: Path,
    *,
    metadata: Mapping[str, str],
    traces: Traces | None = None,
    progress: Progress = silent,
) -> tuple[Path, ...]:
    """Writes `{graph.name}.onnx` and its `.onnx.data` into `folder`; returns their paths.

    traces: traced pieces of earlier exports of the same graph in other precisions; new ones are added.

    The same inputs give the same bytes. Raises BuildError when a piece cannot be traced or the file is not valid ONNX.
    """
    require("export", *PACKAGES)
    import onnx
    import onnx_ir as ir

    pieces = {call.piece.name: call.piece for call in calls}
    traced = {} if traces is None else traces
    for done, (name, piece) in enumerate(pieces.items(), start=1):
        if name not in traced:
            traced[name] = _trace(piece)
        progress("tracing", done, len(pieces))
    model = _assemble(graph, calls, traced, metadata)
    path = folder / f"{graph.name}.onnx"
    written = itertools.count(1)
    with _of_a_weight():
        ir.save(
            model,
            path,
            external_data=f"{path.name}.data",
            size_threshold_bytes=INLINE_BYTES,
            # Tensors finish in any order.
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
def _of_a_weight() -> Iterator[None]:
    """Raises a weight's own error, which the serialiser wraps when it reads small weights."""
    try:
        yield
    except DinoexportError:
        raise
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, DinoexportError):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        raise found from None


@contextmanager
def tracing(calls: Callable[[], Sequence[Call]]) -> Iterator[Callable[[], Traces]]:
    """Traces the pieces of `calls` in a thread; yields a function that waits for the thread and returns the traces.

    No weight is read, so another core can hash the checkpoint at the same time, which takes as long for ViT-g. Pieces
    not started by the end are left out. A single thread traces them all, because only that thread can reuse memory that
    it has freed.
    """
    traces: Traces = {}
    ended = Event()

    def trace() -> Traces:
        for module in _IMPORTS:
            if not ended.is_set():
                import_module(module)
        for call in () if ended.is_set() else calls():
            if not ended.is_set() and call.piece.name not in traces:
                traces[call.piece.name] = _trace(call.piece)
        return traces

    with ThreadPoolExecutor(1) as pool:
        traced = pool.submit(trace)
        try:
            yield traced.result
        finally:
            ended.set()


def _trace(piece: Piece) -> ir.Graph:
    """The piece as an optimised graph whose inputs are its own inputs, then its parameters by name."""
    import onnxscript.optimizer
    import torch

    axes = {
        name: {axis: torch.export.Dim(dim, min=piece.least_sizes.get(dim)) for axis, dim in dims.items()}
        for name, dims in piece.dynamic.items()
    }
    shapes = _as_taken(piece.module, tuple(axes.get(name, {}) for name in piece.example_inputs))
    with _quiet():
        try:
            program = torch.onnx.export(
                piece.module.eval(),
                tuple(piece.example_inputs.values()),
                input_names=list(piece.example_inputs),
                dynamic_shapes=shapes,
                opset_version=piece.opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise BuildError(f"The piece {piece.name} cannot be traced: {error}", next_step="Report it.") from error
        assert program is not None
        model = program.model
        # As graph inputs, the placeholder weights can be neither folded away nor merged because their values are equal.
        for name, _ in piece.module.named_parameters():
            weight = model.graph.initializers.pop(name)
            weight.const_value = None
            model.graph.inputs.append(weight)
        onnxscript.optimizer.optimize(model)
    _copy_dims(model)
    graph: ir.Graph = model.graph
    return graph


def _as_taken(module: torch.nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs' dynamic shapes in `torch.export`'s form: those of `*args` are one nested tuple."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    rest = [i for i, parameter in enumerate(parameters) if parameter.kind is inspect.Parameter.VAR_POSITIONAL]
    return shapes if not rest else (*shapes[: rest[0]], shapes[rest[0] :])


def _copy_dims(model: ir.Model) -> None:
    """Replaces a computed Reshape shape by a constant one if each dynamic dimension only stays in place.

    In ONNX Reshape, 0 copies a dimension; the tracer computes it with Shape and Concat instead, four nodes per block.
    """
    import numpy as np
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(model.graph):
        source, result = (node.inputs[0], node.outputs[0]) if node.op_type == "Reshape" else (None, None)
        if source is None or result is None or source.shape is None or result.shape is None:
            continue
        before, after = source.shape.dims, result.shape.dims
        constant = [
            size if isinstance(size, int) else 0 if i < len(before) and before[i] == size else -1
            for i, size in enumerate(after)
        ]
        if constant.count(-1) > 1 or constant == list(after):
            continue
        tensor = ir.tensor(np.array(constant, np.int64), name=f"{result.name}_shape")
        shape = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape([len(constant)]))
        shape.type = ir.TensorType(ir.DataType.INT64)
        model.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    RemoveUnusedNodesPass()(model)


def _assemble(
    graph: Graph, calls: Sequence[Call], traced: Mapping[str, ir.Graph], metadata: Mapping[str, str]
) -> ir.Model:
    """The calls' graphs in sequence, with the recipe's names as inputs and outputs, and with external weights."""
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
        opset_imports={"": (needed := _lowest_opset(nodes, opset))},
        name=graph.name,
    )
    return ir.Model(ir_graph, ir_version=_ir_version(needed), producer_name="dinoexport", metadata_props=dict(metadata))


def _ir_version(opset: int) -> int:
    """The file format version that belongs to an operator set, because older runtimes read no newer version."""
    since = {23: 11, 21: 10, 19: 9}
    return next((version for first, version in since.items() if opset >= first), 8)


def _lowest_opset(nodes: Sequence[ir.Node], traced: int) -> int:
    """The lowest operator set in which every operator is defined as in the one that was traced to."""
    import onnx

    own = {node.op_type for node in nodes if node.domain in ("", "ai.onnx")}
    return max(_OPSET_MIN, *(onnx.defs.get_schema(name, traced).since_version for name in own))


def _value(tensor: Tensor) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    dtype = ir.DataType[_DTYPES[tensor.dtype]]
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype))
    if tensor.default is not None:
        # An input that is also an initializer is optional.
        content = np.full([int(size) for size in tensor.shape], tensor.default, dtype.numpy())
        value.const_value = ir.Tensor(content, name=tensor.name)
    return value


def _weight(call: Call, parameter: ir.Value) -> tuple[list[ir.Value], list[ir.Node], ir.Value]:
    """The initializers of a parameter, the nodes that dequantise it if it is quantised, and the value to use.

    The bytes are computed when the file is written.
    """
    import onnx_ir as ir

    from dinoexport.graph.lazy_weights import StreamedTensor
    from dinoexport.graph.quantised_weights import QuantisedWeight

    assert parameter.name is not None and parameter.dtype is not None
    weight, name = call.weights[parameter.name], f"{call.scope}.{parameter.name}"
    assert parameter.shape is not None and tuple(parameter.shape) == weight.shape, name
    if not weight.bits:
        stored = _initializer(StreamedTensor(weight, parameter.dtype, name))
        return [stored], [], stored
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
    """The node with its names in the whole graph, without the tracer's metadata, which name files of this machine."""
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences notices of the tracer that a user can do nothing about, such as a missing torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export warns about its own use of deprecated pytree classes.
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""A piece traced to ONNX: `torch.export` -> `torch.onnx` -> onnxscript's optimiser.

What it gives is the content of a small ONNX file without weights, and the same on every run: the notes of the tracer,
which name files of this machine, are left out. A kept trace (`traces`) is found by this file's own hash among others,
so nothing of ours is imported here.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from dinoexport.family import Piece

# Imported by the first trace, in two seconds.
IMPORTS = ("torch", "onnxscript.optimizer", "torch._dynamo")


def trace(piece: Piece) -> bytes:
    """The piece as an optimised ONNX graph whose inputs are its own inputs, then its parameters by name.

    Raises `torch.onnx.OnnxExporterError` when it cannot be traced.
    """
    import onnxscript.optimizer
    import torch

    axes = {
        name: {axis: torch.export.Dim(dim, min=piece.least_sizes.get(dim)) for axis, dim in dims.items()}
        for name, dims in piece.dynamic.items()
    }
    module = piece.module
    # If one tensor were given twice, torch.export would see one input.
    examples = [torch.zeros(e.shape, dtype=getattr(torch, e.dtype)) for e in piece.example_inputs.values()]
    shapes = _as_taken(module, tuple(axes.get(name, {}) for name in piece.example_inputs))
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(examples),
            input_names=list(piece.example_inputs),
            dynamic_shapes=shapes,
            opset_version=piece.opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model = program.model
        # As graph inputs, the placeholder weights are neither folded nor merged where their values are equal.
        for name, _ in module.named_parameters():
            weight = model.graph.initializers.pop(name)
            weight.const_value = None
            model.graph.inputs.append(weight)
        onnxscript.optimizer.optimize(model)
    _copy_dims(model)
    return _content(model)


def _as_taken(module: torch.nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs' dynamic shapes in torch.export's form: those passed as `*args` are one nested tuple."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    rest = [i for i, parameter in enumerate(parameters) if parameter.kind is inspect.Parameter.VAR_POSITIONAL]
    return shapes if not rest else (*shapes[: rest[0]], shapes[rest[0] :])


def _copy_dims(model: ir.Model) -> None:
    """Reshapes to a computed shape become reshapes to a constant one wherever a dynamic dimension only stays in place.

    ONNX Reshape copies a dimension for a 0; the tracer computes it with Shape and Concat instead, four nodes a block.
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


def _content(model: ir.Model) -> bytes:
    """The graph as the bytes of an ONNX file, without the tracer's notes."""
    import onnx_ir as ir

    graph: ir.Graph = model.graph
    nodes = list(graph)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = model.doc_string = None
    for node in nodes:
        node.metadata_props.clear()
        node.doc_string = None
    results = (value for node in nodes for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *results):
        value.metadata_props.clear()
    content: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of the tracer that a user cannot act on, such as a missing torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export warns of its own use of deprecated pytree classes.
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

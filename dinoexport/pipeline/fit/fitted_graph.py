"""Append a fitted classifier to a bundle's own graph: a few standard ONNX nodes after the outputs it reads.

The backbone's weight file is not changed; the head's numbers are stored in the graph's own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError
from dinoexport.spec import Array, Graph

# How a feature is computed from an output: the output as it is, or its mean over the second axis.
Feature = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A head to append to a graph. graph: the new signature. features: the outputs that the head reads.

    tensors, table: see `classifiers.Fitted`. metadata: of the new file, besides the old one's.
    """

    graph: Graph
    features: tuple[Feature, ...]
    tensors: Mapping[str, Array]
    table: Mapping[str, Any]
    metadata: Mapping[str, str]

    def write(self, source: Path, target: Path) -> None:
        """Writes the graph at `source` with the head appended to `target`; the external data file stays the same."""
        import numpy as np
        import onnx
        from onnx import TensorProto, helper

        model = onnx.load(source, load_external_data=False)
        ends = _Nodes()
        parts = []
        for output, form in self.features:
            if form == "mean":
                axis = ends.keep(f"{output}_axis", np.array([1], np.int64))
                parts.append(ends.add("ReduceMean", [output, axis], f"mean_{output}", keepdims=0))
            else:
                parts.append(output)
        joined = parts[0] if len(parts) == 1 else ends.add("Concat", parts, "features", axis=1)
        if "fitted.weight" in self.tensors:
            weight, bias = (
                ends.keep("weight_KC", self.tensors["fitted.weight"]),
                ends.keep("bias_K", self.tensors["fitted.bias"]),
            )
            logits = ends.add("Gemm", [joined, weight, bias], "logits", transB=1)
            shares = ends.add("Softmax", [logits], "shares", axis=1)
        else:
            shares = _neighbours(ends, joined, self.tensors, self.table)
        ends.name("Identity", shares, "probabilities")
        best = ends.add("ArgMax", ["probabilities"], "best", axis=1, keepdims=0)
        ends.name("Cast", best, "class_index", to=TensorProto.INT32)
        model.graph.node.extend(ends.nodes)
        model.graph.initializer.extend(ends.stored)
        del model.graph.output[:]
        types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        model.graph.output.extend(
            helper.make_tensor_value_info(tensor.name, types[tensor.dtype], list(tensor.shape))
            for tensor in self.graph.outputs
        )
        known = {entry.key: entry.value for entry in model.metadata_props} | dict(self.metadata)
        del model.metadata_props[:]
        helper.set_model_props(model, known)
        onnx.save(model, target)
        try:
            onnx.checker.check_model(target, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise BuildError(
                f"{target.name} with its head is not valid: {str(error)[:300]}", next_step="Report it."
            ) from error


class _Nodes:
    """Nodes and constants whose names begin with `head/` and `head.`, as those of a traced head do."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.stored: list[Any] = []

    def add(self, op: str, inputs: Sequence[str], output: str, *more: str, **attributes: Any) -> str:
        """Adds a node and returns its first output's name. more: its other outputs."""
        from onnx import helper

        names = [f"head/{name}" for name in (output, *more)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=names[0], **attributes))
        return names[0]

    def name(self, op: str, value: str, output: str, **attributes: Any) -> None:
        """A node whose output is one of the graph's."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, [value], [output], name=f"head/{output}", **attributes))

    def keep(self, name: str, array: Array) -> str:
        """A constant."""
        import numpy as np
        from onnx import numpy_helper

        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(array), f"head.{name}"))
        return f"head.{name}"


def _neighbours(ends: _Nodes, features: str, tensors: Mapping[str, Array], table: Mapping[str, Any]) -> str:
    """The nearest of the bank vote, weighted by softmax(cosine / T)."""
    import numpy as np
    from onnx import TensorProto

    axis = ends.keep("axis_1", np.array([1], np.int64))
    length = ends.add("ReduceL2", [features, axis], "length", keepdims=1)
    floor = ends.keep("shortest", np.array(1e-12, np.float32))
    unit = ends.add("Div", [features, ends.add("Max", [length, floor], "length_not_zero")], "unit")
    stored = ends.keep("bank_ND", tensors["fitted.bank"].astype(np.float16))
    bank = ends.add("Cast", [stored], "bank", to=TensorProto.FLOAT)
    cosines = ends.add("Gemm", [unit, bank], "cosines", transB=1)
    count = ends.keep("neighbours", np.array([table["neighbours"]], np.int64))
    nearest = ends.add("TopK", [cosines, count], "nearest", "index", axis=1)
    temperature = ends.keep("temperature", np.array(table["temperature"], np.float32))
    weights = ends.add("Softmax", [ends.add("Div", [nearest, temperature], "scaled")], "weights", axis=1)
    votes = ends.keep("votes_NK", tensors["fitted.votes"])
    of_each = ends.add("Gather", [votes, "head/index"], "votes", axis=0)
    row = ends.add("Unsqueeze", [weights, axis], "row")
    return ends.add("Squeeze", [ends.add("MatMul", [row, of_each], "summed"), axis], "shares")

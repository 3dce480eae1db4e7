"""What is asked of the tracer, and what is made of its graph: written graphs and an exporter that only listens."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from dinoexport.family import Example
from dinoexport.graph import tracer

# As it is before the quick mode takes a call of it for a trace, which it skips.
_AS_TAKEN = tracer._as_taken


class Two(torch.nn.Module):
    def forward(self, a: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return a + sum(rest)


class Three(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return a + b + c


def test_inputs_that_are_passed_as_one_are_nested() -> None:
    assert _AS_TAKEN(Three(), ("A", "B", "C")) == ("A", "B", "C")
    assert _AS_TAKEN(Two(), ("A", "B", "C")) == ("A", ("B", "C"))
    assert _AS_TAKEN(Two(), ("A",)) == ("A", ())


def reshaped(before: list[Any], after: list[Any] | None, operator: str = "Reshape") -> ir.Model:
    """y = reshape(x, computed): a shape that is made of the input's, as the tracer writes it."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Shape", ["x"], ["computed"]),
        helper.make_node(
            operator, ["x", "computed"], ["y"], name="n", **({"allowzero": 1} if operator == "Reshape" else {})
        ),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, before)], [value("z", TensorProto.FLOAT, None)],
        value_info=[] if after is None else [value("y", TensorProto.FLOAT, after)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return ir.serde.deserialize_model(model)


@pytest.mark.parametrize(
    ("before", "after", "constant"),
    [
        (["batch", "tokens", 8], ["batch", "tokens", 2, 4], [0, 0, 2, 4]),
        (["batch", 3, 28, "w"], ["batch", 84, "w"], [0, 84, -1]),  # the width has moved
        (["batch", "h", "w", 8], ["batch", "n", 8], [0, -1, 8]),
        ([2, "tokens", 8], ["m", 8], [-1, 8]),
        (["batch"], ["batch", 1], [0, 1]),
        (["tokens"], ["batch", "tokens"], None),
        (["batch"], ["batch", "n"], [0, -1]),  # there is nothing in its place
        (["batch", "h", "w"], ["m", "n"], None),  # two that ONNX would have to find
        (["batch", 6], [1, 6], None),  # constant already
        (["batch", 6], None, None),  # no shape is known
    ],
)
def test_dimensions_that_stay_in_place_are_copied(before: list[Any], after: list[Any], constant: list[int]) -> None:
    model = reshaped(before, after)
    tracer._copy_dims(model)
    made = ir.serde.serialize_model(model)
    types = [node.op_type for node in made.graph.node]
    reshape = made.graph.node[types.index("Reshape")]
    if constant is None:
        assert types == ["Shape", "Reshape", "Identity"] and [*reshape.input] == ["x", "computed"]
        assert [entry.i for entry in reshape.attribute] == [1]
        return
    assert types == ["Reshape", "Identity"] and [*reshape.input] == ["x", "y_shape"]
    assert [(entry.name, entry.i) for entry in reshape.attribute] == [("allowzero", 0)]
    (shape,) = made.graph.initializer
    assert (shape.name, numpy_helper.to_array(shape).tolist(), shape.data_type) == (
        "y_shape",
        constant,
        TensorProto.INT64,
    )


def test_other_operators_keep_their_shapes() -> None:
    model = reshaped(["batch", 6], ["batch", 2, 3], "Expand")
    tracer._copy_dims(model)
    assert [node.op_type for node in model.graph] == ["Shape", "Expand", "Identity"]


def test_notes_of_the_tracer_are_left_out() -> None:
    plain = tracer._content(reshaped(["batch", 6], ["batch", 2, 3]))
    noted = reshaped(["batch", 6], ["batch", 2, 3])
    values = [*noted.graph.inputs, *(value for node in noted.graph for value in node.outputs)]
    for place in (noted, noted.graph, *noted.graph, *values):
        place.metadata_props["pkg.torch.stack_trace"] = "a file of this machine"
    for place in (noted, noted.graph, *noted.graph):
        place.doc_string = "a remark"
    assert b"this machine" in ir.serde.serialize_model(noted).SerializeToString()
    assert tracer._content(noted) == plain
    assert onnx.ModelProto.FromString(plain).graph.node[1].op_type == "Reshape"


class Piece(torch.nn.Module):
    """x + b, with a weight that another has the values of."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = (torch.nn.Parameter(torch.zeros(6), requires_grad=False) for _ in range(2))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is run")


def test_what_is_asked_of_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples of zeros, names and dynamic axes as the piece has them; its weights become inputs behind its own."""
    asked: list[Any] = []
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "b"], ["y"]), helper.make_node("Add", ["y", "c"], ["z"])],
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 6])],
        [value("z", TensorProto.FLOAT, ["batch", 6])],
        initializer=[numpy_helper.from_array(np.zeros(6, np.float32), name) for name in "bc"],
    )
    made = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))

    def export(module: torch.nn.Module, args: tuple[torch.Tensor, ...], **settings: Any) -> Any:
        shapes = [
            {axis: (dim.__name__, dim.min) for axis, dim in axes.items()} for axes in settings.pop("dynamic_shapes")
        ]
        asked.append((module.training, [(x.dtype, tuple(x.shape), x.any().item()) for x in args], shapes, settings))
        return SimpleNamespace(model=made)

    optimizer: Any = ModuleType("onnxscript.optimizer")
    optimizer.optimize = lambda model: asked.append([each.name for each in model.graph.inputs])
    package: Any = ModuleType("onnxscript")
    package.optimizer = optimizer
    for module in (package, optimizer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tracer, "_as_taken", _AS_TAKEN)
    monkeypatch.setattr(torch.onnx, "export", export)
    piece: Any = SimpleNamespace(
        module=Piece(),
        example_inputs={"x": Example(dtype="float16", shape=(2, 6)), "ids": Example(dtype="int64", shape=(1,))},
        dynamic={"x": {0: "batch"}},
        least_sizes={"batch": 3},
        opset=21,
    )
    content = tracer.trace(piece)
    examples = [(torch.float16, (2, 6), False), (torch.int64, (1,), False)]
    settings = {
        "input_names": ["x", "ids"], "opset_version": 21, "dynamo": True, "optimize": False, "verbose": False,
    }  # fmt: skip
    assert asked == [(False, examples, [{0: ("batch", 3)}, {}], settings), ["x", "b", "c"]]
    found = onnx.ModelProto.FromString(content).graph
    assert [each.name for each in found.input] == ["x", "b", "c"] and not found.initializer

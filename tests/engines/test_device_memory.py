"""The device memory of an engine by graphs small enough to count by hand, and the sizes that fit into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dinoexport.engines import profiles
from dinoexport.spec import Dim, Graph, Tensor

GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="x", dtype="float32", shape=("batch", 10), meaning="values"),),
    outputs=(),
    dims=(Dim(name="batch", min=1, opt=2, max=4),),
)
WHOLE = profiles.profile("whole", GRAPH, {})


def saved(folder: Path, nodes: Sequence[str], weights: Sequence[np.ndarray] = (), *, columns: int = 10) -> Path:
    """The graph from x (batch, 10) to y (batch, columns), in float32; a node is written as `output = Operator inputs`.

    The weights are in a file beside it, which is removed.
    """
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ("batch", c)) for n, c in (("x", 10), ("y", columns)))
    made = []
    for written in nodes:
        output, _, operation = written.partition(" = ")
        operator, *inputs = operation.split()
        made.append(helper.make_node(operator, inputs, [output], **({"axis": 1} if operator == "Concat" else {})))
    initializers = [numpy_helper.from_array(values, f"w{number}") for number, values in enumerate(weights)]
    graph = helper.make_graph(made, "model", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    (folder / "weights").unlink(missing_ok=True)
    return path


def test_the_most_that_is_alive_at_once_is_counted_with_a_third_more(tmp_path: Path) -> None:
    """At four rows p takes 160 bytes, the shape 16, and c, d and e 480 each: together 1456, which is the most.

    z and s are attention's scores, before and after the softmax, which are not stored; how many rows of e are not zero
    is not known, so u counts for nothing; y is in the caller's own buffer.
    """
    nodes = [
        "p = Relu x", "c = Concat p p p", "shape = Shape c", "d = Reshape c shape", "e = Neg d", "u = NonZero e",
        "z = Reshape e shape", "s = Softmax z", "y = Sum c d e s w0",
    ]  # fmt: skip
    path = saved(tmp_path, nodes, [np.zeros(30, np.float32)], columns=30)
    assert profiles.scratch_bytes(path, WHOLE) == 1966  # 1965.6


def test_a_graph_of_one_node_needs_no_scratch(tmp_path: Path) -> None:
    assert profiles.scratch_bytes(saved(tmp_path, ["y = Relu x"]), WHOLE) == 0


def test_the_largest_weight_is_told_by_its_bytes(tmp_path: Path) -> None:
    """15 of two bytes, 21 of one, 4 of four, without the file that they are in."""
    weights = [np.zeros((3, 5), np.float16), np.zeros(21, np.int8), np.zeros((2, 2), np.float32)]
    assert profiles.largest_weight_bytes(saved(tmp_path, ["y = Relu x"], weights)) == 30
    assert profiles.largest_weight_bytes(saved(tmp_path, ["y = Relu x"])) == 0


@pytest.mark.parametrize(
    ("budget_bytes", "fits"),
    [(53, {}), (54, {"batch": 1}), (107, {"batch": 1}), (108, {"batch": 2}), (215, {"batch": 3}), (216, {})],
)
def test_the_largest_size_that_fits_is_named_where_not_all_do(
    budget_bytes: int, fits: dict[str, int], tmp_path: Path
) -> None:
    """A row takes 40 bytes between the two nodes, 54 with what a compiler needs besides."""
    path = saved(tmp_path, ["p = Relu x", "y = Neg p"])
    assert profiles.fitting(path, GRAPH, WHOLE, budget_bytes) == fits

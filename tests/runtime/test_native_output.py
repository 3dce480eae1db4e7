"""A runtime writes nothing to the terminal by itself: its lines hold names out of a graph, and nobody escapes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dinoexport.errors import DinoexportError
from dinoexport.runtime import ort, telemetry
from dinoexport.spec import Dim, Graph, Tensor

NAME = "\x1b[2J\x1b[32mPASSED\u202e"


def reshaping(path: Path) -> Path:
    """A graph that loads and whose one node, of a hostile name, fails when it runs."""
    wrong = numpy_helper.from_array(np.array([7, -1], np.int64), "shape")
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [7, None])]
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name=NAME)
    graph = helper.make_graph([node], "g", inputs, outputs, [wrong])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_what_fails_is_raised_and_not_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = reshaping(tmp_path / "model.onnx")
    dims = (Dim(name="batch", min=1, opt=1, max=4),)
    graph = Graph(
        name="model",
        inputs=(Tensor(name="x", dtype="float32", shape=("batch", 3), meaning="x"),),
        outputs=(Tensor(name="y", dtype="float32", shape=(7, "batch"), meaning="y"),),
        dims=dims,
    )
    run = ort.open_graph(path, graph)
    with pytest.raises(DinoexportError, match="Reshape"):
        run({"x": np.ones((2, 3), np.float32)})
    own = telemetry.onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="Reshape"):
        own.run(None, {"x": np.ones((2, 3), np.float32)})
    assert capfd.readouterr() == ("", "")

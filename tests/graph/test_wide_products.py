"""OpenVINO's form of an int8 graph, of one product as the quantiser writes it: the same weight behind its scale."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dinoexport.errors import BuildError
from dinoexport.graph import quantise
from dinoexport.runtime import telemetry

WEIGHT = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
SCALE = np.array([0.5, 0.25, 2.0, 1.0], np.float32)


def integer_graph(path: Path, *, weight_scale_first: bool) -> Path:
    """y = relu(x) @ w by x's own scale and w's, as onnxruntime's dynamic quantiser has it, twice in a row."""
    nodes = [helper.make_node("Relu", ["x"], ["x0"])]
    initializers = []
    for i in range(2):
        inputs = (f"w_scale{i}", f"x_scale{i}") if weight_scale_first else (f"x_scale{i}", f"w_scale{i}")
        nodes += [
            helper.make_node(
                "DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"x_scale{i}", f"x_zero{i}"], name=f"split{i}"
            ),
            helper.make_node(
                "MatMulInteger", [f"q{i}", f"w{i}", f"x_zero{i}", f"w_zero{i}"], [f"n{i}"], name=f"product{i}"
            ),
            helper.make_node("Cast", [f"n{i}"], [f"f{i}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [*inputs], [f"scale{i}"]),
            helper.make_node("Mul", [f"f{i}", f"scale{i}"] if i else [f"scale{i}", f"f{i}"], [f"x{i + 1}"]),
        ]
        weight = WEIGHT if i == 0 else WEIGHT.T.copy()
        initializers += [
            numpy_helper.from_array(weight, f"w{i}"),
            numpy_helper.from_array(SCALE if i == 0 else np.ones(6, np.float32), f"w_scale{i}"),
            numpy_helper.from_array(np.zeros(weight.shape[1], np.int8), f"w_zero{i}"),
        ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, ["n", 6])], [value("x2", 1, ["n", 6])], initializer=initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("weight_scale_first", [True, False])
def test_each_product_is_of_the_activation_and_the_widened_weight(weight_scale_first: bool, tmp_path: Path) -> None:
    (tmp_path / "int8").mkdir()
    source = integer_graph(tmp_path / "int8" / "model.onnx", weight_scale_first=weight_scale_first)
    path, data = quantise.with_wide_products(source, tmp_path)
    assert (path, data) == (tmp_path / "model.onnx", tmp_path / "model.onnx.data")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, node.name, [*node.input], [*node.output]) for node in model.graph.node] == [
        ("Relu", model.graph.node[0].name, ["x"], ["x0"]),
        ("DequantizeLinear", "w0/wide", ["w0", "w_scale0", "w_zero0"], ["w0/wide"]),
        ("MatMul", "product0/wide", ["x0", "w0/wide"], ["product0/wide"]),
        ("DequantizeLinear", "w1/wide", ["w1", "w_scale1", "w_zero1"], ["w1/wide"]),
        ("MatMul", "product1/wide", ["product0/wide", "w1/wide"], ["x2"]),
    ]
    assert {entry.name: entry.i for entry in model.graph.node[1].attribute} == {"axis": 1}
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert set(arrays) == {f"w{part}{i}" for part in ("", "_scale", "_zero") for i in range(2)}
    assert np.array_equal(arrays["w0"], WEIGHT) and np.array_equal(arrays["w_scale0"], SCALE)


@pytest.mark.parametrize("signed", [None, False, True])
def test_what_is_asked_of_the_quantiser(signed: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products alone, a scale for each column, and the weights in a file that others may read as they may the graph."""
    asked: list[Any] = []

    def quantize_dynamic(source: Path, path: Path, **settings: Any) -> None:
        asked.append((source, path, settings))
        if source.name == "bad.onnx":
            raise ValueError("no such operator")
        path.write_bytes(b"graph")
        data = path.with_name(f"{path.name}.data")
        data.write_bytes(b"weights")
        data.chmod(0o600)

    quantiser: Any = ModuleType("onnxruntime.quantization")
    quantiser.quantize_dynamic = quantize_dynamic
    quantiser.QuantType = SimpleNamespace(QInt8="signed", QUInt8="unsigned")
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", quantiser)
    monkeypatch.setattr(telemetry, "onnxruntime", lambda: None)
    source, folder = tmp_path / "m.onnx", tmp_path / "int8"
    folder.mkdir()
    options: dict[str, Any] = {} if signed is None else {"signed": signed}
    path, data = quantise.to_int8(source, folder, **options)
    settings = {
        "op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": "signed" if signed else "unsigned",
        "use_external_data_format": True,
    }  # fmt: skip
    assert asked == [(source, path, settings)] and path == folder / "m.onnx"
    assert data.read_bytes() == b"weights" and data.stat().st_mode == path.stat().st_mode
    with pytest.raises(BuildError, match=r"^bad\.onnx cannot be quantised: no such operator$") as refused:
        quantise.to_int8(tmp_path / "bad.onnx", folder)
    assert refused.value.next_step == "Use --precision fp32."


def test_openvino_s_form_is_of_signed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def to_int8(onnx: Path, folder: Path, *, signed: bool = False) -> tuple[Path, Path]:
        asked.append((onnx, folder.parent, signed))
        return integer_graph(folder / onnx.name, weight_scale_first=True), folder / "data"

    monkeypatch.setattr(quantise, "to_int8", to_int8)
    path, _ = quantise.to_wide_int8(tmp_path / "elsewhere" / "m.onnx", tmp_path)
    assert asked == [(tmp_path / "elsewhere" / "m.onnx", tmp_path, True)]
    assert path == tmp_path / "m.onnx" and sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]

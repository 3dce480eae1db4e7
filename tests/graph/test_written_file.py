"""A whole ONNX file of two calls of one small piece: its nodes, names, types and weights, without tracing a model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dinoexport.errors import BuildError
from dinoexport.family import Call, Piece
from dinoexport.graph import lazy_weights, onnx_writer
from dinoexport.spec import Dim, Graph, Tensor, Weight

FLOAT = TensorProto.FLOAT
GRAPH = Graph(
    name="model",
    inputs=(
        Tensor(name="x", dtype="float32", shape=("batch", 64), meaning="numbers"),
        Tensor(name="scale", dtype="float32", shape=(1,), meaning="a factor", default=2),
    ),
    outputs=(Tensor(name="y", dtype="float32", shape=("batch", 64), meaning="numbers"),),
    dims=(Dim(name="batch", min=1, opt=1, max=4),),
)
MATRIX, OFFSETS = (64, 64), (2, 64)


def value(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, FLOAT, shape)


def trace(*, offsets: bool = False, extra: Any = ()) -> bytes:
    """product = x @ w, sum = (product + 1) * scale, two constants and, if wanted, offsets."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "one"], ["more"]),
        helper.make_node("Add", ["more", "again"], ["more2"]),
        *([helper.make_node("ReduceSum", ["o"], ["o_sum"], keepdims=1)] if offsets else ()),
        *extra,
        helper.make_node("Mul", ["more2", "s"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "piece",
        [value("x", "batch", 64), value("s", 1), value("w", *MATRIX), *([value("o", *OFFSETS)] if offsets else ())],
        [value("out", "batch", 64)],
        initializer=[numpy_helper.from_array(np.ones(1, np.float32), name) for name in ("one", "again")],
        value_info=[value(name, "batch", 64) for name in ("product", "more")],
    )
    return helper.make_model(graph).SerializeToString()


PIECE = Piece(name="piece", code="none:None", arguments={}, example_inputs={}, dynamic={}, opset=21)
MATRICES = [np.random.RandomState(i).standard_normal(MATRIX).astype(np.float32) for i in range(2)]


def calls(**facts: Any) -> list[Call]:
    """The second continues the first. facts: of each weight."""
    found = []
    for i, (inputs, outputs) in enumerate([(("x", "scale"), ("middle",)), (("middle", "scale"), ("y",))]):
        weights = {"w": Weight(shape=MATRIX, read=lambda i=i: MATRICES[i], **facts)}
        if facts.get("bits") == 4:
            weights["o"] = Weight(shape=OFFSETS, read=weights["w"].read, offsets_of="w")
        found.append(Call(piece=PIECE, scope=f"part{i}", inputs=inputs, outputs=outputs, weights=weights))
    return found


def exported(folder: Path, traced: bytes, **facts: Any) -> tuple[onnx.ModelProto, list[tuple[Any, ...]]]:
    """The file, and the progress that was told."""
    told: list[tuple[Any, ...]] = []
    made = onnx_writer.export(
        GRAPH,
        calls(**facts),
        folder,
        metadata={"b": "2", "a": "1"},
        traces={"piece": traced},
        trace=pytest.fail,
        progress=lambda *words: told.append(words),
    )
    assert (made.onnx, made.data) == (folder / "model.onnx", folder / "model.onnx.data")
    assert made.data_sha256 == hashlib.sha256(made.data.read_bytes()).hexdigest()
    return onnx.load(made.onnx), told


def test_the_whole_file(tmp_path: Path) -> None:
    model, told = exported(tmp_path, trace())
    assert told[0] == ("tracing", 1, 1)
    assert (model.producer_name, model.ir_version) == ("dinoexport", 8)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("a", "1"), ("b", "2")]
    graph = model.graph
    assert [(node.name, node.op_type, [*node.input], [*node.output]) for node in graph.node] == [
        ("part0/product", "MatMul", ["x", "part0.w"], ["part0/product"]),
        ("part0/more", "Add", ["part0/product", "constant_0"], ["part0/more"]),
        ("part0/more2", "Add", ["part0/more", "constant_0"], ["part0/more2"]),
        ("part0/out", "Mul", ["part0/more2", "scale"], ["middle"]),
        ("part1/product", "MatMul", ["middle", "part1.w"], ["part1/product"]),
        ("part1/more", "Add", ["part1/product", "constant_0"], ["part1/more"]),
        ("part1/more2", "Add", ["part1/more", "constant_0"], ["part1/more2"]),
        ("part1/out", "Mul", ["part1/more2", "scale"], ["y"]),
    ]
    # Only what the piece knows the type of, and no input or output twice: the checker's strictest mode takes neither.
    assert [entry.name for entry in graph.value_info] == [
        "constant_0", "part0.w", "part1.w", "part0/product", "part0/more", "middle", "part1/product", "part1/more",
    ]  # fmt: skip
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert [*arrays] == ["constant_0", "scale", "part0.w", "part1.w"]
    assert arrays["constant_0"].tolist() == [1] and arrays["scale"].tolist() == [2]
    assert all(np.array_equal(arrays[f"part{i}.w"], MATRICES[i]) for i in range(2))
    dims = [[dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in graph.input]
    assert dims == [["batch", 64], [1]] and [entry.name for entry in graph.output] == ["y"]


@pytest.mark.parametrize("changes", [{"inputs": ("x", "scale", "x", "x")}, {"outputs": ("middle", "more")}])
def test_a_call_names_as_many_values_as_its_piece_has(changes: dict[str, Any], tmp_path: Path) -> None:
    first, second = calls()
    wrong = [replace(first, **changes), second]
    with pytest.raises(ValueError, match=r"^zip\(\) argument"):
        onnx_writer.export(GRAPH, wrong, tmp_path, metadata={}, traces={"piece": trace()}, trace=pytest.fail)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_few_bits_are_widened_before_their_product(bits: int, tmp_path: Path) -> None:
    model, _ = exported(tmp_path, trace(offsets=bits == 4), bits=bits, block=32)
    first, product, *_ = model.graph.node
    assert (first.name, first.op_type, [*first.output]) == ("part0.w/widened", "DequantizeLinear", ["part0.w"])
    assert [*first.input] == ["part0.w_codes", "part0.w_scales"]
    assert {entry.name: entry.i for entry in first.attribute} == {"axis": 0, "block_size": 32}
    assert product.input[1] == "part0.w" and [entry.version for entry in model.opset_import] == [21]
    held = {tensor.name: (tensor.data_type, [*tensor.dims]) for tensor in model.graph.initializer}
    kind = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    wanted = {"constant_0": (FLOAT, [1]), "scale": (FLOAT, [1])}
    for part in ("part0", "part1"):
        wanted |= {f"{part}.w_codes": (kind, [64, 64]), f"{part}.w_scales": (FLOAT, [2, 64])}
        wanted |= {f"{part}.o": (FLOAT, [2, 64])} if bits == 4 else {}
    assert held == wanted
    assert "part0.w" in {entry.name for entry in model.graph.value_info}


def test_a_file_that_is_not_valid_is_reported_with_the_checker_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes that do not fit are found by inferring all of them; of the words, the first three hundred."""
    wrong = helper.make_node("Reshape", ["product", "w"], ["more2"])
    with pytest.raises(BuildError, match=r"The exported model\.onnx is not valid ONNX: "):
        exported(tmp_path, trace(extra=[wrong]))

    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("x" * 299 + "yz")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(BuildError) as caught:
        exported(tmp_path, trace())
    assert caught.value.message == f"The exported model.onnx is not valid ONNX: {'x' * 299}y"


def test_shapes_that_do_not_fit_are_found(tmp_path: Path) -> None:
    wrong = [helper.make_node("MatMul", ["one", "w"], ["lost"])]
    with pytest.raises(BuildError, match=r"is not valid ONNX: (.|\n)*MatMul"):
        exported(tmp_path, trace(extra=wrong))


@pytest.mark.parametrize(("kind", "told"), [("torch.onnx.errors", True), ("torch", True), ("torchvision", False)])
def test_errors_of_the_tracer_are_the_piece_s(kind: str, told: bool) -> None:
    """Any other error is nobody's but its own."""
    error = type("Odd", (Exception,), {"__module__": kind})("no kernel")

    def fails(_: Piece) -> bytes:
        raise error

    with pytest.raises(BuildError if told else type(error)) as caught:
        onnx_writer.traced(PIECE, fails)
    if told:
        assert str(caught.value) == "The piece piece cannot be traced: no kernel" and caught.value.__cause__ is error


def test_numbers_that_need_no_cast_are_not_copied() -> None:
    block = np.ones(4, np.float32)
    assert lazy_weights._cast(block, np.dtype(np.float32)) is block

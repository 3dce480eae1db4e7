"""Products of one input that become one: the same numbers, of a graph written here and run by onnx's own evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dinoexport.runtime import ort_joined_products

ROWS, BLOCK = 16, 8
X = np.random.default_rng(0).standard_normal((3, ROWS)).astype(np.float32)


class Made:
    """A graph under construction; every product has weights of its own."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(1)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.outputs: list[str] = []

    def constant(self, name: str, values: np.ndarray, kind: int = TensorProto.FLOAT) -> str:
        if kind == TensorProto.INT4:  # two numbers share a byte, the first the lower half
            low, high = values.ravel()[0::2] & 15, values.ravel()[1::2] & 15
            raw = (low | high << 4).astype(np.uint8)
        else:
            raw = values.astype(np.int8 if kind == TensorProto.INT8 else np.float32)
        self.constants.append(helper.make_tensor(name, kind, values.shape, raw.tobytes(), raw=True))
        return name

    def product(
        self, name: str, columns: int, *, bits: int = 4, axis: int = 0, offsets: bool = False, to: str = "x"
    ) -> None:
        high = 2 ** (bits - 1)
        codes = self.random.integers(-high, high, (ROWS, columns))
        kind = TensorProto.INT4 if bits == 4 else TensorProto.INT8
        shape = (ROWS // BLOCK, columns) if axis == 0 else (ROWS, columns // BLOCK)
        parts = [
            self.constant(f"{name}/codes", codes, kind),
            self.constant(f"{name}/scales", self.random.random(shape) + 0.1),
        ]
        self.nodes += [
            helper.make_node("DequantizeLinear", parts, [f"{name}/wide"], axis=axis, block_size=BLOCK),
            helper.make_node("MatMul", [to, f"{name}/wide"], [f"{name}/product" if offsets else name]),
        ]
        if offsets:
            more = self.constant(f"{name}/offsets", self.random.random((ROWS // BLOCK, columns)))
            self.nodes += [
                helper.make_node("MatMul", ["sums", more], [f"{name}/shares"]),
                helper.make_node("Add", [f"{name}/product", f"{name}/shares"], [name]),
            ]
        self.outputs.append(name)

    def model(self) -> Any:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "made",
            [value("x", TensorProto.FLOAT, [3, ROWS]), value("sums", TensorProto.FLOAT, [3, ROWS // BLOCK])],
            [value(name, TensorProto.FLOAT, None) for name in self.outputs],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def answers(model: Any) -> dict[str, np.ndarray]:
    """What a model gives, computed here operator by operator."""
    values = {"x": X, "sums": X.reshape(3, -1, BLOCK).sum(axis=2)}
    values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        given = [values[name] for name in node.input]
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "DequantizeLinear":
            wide = given[1].repeat(settings["block_size"], axis=settings["axis"])
            made = [given[0].astype(np.float32) * wide]
        elif node.op_type == "Split":
            made = np.split(given[0], np.cumsum(given[1])[:-1], axis=settings["axis"])
        else:
            made = [given[0] @ given[1] if node.op_type == "MatMul" else given[0] + given[1]]
        values |= dict(zip(node.output, made, strict=True))
    return {output.name: values[output.name] for output in model.graph.output}


def joined(made: Made, folder: Path = Path()) -> dict[str, int]:
    """How many operators of each kind there are afterwards; the answers must be the same."""
    model = made.model()
    before = answers(model)
    ort_joined_products.join_products(model, folder)
    for name, values in answers(model).items():
        np.testing.assert_allclose(values, before[name], rtol=1e-5, err_msg=name)
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read, "what nothing reads is gone"
    kinds = [node.op_type for node in model.graph.node]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_one_input_become_one(bits: int) -> None:
    made = Made()
    for name, columns in (("q", 6), ("k", 2), ("v", 4)):
        made.product(name, columns, bits=bits)
    assert joined(made) == {"DequantizeLinear": 1, "MatMul": 1, "Split": 1}


def test_their_offsets_too() -> None:
    made = Made()
    made.product("q", 6, offsets=True)
    made.product("k", 2, offsets=True)
    assert joined(made) == {"Add": 1, "DequantizeLinear": 1, "MatMul": 2, "Split": 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"bits": 8}),
        ({}, {"offsets": True}),
        ({}, {"axis": 1, "columns": 8}),
        ({}, {"columns": 3}),
        ({"axis": 1, "columns": 8}, {"axis": 1, "columns": 8}),
    ],
    ids=["other bits", "offsets of one", "blocks along columns", "half a byte", "both along columns"],
)
def test_what_cannot_lie_side_by_side_stays(first: dict[str, Any], second: dict[str, Any]) -> None:
    made = Made()
    made.product("a", **{"columns": 6} | first)
    made.product("b", **{"columns": 6} | second)
    found = joined(made)
    assert found["DequantizeLinear"] == 2 and "Split" not in found


def test_products_of_other_inputs_stay() -> None:
    made = Made()
    made.product("a", ROWS)
    made.product("b", 4, to="a")
    assert joined(made) == {"DequantizeLinear": 2, "MatMul": 2}


@pytest.mark.parametrize("offsets", [False, True])
def test_what_reads_one_product_may_come_before_the_next_product(offsets: bool) -> None:
    made = Made()
    made.product("a", 6, offsets=offsets)
    made.nodes.append(helper.make_node("Add", ["a", "a"], ["twice"]))
    made.product("b", 6, offsets=offsets)
    made.outputs.append("twice")
    assert joined(made)["Split"] == 1


def test_what_reads_the_second_product_may_come_before_the_first_has_its_offsets() -> None:
    made = Made()
    made.product("a", 6, offsets=True)
    first_sum = made.nodes.pop()
    made.product("b", 6, offsets=True)
    made.nodes += [helper.make_node("Add", ["b", "b"], ["twice"]), first_sum]
    made.outputs.append("twice")
    assert joined(made)["Split"] == 1


def test_products_that_are_added_to_each_other_have_no_offsets() -> None:
    made = Made()
    made.product("a", 6)
    made.product("b", 6)
    made.nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    made.outputs = ["y"]
    assert joined(made) == {"Add": 1, "DequantizeLinear": 1, "MatMul": 1, "Split": 1}


def test_one_weight_may_be_used_twice() -> None:
    made = Made()
    made.product("a", 6)
    made.nodes.append(helper.make_node("MatMul", ["x", "a/wide"], ["b"]))
    made.outputs.append("b")
    assert joined(made) == {"DequantizeLinear": 1, "MatMul": 1, "Split": 1}


@pytest.mark.parametrize(("bits", "stored"), [(4, 96), (8, 192)])
def test_products_too_large_to_copy_stay(monkeypatch: pytest.MonkeyPatch, bits: int, stored: int) -> None:
    """Bytes of all that would be copied: two times 16 x 6 numbers."""
    for most, split in ((stored, True), (stored - 1, False)):
        monkeypatch.setattr(ort_joined_products, "_LARGEST_COPY_BYTES", most)
        made = Made()
        made.product("a", 6, bits=bits)
        made.product("b", 6, bits=bits)
        made.product("alone", ROWS, bits=12 - bits)  # of no group
        assert ("Split" in joined(made)) == split


@pytest.mark.parametrize(("columns", "split"), [(1 << 14, True), ((1 << 14) + 2, False)])
def test_a_quarter_of_a_gibibyte_is_copied_and_no_more(columns: int, split: bool) -> None:
    """Two weights of 2**14 rows in four bits, whose numbers are not there."""
    nodes, constants = [], []
    for name, wide in (("a", 1 << 14), ("b", columns)):
        sizes = {f"{name}/codes": (1 << 14, wide), f"{name}/scales": (1 << 11, wide)}
        constants += [TensorProto(name=part, data_type=TensorProto.INT4, dims=dims) for part, dims in sizes.items()]
        nodes += [
            helper.make_node("DequantizeLinear", list(sizes), [f"{name}/wide"], axis=0, block_size=BLOCK),
            helper.make_node("MatMul", ["x", f"{name}/wide"], [name]),
        ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ab"]
    model = helper.make_model(helper.make_graph(nodes, "made", [], outputs, constants))
    ort_joined_products.join_products(model, Path())
    assert ("Split" in [node.op_type for node in model.graph.node]) == split


def test_weights_in_a_file_beside_the_graph(tmp_path: Path) -> None:
    made = Made()
    made.product("a", 6)
    made.product("b", 4)
    model = made.model()
    before = answers(model)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    loaded = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    ort_joined_products.join_products(loaded, tmp_path)
    for name, values in answers(loaded).items():
        np.testing.assert_allclose(values, before[name], rtol=1e-5)


def norms(*nodes: Any) -> Any:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "made", [], [value], [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_a_sum_and_its_norm_become_one() -> None:
    """The sum is still there for who reads it; a norm of something else, and a sum without a norm, stay."""
    model = norms(
        helper.make_node("Constant", [], ["c"]),
        helper.make_node("RMSNormalization", ["a", "w0"], ["first"]),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "w1"], ["normed"], epsilon=0.25),
        helper.make_node("Add", ["sum", "normed"], ["sum2"]),
        helper.make_node("RMSNormalization", ["sum2", "w2"], ["normed2"]),
        helper.make_node("Add", ["normed2", "first"], ["y"]),
    )
    ort_joined_products.join_norms(model)
    shown = [(node.op_type, list(node.input), list(node.output)) for node in model.graph.node]
    assert shown == [
        ("Constant", [], ["c"]),
        ("RMSNormalization", ["a", "w0"], ["first"]),
        ("SkipSimplifiedLayerNormalization", ["a", "b", "w1"], ["normed", "", "", "sum"]),
        ("SkipSimplifiedLayerNormalization", ["sum", "normed", "w2"], ["normed2", "", "", "sum2"]),
        ("Add", ["normed2", "first"], ["y"]),
    ]
    epsilons = [helper.get_attribute_value(node.attribute[0]) for node in model.graph.node[2:4]]
    assert epsilons == pytest.approx([0.25, 1e-5]) and model.graph.node[2].domain == "com.microsoft"

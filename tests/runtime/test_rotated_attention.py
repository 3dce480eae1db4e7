"""A decoder's graph whose attention rotates queries and keys: each operator of one written here, and other forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dinoexport.runtime.ort_rotated_attention import rotate_in_attention

FREQUENCIES = (1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 64, 1 / 128)
STEM = """
    seen = Relu mask
    positions = Add seen first_position
    angles = Mul positions frequencies
    cosines = Cos angles
    sines = Sin angles
    hidden = Gather table ids
"""
APART = """
    q = MatMul hidden wq
    k = MatMul hidden wk
    v = MatMul hidden wv
"""
JOINED = """
    qkv = MatMul hidden wqkv
    q, k, v = Split qkv widths
"""
ATTENTION = """
    q/turned = RotaryEmbedding q cosines sines
    k/turned = RotaryEmbedding k cosines sines
    o, present_k, present_v = GroupQueryAttention q/turned k/turned v past_k past_v last all - - - bias
    logits = MatMul o wo
"""
AFTER_STEM = [
    "seen = Relu mask", "positions = Add seen first_position", "positions/whole = Cast positions",
    "position_ids = Squeeze positions/whole last_axis", "hidden = Gather table ids",
]  # fmt: skip


def made(text: str, *, constant: str = "frequencies", frequencies: Any = FREQUENCIES) -> Any:
    nodes = []
    for line in filter(None, map(str.strip, text.splitlines())):
        outputs, _, operation = line.partition(" = ")
        kind, *inputs = operation.split()
        named: Any = {"domain": "com.microsoft", "num_heads": 2} if kind == "GroupQueryAttention" else {}
        named |= {"to": 7} if kind == "Cast" else {}
        inputs = [name.strip("-") for name in inputs]
        nodes.append(helper.make_node(kind, inputs, [*outputs.split(", ")], **named))
    values = [numpy_helper.from_array(np.array(frequencies, np.float32), constant)]
    outputs = [helper.make_tensor_value_info(name, 1, None) for name in ("logits", "present_k", "present_v")]
    graph = helper.make_graph(nodes, "model", [], outputs, values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def written(model: Any) -> list[str]:
    """The operators as they are written above."""
    lines = []
    for node in model.graph.node:
        inputs = " ".join(name or "-" for name in node.input)
        lines.append(f"{', '.join(node.output)} = {node.op_type} {inputs}")
    return lines


@pytest.mark.parametrize(
    ("products", "after", "given"),
    [
        (APART, ["q = MatMul hidden wq", "k = MatMul hidden wk", "v = MatMul hidden wv"], "q k v"),
        (JOINED, ["qkv = MatMul hidden wqkv"], "qkv - -"),
        (
            JOINED.replace("q, k, v", "k, q, v"),
            ["qkv = MatMul hidden wqkv", "k, q, v = Split qkv widths"],
            "q k v",
        ),
    ],
    ids=["three products", "one product", "one product in another order"],
)
def test_attention_reads_tables_of_positions(products: str, after: list[str], given: str) -> None:
    model = made(STEM + products + ATTENTION)
    assert rotate_in_attention(model) is not None
    inputs = f"{given} past_k past_v last all cos_cache sin_cache position_ids bias"
    assert written(model) == [
        *AFTER_STEM, *after, f"o, present_k, present_v = GroupQueryAttention {inputs}", "logits = MatMul o wo"
    ]  # fmt: skip
    (attention,) = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    assert {a.name: a.i for a in attention.attribute} == {"num_heads": 2, "do_rotary": 1}
    (whole,) = (node for node in model.graph.node if node.op_type == "Cast")
    assert whole.attribute[0].i == 7 and attention.domain == "com.microsoft"
    assert [(v.name, v.type.tensor_type.elem_type) for v in model.graph.input] == [("cos_cache", 1), ("sin_cache", 1)]
    for value in model.graph.input:
        assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == ["room", 8]
    (axis,) = (tensor for tensor in model.graph.initializer if tensor.name == "last_axis")
    assert numpy_helper.to_array(axis).tolist() == [-1]


def test_tables_are_the_graph_s_own_cosines_and_sines() -> None:
    for text in (STEM, STEM.replace("Mul positions frequencies", "Mul frequencies positions")):
        tables = rotate_in_attention(made(text + APART + ATTENTION))
        positions_N1 = np.array([[0], [3], [99_936]], np.float32)
        cosines, sines = ReferenceEvaluator(tables).run(None, {"positions": positions_N1})
        angles = (positions_N1 * np.array(FREQUENCIES, np.float32)).astype(np.float64)
        assert np.allclose(cosines, np.cos(angles), atol=1e-6) and np.allclose(sines, np.sin(angles), atol=1e-6)
        assert tables.opset_import[0].version == 23 and tables.ir_version == 10
        (rows,) = tables.graph.input
        assert [d.dim_param or d.dim_value for d in rows.type.tensor_type.shape.dim] == ["rows", 1]


def changed(before: str, after: str) -> str:
    text = STEM + APART + ATTENTION
    assert before in text
    return text.replace(before, after)


@pytest.mark.parametrize(
    "model",
    [
        made(changed("q/turned = RotaryEmbedding q cosines sines", "q/turned = Relu q")),
        made(changed("k/turned = RotaryEmbedding k cosines sines", "k/turned = RotaryEmbedding k sines cosines")),
        made(changed("cosines = Cos", "cosines = Sin")),
        made(changed("sines = Sin angles", "sines = Sin positions")),
        made(changed("cosines = Cos angles\n", "")),
        made(changed("sines = Sin angles\n", "")),
        made(changed("angles = Mul", "angles = Add")),
        made(changed("    angles = Mul positions frequencies\n", "")),
        made(STEM + APART + ATTENTION, constant="others"),
        made(changed("Mul positions frequencies", "Mul frequencies frequencies")),
        made(changed("    positions = Add seen first_position\n", "")),
        made(STEM + APART + ATTENTION, frequencies=[FREQUENCIES]),
        made(STEM + APART + ATTENTION, frequencies=FREQUENCIES[:4]),
        made(STEM + "logits = MatMul hidden wo"),
    ],
    ids=[
        "queries not rotated", "two rotations", "no cosine", "another angle", "cosines given", "sines given",
        "no product", "angles given", "frequencies given", "no positions", "positions given", "frequencies in rows",
        "heads of eight", "no attention",
    ],
)  # fmt: skip
def test_rotations_of_another_form_stay(model: Any) -> None:
    before = model.SerializeToString()
    assert rotate_in_attention(model) is None
    assert model.SerializeToString() == before

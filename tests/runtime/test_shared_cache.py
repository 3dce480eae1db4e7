"""A decoder's graph whose cache stays in place: each operator of one written here, and the forms that stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dinoexport.runtime import ort_decoder, ort_shared_cache
from tests.runtime.toy_decoder import GRAPH

# One block: three heads of queries, one of keys and values.
BLOCK = """
    ids = Cast input_ids
    hidden = Gather table ids
    sees = Equal attention_mask one
    q = MatMul hidden wq
    q/heads = Reshape q q/shape
    q/first = Transpose q/heads
    q/turned = RotaryEmbedding q/first cos sin
    k = MatMul hidden wk
    k/heads = Reshape k k/shape
    k/first = Transpose k/heads
    k/turned = RotaryEmbedding k/first cos sin
    present_k = Concat past_k k/turned
    v = MatMul hidden wv
    v/heads = Reshape v k/shape
    v/first = Transpose v/heads
    present_v = Concat past_v v/first
    attended = Attention q/turned present_k present_v sees
    attended/first = Transpose attended
    answer = Reshape attended/first joined/shape
    sum = Add hidden answer
    normed = RMSNormalization sum ones
    logits = MatMul normed wo
"""
SHAPES = {"q/shape": [0, 0, 3, 4], "k/shape": [0, 0, 1, 4], "joined/shape": [0, 0, 12]}


def made(text: str = BLOCK, *, rotary: dict[str, int] | None = None, constants: bool = True) -> Any:
    """The model of the operators; constants: whether shapes are constants, not inputs."""
    value, nodes = helper.make_tensor_value_info, []
    for line in filter(None, map(str.strip, text.splitlines())):
        output, _, operation = line.partition(" = ")
        kind, *inputs = operation.split()
        attributes: dict[str, Any] = {
            "Concat": {"axis": 2},
            "Attention": {"scale": 0.5},
            "RotaryEmbedding": rotary or {},
        }
        nodes.append(helper.make_node(kind, inputs, [output], **attributes.get(kind, {})))
    weights = ("table", "one", "wq", "wk", "wv", "wo", "cos", "sin", "ones")
    initializers = [numpy_helper.from_array(np.ones(64, np.float32), name) for name in weights]
    shapes = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in SHAPES.items()]
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    graph = helper.make_graph(
        nodes,
        "model",
        [value(tensor.name, kinds[tensor.dtype], tensor.shape) for tensor in GRAPH.inputs],
        [value(tensor.name, kinds[tensor.dtype], tensor.shape) for tensor in GRAPH.outputs],
        initializers + shapes * constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def written(model: Any) -> list[str]:
    """The operators as `BLOCK` has them, each with its attributes."""

    def line(node: Any) -> str:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        named = " ".join(f"{name}={value:g}" for name, value in settings.items() if name != "axis")
        outputs, inputs = ", ".join(node.output), " ".join(name or "-" for name in node.input)
        return " ".join(f"{outputs} = {node.domain} {node.op_type} {inputs} {named}".split())

    return [line(node) for node in model.graph.node]


def shapes(values: Any) -> dict[str, list[Any]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


AFTERWARDS = [
    "ids = Cast input_ids",
    "hidden = Gather table ids",
    "sees = Equal attention_mask one",
    "seen = Constant value_float=0",
    "unseen = Constant value_float=-3.4e+38",
    "attention_bias = Where sees seen unseen",
    "q = MatMul hidden wq",
    "k = MatMul hidden wk",
    "v = MatMul hidden wv",
    "q/turned/flat = RotaryEmbedding q cos sin num_heads=3",
    "k/turned/flat = RotaryEmbedding k cos sin num_heads=1",
    (
        "answer, present_k, present_v = com.microsoft GroupQueryAttention q/turned/flat k/turned/flat v past_k past_v "
        "seqlens_k total_sequence_length - - - attention_bias kv_num_heads=1 num_heads=3 scale=0.5"
    ),
    "sum = Add hidden answer",
    "normed = RMSNormalization sum ones",
    "logits = MatMul normed wo",
]


def test_attention_becomes_one_operator_with_the_cache_in_place() -> None:
    model = made()
    assert ort_shared_cache.share_cache(model, GRAPH) is True
    assert written(model) == AFTERWARDS
    assert shapes(model.graph.input) == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "total"],
        "logits_to_keep": [1],
        "first_position": [1],
        "past_k": ["batch", 2, "room", 8],
        "past_v": ["batch", 2, "room", 8],
        "seqlens_k": ["batch"],
        "total_sequence_length": [1],
    }
    assert shapes(model.graph.output) == {
        "logits": ["batch", "kept", 3],
        "present_k": ["batch", 2, "room", 8],
        "present_v": ["batch", 2, "room", 8],
    }
    assert [tensor.type.tensor_type.elem_type for tensor in model.graph.input[-2:]] == [TensorProto.INT32] * 2
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23), ("com.microsoft", 1)]


def changed(*changes: tuple[str, str]) -> str:
    text = BLOCK
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return text


@pytest.mark.parametrize(
    "text",
    [
        changed((" sees\n    attended/first", "\n    attended/first")),
        changed(("attended = Attention q/turned present_k present_v sees", "attended = Softmax q/turned")),
        changed(
            ("    sum =", "    apart = Attention q/turned present_k present_v ids\n    sum ="),
        ),
        changed(("    sum =", "    apart = Attention q/turned k/turned v/first sees\n    sum =")),
        changed(("present_k = Concat past_k k/turned", "present_k = Mul past_k k/turned")),
        changed(("present_v = Concat past_v v/first", "present_v = Mul past_v v/first")),
        changed(("answer = Reshape attended/first joined/shape", "answer = Mul attended/first joined/shape")),
        changed(
            ("attended/first = Transpose attended\n", ""), ("Reshape attended/first joined", "Reshape attended joined")
        ),
        changed(("q/turned = RotaryEmbedding q/first cos sin\n", ""), ("Attention q/turned", "Attention q/first")),
        changed(("k/turned = RotaryEmbedding k/first cos sin\n", ""), ("past_k k/turned", "past_k k/first")),
        changed(("q/first = Transpose q/heads", "q/first = Mul q/heads one")),
        changed(("v/heads = Reshape v k/shape", "v/heads = Mul v one")),
        changed(
            ("v/first = Transpose v/heads\n", ""), ("past_v v/first", "past_v v/heads")
        ),
        changed(("Concat past_k k/turned", "Concat past_v k/turned")),
    ],
    ids=[
        "no mask", "no attention", "two masks", "an attention without a past", "keys not appended",
        "values not appended", "heads not joined", "heads not moved back", "queries not rotated", "keys not rotated",
        "queries not moved", "values not split", "values not moved", "another past",
    ],
)  # fmt: skip
def test_attention_of_another_form_stays_as_it_is(text: str) -> None:
    model = made(text)
    before = model.SerializeToString()
    assert ort_shared_cache.share_cache(model, GRAPH) is False
    assert model.SerializeToString() == before


@pytest.mark.parametrize(("width", "taken"), [(8, True), (64, True), (4, False), (12, False), (20, False)])
def test_heads_whose_width_the_operator_refuses_stay(width: int, taken: bool) -> None:
    inputs = tuple(
        replace(tensor, shape=(*tensor.shape[:3], width)) if tensor.name in GRAPH.carried else tensor
        for tensor in GRAPH.inputs
    )
    model = made()
    before = model.SerializeToString()
    assert ort_shared_cache.share_cache(model, replace(GRAPH, inputs=inputs)) is taken
    assert (model.SerializeToString() == before) is not taken


def test_another_rotation_another_carried_value_and_heads_of_any_number_stay() -> None:
    for model, graph in (
        (made(rotary={"interleaved": 1}), GRAPH),
        (made(), replace(GRAPH, carried={"past_k": "present_v", "past_v": "present_k"})),
        (made(constants=False), GRAPH),
    ):
        before = model.SerializeToString()
        assert ort_shared_cache.share_cache(model, graph) is False
        assert model.SerializeToString() == before


def test_a_file_is_read_without_its_weights(tmp_path: Path) -> None:
    """Only products that are joined need theirs; a sum and its norm are joined without."""
    path, other = tmp_path / "model.onnx", tmp_path / "other.onnx"
    for file, model in ((path, made()), (other, made(rotary={"interleaved": 1}))):
        onnx.save(model, file, save_as_external_data=True, location="weights", size_threshold=128)
        (tmp_path / "weights").unlink()
    shared = ort_decoder.with_shared_cache(path, GRAPH)
    assert shared is not None
    model = onnx.load_from_string(shared.model)
    norm = "normed, , , sum = com.microsoft SkipSimplifiedLayerNormalization hidden answer ones epsilon=1e-05"
    assert written(model) == [*AFTERWARDS[:-3], norm, AFTERWARDS[-1]]
    assert ort_decoder.with_shared_cache(other, GRAPH) is None

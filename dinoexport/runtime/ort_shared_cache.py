"""Make a graph that carries state keep its cache in place in ONNX Runtime, as onnxruntime-genai's graphs do.

The portable graph appends to the cache, which copies all of it at every token. GroupQueryAttention, ONNX Runtime's own
operator, writes the new entries into a buffer that is input and output at once:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinoexport.spec import Graph

LAST_TOKEN, ALL_TOKENS = "seqlens_k", "total_sequence_length"  # the names in onnxruntime-genai's graphs
_BIAS, _ROOM, _LOWEST = "attention_bias", "room", -3.4e38
_WIDTH_MULTIPLE = 8  # of the heads that the operator takes


def share_cache(model: Any, graph: Graph) -> bool:
    """Makes `model` (a ModelProto) keep its cache in place; False, without a change, if its attention has another form.

    Carried inputs and outputs become buffers (B, heads, room, width). Two int32 inputs are new: `LAST_TOKEN` (B,), the
    index of each sequence's last token in the buffer, and `ALL_TOKENS` (1,), how many tokens it has.
    """
    from onnx import TensorProto, helper

    edit = _Edit(model, graph)
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    masks = {node.input[3] for node in attentions if len(node.input) > 3}
    grouped = [edit.grouped(node) for node in attentions]
    widths = [tensor.shape[-1] for tensor in graph.inputs if tensor.name in graph.carried]
    if len(masks) != 1 or not all(grouped) or any(int(width) % _WIDTH_MULTIPLE for width in widths):
        return False
    (mask,) = masks
    instead = {nodes[-1].output[0]: nodes for nodes in grouped}
    written = {name for nodes in grouped for name in nodes[-1].output}
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.output[0] in instead:
            nodes += instead[node.output[0]]
        elif not written & set(node.output):
            nodes.append(node)
        if mask in node.output:
            seen = helper.make_node("Constant", [], ["seen"], value_float=0.0)
            unseen = helper.make_node("Constant", [], ["unseen"], value_float=_LOWEST)
            nodes += [seen, unseen, helper.make_node("Where", [mask, "seen", "unseen"], [_BIAS])]
    del model.graph.node[:]
    model.graph.node.extend(needed(nodes, {tensor.name for tensor in model.graph.output}))
    for tensor in (*model.graph.input, *model.graph.output):
        if tensor.name in graph.carried or tensor.name in graph.carried.values():
            tensor.type.tensor_type.shape.dim[2].dim_param = _ROOM
    model.graph.input.append(helper.make_tensor_value_info(LAST_TOKEN, TensorProto.INT32, ["batch"]))
    model.graph.input.append(helper.make_tensor_value_info(ALL_TOKENS, TensorProto.INT32, [1]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return True


def needed(nodes: Sequence[Any], names: set[str]) -> list[Any]:
    """Those of the nodes, in their order, on which the values `names` depend; their inputs are added to `names`."""
    kept = []
    for node in reversed(nodes):
        if names & set(node.output):
            kept.append(node)
            names.update(node.input)
    return kept[::-1]


class _Edit:
    """A model, searched by the names of its tensors."""

    def __init__(self, model: Any, graph: Graph) -> None:
        self.carried = graph.carried
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.read_by = {name: node for node in model.graph.node for name in node.input}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def grouped(self, attention: Any) -> Sequence[Any]:
        """The operators that replace an Attention and everything between it and the products; empty for another form.

        In the known form, each product is split into heads, which are rotated (except those of values), keys and values
        are appended to the past, and the heads of the result are joined.
        """
        from onnx import helper

        query_name, key_name, value_name = attention.input[:3]
        key_joined, value_joined = self.made("Concat", key_name), self.made("Concat", value_name)
        answer = self.read("Reshape", getattr(self.read("Transpose", attention.output[0]), "output", [""])[0])
        if not (key_joined and value_joined and answer):
            return ()
        query, key = (self.rotated(name) for name in (query_name, key_joined.input[1]))
        value = self.product(value_joined.input[1])
        pasts = [node.input[0] for node in (key_joined, value_joined)]
        if not (query and key and value) or [self.carried.get(past) for past in pasts] != [key_name, value_name]:
            return ()
        scale = {a.name: a.f for a in attention.attribute if a.name == "scale"}
        inputs = [query.output[0], key.output[0], value[0], *pasts, LAST_TOKEN, ALL_TOKENS, "", "", "", _BIAS]
        heads = {"num_heads": query.attribute[0].i, "kv_num_heads": key.attribute[0].i}
        outputs = [answer.output[0], key_name, value_name]
        return (
            query,
            key,
            helper.make_node("GroupQueryAttention", inputs, outputs, domain="com.microsoft", **heads, **scale),
        )

    def rotated(self, name: str) -> Any:
        """A rotation of the product (B, T, heads * width), equal to that of its heads; None if they are not rotated."""
        from onnx import helper

        rotary = self.made("RotaryEmbedding", name)
        product = rotary and self.product(rotary.input[0])
        if not product or rotary.attribute:
            return None
        source, heads = product
        return helper.make_node("RotaryEmbedding", [source, *rotary.input[1:]], [f"{name}/flat"], num_heads=heads)

    def product(self, name: str) -> tuple[str, int] | None:
        """The product (B, T, heads * width) whose heads `name` (B, heads, T, width) are, and their number."""
        from onnx import numpy_helper

        split = self.made("Reshape", getattr(self.made("Transpose", name), "input", [""])[0])
        if not split or split.input[1] not in self.constants:
            return None
        return split.input[0], int(numpy_helper.to_array(self.constants[split.input[1]])[2])

    def made(self, kind: str, name: str) -> Any:
        """The operator that makes `name`, if it is of the kind."""
        node = self.made_by.get(name)
        return node if node is not None and node.op_type == kind else None

    def read(self, kind: str, name: str) -> Any:
        """The last operator that reads `name`, if it is of the kind."""
        node = self.read_by.get(name)
        return node if node is not None and node.op_type == kind else None

"""Make a graph that carries state keep its cache in place in ONNX Runtime, as onnxruntime-genai's graphs do.

The portable graph appends to the cache, which copies all of it at every token. GroupQueryAttention, ONNX Runtime's own
operator, writes the new entries into a buffer that is input and output at once:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoexport.runtime.decoding import FIRST_POSITION
from dinoexport.spec import Array, Graph

# The names in onnxruntime-genai's graphs.
LAST_TOKEN, ALL_TOKENS = "seqlens_k", "total_sequence_length"
COSINES, SINES = "cos_cache", "sin_cache"
_BIAS, _POSITIONS, _ROOM, _LOWEST = "attention_bias", "positions", "room", -3.4e38
_ROTATED_MULTIPLE = 16  # heads of another width the operator does not rotate


def share_cache(model: Any, graph: Graph) -> bool:
    """Changes `model` (an onnx.ModelProto) so. False, and no change, if its attention has another form.

    Carried inputs and outputs become buffers (B, heads, room, width). Two int32 inputs are new: `LAST_TOKEN` (B,), the
    index of each sequence's last token in the buffer, and `ALL_TOKENS` (1,), how many tokens it has.
    """
    from onnx import TensorProto, helper

    edit = _Edit(model, graph)
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    masks = {node.input[3] for node in attentions if len(node.input) > 3}
    grouped = [edit.grouped(node) for node in attentions]
    if len(masks) != 1 or not all(grouped):
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
    model.graph.node.extend(_read(nodes, {tensor.name for tensor in model.graph.output}))
    for tensor in (*model.graph.input, *model.graph.output):
        if tensor.name in graph.carried or tensor.name in graph.carried.values():
            tensor.type.tensor_type.shape.dim[2].dim_param = _ROOM
    model.graph.input.append(helper.make_tensor_value_info(LAST_TOKEN, TensorProto.INT32, ["batch"]))
    model.graph.input.append(helper.make_tensor_value_info(ALL_TOKENS, TensorProto.INT32, [1]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return True


def rotate_inside(model: Any, folder: Path) -> Array | None:
    """Makes the attention of such a `model`, whose weights lie in `folder`, rotate heads itself.

    Returns the frequencies (K/2,) of the angles; None, and no change, if they are computed in another way. Two float32
    inputs are new: `COSINES` and `SINES` (room, K/2), of the angles of all positions from the sequences' first on. The
    graph computes only those of the new tokens, which the operator does not take.
    """
    from onnx import TensorProto, helper, numpy_helper

    made_by = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def made(kind: str, name: str) -> Any:
        node = made_by.get(name)
        return node if node is not None and node.op_type == kind else None

    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    rotations = [made("RotaryEmbedding", name) for node in attentions for name in node.input[:2]]
    turns = {tuple(rotary.input[1:3]) if rotary else () for rotary in rotations}
    cosines, sines = next(iter(turns)) if len(turns) == 1 and all(turns) else ("", "")
    cosine, sine = made("Cos", cosines), made("Sin", sines)
    angle = cosine and sine and cosine.input[0] == sine.input[0] and made("Mul", cosine.input[0])
    shifted = angle and made("Add", angle.input[0])
    first = shifted and made("Cast", shifted.input[1])
    if not first or first.input[0] != FIRST_POSITION or angle.input[1] not in constants:
        return None
    frequencies_P: Array = numpy_helper.to_array(constants[angle.input[1]], base_dir=str(folder))
    if 2 * len(frequencies_P) % _ROTATED_MULTIPLE:
        return None
    for node in attentions:
        for i in (0, 1):
            node.input[i] = made_by[node.input[i]].input[0]
        for i, name in enumerate((COSINES, SINES, _POSITIONS), start=7):
            node.input[i] = name
        node.attribute.append(helper.make_attribute("do_rotary", 1))
    nodes: list[Any] = []
    for node in model.graph.node:
        nodes.append(node)
        if shifted.input[0] in node.output:  # (B, T, 1), without the position of the sequence's first token
            nodes.append(helper.make_node("Constant", [], ["last_axis"], value_ints=[-1]))
            nodes.append(helper.make_node("Cast", [shifted.input[0]], [f"{_POSITIONS}/whole"], to=TensorProto.INT64))
            nodes.append(helper.make_node("Squeeze", [f"{_POSITIONS}/whole", "last_axis"], [_POSITIONS]))
    read = _read(nodes, {tensor.name for tensor in model.graph.output})
    del model.graph.node[:]
    model.graph.node.extend(read)
    for name in (COSINES, SINES):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [_ROOM, len(frequencies_P)]))
    return frequencies_P


def _read(nodes: Sequence[Any], names: set[str]) -> list[Any]:
    """Those of the nodes, in their order, on which these outputs depend. names: is added to."""
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
        """What takes the place of an Attention and of all between it and the products; empty for another form.

        In the form that is known, heads are split off each product and rotated (not those of values), keys and values
        are appended to the past, and the answer's heads are joined.
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
        """A rotation of the product (B, T, heads * width) with the same answer as that of its heads; None without."""
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

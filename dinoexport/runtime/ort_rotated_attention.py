"""Let ONNX Runtime's attention rotate queries and keys itself, as in onnxruntime-genai's graphs.

GroupQueryAttention then takes the joined product of queries, keys and values as it is: three operators of a block are
left out, which takes 0.91 to 1.00 of a step's time (SmolLM2 in int4, two threads, after 1024 tokens). It reads the
cosines and sines of all positions from two tables, which a graph would compute again for every token; so they are
inputs, and a second graph, made of the same operators, computes them.
"""

from __future__ import annotations

from typing import Any

from dinoexport.runtime.ort_shared_cache import needed

COSINES, SINES = "cos_cache", "sin_cache"  # the names in onnxruntime-genai's graphs
POSITIONS = "positions"
_POSITION_IDS = "position_ids"
_WIDTH_MULTIPLE = 16  # of the heads that the operator rotates


def rotate_in_attention(model: Any) -> Any:
    """Changes `model` (a ModelProto), whose cache is in place; returns the ModelProto of the tables.

    Two float32 inputs are new: `COSINES` and `SINES` (room, width / 2), whose rows are positions of the sequence. The
    second graph computes such rows of `POSITIONS` (N, 1), float32. Returns None, without a change, if the rotations
    have another form.
    """
    from onnx import TensorProto, helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    rotated = {name for node in attentions for name in node.input[:2]}
    rotations = {tuple(made_by[name].input[1:]) for name in rotated if made_by[name].op_type == "RotaryEmbedding"}
    if len(rotations) != 1 or any(made_by[name].op_type != "RotaryEmbedding" for name in rotated):
        return None
    cosine, sine = (made_by.get(name) for name in next(iter(rotations)))
    if not cosine or not sine or (cosine.op_type, sine.op_type) != ("Cos", "Sin") or cosine.input != sine.input:
        return None
    angles = made_by.get(cosine.input[0])
    if not angles or angles.op_type != "Mul":
        return None
    positions, frequencies = sorted(angles.input, key=lambda name: name in constants)
    if positions in constants or frequencies not in constants or positions not in made_by:
        return None
    widths = list(constants[frequencies].dims)
    if len(widths) != 1 or 2 * widths[0] % _WIDTH_MULTIPLE:
        return None

    for node in attentions:
        products = [*(made_by[name].input[0] for name in node.input[:2]), node.input[2]]
        split = made_by.get(products[0])
        if split and split.op_type == "Split" and list(split.output) == products:
            products = [split.input[0], "", ""]
        inputs = [*products, *node.input[3:7], COSINES, SINES, _POSITION_IDS, *node.input[10:]]
        del node.input[:]
        node.input.extend(inputs)
        node.attribute.append(helper.make_attribute("do_rotary", 1))
    last_axis = helper.make_tensor("last_axis", TensorProto.INT64, [1], [-1])
    whole = helper.make_node("Cast", [positions], [f"{positions}/whole"], to=TensorProto.INT64)
    position_ids = helper.make_node("Squeeze", [f"{positions}/whole", last_axis.name], [_POSITION_IDS])
    nodes: list[Any] = []
    for node in model.graph.node:
        nodes += [node, whole, position_ids] if node is made_by[positions] else [node]
    nodes = needed(nodes, {tensor.name for tensor in model.graph.output})
    tables = _tables(model, angles, (cosine, sine), constants[frequencies])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(last_axis)
    for name in (COSINES, SINES):
        table = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["room", widths[0]])
        model.graph.input.append(table)
    return tables


def _tables(model: Any, angles: Any, rotation: tuple[Any, Any], frequencies: Any) -> Any:
    """The model's operators from positions to cosines and sines, as a graph for rows of positions."""
    from onnx import TensorProto, helper

    product = helper.make_node("Mul", [POSITIONS, frequencies.name], angles.output)
    values = [helper.make_tensor_value_info(POSITIONS, TensorProto.FLOAT, ["rows", 1])]
    found = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["rows", None]) for node in rotation]
    graph = helper.make_graph([product, *rotation], "tables", values, found, [frequencies])
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)

"""One product whose result is split, as several products: for OpenVINO, in forms of one size.

A graph computes queries, keys and values in one product, which is best on a GPU. OpenVINO's Split then copies the whole
result. Of ViT-S's time on a CPU with AVX2 this copy was 1.3 % at 224 and 0.8 % at 518 (OpenVINO's counters,
two threads), and three products take no longer than one. `benchmarks/one_size.py` measures the whole.
"""

from __future__ import annotations

from typing import Any

from dinoexport.runtime import telemetry

_SPLITS = ("Split", "VariadicSplit")


def separate(model: Any) -> int:
    """Replaces every such product in an OpenVINO model of fixed shapes, and returns how many there were.

    The parts have the same sums in the same order, so that answers differ by rounding only.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() in _SPLITS]
    return sum(_separate(split) for split in found)


def _separate(split: Any) -> bool:
    added = split.input_value(0)
    shape, axis = added.get_partial_shape(), _constant(split.input_value(1))
    if shape.is_dynamic or axis is None or int(axis) % len(shape) != len(shape) - 1:
        return False
    product, bias = _product(added)
    weight = None if product is None else _constant(product.input_value(1))
    if product is None or weight is None or weight.ndim != 2 or any(product.get_attributes().values()):
        return False
    opset = telemetry.openvino().opset13
    start = 0
    for part in split.outputs():
        stop = start + part.get_shape()[-1]
        result = opset.matmul(product.input_value(0), _copied(weight[:, start:stop]), False, False)
        if bias is not None:
            result = opset.add(result, _copied(bias[start:stop]))
        for reader in part.get_target_inputs():
            reader.replace_source_output(result.output(0))
        start = stop
    return True


def _product(value: Any) -> tuple[Any, Any]:
    """The product that gives `value`, and its bias or None; (None, None) if others read the result too."""
    node, bias = value.get_node(), None
    if len(value.get_target_inputs()) != 1:
        return None, None
    if node.get_type_name() == "Add":
        sides = [node.input_value(0), node.input_value(1)]
        constants = [_constant(side) for side in sides]
        if (constants[0] is None) == (constants[1] is None):
            return None, None
        bias = next(constant for constant in constants if constant is not None).reshape(-1)
        value = next(side for side, constant in zip(sides, constants, strict=True) if constant is None)
        if bias.size != value.get_shape()[-1] or len(value.get_target_inputs()) != 1:
            return None, None
        node = value.get_node()
    return (node, bias) if node.get_type_name() == "MatMul" else (None, None)


def _constant(value: Any) -> Any:
    """The numbers of a constant, None for any other value."""
    node = value.get_node()
    return node.data if node.get_type_name() == "Constant" else None


def _copied(part: Any) -> Any:
    import numpy as np

    return telemetry.openvino().opset13.constant(np.ascontiguousarray(part))

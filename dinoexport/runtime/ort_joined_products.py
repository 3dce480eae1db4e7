"""Make fewer and larger operators of a decoder whose weights have few bits, as onnxruntime-genai's graphs have.

A product of one token takes a few microseconds, as long as ONNX Runtime needs to begin any operator. Products of the
same input become one, which changes no number: each column is computed by itself. A sum and its norm become ONNX
Runtime's own operator for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Joined weights are a copy within the model, and opening holds that copy three times: as tensors, as bytes, and in the
# session. SmolLM2's are 70 MB in int8. The larger a product is, the less the beginning of its operator counts.
_LARGEST_COPY_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class _Product:
    """x times a weight in blocks of few bits, and the sums of the blocks of x times the weight's offsets, added to it.

    nodes: these operators, in the graph's order. sums, offsets: the names of these tensors; empty for a weight without
    offsets.
    """

    nodes: tuple[Any, ...]
    codes: str
    scales: str
    block: int
    sums: str = ""
    offsets: str = ""

    @property
    def output(self) -> str:
        """The name of the result."""
        return str(self.nodes[-1].output[0])


def join_products(model: Any, folder: Path) -> None:
    """Joins products of `model` (a ModelProto), whose weights lie in `folder`; does nothing if they are too large."""
    search = _Search(model)
    groups = [group for group in search.groups() if len(group) > 1]
    if sum(search.stored_bytes(product) for group in groups for product in group) > _LARGEST_COPY_BYTES:
        return
    instead: dict[str, list[Any]] = {}
    for group in groups:
        # After the sums, before anything that reads one of the products.
        place = group[0].nodes[1 if group[0].sums else 0].output[0]
        instead |= {name: [] for product in group for node in product.nodes for name in node.output}
        instead[place] = _joined(model, search, group, folder)
    nodes = [new for node in model.graph.node for new in instead.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unread(model)


def join_norms(model: Any) -> None:
    """Changes `model`, a decoder: an Add and the RMSNormalization that reads it become one operator."""
    from onnx import helper

    sums = {node.output[0]: node for node in model.graph.node if node.op_type == "Add"}
    norms = {n.input[0]: n for n in model.graph.node if n.op_type == "RMSNormalization" and n.input[0] in sums}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Add" and node.output[0] in norms:
            norm = norms[node.output[0]]
            outputs = [norm.output[0], "", "", node.output[0]]
            nodes.append(
                helper.make_node(
                    "SkipSimplifiedLayerNormalization",
                    [*node.input, norm.input[1]],
                    outputs,
                    domain="com.microsoft",
                    epsilon=_attribute(norm, "epsilon", 1e-5),
                )
            )
        elif norms.get(node.input[0] if node.input else "") is not node:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


class _Search:
    """A model, searched by the names of its tensors."""

    def __init__(self, model: Any) -> None:
        self.nodes = model.graph.node
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.made_by = {name: node for node in self.nodes for name in node.output}
        self.read_by: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.read_by.setdefault(name, []).append(node)

    def groups(self) -> Iterator[list[_Product]]:
        """The products of one input whose weights can lie beside each other: same bits, blocks and kind of offsets."""
        found: dict[tuple[object, ...], list[_Product]] = {}
        for node in self.nodes:
            if node.op_type == "MatMul" and (product := self.product(node)):
                kind = (node.input[0], self.constants[product.codes].data_type, product.block, product.sums)
                found.setdefault(kind, []).append(product)
        yield from found.values()

    def product(self, node: Any) -> _Product | None:
        """The product that begins with this MatMul; None if its weight is not in few bits."""
        widened = self.made_by.get(node.input[1])
        if widened is None or widened.op_type != "DequantizeLinear" or len(widened.input) != 2:
            return None
        codes, scales = widened.input
        if _attribute(widened, "axis", 1) != 0:  # blocks along the columns would not lie beside each other
            return None
        # Two columns of four bits share a byte.
        if not {codes, scales} <= set(self.constants) or self.constants[codes].dims[1] % 2:
            return None
        known = {"codes": codes, "scales": scales, "block": int(_attribute(widened, "block_size", 0))}
        readers = self.read_by.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Add":
            (other,) = (name for name in readers[0].input if name != node.output[0])
            shares = self.made_by.get(other)
            if shares is not None and shares.op_type == "MatMul" and shares.input[1] in self.constants:
                sums, offsets = shares.input
                return _Product(nodes=(node, shares, readers[0]), sums=sums, offsets=offsets, **known)
        return _Product(nodes=(node,), **known)

    def stored_bytes(self, product: _Product) -> int:
        """Bytes of the weight's codes."""
        rows, columns = self.constants[product.codes].dims
        return int(rows * columns * _bits(self.constants[product.codes]) // 8)


def _joined(model: Any, search: _Search, group: list[_Product], folder: Path) -> list[Any]:
    """The operators that compute all products of the group; their weights are added to the model."""
    from onnx import TensorProto, helper

    first, name = group[0], f"{group[0].output}/joined"

    def constant(part: str, sources: list[str]) -> str:
        model.graph.initializer.append(_side_by_side(f"{name}/{part}", [search.constants[s] for s in sources], folder))
        return f"{name}/{part}"

    codes = constant("codes", [product.codes for product in group])
    scales = constant("scales", [product.scales for product in group])
    widths = helper.make_tensor(
        f"{name}/widths",
        TensorProto.INT64,
        [len(group)],
        [search.constants[product.codes].dims[1] for product in group],
    )
    model.graph.initializer.append(widths)
    nodes = [
        helper.make_node("DequantizeLinear", [codes, scales], [f"{name}/weight"], axis=0, block_size=first.block),
        helper.make_node("MatMul", [first.nodes[0].input[0], f"{name}/weight"], [f"{name}/product"]),
    ]
    if first.sums:
        offsets = constant("offsets", [product.offsets for product in group])
        nodes += [
            helper.make_node("MatMul", [first.sums, offsets], [f"{name}/shares"]),
            helper.make_node("Add", [f"{name}/product", f"{name}/shares"], [f"{name}/sum"]),
        ]
    outputs = [product.output for product in group]
    return [*nodes, helper.make_node("Split", [nodes[-1].output[0], widths.name], outputs, axis=-1)]


def _side_by_side(name: str, tensors: list[Any], folder: Path) -> Any:
    """One tensor with the columns of all."""
    import numpy as np
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    rows = tensors[0].dims[0]
    parts = []
    for tensor in tensors:
        read = TensorProto()
        read.CopyFrom(tensor)
        if uses_external_data(read):
            load_external_data_for_tensor(read, str(folder))
        parts.append(np.frombuffer(read.raw_data, np.uint8).reshape(rows, -1))
    columns = sum(tensor.dims[1] for tensor in tensors)
    raw = np.concatenate(parts, axis=1).tobytes()
    return TensorProto(name=name, data_type=tensors[0].data_type, dims=[rows, columns], raw_data=raw)


def _drop_unread(model: Any) -> None:
    """Removes operators that nothing reads: they widened a weight that is now part of a joined one."""
    read = {name for node in model.graph.node for name in node.input} | {tensor.name for tensor in model.graph.output}
    nodes = [node for node in model.graph.node if node.op_type != "DequantizeLinear" or read & set(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _bits(tensor: Any) -> int:
    """Bits of one number of the tensor."""
    from onnx import TensorProto

    return 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else 8


def _attribute(node: Any, name: str, default: float) -> float:
    """The number of an attribute."""
    found: Mapping[str, float] = {a.name: a.i if a.type == 2 else a.f for a in node.attribute}
    return found.get(name, default)

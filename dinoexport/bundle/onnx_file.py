"""Inspect an ONNX file before a runtime opens it: operators, subgraphs, and the files it would read.

An untrusted graph is a program: a Loop may never end, a constant can be larger than memory, and external data can name
any file. A bundle's graph may therefore hold only operators that dinoexport writes, no subgraph and no function, and
its weights must be in the one file that the manifest lists for it.

`validate` must not need onnx, so this module reads protobuf's wire format itself, as far as the checks need it
(https://protobuf.dev/programming-guides/encoding). Field numbers: onnx/onnx.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinoexport.system import untrusted

# The file without its weights: a graph of forty blocks has 2 MB.
GRAPH_MAX_BYTES = 1 << 27
# Elements of one constant that a graph may expand by itself: twice the position grid of the largest input.
_UNFOLDED_MAX = 1 << 28
# What we write joins a class token to patches, or halves of what was split before: twice, or a few times.
_GROWN_MAX = 4096
# Operators whose outputs are of the size of their weights, or smaller.
_OF_OTHER_SIZE = frozenset(
    """
    ArgMax Attention AveragePool Conv ConvTranspose Einsum Gather GatherElements GatherND Gemm GlobalAveragePool MatMul
    MatMulInteger MaxPool ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Shape TopK
    """.split()  # noqa: SIM905
)
# What may stand between a softmax and the product that it weighs.
_SAME_VALUES = frozenset({"Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_UNFOLDING = frozenset({"Expand", "ConstantOfShape", "Reshape", "Tile", "Pad"})
OPERATORS = frozenset(
    """
    Abs Add And ArgMax Attention AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div DynamicQuantizeLinear Einsum Equal Erf Exp Expand Flatten
    Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual GroupNormalization HardSwish
    Identity InstanceNormalization IsInf IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax LpNormalization MatMul
    MatMulInteger Max MaxPool Mean Min Mod Mul Neg Not Or Pad Pow PRelu QuantizeLinear RMSNormalization Range Reciprocal
    ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding
    Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze
    Sub Sum Swish Tanh TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905 (a list of so many would be harder to read)
)
# ONNX Runtime's own operators, in the domain com.microsoft.
_OWN_DOMAIN = "com.microsoft"
OWN_OPERATORS = frozenset(
    """
    FastGelu GroupQueryAttention MatMulNBits MultiHeadAttention QuickGelu RotaryEmbedding
    SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization
    """.split()  # noqa: SIM905
)
_INT64 = 7
_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSETS, _MODEL_FUNCTIONS = 1, 7, 8, 25
_GRAPH_NODES, _GRAPH_TENSORS, _GRAPH_SPARSE = 1, 5, 15
# Bits of an element, by TensorProto.DataType.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4,
}  # fmt: skip


def check(path: Path, *, data_bytes: int | None) -> None:
    """Raises ValueError or `untrusted.Unreadable` for an ONNX file with content that dinoexport does not write.

    data_bytes: the size of the file NAME.onnx.data beside it; None when there is none.
    """
    raw = memoryview(untrusted.read_bytes(path, max_bytes=GRAPH_MAX_BYTES, links=False))
    try:
        _check_model(raw, f"{path.name}.data", data_bytes)
    except (IndexError, TypeError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"it is not an ONNX file ({error})") from None


def versions(path: Path) -> tuple[int, int]:
    """(version of the file format, operator set) that the checked ONNX file at `path` requires of a runtime."""
    model = _grouped(memoryview(untrusted.read_bytes(path, max_bytes=GRAPH_MAX_BYTES, links=False)))
    opsets = [_grouped(_message(entry)) for entry in model.get(_MODEL_OPSETS, ())]
    own = [int(opset[2][-1]) for opset in opsets if _last_text(opset, 1) in ("", "ai.onnx") and 2 in opset]
    return int(model.get(_MODEL_IR, [0])[-1]), max(own, default=0)


def attention_count(path: Path) -> int:
    """How many attentions the ONNX file at `path` computes: Attention nodes, and softmaxes that weigh a product.

    The softmax at the end of a classifier does not count: nothing is multiplied by its result.
    """
    model = _grouped(memoryview(untrusted.read_bytes(path, max_bytes=GRAPH_MAX_BYTES)))
    nodes = [_grouped(_message(node)) for node in _grouped(_message(model[_MODEL_GRAPH][0]))[_GRAPH_NODES]]
    softmax_of: dict[str, str] = {}  # a value -> the softmax that it holds
    weighing: set[str] = set()
    found = 0
    # Nodes are stored in the order in which they run, so a softmax comes before what reads it.
    for node in nodes:
        kind, inputs, outputs = _last_text(node, 4), [*map(_text, node.get(1, ()))], [*map(_text, node.get(2, ()))]
        if kind == "Attention":
            found += 1
        elif kind == "Softmax":
            softmax_of[outputs[0]] = outputs[0]
        elif kind in _SAME_VALUES and inputs[0] in softmax_of:
            softmax_of[outputs[0]] = softmax_of[inputs[0]]
        elif kind in ("MatMul", "Einsum"):
            weighing.update(softmax_of[name] for name in inputs if name in softmax_of)
    return found + len(weighing)


def _check_model(raw: memoryview, data_name: str, data_bytes: int | None) -> None:
    model = _grouped(raw)
    if _MODEL_FUNCTIONS in model:
        raise ValueError("it defines functions")
    if len(model.get(_MODEL_GRAPH, ())) != 1:
        raise ValueError("it is not an ONNX file")
    graph = _grouped(_message(model[_MODEL_GRAPH][0]))
    if _GRAPH_SPARSE in graph:
        raise ValueError("it holds a sparse tensor")
    if not graph.get(_GRAPH_NODES):
        raise ValueError("it computes nothing")
    constants: dict[str, tuple[int, ...]] = {}
    for tensor in graph.get(_GRAPH_TENSORS, ()):
        name, values = _check_tensor(_message(tensor), data_name, data_bytes)
        constants[name] = values
    grown: dict[str, float] = {}
    for node in graph[_GRAPH_NODES]:
        parts = _check_node(_message(node), data_name, data_bytes, constants)
        _check_growth(parts, constants, grown)


def _check_node(
    raw: memoryview, data_name: str, data_bytes: int | None, constants: Mapping[str, tuple[int, ...]]
) -> dict[int, list[Any]]:
    node = _grouped(raw)
    kind, domain = _last_text(node, 4), _last_text(node, 7)
    known = {"": OPERATORS, "ai.onnx": OPERATORS, _OWN_DOMAIN: OWN_OPERATORS}.get(domain, frozenset())
    if kind not in known:
        raise ValueError(f"it holds the operator {domain and f'{domain}.'}{kind}, which dinoexport does not write")
    for attribute in node.get(5, ()):
        parts = _grouped(_message(attribute))
        if parts.keys() & {6, 11}:
            raise ValueError(f"its {kind} holds a subgraph")
        if parts.keys() & {22, 23}:
            raise ValueError("it holds a sparse tensor")
        for tensor in (*parts.get(5, ()), *parts.get(10, ())):
            _check_tensor(_message(tensor), data_name, data_bytes)
    if kind in _UNFOLDING:
        for name in map(_text, node.get(1, ())):
            sizes = [abs(size) for size in constants.get(name, ()) if size]
            if math.prod(sizes) > _UNFOLDED_MAX:
                raise ValueError(f"a {kind} expands to {'x'.join(map(str, sizes[:8]))} elements")
    return node


def _check_growth(
    node: Mapping[int, list[Any]], constants: Mapping[str, tuple[int, ...]], grown: dict[str, float]
) -> None:
    """Limits how much larger values become when they are joined and repeated: forty doublings fill any memory.

    grown: value -> how many times as large it is as the values that it was joined from.
    """
    kind, inputs, outputs = _last_text(node, 4), [*map(_text, node.get(1, ()))], [*map(_text, node.get(2, ()))]
    if kind in _OF_OTHER_SIZE:
        return
    each = [grown.get(name, 1.0) for name in inputs]
    times = sum(each) if kind == "Concat" else max(each, default=1.0)
    if kind == "Tile" and len(inputs) == 2:
        times *= max(1, math.prod(abs(size) for size in constants.get(inputs[1], ()) if size))
    if kind == "Split":
        times = max(1.0, times / max(1, len(outputs)))
    if times > _GROWN_MAX:
        raise ValueError(f"its values are joined and repeated to {times:.0f} times their size")
    grown.update(dict.fromkeys(outputs, times))


def _check_tensor(raw: memoryview, data_name: str, data_bytes: int | None) -> tuple[str, tuple[int, ...]]:
    """A tensor's name and int64 values. Its declared size must be that of its data, inline or in the listed file."""
    tensor = _grouped(raw)
    name, dims = _last_text(tensor, 8), [dim for value in tensor.get(1, ()) for dim in _integers(value)]
    dtype = int(tensor.get(2, [0])[-1])
    inline = b"".join(bytes(_message(value)) for value in tensor.get(9, ()))
    if any(dim < 0 for dim in dims):
        raise ValueError(f"the tensor {name!r} has shape {dims}")
    size = -(-math.prod(dims) * _BITS.get(dtype, 8) // 8)
    entries = [_grouped(_message(entry)) for entry in tensor.get(13, ())]
    external = {_last_text(entry, 1): _last_text(entry, 2) for entry in entries}
    if external:
        _check_place(name, size, external, data_name, data_bytes)
    elif size > GRAPH_MAX_BYTES or (inline and len(inline) != size):
        raise ValueError(f"the tensor {name!r} declares {size} bytes, and its data have another size")
    values = struct.unpack(f"<{len(inline) // 8}q", inline) if dtype == _INT64 and inline else ()
    return name, values


def _check_place(name: str, size: int, external: Mapping[str, str], data_name: str, data_bytes: int | None) -> None:
    if external.get("location") != data_name or data_bytes is None:
        raise ValueError(f"the weights {name!r} are in {external.get('location')!r}, which the bundle does not list")
    offset, length = _number(external.get("offset", "0")), _number(external.get("length", str(size)))
    if length != size or offset + length > data_bytes:
        raise ValueError(f"the weights {name!r} are {size} bytes at {offset}, and {data_name} has {data_bytes}")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise ValueError(f"{text[:20]!r} is not a position in a file")
    return int(text)


# ---- protobuf's wire format ----


def _grouped(raw: memoryview) -> dict[int, list[Any]]:
    """The values of each field of a message, by its number."""
    found: dict[int, list[Any]] = {}
    for number, value in _fields(raw):
        found.setdefault(number, []).append(value)
    return found


def _last_text(message: Mapping[int, list[Any]], number: int) -> str:
    values = message.get(number)
    return _text(values[-1]) if values else ""


def _fields(raw: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int, or the bytes of a length-delimited field."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if not number:
            raise IndexError("a field without a number")
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(raw, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire}")
        if at + length > len(raw):
            raise IndexError("it ends early")
        yield number, raw[at : at + length]
        at += length


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("a number does not end")


def _integers(value: Any) -> list[int]:
    """The values of a repeated field: one, or all of them packed."""
    if isinstance(value, int):
        return [_signed(value)]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(_signed(number))
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise IndexError("a number where a message is expected")
    return value


def _text(value: Any) -> str:
    return bytes(_message(value)).decode("utf-8")

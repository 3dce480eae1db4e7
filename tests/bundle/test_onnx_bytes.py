"""An ONNX file read byte by byte as onnx itself reads it: sizes of every type, bounds, numbers and operator sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper

from dinoexport.bundle import onnx_file
from tests.bundle.test_onnx_file import checked, external, loop, model
from tests.properties import examples

# Types of a fixed size, and their bits by onnx.
BITS = {
    kind: 4 if "INT4" in name or "FLOAT4" in name else 8 * helper.tensor_dtype_to_np_dtype(kind).itemsize
    for name, kind in TensorProto.DataType.items()
    if kind in onnx_file._BITS
}


def test_types_have_their_own_sizes() -> None:
    """All types up to the last of opset 23, but the two of complex numbers, text and none."""
    assert BITS == onnx_file._BITS
    assert set(BITS) == set(range(24)) - {
        getattr(TensorProto, name) for name in ("UNDEFINED", "STRING", "COMPLEX64", "COMPLEX128")
    }


def test_fields_have_onnx_s_numbers() -> None:
    numbers = [
        message.DESCRIPTOR.fields_by_name[name].number
        for message, name in (
            (ModelProto, "ir_version"), (ModelProto, "graph"), (ModelProto, "opset_import"), (ModelProto, "functions"),
            (GraphProto, "node"), (GraphProto, "initializer"), (GraphProto, "sparse_initializer"),
        )
    ]  # fmt: skip
    read = onnx_file
    assert numbers == [
        read._MODEL_IR, read._MODEL_GRAPH, read._MODEL_OPSETS, read._MODEL_FUNCTIONS,
        read._GRAPH_NODES, read._GRAPH_TENSORS, read._GRAPH_SPARSE,
    ]  # fmt: skip
    assert TensorProto.INT64 == read._INT64


def grown(*nodes: Any, sizes: tuple[int, ...] = ()) -> dict[str, float]:
    """How many times their size the values of these nodes are; `sizes` is a constant."""
    found: dict[str, float] = {}
    for kind, inputs, outputs in nodes:
        node = helper.make_node(kind, inputs, outputs).SerializeToString()
        onnx_file._check_growth(onnx_file._grouped(memoryview(node)), {"sizes": sizes}, found)
    return found


def test_how_much_values_grow() -> None:
    assert grown(("Relu", ["x"], ["a"]), ("Concat", ["a", "x", "x"], ["b"]), ("Add", ["b", "x"], ["c"])) == {
        "a": 1, "b": 3, "c": 3,
    }  # fmt: skip
    assert grown(("Concat", ["x", "x", "x"], ["a"]), ("Split", ["a"], ["b", "c"]), ("Split", ["b"], ["d", "e"])) == {
        "a": 3, "b": 1.5, "c": 1.5, "d": 1, "e": 1,
    }  # fmt: skip
    assert grown(("Concat", ["x", "x", "x"], ["a"]), ("Split", ["a"], ["b"])) == {"a": 3, "b": 3}
    assert grown(("Concat", ["x", "x"], ["a"]), ("MatMul", ["a", "x"], ["b"])) == {"a": 2}
    assert grown(("Constant", [], ["a"])) == {"a": 1} and grown(("Split", ["x"], ["a"])) == {"a": 1}
    assert grown(("Tile", ["x", "sizes"], ["a"]), sizes=(2, 3, 0, -2)) == {"a": 12}
    assert grown(("Tile", ["x", "sizes"], ["a"]), sizes=(4096,)) == {"a": 4096}
    assert grown(("Tile", ["x", "unknown"], ["a"])) == {"a": 1}
    with pytest.raises(ValueError, match="to 4097 times their size"):
        grown(("Tile", ["x", "sizes"], ["a"]), sizes=(4097,))


def test_the_largest_constant_that_is_expanded(tmp_path: Path) -> None:
    """Twice the numbers of 2**27; a size of 0 or -1 is left out, and a message has eight sizes at most."""
    for sizes, shown in (
        ((1 << 14, 1 << 14, 0, -1), ""),
        ((1 << 14, (1 << 14) + 1), "16384x16385"),
        ((8,) * 10, "x".join("8" * 8)),
    ):
        shape = helper.make_tensor("s", TensorProto.INT64, [len(sizes)], np.array(sizes, "<i8").tobytes(), raw=True)
        raw = model(helper.make_node("Expand", ["x", "s"], ["y"]), initializers=[shape])
        if not shown:
            checked(tmp_path, raw)
            continue
        with pytest.raises(ValueError, match=f"a Expand expands to {shown} elements"):
            checked(tmp_path, raw)


@pytest.mark.parametrize(("count", "taken"), [(1 << 27, True), ((1 << 27) + 1, False)])
def test_the_largest_tensor_without_bytes(count: int, taken: bool) -> None:
    """Its numbers may be in a field of their own, which the file's size limits."""
    raw = memoryview(TensorProto(name="w", data_type=TensorProto.INT8, dims=[count]).SerializeToString())
    if taken:
        assert onnx_file._check_tensor(raw, "", None) == ("w", ())
    else:
        with pytest.raises(ValueError, match=f"declares {count} bytes"):
            onnx_file._check_tensor(raw, "", None)


def test_a_type_that_is_not_given_has_a_byte(tmp_path: Path) -> None:
    for kind in (0, 99):
        raw = memoryview(TensorProto(name="w", data_type=kind, dims=[3], raw_data=b"abc").SerializeToString())
        assert onnx_file._check_tensor(raw, "", None) == ("w", ())
    assert (
        onnx_file._check_tensor(
            memoryview(TensorProto(name="w", dims=[3], raw_data=b"abc").SerializeToString()), "", None
        )[0]
        == "w"
    )
    with pytest.raises(ValueError, match=r"'11111111111111111111' is not a position"):
        onnx_file._number("1" * 25)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_tensor_has_as_many_bytes_as_its_shape_says(kind: int, count: int, tmp_path: Path) -> None:
    size = -(-count * BITS[kind] // 8)
    for there in (size - 1, size, size + 1):
        tensor = TensorProto(name="w", data_type=kind, dims=[1, count], raw_data=b"\x01" * there)
        beside = external("m.onnx.data", shape=(count,), length=there)
        beside.data_type = kind
        raw = [model(initializers=[tensor]), model(initializers=[beside])]
        if there == size:
            for each in raw:
                checked(tmp_path, each, 64)
        else:
            if there:  # without any bytes its numbers are in a field of their own
                with pytest.raises(ValueError, match=f"declares {size} bytes"):
                    checked(tmp_path, raw[0])
            with pytest.raises(ValueError, match=f"are {size} bytes at 0"):
                checked(tmp_path, raw[1], 64)


@pytest.mark.parametrize(
    ("offset", "length", "there", "taken"),
    [
        (0, 16, 16, True), (0, 16, 15, False), (4, 16, 20, True), (4, 16, 19, False), (0, 15, 16, False),
        (0, 17, 64, False), (10**17, 16, 10**17 + 16, True),
    ],
)  # fmt: skip
def test_weights_lie_within_their_file(offset: int, length: int, there: int, taken: bool, tmp_path: Path) -> None:
    raw = model(initializers=[external("m.onnx.data", offset=offset, length=length)])
    if taken:
        checked(tmp_path, raw, there)
    else:
        with pytest.raises(ValueError, match=f"16 bytes at {offset}, and m.onnx.data has {there}"):
            checked(tmp_path, raw, there)


@pytest.mark.parametrize("text", ["-1", "+1", "1e3", "", " 1", "٣", "1" * 19, "0x1"])
def test_positions_that_are_none(text: str, tmp_path: Path) -> None:
    for key in ("offset", "length"):
        tensor = external("m.onnx.data")
        next(entry for entry in tensor.external_data if entry.key == key).value = text
        with pytest.raises(ValueError, match="is not a position in a file"):
            checked(tmp_path, model(initializers=[tensor]))


def test_without_positions_the_whole_file_is_the_tensor(tmp_path: Path) -> None:
    tensor = external("m.onnx.data")
    del tensor.external_data[1:]
    checked(tmp_path, model(initializers=[tensor]))
    with pytest.raises(ValueError, match=r"m\.onnx\.data has 15"):
        checked(tmp_path, model(initializers=[tensor]), 15)


def test_a_tensor_may_come_in_pieces(tmp_path: Path) -> None:
    """Of a field that is there twice the last counts, except of lists and raw bytes, which are joined."""
    whole = TensorProto(name="other", data_type=TensorProto.INT8, dims=[2], raw_data=b"ab")
    more = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], raw_data=b"c" * 22)
    joined = whole.SerializeToString() + more.SerializeToString()
    assert onnx_file._check_tensor(memoryview(joined), "", None) == ("w", ())


@pytest.mark.parametrize("values", [[], [0], [-1], [1, -(2**63), 2**63 - 1]])
def test_int64_values_are_read(values: list[int]) -> None:
    tensor = helper.make_tensor("s", TensorProto.INT64, [len(values)], np.array(values, "<i8").tobytes(), raw=True)
    assert onnx_file._check_tensor(memoryview(tensor.SerializeToString()), "", None) == ("s", tuple(values))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("numbers", [[], [0], [127, 128, 300], [-1], [2**63 - 1, -(2**63), 5]])
def test_lists_of_numbers(numbers: list[int], packed: bool) -> None:
    """A field for each, as onnx writes them, or all in one field, which protobuf reads too."""
    each = [TensorProto(dims=[number]).SerializeToString() for number in numbers]
    assert all(field[0] == 0x08 for field in each)
    values = b"".join(field[1:] for field in each)
    tensor = b"\x0a" + bytes([len(values)]) + values if packed else b"".join(each)
    assert list(TensorProto.FromString(tensor).dims) == numbers
    found = onnx_file._grouped(memoryview(tensor))
    assert [number for value in found.get(1, ()) for number in onnx_file._integers(value)] == numbers


@examples(200)
@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_a_number_of_any_length(number: int, before: bytes) -> None:
    coded, rest = bytearray(), number
    while rest > 127:
        coded.append(rest & 127 | 128)
        rest >>= 7
    raw = memoryview(before + bytes([*coded, rest]))
    assert onnx_file._varint(raw, len(before)) == (number, len(raw))
    with pytest.raises(IndexError):
        onnx_file._varint(raw[:-1], len(before))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x80" * 10 + b"\x01", "a number does not end"), (b"\x02\x01a", "a field without a number"),
        (b"\x0a\x02a", "it ends early"), (b"\x09" + b"1" * 7, "it ends early"), (b"\x0d" + b"1" * 3, "it ends early"),
        (b"\x0b", "wire type 3"), (b"\x0c", "wire type 4"), (b"\x0e", "wire type 6"), (b"\x0f", "wire type 7"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_message(raw: bytes, words: str) -> None:
    with pytest.raises(IndexError, match=words):
        onnx_file._grouped(memoryview(raw))


def test_fields_of_every_kind() -> None:
    raw = b"\x08\x96\x01" + b"\x11" + b"12345678" + b"\x1a\x02ab" + b"\x25" + b"1234" + b"\x1a\x00" + b"\xf8\x01\x05"
    found = {
        n: [v if isinstance(v, int) else bytes(v) for v in vs] for n, vs in onnx_file._grouped(memoryview(raw)).items()
    }
    assert found == {1: [150], 2: [b"12345678"], 3: [b"ab", b""], 4: [b"1234"], 31: [5]}
    assert onnx_file._last_text(onnx_file._grouped(memoryview(raw)), 3) == ""
    with pytest.raises(IndexError, match="a number where"):
        onnx_file._message(5)


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ([("", 18)], 18), ([("ai.onnx", 17)], 17), ([("com.microsoft", 1), ("", 21)], 21),
        ([("", 18), ("ai.onnx", 20), ("other", 99)], 20), ([("other", 3)], 0), ([], 0),
    ],
)  # fmt: skip
def test_versions(imports: list[tuple[str, int]], expected: int, tmp_path: Path) -> None:
    made = ModelProto.FromString(model())
    made.ir_version = 9
    del made.opset_import[:]
    made.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in imports)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert onnx_file.versions(tmp_path / "m.onnx") == (9, expected)
    made.ClearField("ir_version")
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert onnx_file.versions(tmp_path / "m.onnx") == (0, expected)


def node(kind: str, inputs: str, outputs: str, **settings: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **settings)


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ([node("Softmax", "x", "y")], 0),
        ([node("Softmax", "x", "s"), node("MatMul", "s v", "y")], 1),
        ([node("Softmax", "x", "s"), node("Einsum", "v s", "y")], 1),
        ([node("Softmax", "x", "s"), node("Add", "s v", "y")], 0),
        (
            [node("Softmax", "x", "s"), node("Cast", "s", "c"), node("Identity", "c", "d"), node("MatMul", "d v", "y")],
            1,
        ),
        ([node("Softmax", "x", "s"), node("Relu", "s", "c"), node("MatMul", "c v", "y")], 0),
        ([node("Softmax", "x", "s"), node("MatMul", "s v", "a"), node("MatMul", "s w", "y")], 1),
        (
            [
                node("Softmax", "x", "s"),
                node("MatMul", "s v", "a"),
                node("Softmax", "a", "t"),
                node("MatMul", "t v", "y"),
            ],
            2,
        ),
        ([node("Attention", "q k v", "a"), node("Attention", "a k v", "y")], 2),
        ([node("MatMul", "x v", "y")], 0),
    ],
)
def test_attentions(nodes: list[Any], count: int, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(model(*nodes))
    assert onnx_file.attention_count(tmp_path / "m.onnx") == count


def sizes(*numbers: int, name: str = "shape") -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(numbers)], np.array(numbers, "<i8").tobytes(), raw=True)


@pytest.mark.parametrize("kind", sorted(onnx_file._UNFOLDING))
@pytest.mark.parametrize(
    ("shape", "taken"),
    [((1 << 14, 1 << 14), True), ((1 << 14, (1 << 14) + 1), False), ((-(1 << 29),), False), ((0, 1 << 14), True)],
)  # fmt: skip
def test_what_one_constant_may_expand_to(kind: str, shape: tuple[int, ...], taken: bool, tmp_path: Path) -> None:
    one = [node(kind, "x shape", "y")] if kind != "Tile" else [node(kind, "x shape more", "y")]
    raw = model(*one, initializers=[sizes(*shape)])
    if taken:
        checked(tmp_path, raw)
    else:
        with pytest.raises(ValueError, match=f"a {kind} expands to"):
            checked(tmp_path, raw)
    checked(tmp_path, model(node("Add", "x shape", "y"), initializers=[sizes(*shape)]))


@pytest.mark.parametrize(
    ("nodes", "repeats", "taken"),
    [
        ([node("Tile", "x shape", "y")], (64, 64), True),
        ([node("Tile", "x shape", "y")], (64, 65), False),
        ([node("Tile", "x shape", "a"), node("Tile", "a shape", "y")], (64,), True),
        ([node("Tile", "x shape", "a"), node("Tile", "a shape", "y")], (65,), False),
        ([node("Tile", "x shape", "a"), node("Add", "x a", "b"), node("Tile", "b shape", "y")], (65,), False),
        ([node("Tile", "x shape", "a"), node("MatMul", "a w", "b"), node("Tile", "b shape", "y")], (65,), True),
        ([node("Tile", "x shape", "a"), node("Split", "a", "b c"), node("Tile", "b shape", "y")], (90,), True),
        ([node("Tile", "x shape", "a"), node("Split", "a", "b c"), node("Tile", "b shape", "y")], (91,), False),
        ([node("Split", "x", "b c"), node("Tile", "b shape", "y")], (4096,), True),
        ([node("Split", "x", "b c"), node("Tile", "b shape", "y")], (4097,), False),
        ([node("Tile", "x shape", "a"), node("Concat", "a x", "y", axis=0)], (4095,), True),
        ([node("Tile", "x shape", "a"), node("Concat", "a x", "y", axis=0)], (4096,), False),
    ],
)
def test_how_much_values_may_grow(nodes: list[Any], repeats: tuple[int, ...], taken: bool, tmp_path: Path) -> None:
    raw = model(*nodes, initializers=[sizes(*repeats)])
    if taken:
        checked(tmp_path, raw)
    else:
        with pytest.raises(ValueError, match="joined and repeated"):
            checked(tmp_path, raw)


def test_content_that_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    """Sparse tensors, subgraphs in a list, tensors of attributes; and the domains that are known."""
    sparse = ModelProto.FromString(model())
    sparse.graph.sparse_initializer.add()
    graphs = helper.make_node("Relu", ["x"], ["y"])
    graphs.attribute.add(name="g", graphs=[loop().attribute[0].g])
    of_attribute = {
        "sparse_tensor": "sparse", "sparse_tensors": "sparse",
    }  # fmt: skip
    with pytest.raises(ValueError, match="sparse"):
        checked(tmp_path, sparse.SerializeToString())
    with pytest.raises(ValueError, match="subgraph"):
        checked(tmp_path, model(graphs))
    for field, words in of_attribute.items():
        one = helper.make_node("Relu", ["x"], ["y"])
        attribute = one.attribute.add(name="a")
        getattr(attribute, field).add() if field.endswith("s") else attribute.sparse_tensor.SetInParent()
        with pytest.raises(ValueError, match=words):
            checked(tmp_path, model(one))
    for field in ("t", "tensors"):
        one = helper.make_node("Constant", [], ["y"])
        attribute = one.attribute.add(name="value")
        wrong = TensorProto(name="w", data_type=1, dims=[2], raw_data=b"123")
        attribute.t.CopyFrom(wrong) if field == "t" else attribute.tensors.append(wrong)
        with pytest.raises(ValueError, match="declares 8 bytes"):
            checked(tmp_path, model(one))
    checked(tmp_path, model(helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")))
    checked(tmp_path, model(helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft")))
    with pytest.raises(ValueError, match=r"the operator com\.microsoft\.Relu"):
        checked(tmp_path, model(helper.make_node("Relu", ["x"], ["y"], domain="com.microsoft")))
    nothing = ModelProto.FromString(model())
    del nothing.graph.node[:]
    with pytest.raises(ValueError, match="computes nothing"):
        checked(tmp_path, nothing.SerializeToString())

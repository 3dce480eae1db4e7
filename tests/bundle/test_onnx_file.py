"""A graph from outside holds only operators we write, no subgraph, and reads no file but the one that is listed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dinoexport.bundle import onnx_file
from dinoexport.system.untrusted import Unreadable
from tests.properties import examples


def model(*nodes: Any, initializers: Any = (), functions: Any = ()) -> bytes:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, ["n"])], [value("y", 1, ["n"])],
        initializer=list(initializers),
    )  # fmt: skip
    return helper.make_model(graph, functions=list(functions)).SerializeToString()


def external(location: str, *, shape: tuple[int, ...] = (4,), offset: int = 0, length: int = 16) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=text)
    return tensor


def loop() -> Any:
    """A Loop without an end, by the operator's own definition."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])], "body",
        [helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("d", 9, [])],
    )  # fmt: skip
    return helper.make_node("Loop", ["", "true"], ["y"], body=body)


SHAPE = numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "shape")
WRONG = {
    "a loop": (model(loop()), "operator Loop"),
    "a subgraph": (model(helper.make_node("Relu", ["x"], ["y"], body=loop().attribute[0].g)), "subgraph"),
    "a condition": (model(helper.make_node("If", ["x"], ["y"])), "operator If"),
    "another domain": (model(helper.make_node("Relu", ["x"], ["y"], domain="evil")), r"evil\.Relu"),
    "functions": (
        model(functions=[helper.make_function("f", "F", ["a"], ["b"], [], [helper.make_opsetid("", 17)])]), "functions",
    ),
    "a huge constant": (model(helper.make_node("Expand", ["x", "shape"], ["y"]), initializers=[SHAPE]), "expands"),
    "ConstantOfShape": (
        model(helper.make_node("ConstantOfShape", ["shape"], ["y"]), initializers=[SHAPE]), "expands",
    ),
    "another file": (model(initializers=[external("/etc/passwd")]), "/etc/passwd"),
    "a file above": (model(initializers=[external("../m.onnx.data")]), "does not list"),
    "a file that is not listed": (model(initializers=[external("other.data")]), "other.data"),
    "beyond the file's end": (model(initializers=[external("m.onnx.data", offset=8)]), "and m.onnx.data has 16"),
    "less than its shape": (model(initializers=[external("m.onnx.data", length=8)]), "16 bytes"),
    "an offset that is none": (model(initializers=[external("m.onnx.data", offset=-1)]), "not a position"),
    "a tensor without its data": (
        model(initializers=[TensorProto(name="w", data_type=1, dims=[1 << 40])]), "declares",
    ),
    "a negative shape": (model(initializers=[TensorProto(name="w", data_type=1, dims=[-1])]), "shape"),
    "nothing": (b"", "not an ONNX file"),
    "text": (b"hello world", "not an ONNX file"),
    "two graphs": (model() + model(), "not an ONNX file"),
}  # fmt: skip


def checked(tmp_path: Path, raw: bytes, data_bytes: int | None = 16) -> None:
    (tmp_path / "m.onnx").write_bytes(raw)
    onnx_file.check(tmp_path / "m.onnx", data_bytes=data_bytes)


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    raw, words = WRONG[kind]
    with pytest.raises(ValueError, match=words):
        checked(tmp_path, raw)


@pytest.mark.parametrize("through", ["itself", "Relu", "Slice"])
def test_joins_that_fill_memory_are_refused(tmp_path: Path, through: str) -> None:
    """Forty doublings of a value, directly or through other operators."""
    nodes, value = [], "x"
    for i in range(40):
        other = value
        if through != "itself":
            other = f"r{i}"
            nodes.append(helper.make_node(through, [value], [other]))
        nodes.append(helper.make_node("Concat", [value, other], [f"c{i}"], axis=0))
        value = f"c{i}"
    nodes.append(helper.make_node("Relu", [value], ["y"]))
    with pytest.raises(ValueError, match="times their size"):
        checked(tmp_path, model(*nodes))


def test_halves_that_are_joined_again_are_taken(tmp_path: Path) -> None:
    """As rotary positions do in every block."""
    nodes, value = [], "x"
    for i in range(40):
        nodes.append(helper.make_node("Split", [value], [f"a{i}", f"b{i}"], axis=0))
        nodes.append(helper.make_node("Concat", [f"b{i}", f"a{i}"], [f"c{i}"], axis=0))
        value = f"c{i}"
    checked(tmp_path, model(*nodes, helper.make_node("Relu", [value], ["y"])))


def test_what_is_taken(tmp_path: Path) -> None:
    checked(tmp_path, model(initializers=[external("m.onnx.data")]))
    checked(tmp_path, model(initializers=[numpy_helper.from_array(np.ones((2, 3), np.float16), "c")]), None)
    with pytest.raises(ValueError, match="does not list"):
        checked(tmp_path, model(initializers=[external("m.onnx.data")]), None)


@examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_refused_in_one_way(tmp_path: Path, noise: bytes, at: int) -> None:
    raw = model(initializers=[external("m.onnx.data")])
    for bytes_ in (noise, raw[:at], raw[:at] + noise + raw[at + len(noise) :]):
        with suppress(ValueError, Unreadable):
            checked(tmp_path, bytes_)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Unreadable, match="bytes or more"):
        onnx_file.check(tmp_path / "m.onnx", data_bytes=None)

"""Answers in Triton's binary form: byte strings, sizes, and the largest answer a graph may give."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dinoexport.serving import answers
from dinoexport.serving.answers import HEADER_MAX_BYTES, Malformed
from dinoexport.spec import Dim, Graph, Tensor


def packed(*texts: bytes) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def body(*outputs: tuple[str, str, list[int], bytes], size: int | None = None) -> tuple[bytes, str]:
    """A response, and the length of its header; size: what is declared of the last output instead of its own."""
    listed = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        for name, kind, shape, raw in outputs
    ]
    if size is not None:
        listed[-1]["parameters"] = {"binary_data_size": size}
    header = json.dumps({"outputs": listed}).encode()
    return header + b"".join(raw for *_, raw in outputs), str(len(header))


def test_byte_strings_and_numbers() -> None:
    first, second = packed(b"", b"one", b"\x00\xff" * 200, b"x"), np.arange(3, dtype=np.float32).tobytes()
    made = body(("files", "BYTES", [2, 2], first), ("numbers", "FP32", [3, 1], second), ("more", "BYTES", [0], b""))
    found = answers.decoded(*made, ["files", "numbers", "more"])
    assert found["files"].tolist() == [[b"", b"one"], [b"\x00\xff" * 200, b"x"]]
    assert found["numbers"].tolist() == [[0.0], [1.0], [2.0]] and found["more"].shape == (0,)


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        (packed(b"a", b"b"), 1), (packed(b"a"), 2), (packed(b"a") + b"\x00", 1), (b"\x00" * 3, 1), (b"", 1),
        (packed(b"abc")[:-1], 1), (b"\xff\xff\xff\xffab", 1), (packed(b"a"), 0), (b"", 1 << 60),
    ],
)  # fmt: skip
def test_byte_strings_that_are_not_as_many_as_said(raw: bytes, count: int) -> None:
    """At once, however many the server says there are."""
    with pytest.raises(Malformed, match=f"'files' does not hold {count} byte strings"):
        answers.decoded(*body(("files", "BYTES", [count], raw)), ["files"])


@pytest.mark.parametrize(("kind", "raw"), [("BYTES", packed(b"abc")), ("FP32", b"\x00" * 4)])
@pytest.mark.parametrize("more", [1, -1])
def test_sizes_that_are_not_those_of_the_bytes(kind: str, raw: bytes, more: int) -> None:
    with pytest.raises(Malformed, match=r"declares|follow|does not hold"):
        answers.decoded(*body(("a", kind, [1], raw), size=len(raw) + more), ["a"])


def test_bytes_behind_the_outputs() -> None:
    raw, length = body(("a", "UINT8", [1], b"x"))
    assert answers.decoded(raw, length, ["a"])["a"].tolist() == [120]
    with pytest.raises(Malformed, match="1 bytes follow"):
        answers.decoded(raw + b"y", length, ["a"])
    with pytest.raises(Malformed, match="lacks b"):
        answers.decoded(raw, length, ["a", "b"])


@pytest.mark.parametrize("length", [None, "", "-1", "0", "1e2", "٣", "99999999999", str(HEADER_MAX_BYTES + 1)])
def test_lengths_of_the_header_that_are_none(length: str | None) -> None:
    with pytest.raises(Malformed, match="its JSON header"):
        answers.decoded(b" " * (HEADER_MAX_BYTES + 2), length, [])


def test_a_header_may_be_the_whole_body_and_as_long_as_is_read() -> None:
    header = b'{"outputs": []}'
    assert answers.decoded(header, str(len(header)), []) == {}
    padded = header.ljust(HEADER_MAX_BYTES)
    assert answers.decoded(padded, str(len(padded)), []) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [-1]}, "invalid"), ({"shape": [1.0]}, "invalid"), ({"shape": [True]}, "invalid"),
        ({"shape": [1] * 17}, "invalid"), ({"name": 3}, "invalid"), ({"shape": None}, "lacks"),
        ({"datatype": "FP8"}, "lacks"), ({"parameters": {}}, "lacks"),
        ({"parameters": {"binary_data_size": -1}}, "invalid"),
    ],
)  # fmt: skip
def test_outputs_that_are_described_wrongly(change: dict[str, Any], words: str) -> None:
    output = {"name": "a", "datatype": "UINT8", "shape": [1], "parameters": {"binary_data_size": 1}}
    header = json.dumps({"outputs": [output | change]}).encode()
    with pytest.raises(Malformed, match=words):
        answers.decoded(header + b"x", str(len(header)), ["a"])


def test_a_rank_of_sixteen_is_read() -> None:
    assert answers.decoded(*body(("a", "UINT8", [1] * 16, b"x")), ["a"])["a"].ndim == 16


def graph(*outputs: Tensor, **sizes: int) -> Graph:
    image = Tensor(name="image", dtype="uint8", shape=("batch", "height", 3), meaning="")
    dims = tuple(Dim(name=name, min=1, opt=1, max=size) for name, size in sizes.items())
    return Graph(name="model", inputs=(image,), outputs=outputs, dims=dims)


def test_the_largest_answer_of_a_graph() -> None:
    """Eight bytes for a number, every dimension at its largest; one that follows has at most an item's elements."""
    tokens = Tensor(name="tokens", dtype="float32", shape=("batch", "patches", 5), meaning="")
    files = Tensor(name="files", dtype="bytes", shape=("batch",), meaning="")
    assert answers.signature(graph(tokens, batch=4, height=7)) == HEADER_MAX_BYTES + 8 * 4 * (7 * 3) * 5
    assert answers.signature(graph(files, batch=4, height=7)) == HEADER_MAX_BYTES + (1 << 26) * 4


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [((2, 4), "float32", ""), ((2, 5), "float32", "where 4 is 4"), ((3, 4), "float32", "where batch is 2"),
     ((2, 4), "float64", "is float64 of rank 2"), ((2, 4, 1), "float32", "of rank 3")],
)  # fmt: skip
def test_outputs_are_held_to_the_signature(shape: tuple[int, ...], dtype: str, words: str) -> None:
    wanted = graph(Tensor(name="a", dtype="float32", shape=("batch", 4), meaning=""), batch=4, height=7)
    given, asked = {"a": np.zeros(shape, dtype)}, {"image": np.zeros((2, 7, 3), np.uint8)}
    if not words:
        answers.check_outputs(wanted, given, asked)
        with pytest.raises(Malformed, match="lacks a"):
            answers.check_outputs(wanted, {}, asked)
    else:
        with pytest.raises(Malformed, match=words):
            answers.check_outputs(wanted, given, asked)


def test_a_length_may_have_ten_digits() -> None:
    header = b'{"outputs": []}'
    assert answers.decoded(header, "0000000015", []) == {}
    with pytest.raises(Malformed, match="it has no length of its JSON header"):
        answers.decoded(header, "00000000015", [])


def test_a_header_of_one_byte_is_read() -> None:
    with pytest.raises(Malformed, match="its header lists no outputs"):
        answers.decoded(b"1", "1", [])
    with pytest.raises(Malformed, match="its JSON header has 0 of 1 bytes"):
        answers.decoded(b"1", "0", [])


def test_byte_strings_that_end_before_their_size_are_named() -> None:
    with pytest.raises(Malformed, match="'a' declares 8 bytes"):
        answers.decoded(*body(("a", "BYTES", [1], packed(b"abc")), size=8), ["a"])


def test_the_last_byte_string_may_be_empty() -> None:
    made = body(("files", "BYTES", [3], packed(b"one", b"", b"")), ("n", "UINT8", [1], b"x"))
    found = answers.decoded(*made, ["files", "n"])
    assert found["files"].tolist() == [b"one", b"", b""] and found["n"].tolist() == [120]


def test_the_largest_answer_without_sizes_of_inputs() -> None:
    """A dimension that nothing bounds counts as one: in an input, and where there is no input."""
    tokens = Tensor(name="tokens", dtype="float32", shape=("batch", "patches", 5), meaning="")
    assert answers.signature(graph(tokens, batch=4)) == HEADER_MAX_BYTES + 8 * 4 * 3 * 5
    nothing = Graph(name="model", inputs=(), outputs=(tokens,), dims=(Dim(name="batch", min=1, opt=1, max=4),))
    assert answers.signature(nothing) == HEADER_MAX_BYTES + 8 * 4 * 5


def test_dimensions_that_outputs_share_are_equal() -> None:
    """With each other too, where no input has them; inputs in another form bind what they have."""
    outputs = tuple(Tensor(name=n, dtype="float32", shape=("batch", "patches"), meaning="") for n in ("a", "b"))
    wanted, one = graph(*outputs, batch=4, height=7), np.zeros((2, 3), np.float32)
    for image in (np.zeros((2, 7, 3), np.uint8), np.zeros(2, np.uint8)):
        answers.check_outputs(wanted, {"a": one, "b": one}, {"image": image})
        with pytest.raises(Malformed, match=r"b has shape \[2, 4\], where patches is 3"):
            answers.check_outputs(wanted, {"a": one, "b": np.zeros((2, 4), np.float32)}, {"image": image})
        with pytest.raises(Malformed, match=r"a has shape \[3, 3\], where batch is 2"):
            answers.check_outputs(wanted, {"a": np.zeros((3, 3), np.float32), "b": one}, {"image": image})

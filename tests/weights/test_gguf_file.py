"""GGUF headers at the limits of what is read, and values of every type."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from dinoexport.errors import WeightsError
from dinoexport.weights import gguf_file

# Number of the type -> how its value is packed; 8 is text, 9 a list.
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


def header(*values: bytes, tensors: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    """A file of these values, each under a key of its own. counts: what it claims, if that is not what it has."""
    numbers = struct.pack("<QQ", *((1 if tensors else 0, len(values)) if counts is None else counts))
    keys = b"".join(struct.pack("<Q", 2) + b"k%c" % (97 + i) + value for i, value in enumerate(values))
    return b"GGUF" + struct.pack("<I", 3) + numbers + keys + tensors


def tensor(dims: int) -> bytes:
    return struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{dims}QIQ", dims, *[1] * dims, 0, 0)


def listed(kind: int, count: int, content: bytes) -> bytes:
    """A list, without the number of its own type before it."""
    return struct.pack("<IQ", kind, count) + content


def kind_of(number: int, content: bytes) -> bytes:
    return struct.pack("<I", number) + content


def checked(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with path.open("rb", buffering=0) as file:
        read = gguf_file._Header(file)  # type: ignore[arg-type]
        try:
            read.check()
        finally:
            read.release()


EVERY = (
    *(kind_of(number, struct.pack(f"<{form}", 1)) for number, form in FORMS.items()),
    kind_of(TEXT, struct.pack("<Q", 3) + b"abc"),
    *(kind_of(LIST, listed(number, 3, struct.pack(f"<3{form}", 1, 0, 1))) for number, form in FORMS.items()),
    kind_of(LIST, listed(TEXT, 2, struct.pack("<Q", 1) + b"x" + struct.pack("<Q", 0))),
)


def test_values_of_every_type(tmp_path: Path) -> None:
    """The whole header is passed over to its last byte, and one byte fewer is too few."""
    checked(tmp_path / "w.gguf", header(*EVERY))
    for value in EVERY:
        checked(tmp_path / "w.gguf", header(value))
        with pytest.raises(ValueError, match=r"it ends early|an array has 3 entries"):
            checked(tmp_path / "w.gguf", header(value)[:-1])
    with pytest.raises(ValueError, match="it ends early"):
        checked(tmp_path / "w.gguf", header(*EVERY)[:-1])
    path = tmp_path / "own.gguf"
    path.write_bytes(header(*EVERY))
    found = gguf_file.metadata(path)
    assert [found[f"k{chr(97 + i)}"] for i in range(12)] == [1, 1, 1, 1, 1, 1, 1.0, True, 1, 1, 1.0, "abc"]
    assert found[f"k{chr(97 + len(EVERY) - 1)}"] == ["x", ""]


NUMBERS = listed(0, 2, b"\1\2")
NESTED = listed(LIST, 2, NUMBERS * 2)
TOO_DEEP = listed(LIST, 1, NESTED)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (header(kind_of(LIST, NUMBERS)), ""),
        (header(kind_of(LIST, NESTED)), ""),
        (header(kind_of(LIST, TOO_DEEP)), "a value is of type 9"),
        (header(kind_of(13, b"")), "a value is of type 13"),
        (header(kind_of(LIST, listed(13, 1, b"\1"))), "a value is of type 13"),
        # As many entries as bytes are left, and one more.
        (header(kind_of(LIST, listed(0, 4, bytes(4)))), ""),
        (header(kind_of(LIST, listed(0, 5, bytes(4)))), "an array has 5 entries"),
        (header(kind_of(LIST, listed(TEXT, 4, bytes(8)))), "it ends early"),
        (header(tensors=tensor(8)), ""),
        (header(tensors=tensor(9)), "a tensor has 9 dimensions"),
        (header(tensors=tensor(1)[:-1]), "it ends early"),
        (header(counts=(0, 100_000)), "it ends early"),
        (header(counts=(0, 100_001)), "it has 0 tensors and 100001 keys"),
        (header(counts=(100_001, 0)), "it has 100001 tensors and 0 keys"),
    ],
)
def test_limits_of_a_header(raw: bytes, problem: str, tmp_path: Path) -> None:
    if not problem:
        checked(tmp_path / "w.gguf", raw)
        return
    with pytest.raises(ValueError, match=problem):
        checked(tmp_path / "w.gguf", raw)
    with pytest.raises(WeightsError, match=problem):
        gguf_file.metadata(tmp_path / "w.gguf")


def test_a_value_of_each_tensor_is_read(tmp_path: Path) -> None:
    """Outermost dimension first, as of no other format: the file names the innermost first."""
    described = struct.pack("<Q", 1) + b"t" + struct.pack("<I2QIQ", 2, 3, 2, 0, 0)
    raw = header(tensors=described)
    path = tmp_path / "w.gguf"
    path.write_bytes(raw + bytes(-len(raw) % 32) + struct.pack("<6f", *range(6)))
    shapes, read = gguf_file.open_gguf(path)
    assert shapes == {"t": (2, 3)} and read("t").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert gguf_file.types(path) == {"t": "F32"}


def test_what_a_gguf_file_is(tmp_path: Path) -> None:
    for raw, whether in ((b"GGUF", True), (b"GGU", False), (b"gguf", False)):
        (tmp_path / "w").write_bytes(raw)
        assert gguf_file.is_gguf(tmp_path / "w") is whether
    content: Any = gguf_file.is_gguf(tmp_path)
    assert content is False

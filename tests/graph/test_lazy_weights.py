"""What is streamed to a file is the whole weight, cast: held against NumPy's own cast of all of it at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from dinoexport.errors import ValidationFailed
from dinoexport.graph.lazy_weights import StreamedTensor
from dinoexport.spec import Array, Weight

DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


def streamed(values: Array, dtype: ir.DataType) -> StreamedTensor:
    return StreamedTensor(Weight(shape=values.shape, read=lambda: values), dtype, "weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (700_001,), (1, 5, 384), (1153, 601), (3, 300_000)], ids=str)
def test_bytes_are_those_of_the_whole(shape: tuple[int, ...], dtype: ir.DataType, tmp_path: Path) -> None:
    """Less than a block, several with a rest, and rows that are longer than one; as they lie and transposed."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for way in (values, values.T):
        expected = np.ascontiguousarray(way).astype(DTYPES[dtype])
        tensor = streamed(way, dtype)
        with (tmp_path / "data").open("wb") as file:
            file.write(b"before")
            tensor.tofile(file)
        assert (tmp_path / "data").read_bytes() == b"before" + expected.tobytes()
        assert tensor.tobytes() == expected.tobytes() and tensor.nbytes == expected.nbytes
        assert tuple(tensor.shape) == way.shape


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (np.zeros(262_144, np.float32), [262_144]),
        (np.zeros((3, 100_000), np.float32), [262_144, 37_856]),
        (np.zeros((40, 300), np.float32).T, [128 * 40, 128 * 40, 44 * 40]),
    ],
    ids=["a block", "more than a block", "transposed"],
)
def test_few_numbers_are_held_as_another_copy(values: Array, numbers: list[int]) -> None:
    """A quarter of a million at a time, and 128 rows of a matrix that is transposed."""
    written: list[int] = []
    file: Any = SimpleNamespace(write=lambda content: written.append(len(content)))
    streamed(values, ir.DataType.FLOAT16).tofile(file)
    assert written == [2 * count for count in numbers]


def test_what_does_not_fit_is_named_wherever_it_lies(tmp_path: Path) -> None:
    values = np.zeros((2000, 300), np.float32)
    values[-1, -1] = 70_000
    with (tmp_path / "data").open("wb") as file, pytest.raises(ValidationFailed, match="weight reaches 70,000"):
        streamed(values, ir.DataType.FLOAT16).tofile(file)
    streamed(values, ir.DataType.FLOAT).tobytes()


@pytest.mark.parametrize("sign", [1, -1])
def test_every_fp16_number_is_rounded_to_where_it_is_nearest(sign: int, tmp_path: Path) -> None:
    """Each number that fp16 has, each middle between two, where ties go to even, and float32's next on either side."""
    held = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (held[:-1] + held[1:]) / 2  # exact: they take one more bit
    near = np.concatenate((held, middles))
    values = sign * np.concatenate((near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1))))
    assert streamed(values, ir.DataType.FLOAT16).tobytes() == values.astype(np.float16).tobytes()

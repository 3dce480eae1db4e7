"""Columns of a Parquet file: which an output gives, how values are stored, and what other tools read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport.embed import columns
from dinoexport.embed.columns import Column, ImageRow
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.spec import Dim, Graph, Tensor

pytest.importorskip("pyarrow")
SHAPES: dict[str, tuple[tuple[int | str, ...], str]] = {
    "labels": (("batch", "h", "w"), "uint8"), "patch_tokens": (("batch", "patches", 3), "float32"),
    "class_token": (("batch", 5), "float32"), "half": (("batch", 2), "float16"), "score": (("batch",), "float32"),
    "depth": (("batch", "h", "w"), "float32"), "open": (("batch", "n"), "float32"),
    "maps": (("batch", 2, 3, 4), "float32"), "nothing": ((), "float32"),
}  # fmt: skip


def graph(*names: str, **dims: tuple[int, int]) -> Graph:
    outputs = tuple(
        Tensor(name=n, dtype=SHAPES[n][1], shape=SHAPES[n][0], meaning="")  # type: ignore[arg-type]
        for n in names or SHAPES
    )
    made = tuple(Dim(name=n, min=1, opt=opt, max=9999, step=step) for n, (opt, step) in dims.items())
    return Graph(name="model", inputs=(), outputs=outputs, dims=made)


def column(name: str, kind: str, width: int = 0, output: str = "") -> Column:
    return Column(name=name, output=output or name, kind=kind, width=width)  # type: ignore[arg-type]


KNOWN = {
    "patch_tokens": column("patch_tokens", "tokens", 3), "patch_mean": column("patch_mean", "mean", 3, "patch_tokens"),
    "class_token": column("class_token", "vector", 5), "half": column("half", "vector", 2),
    "score": column("score", "scalar"), "depth": column("depth", "tensor"),
    "open": column("open", "tensor"), "maps": column("maps", "tensor"),
}  # fmt: skip


def test_every_output_of_numbers_gives_columns() -> None:
    assert columns.choose(graph(), list(KNOWN)) == tuple(KNOWN.values())


@pytest.mark.parametrize(
    ("names", "first"), [((), "class_token"), (("depth", "half", "class_token"), "half"), (("depth", "score"), "depth")]
)
def test_the_first_vector_is_the_default(names: tuple[str, ...], first: str) -> None:
    assert columns.choose(graph(*names), None) == (KNOWN[first],)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["labels"], "labels is uint8; columns are of floating-point outputs"),
        (["class_tokens"], "no output 'class_tokens'. Did you mean 'class_token'"),
        (["score", "half", "score"], "names one twice: score, half, score"),
    ],
)
def test_columns_that_are_not_there(wanted: list[str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        columns.choose(graph(), wanted)
    assert words in refused.value.message


def test_values_of_a_batch() -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    assert np.array_equal(KNOWN["patch_tokens"].of({"patch_tokens": tokens}), tokens)
    means = KNOWN["patch_mean"].of({"patch_tokens": tokens})
    assert len(means) == 2 and means[0].dtype == np.float32
    np.testing.assert_allclose(means, tokens.astype(np.float64).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "dtype", "size"),
    [
        (["class_token"], "float32", 100 + 4 * 5), (["class_token"], "float16", 100 + 2 * 5),
        (["score"], "float32", 100 + 4), (["patch_tokens"], "float32", 100 + 4 * 3 * 2 * 4),
        (["patch_mean", "class_token"], "float32", 100 + 4 * (3 + 5)), (["depth"], "float16", 100 + 2 * 2 * 4),
    ],
)  # fmt: skip
def test_about_how_large_a_row_is(names: list[str], dtype: str, size: int) -> None:
    """With the tokens of the most likely size: 2 by 4 patches of 14."""
    sized = graph(height=(28, 14), width=(56, 14), batch=(7, 1))
    assert columns.row_bytes([KNOWN[name] for name in names], sized, dtype) == size
    plain = columns.row_bytes([KNOWN[name] for name in names], graph(batch=(7, 1)), dtype)
    assert plain == 100 + (2 if dtype == "float16" else 4) * sum(max(1, KNOWN[name].width) for name in names)


def test_values_are_normalised_and_rounded() -> None:
    def stored(values: Any, dtype: str = "float32", *, normalised: bool = True) -> Any:
        return columns.stored(np.asarray(values, np.float32), dtype=dtype, normalised=normalised, name="a row")

    assert stored([3, 4]).tolist() == pytest.approx([0.6, 0.8]) and stored([3, 4], normalised=False).tolist() == [3, 4]
    assert stored([0, 0]).tolist() == [0, 0] and stored(-2.0) == -1.0
    assert stored([[3, 4]]).tolist() == [[3, 4]], "tokens stay as they are"
    half = stored([65504, 1], "float16", normalised=False)
    assert half.dtype == np.float16 and half.tolist() == [65504, 1]
    for most in ([65505.0], [-65505.0]):
        with pytest.raises(ValidationFailed, match=r"a row holds 6\.55e\+04, more than float16 can"):
            stored(most, "float16", normalised=False)
    assert stored([65505.0], "float16").tolist() == [1.0]
    assert stored([], "float16").size == 0


ROWS = [
    ImageRow(name="a.png", sha256="0" * 64, height=28, width=56, grid=(2, 4), values={
        "score": np.float32(0.5), "class_token": np.arange(5, dtype=np.float32), "depth": np.ones((2, 3), np.float32),
        "patch_tokens": np.arange(24, dtype=np.float32).reshape(8, 3), "patch_mean": np.full(3, 7, np.float32),
    }),
    ImageRow(name="b.png", error="no image", grid=(9, 9)),
    ImageRow(name="c.png", sha256="1" * 64, height=14, width=14, grid=(1, 1), values={
        "score": np.float32(-1), "class_token": np.ones(5, np.float32), "depth": np.zeros((1, 0), np.float32),
        "patch_tokens": np.ones((1, 3), np.float32), "patch_mean": np.ones(3, np.float32),
    }),
]  # fmt: skip
USED = tuple(KNOWN[name] for name in ("score", "class_token", "depth", "patch_tokens", "patch_mean"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_other_tools_read(dtype: str, tmp_path: Path) -> None:
    """A row without values has a reason, and nothing else."""
    import pyarrow.parquet as pq

    schema = columns.schema(USED, dtype=dtype, metadata={"key": "value"})
    rows = [
        ImageRow(name=r.name, sha256=r.sha256, height=r.height, width=r.width, grid=r.grid, error=r.error,
                 values={n: np.asarray(v, dtype) for n, v in r.values.items()})
        for r in ROWS
    ]  # fmt: skip
    writer = columns.Writer(tmp_path / "x.parquet", schema, USED, dtype=dtype)
    writer.write(columns.table(rows, USED, schema))
    writer.write(columns.table(rows[1:2], USED, schema))
    writer.write(columns.table([], USED, schema))
    writer.close()
    read = pq.read_table(tmp_path / "x.parquet")
    assert read.schema.metadata[b"key"] == b"value" and not read.schema.field("path").nullable
    first, failed, last, again = read.to_pylist()
    assert first == {
        "path": "a.png", "sha256": "0" * 64, "height": 28, "width": 56, "score": 0.5, "class_token": [0, 1, 2, 3, 4],
        "depth": [1.0] * 6, "depth_shape": [2, 3], "patch_mean": [7.0] * 3, "grid_height": 2, "grid_width": 4,
        "patch_tokens": np.arange(24).reshape(8, 3).tolist(), "error": None,
    }  # fmt: skip
    assert last["depth"] == [] and last["depth_shape"] == [1, 0] and last["patch_tokens"] == [[1.0] * 3]
    for row in (failed, again):
        assert (row.pop("path"), row.pop("error")) == ("b.png", "no image") and set(row.values()) == {None}
    kind = read.schema.field("class_token").type
    assert kind.list_size == 5 and str(kind.value_type) == ("halffloat" if dtype == "float16" else "float")
    facts = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0)
    encodings = {facts.column(i).path_in_schema: facts.column(i) for i in range(facts.num_columns)}
    for name in ("score", "class_token.list.element", "patch_tokens.list.element.list.element", "depth.list.element"):
        assert ("BYTE_STREAM_SPLIT" in encodings[name].encodings) == (dtype == "float32"), name
        assert encodings[name].compression == "ZSTD"
    assert encodings["path"].is_stats_set and not encodings["score"].is_stats_set


def test_tables_with_and_without_tokens(tmp_path: Path) -> None:
    """Only columns of all tokens have their grid beside them; the width of a row is its group's."""
    names = [
        columns.schema([KNOWN[name]], dtype="float32", metadata={}).names for name in ("class_token", "patch_tokens")
    ]
    around = ["path", "sha256", "height", "width"]
    assert names[0] == [*around, "class_token", "error"]
    assert names[1] == [*around, "patch_tokens", "grid_height", "grid_width", "error"]


def test_what_is_short_is_normalised_to_one() -> None:
    """Also where a vector is shorter than one, and float16 is asked for."""
    found = columns.stored(np.array([0.3, 0.4], np.float32), dtype="float16", normalised=True, name="a row")
    assert found.tolist() == pytest.approx([0.6, 0.8], abs=1e-3)

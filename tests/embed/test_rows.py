"""Each image is one row with the bundle's tokens, in files that other people's tools open and `--verify` reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinoexport.embed import plan as plans
from dinoexport.embed import run, verify
from dinoexport.errors import UsageError, ValidationFailed
from tests.embed.conftest import BROKEN, COUNT
from tests.embed.runs import LENIENT, expected, hashes, rows_of


@pytest.fixture(scope="module")
def embedded(tiny: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All photos in seven shards, with patch tokens and their mean."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    outputs = ["class_token", "patch_mean", "patch_tokens"]
    found = run.embed(tiny, str(photos), str(out), outputs=outputs, shards=7, **{**LENIENT, "workers": 2})
    assert (found.rows, found.failed, found.complete) == (COUNT, BROKEN, True)
    return out


def test_every_image_is_one_row_with_the_bundles_tokens(embedded: Path, tiny: Path, photos: Path) -> None:
    rows = rows_of(embedded)
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg"))
    assert sorted(row["path"] for row in rows) == names
    right = expected(tiny, photos, [row["path"] for row in rows if row["error"] is None])
    assert len(right) == COUNT - BROKEN
    for row in rows:
        assert row["sha256"] == hashlib.sha256((photos / row["path"]).read_bytes()).hexdigest()
        if row["error"] is not None:
            assert int(row["path"][3:6]) % 10 == 7
            assert row["class_token"] is None and row["patch_tokens"] is None and row["height"] is None
            assert str(photos) not in row["error"] and "0x" not in row["error"]
            continue
        with Image.open(photos / row["path"]) as image:
            assert (row["width"], row["height"]) == image.size
        assert (row["grid_height"], row["grid_width"]) == (16, 16)
        tokens = right[row["path"]]["patch_tokens"][0]
        np.testing.assert_allclose(row["class_token"], right[row["path"]]["class_token"][0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(row["patch_tokens"], tokens, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(row["patch_mean"], tokens.mean(axis=0), rtol=1e-4, atol=1e-4)


def test_parts_say_what_they_are(embedded: Path, tiny: Path) -> None:
    part = min(embedded.glob("*.parquet"))
    schema = pq.read_schema(part)
    assert schema.field("class_token").type == pa.list_(pa.float32(), 96)
    assert schema.field("patch_tokens").type == pa.list_(pa.list_(pa.float32(), 96))
    assert schema.metadata[b"dinoexport.variant"] == b"tiny_swiglu"
    assert b"ONNX Runtime" in schema.metadata[b"dinoexport.runtime"]
    assert schema.metadata[b"dinoexport.normalised"] == b"no"
    success = json.loads((embedded / plans.SUCCESS).read_text())
    assert (success["rows"], success["failed"]) == (COUNT, BROKEN)
    assert {name: facts["sha256"] for name, facts in success["parts"].items()} == hashes(embedded)
    assert all(b"/" not in value for key, value in schema.metadata.items() if key.startswith(b"dinoexport.model"))


def test_other_peoples_tools_open_it(embedded: Path, tiny: Path, photos: Path) -> None:
    """DuckDB, pandas, FAISS: the nearest neighbour of a row is itself, and of its double, the double."""
    import duckdb
    import faiss
    import pandas

    pattern = str(embedded / "*.parquet")
    frame = pandas.read_parquet(embedded, columns=["path", "class_token", "error"])
    assert len(frame) == COUNT and frame["error"].notna().sum() == BROKEN
    good = frame[frame["error"].isna()]
    vectors = np.stack(list(good["class_token"])).astype(np.float32)
    index = faiss.IndexFlatIP(96)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    index.add(unit)
    _, nearest = index.search(unit, 1)
    assert (nearest[:, 0] == np.arange(len(unit))).all()
    names = duckdb.sql(
        f"WITH e AS (SELECT path, class_token::FLOAT[96] AS v FROM '{pattern}' WHERE error IS NULL)"
        " SELECT a.path, arg_max(b.path, array_cosine_similarity(a.v, b.v)) FROM e a, e b GROUP BY a.path"
    ).fetchall()
    assert len(names) == COUNT - BROKEN and all(one == other for one, other in names)


def test_other_shards_workers_and_threads_give_the_same_rows(
    embedded: Path, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    """The same plan gives the same bytes whoever does it; another one the same rows but for rounding."""
    outputs = ["class_token", "patch_mean", "patch_tokens"]
    for part in ((1, 2), (0, 2)):
        run.embed(tiny, str(photos), str(tmp_path / "a"), outputs=outputs, shards=7, part=part, workers=1, max_failed=1)
    assert hashes(tmp_path / "a") == hashes(embedded)
    run.embed(tiny, str(photos), str(tmp_path / "b"), outputs=["class_token"], shards=3, **LENIENT)
    before = {row["path"]: row for row in rows_of(embedded)}
    for row in rows_of(tmp_path / "b"):
        assert row["error"] == before[row["path"]]["error"]
        if row["error"] is None:
            np.testing.assert_allclose(row["class_token"], before[row["path"]]["class_token"], rtol=2e-5, atol=2e-5)


def test_float16_and_normalised(tiny: Path, photos: Path, tmp_path: Path, embedded: Path) -> None:
    import duckdb

    run.embed(tiny, str(photos), str(tmp_path), dtype="float16", normalised=True, shards=2, **LENIENT)
    part = min(tmp_path.glob("*.parquet"))
    assert pq.read_schema(part).field("class_token").type == pa.list_(pa.float16(), 96)
    assert pq.read_schema(part).metadata[b"dinoexport.normalised"] == b"L2"
    before = {row["path"]: row for row in rows_of(embedded)}
    for row in rows_of(tmp_path):
        if row["error"] is None:
            exact = np.array(before[row["path"]]["class_token"])
            np.testing.assert_allclose(
                np.array(row["class_token"], np.float32), exact / np.linalg.norm(exact), atol=5e-4
            )
    assert duckdb.sql(f"SELECT count(*) FROM '{part}' WHERE class_token IS NOT NULL").fetchall()[0][0] > 0
    with pytest.raises(ValidationFailed, match="more than float16"):
        from dinoexport.embed.columns import stored

        stored(np.array([1e5], np.float32), dtype="float16", normalised=False, name="class_token of a.jpg")


def test_verify(embedded: Path, tiny: Path, photos: Path, tmp_path: Path) -> None:
    found = verify.verify(tiny, str(photos), str(embedded), seed=1)
    assert found.passed and found.sampled >= 10 and not found.changed

    copy = tmp_path / "copy"
    shutil.copytree(embedded, copy)
    part = sorted(copy.glob("*.parquet"))[2]
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    found = verify.verify(tiny, str(photos), str(copy), seed=1)
    assert not found.passed and found.damaged == (part.name,)


def test_verify_finds_wrong_rows(embedded: Path, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Two rows exchanged, with the part's hash as it then is: only embedding again can tell."""

    copy = tmp_path / "copy"
    shutil.copytree(embedded, copy)
    for part in copy.glob("*.parquet"):
        table = pq.read_table(part)
        good = [i for i, e in enumerate(table.column("error").to_pylist()) if e is None]
        order = list(range(len(table)))
        for one, other in zip(good, good[1:] + good[:1], strict=True):
            order[one] = other
        mixed = table.set_column(0, "path", table.column("path").take(order))
        mixed = mixed.set_column(1, "sha256", table.column("sha256").take(order))
        pq.write_table(mixed, part)
        done = next((copy / plans.FOLDER).rglob(f"{part.name[5:10]}.done.json"))
        facts = json.loads(done.read_text()) | {"sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
        done.write_text(json.dumps(facts))
    found = verify.verify(tiny, str(photos), str(copy), seed=1)
    assert not found.damaged and not found.passed


def test_verify_of_float16(tiny: Path, photos: Path, tmp_path: Path) -> None:
    run.embed(tiny, str(photos), str(tmp_path), dtype="float16", normalised=True, shards=2, **LENIENT)
    assert verify.verify(tiny, str(photos), str(tmp_path), seed=1).passed


def test_parquet_column(tiny: Path, photos: Path, tmp_path: Path, embedded: Path) -> None:
    """Bytes, and a struct as Hugging Face stores images; a null is a failed row."""
    names = [row["path"] for row in rows_of(embedded) if row["error"] is None][:10]
    contents: list[bytes | None] = [(photos / name).read_bytes() for name in names]
    table = pa.table({
        "id": list(range(11)),
        "image": pa.array([*contents, None], pa.binary()),
        "hf": pa.array([*({"bytes": c, "path": None} for c in contents), None]),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    with pytest.raises(UsageError, match="2 could: image, hf"):
        run.embed(tiny, str(tmp_path / "in.parquet"), str(tmp_path / "x"), **LENIENT)
    with pytest.raises(UsageError, match="no column 'id' of encoded images"):
        run.embed(tiny, f"{tmp_path / 'in.parquet'}:id", str(tmp_path / "x"), **LENIENT)
    before = {row["path"]: row["class_token"] for row in rows_of(embedded)}
    for column in ("image", "hf"):
        out = tmp_path / column
        run.embed(tiny, f"{tmp_path / 'in.parquet'}:{column}", str(out), shards=2, **LENIENT)
        found = {row["path"]: row for row in rows_of(out)}
        assert found.keys() == {f"in.parquet#{i}" for i in range(11)}
        assert found["in.parquet#10"]["error"] == "the column holds nothing in this row"
        for i, name in enumerate(names):
            np.testing.assert_allclose(found[f"in.parquet#{i}"]["class_token"], before[name], rtol=2e-5, atol=2e-5)
        assert verify.verify(tiny, f"{tmp_path / 'in.parquet'}:{column}", str(out), seed=1).passed

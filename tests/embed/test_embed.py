"""`embed`: every image once, the tokens of the bundle, in files that other people's tools open."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.embed import local, opening, run, sources, verify
from dinoexport.embed import plan as plans
from dinoexport.embed.embedder import Prepared, model_of
from dinoexport.errors import BuildError, MissingRequirement, UsageError, ValidationFailed
from dinoexport.pipeline.request import build_request
from dinoexport.runtime import sizes
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import store
from tests.conftest import DATA
from tests.embed.conftest import BROKEN, COUNT, fill, picture

ROOT = Path(__file__).parent.parent.parent
LENIENT = {"max_failed": 0.2, "workers": 1}


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every row, in the order of the parts' names."""
    return [row for part in sorted(out.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def hashes(out: Path) -> dict[str, str]:
    return {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in sorted(out.glob("*.parquet"))}


def expected(tiny: Path, photos: Path, names: list[str]) -> dict[str, Any]:
    """Class tokens by ONNX Runtime's own session, one image at a time: nothing of `embed` but the preparation."""
    import onnxruntime

    session = onnxruntime.InferenceSession(tiny / "model.onnx", providers=["CPUExecutionProvider"])
    model = model_of(bundle.read_manifest(tiny))
    found = {}
    for name in names:
        inputs = model.prepare("images", {}, [(photos / name).read_bytes()])
        found[name] = dict(
            zip(("class_token", "patch_tokens"), session.run(["class_token", "patch_tokens"], inputs), strict=True)
        )
    return found


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


def test_goes_on_and_refuses_another_run(tiny: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run.embed(tiny, str(photos), str(out), shards=4, part=(1, 2), **LENIENT)
    assert (found.shards, found.complete) == (2, False) and not (out / plans.SUCCESS).exists()
    first = hashes(out)
    assert len(first) == 2
    found = run.embed(tiny, str(photos), str(out), **LENIENT)
    assert (found.shards, found.done_before, found.complete) == (4, 2, True)
    assert first.items() <= hashes(out).items()
    for change, said in (({"dtype": "float16"}, "dtype 'float32', not 'float16'"), ({"shards": 5}, "4 shards, not 5")):
        with pytest.raises(UsageError, match=said):
            run.embed(tiny, str(photos), str(out), **{**LENIENT, **change})
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "one.jpg").write_bytes(picture(1))
    with pytest.raises(UsageError, match="holds another run: it has images"):
        run.embed(tiny, str(tmp_path / "others"), str(out), **LENIENT)
    (tmp_path / "moved").symlink_to(photos)
    assert run.embed(tiny, str(tmp_path / "moved"), str(out), **LENIENT).complete  # the same listing elsewhere


def test_extend_and_retry(tiny: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    fill(photos, 20)
    run.embed(tiny, str(photos), str(out), shards=3, **LENIENT)
    before = hashes(out)
    fill(photos, 15, first=20)
    found = run.embed(tiny, str(photos), str(out), extend=True, **LENIENT)
    assert (found.rows, found.complete) == (35, True)
    assert before.items() <= hashes(out).items() and any(n.startswith("extension-1-") for n in hashes(out))
    assert sorted(r["path"] for r in rows_of(out)) == sorted(
        p.relative_to(photos).as_posix() for p in photos.rglob("*.jpg")
    )
    assert run.embed(tiny, str(photos), str(out), extend=True, **LENIENT).done_before == found.shards  # nothing new
    failed = [row["path"] for row in rows_of(out) if row["error"]]
    for name in failed[:2]:
        (photos / name).write_bytes(picture(hash(name) % 1000))
    untouched = {r["path"]: r["class_token"] for r in rows_of(out)}
    seen: list[run.State] = []
    found = run.embed(tiny, str(photos), str(out), retry_failed=True, watch=seen.append, **LENIENT)
    assert found.failed == len(failed) - 2 and {state.rows_total for state in seen} == {len(failed)}
    after = {r["path"]: r for r in rows_of(out)}
    assert len(after) == 35 and all(after[name]["error"] is None for name in failed[:2])
    assert all(after[name]["class_token"] == tokens for name, tokens in untouched.items() if name not in failed)
    right = expected(tiny, photos, failed[:2])
    for name in failed[:2]:
        np.testing.assert_allclose(after[name]["class_token"], right[name]["class_token"][0], rtol=2e-5, atol=2e-5)
    success = json.loads((out / plans.SUCCESS).read_text())
    assert {n: f["sha256"] for n, f in success["parts"].items()} == hashes(out) and success["failed"] == found.failed


def command(tiny: Path, photos: Path, out: Path, *more: str) -> list[str]:
    words = ["embed", str(tiny), "--images", str(photos), "--out", str(out), "--max-failed", "20%", *more]
    return [sys.executable, "-m", "dinoexport", *words]


def test_killed_at_random_nothing_is_lost_or_doubled(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Two runners on one folder, killed at any moment; in the end every image has its one row, and nothing is left."""
    words = ["-m", "tests.embed.kill_workers", str(tiny), str(photos), str(tmp_path / "out"), "20", "5"]
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = json.loads(ran.stdout)
    assert said["kills"] >= 20 and (said["rows"], said["distinct"], said["left"]) == (COUNT, COUNT, [])


def test_a_killed_command_leaves_no_worker_and_is_taken_up(tiny: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(tiny, photos, out, "--shards", "6", "--workers", "1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not list(out.glob("*.parquet")):
        time.sleep(0.02)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _group_lives(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = hashes(out)
    found = run.embed(tiny, str(photos), str(out), **LENIENT)
    assert found.complete and found.done_before == len(before) and before.items() <= hashes(out).items()
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_image_that_kills_the_decoder_is_one_failed_row(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies is replaced; the image it dies of is found, and is a row like any other failure."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, hashlib\n"
        "import dinoexport.embed.embedder as e\n"
        "real = e.Prepared.of\n"
        "def of(self, name, read):\n"
        "    if name == 'd1/022.jpg': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return real(self, name, read)\n"
        "e.Prepared.of = of\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    seen: list[run.State] = []
    found = run.embed(tiny, str(photos), str(tmp_path / "out"), shards=3, watch=seen.append, **LENIENT)
    assert (found.rows, found.failed) == (COUNT, BROKEN + 1)
    (row,) = [row for row in rows_of(tmp_path / "out") if row["path"] == "d1/022.jpg"]
    assert row["error"] == "the decoder died of SIGSEGV on it"
    assert not list((tmp_path / "out").rglob(".*.partial"))  # of the worker that died
    assert (seen[-1].rows, seen[-1].failed) == (COUNT, BROKEN + 1)  # what died was not counted twice


@pytest.mark.parametrize("times", [2, 9])
def test_a_worker_that_is_killed_while_it_opens_the_bundle_is_replaced(
    times: int, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shard's killer is: some times, not for ever."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal\n"
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "with starts.open('a') as file: file.write('x')\n"
        f"if starts.stat().st_size <= {times}: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    if times < local.DEATHS_MAX:
        assert run.embed(tiny, str(photos), str(tmp_path / "out"), shards=2, **LENIENT).complete
        return
    with pytest.raises(BuildError, match="died of SIGKILL before its first shard") as raised:
        run.embed(tiny, str(photos), str(tmp_path / "out"), shards=2, **LENIENT)
    assert "--workers" in raised.value.next_step


def test_finished_run_of_1000_shards_restarts_at_once(tiny: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.embed(tiny, str(photos), str(out), shards=1000, **LENIENT)
    started = time.monotonic()
    found = run.embed(tiny, str(photos), str(out), **LENIENT)
    assert time.monotonic() - started < 5
    assert (found.shards, found.done_before, found.rows) == (1000, 1000, COUNT)


def test_verify(embedded: Path, tiny: Path, photos: Path, tmp_path: Path) -> None:
    found = verify.verify(tiny, str(photos), str(embedded), seed=1)
    assert found.passed and found.sampled >= 10 and not found.changed
    import shutil

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
    import shutil

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


def test_nearest_sizes(tiny: Path, photos: Path, tmp_path: Path) -> None:
    run.embed(tiny, str(photos), str(tmp_path), size="nearest", outputs=["patch_tokens"], shards=2, **LENIENT)
    rows = rows_of(tmp_path)
    grids = {(row["grid_height"], row["grid_width"]) for row in rows if row["error"] is None}
    assert len(grids) == 3
    assert all(len(r["patch_tokens"]) == r["grid_height"] * r["grid_width"] for r in rows if r["error"] is None)
    assert verify.verify(tiny, str(photos), str(tmp_path), seed=1).passed


def test_named_sizes_run_in_forms_of_their_own(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image at the nearest of them; the plan says which batches take which form, so all workers write the same."""
    for name, workers in (("one", 1), ("two", 2)):
        options = {**LENIENT, "workers": workers, "outputs": ["class_token", "patch_tokens"], "shards": 2}
        run.embed(tiny, str(photos), str(tmp_path / name), size="56x42,28x84", **options)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    rows = [row for row in rows_of(tmp_path / "one") if row["error"] is None]
    assert {(row["grid_height"], row["grid_width"]) for row in rows} == {(4, 3), (2, 6)}
    (plan,) = plans.read_all(store.open_place(str(tmp_path / "one")))
    assert plan.settings.forms == ("4x28x84", "4x56x42")
    model, settings = model_of(bundle.read_manifest(tiny)), {"sizes": [[28, 84], [56, 42]]}
    import onnxruntime

    session = onnxruntime.InferenceSession(tiny / "model.onnx", providers=["CPUExecutionProvider"])
    for row in rows:
        inputs = model.prepare("sized_images", settings, [(photos / row["path"]).read_bytes()])
        (right,) = session.run(["class_token"], inputs)
        np.testing.assert_allclose(row["class_token"], right[0], rtol=5e-5, atol=5e-5)
    for size, said in (("28x2800", "2800"), ("nearst", "is no size"), ("4x28x28", "is not HxW")):
        with pytest.raises(UsageError, match=said):
            run.embed(tiny, str(photos), str(tmp_path / "x"), size=size, **LENIENT)
    graphs = {tiny / graph.file: graph.graph() for graph in bundle.read_manifest(tiny).graphs}
    monkeypatch.setattr(sizes, "_APART_MAX", {Precision.FP32: -1.0})  # no form is near enough
    with pytest.raises(ValidationFailed, match="cannot be used: its answers are off"):
        opening._with_forms(graphs, Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32), ("4x28x84",))


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


def test_what_is_no_image_is_a_failed_row(tiny: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "good.png").write_bytes(picture(1, form="PNG"))
    (photos / "notes.txt").write_text("no image")
    (photos / "thin.png").write_bytes(picture(2, size=(30000, 1), form="PNG"))
    (photos / ".hidden.jpg").write_bytes(picture(3))
    (tmp_path / "secret.jpg").write_bytes(picture(4))
    (photos / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (photos / "dangling.jpg").symlink_to("nowhere.jpg")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "folder.jpg").symlink_to(".")
    (photos / "same.png").symlink_to("good.png")
    os.mkfifo(photos / "pipe.jpg")
    run.embed(tiny, str(photos), str(out), max_failed=1, workers=1)
    said = {row["path"]: row["error"] for row in rows_of(out)}
    assert said == {
        "dangling.jpg": "a link to nothing",
        "folder.jpg": "a link to a folder",
        "good.png": None,
        "loop.jpg": "a link to itself",
        "notes.txt": "not an image by its name",
        "out.jpg": "a link that leads out of the folder",
        "pipe.jpg": "not a regular file",
        "same.png": None,
        "thin.png": "An image of 30000x1 is too long and thin to resize",
    }
    with pytest.raises(ValidationFailed, match="7 of 9 images could not be embedded"):
        run.embed(tiny, str(photos), str(out))


def test_image_replaced_after_the_listing(tiny: Path, tmp_path: Path) -> None:
    """The hash is of the bytes that were embedded, whatever was listed; what is gone is a failed row."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    fill(photos, 6)
    run.embed(tiny, str(photos), str(out), shards=2, part=(0, 2), workers=1)
    place = store.open_place(str(out))
    left = plans.items_of(place, plans.read_all(place)[0], 1)
    (photos / left[0]).write_bytes(picture(99))
    (photos / left[1]).unlink()
    run.embed(tiny, str(photos), str(out), workers=1, max_failed=1)
    rows = {row["path"]: row for row in rows_of(out)}
    assert rows[left[0]]["sha256"] == hashlib.sha256(picture(99)).hexdigest()
    assert rows[left[1]]["error"] == "no longer there"


def test_refusals(tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, said in (
        ({"images": str(tmp_path / "none")}, "There is no folder"),
        ({"images": str(photos / "*.xyz")}, "lists no image"),
        ({"outputs": ["class_tokens"]}, "Did you mean 'class_token'"),
        ({"outputs": ["class_token"] * 2}, "names one twice"),
        ({"out": "ftp://somewhere/x"}, "ftp:// is not a known scheme"),
        ({"out": "s3://user:password@bucket/x"}, "must not contain a user name, a password or a query"),
        ({"out": "https://example.invalid/x"}, "cannot be written to"),
        ({"out": "http://[::1"}, r"is not an address\."),
        ({"out": "s3://bucket:port/x"}, r"is not an address\."),
    ):
        given = {"images": str(photos), "out": str(tmp_path / "out"), **words}
        with pytest.raises(UsageError, match=said) as raised:
            run.embed(tiny, given.pop("images"), given.pop("out"), **{**LENIENT, **given})
        assert "password" not in str(raised.value).replace("a password", "") and raised.value.next_step
    for word in ("3/3", "-1/2", "1", "1/0"):
        with pytest.raises(UsageError, match="not I/N"):
            run.part_of(word)
    for word in ("101%", "-1", "x"):
        with pytest.raises(UsageError, match="not a share"):
            run.share_of(word)
    assert run.share_of("1%") == 0.01 and run.share_of("0.5") == 0.5
    with monkeypatch.context() as patch, pytest.raises(MissingRequirement, match="ray is not installed"):
        patch.setitem(sys.modules, "ray", None)
        run.embed(tiny, str(photos), str(tmp_path / "out"), engine="ray", **LENIENT)
    assert not (tmp_path / "out").exists(), "nothing is written before a refusal"
    locked = tmp_path / "locked"
    locked.write_text("a file where the folder should be")
    with pytest.raises(UsageError, match="is not a folder that can be read: Not a directory"):
        run.embed(tiny, str(photos), str(locked / "out"), **LENIENT)


def test_rejected_and_damaged_bundles_are_refused(tiny: Path, photos: Path, tmp_path: Path) -> None:
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(tiny, bad)
    manifest = bundle.read_manifest(bad)
    (bad / bundle.MANIFEST).write_bytes(manifest.model_copy(update={"verdict": "rejected"}).to_bytes())
    with pytest.raises(ValidationFailed, match="is rejected"):
        run.embed(bad, str(photos), str(tmp_path / "out"), **LENIENT)
    (bad / bundle.MANIFEST).write_bytes(manifest.to_bytes())
    data = bad / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 255
    data.write_bytes(raw)
    with pytest.raises(ValidationFailed, match="does not have the SHA-256"):
        run.embed(bad, str(photos), str(tmp_path / "out"), **LENIENT)
    assert not (tmp_path / "out" / plans.FOLDER).exists()


def test_a_machine_that_computes_wrongly_embeds_nothing(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import dinoexport.embed.opening as e\n"
        "real = e.runners.driven\n"
        "def driven(model, opened):\n"
        "    run = real(model, opened)\n"
        "    return lambda inputs: {n: a * 1.001 for n, a in run(inputs).items()}\n"
        "e.runners.driven = driven\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ValidationFailed, match="does not give PyTorch's outputs"):
        run.embed(tiny, str(photos), str(tmp_path / "out"), **LENIENT)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_text_is_refused_in_words(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_families import TOY

    monkeypatch.syspath_prepend(str(TOY))
    out = tmp_path / "toy"
    built = CliRunner().invoke(
        cli.app, ["export", str(TOY / "toy.toml"), "--weights", "synthetic:0", "--out", str(out)]
    )
    assert built.exit_code == 0, built.output
    with pytest.raises(UsageError, match=r"takes no image files.*token numbers"):
        run.embed(out, str(photos), str(tmp_path / "out"), **LENIENT)


def test_full_disk_keeps_what_is_finished(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk: a big shard fails in one sentence, and no part is left of it."""
    import resource

    def little() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    words = command(tiny, photos, tmp_path / "out", "--shards", "2", "--outputs", "patch_tokens", "--workers", "1")
    ended = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=little)
    assert ended.returncode == 4 and "No room left" in ended.stderr, ended.stderr
    assert not list((tmp_path / "out").glob("*.parquet")) and not list((tmp_path / "out").glob(".*"))


def test_a_million_entries_are_listed_in_flat_memory(tmp_path: Path) -> None:
    """Peak of the planning process for 200,000 entries over that for 2,000: the names alone take 30 MB."""
    code = (
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from dinoexport.embed import plan, sources\n"
        "from dinoexport.system import store\n"
        "class Many:\n"
        "    samples = None\n"
        "    def items(self):\n"
        "        for i in range(int(sys.argv[1])):\n"
        "            n = f'a/folder/{i:09d}-' + 'x' * 100; yield sources.Item(name=n, size_bytes=1, key=n)\n"
        "plan._SHARED_OUT = 2000\n"
        "s = plan.Settings(images='x', model_sha256='0' * 64, variant='v', precision='fp32', front_end='images',"
        " preparation={}, outputs=('class_token',), dtype='float32', normalised=False, batch=1)\n"
        "p = plan.make(Many(), store.open_place(sys.argv[2]), s, before=(), shards=64, workers=1, row_bytes=1,"
        " progress=lambda *_: None)\n"
        "assert p.items == int(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for count in (2_000, 200_000):
        ran = subprocess.run(
            [sys.executable, "-c", code, str(count), str(tmp_path / str(count))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks


def test_the_command_line(tiny: Path, photos: Path, tmp_path: Path) -> None:
    words = command(tiny, photos, tmp_path / "out", "--shards", "3")
    ran = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["rows"] == COUNT
    lines = [json.loads(line) for line in ran.stderr.splitlines() if line.startswith("{")]
    assert lines[0]["plan"]["images"] == COUNT and lines[-1]["rows"] == COUNT and lines[-1]["shards"] == 3
    shown = CliRunner().invoke(cli.app, words[3:])
    assert shown.exit_code == 0 and f"{COUNT} in 3 shards (3 done before), {BROKEN} failed" in shown.stdout
    shown = CliRunner().invoke(cli.app, [*words[3:], "--verify"])
    assert shown.exit_code == 0 and "PASSED" in shown.stdout
    strict = CliRunner().invoke(cli.app, [*words[3:-4], "--max-failed", "1%"])
    assert strict.exit_code == 1 and "6 of 60 images could not be embedded" in strict.stderr


def test_prepares_with_the_bundles_own_mean_and_deviation(tmp_path: Path) -> None:
    """A grey image's value in each channel, by hand, for a recipe that is not ImageNet's."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    shutil.copy(DATA / "tiny_cases.toml", tmp_path)
    table = f"\n[preprocess]\nmean = {list(mean)}\nstd = {list(std)}\n"
    (tmp_path / "own.toml").write_text((DATA / "tiny_swiglu.toml").read_text() + table)
    model = build_request(str(tmp_path / "own.toml"), weights="synthetic:0").model
    (end, *_) = model.front_ends(None, progress=lambda *_: None)
    grey = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 90, 90)).save(grey, "PNG")
    item = Prepared(model=model, front_end=end, graph=model.graphs[0]).of("grey.png", grey.getvalue)
    assert item.inputs is not None and (item.row.height, item.row.width) == (48, 64)
    for channel in range(3):
        value = (90 / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(item.inputs["pixels"][0, channel], value, rtol=1e-5)


def test_shard_of_is_fixed() -> None:
    """Were it to change, --extend would add every image again."""
    assert [plans.shard_of(f"d/{i}.jpg", 64) for i in range(6)] == [
        int.from_bytes(hashlib.blake2b(f"d/{i}.jpg".encode(), digest_size=8).digest(), "big") % 64 for i in range(6)
    ]
    assert plans.shard_of("d/0.jpg", 1000) == 9
    counts = np.bincount([plans.shard_of(str(i), 16) for i in range(16_000)], minlength=16)
    assert counts.min() > 850 and counts.max() < 1150
    assert sources._is_hidden("a/.b/c") and not sources._is_hidden("a/b.c")

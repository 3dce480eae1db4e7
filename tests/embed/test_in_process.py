"""What a run of `embed` writes and what it does again: every row and file, with a model that is written down."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.embed import embedder, plan, run, verify
from dinoexport.embed.plan import shard_of
from dinoexport.embed.run import State, embed
from dinoexport.errors import UsageError, ValidationFailed
from tests.embed.in_process import Model, answers, fill, installed, manifest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
OUTPUTS = ("class_token", "patch_tokens")
NOT_FINITE = "the model's output is not finite"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return installed(monkeypatch)


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Any]:
    return fill(tmp_path / "photos")


@pytest.fixture
def embedded(model: Model, photos: dict[str, Any], tmp_path: Path) -> Any:
    """`embed` of the pictures in a folder of this test."""

    def call(out: str = "out", **options: Any) -> run.Embedded:
        options = {"images": str(tmp_path / "photos"), "outputs": OUTPUTS, "max_failed": 0.5, "shards": 1} | options
        return embed(tmp_path / "bundle", out=str(tmp_path / out), **options)

    return call


def rows(out: Path) -> dict[str, dict[str, Any]]:
    found = [row for part in sorted(out.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert len({row["path"] for row in found}) == len(found)
    return {row["path"]: row for row in found}


def expected(photos: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Each row by itself, without batches."""
    wanted = {}
    for name, pixels in photos.items():
        sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        row: dict[str, Any] = dict.fromkeys(("height", "width", "grid_height", "grid_width", *OUTPUTS, "error"))
        row |= {"path": name, "sha256": sha256}
        if pixels is None:
            row["error"] = "not a readable image (none of JPEG, PNG, WEBP, BMP, TIFF)"
        else:
            row["height"], row["width"] = pixels.shape[2:]
            if pixels.min() == 255:
                row["error"] = NOT_FINITE
            else:
                row["grid_height"], row["grid_width"] = row["height"] // 2, row["width"] // 2
                row |= {key: array[0].tolist() for key, array in answers(pixels).items()}
        wanted[name] = row
    return wanted


def test_every_picture_is_a_row(embedded: Any, model: Model, photos: dict[str, Any], tmp_path: Path) -> None:
    """Pictures of one size are in one batch, of five at most; those that are left come last."""
    done = embedded()
    assert rows(tmp_path / "out") == expected(photos, tmp_path / "photos")
    assert model.batches == [(5, 3, 4, 6), (3, 3, 8, 2), (3, 3, 4, 6)]
    assert (done.rows, done.failed, done.shards, done.done_before, done.complete) == (12, 2, 1, 0, True)
    assert done.out == str(tmp_path / "out") and done.layout is not None


def test_other_shards_give_the_same_rows(
    embedded: Any, photos: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded()
    embedded("three", shards=3)
    assert rows(tmp_path / "three") == rows(tmp_path / "out")
    for shard in range(3):
        part = pq.read_table(tmp_path / "three" / f"part-{shard:05}-of-00003.parquet")
        names = [name for name in photos if shard_of(name, 3) == shard]
        assert names and part.column("path").to_pylist() == names
    # However few are in memory at once, and however few decoded ahead.
    monkeypatch.setattr(plan, "_SHARED_OUT", 3)
    monkeypatch.setattr(embedder, "_BATCHES_AHEAD", 0)
    monkeypatch.setattr(embedder, "_GROUP_ROWS", 1)
    embedded("groups", shards=3)
    assert rows(tmp_path / "groups") == rows(tmp_path / "out")


def test_files_of_a_run(embedded: Any, tmp_path: Path) -> None:
    """The plan, the lists, what each shard came to, and what all did; each part says what it is."""
    embedded(shards=2, dtype="float16", normalised=True, outputs=["class_token"])
    out = tmp_path / "out"
    plan_file = json.loads((out / "_plan" / "0.json").read_text())
    lists = plan_file["lists"]
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "_SUCCESS.json", "_plan/0.json", "part-00000-of-00002.parquet", "part-00001-of-00002.parquet",
        *(f"_plan/{lists}/0000{i}.{end}" for i in (0, 1) for end in ("done.json", "jsonl")),
    }  # fmt: skip
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "photos").iterdir()}
    names = sorted(sizes)
    listing = hashlib.sha256("".join(json.dumps([name, name]) for name in names).encode()).hexdigest()
    model_sha256 = hashlib.sha256(
        json.dumps(
            [
                [[name, hashlib.sha256(name.encode()).hexdigest()] for name in ("model.onnx", "model.onnx.data")],
                {"a": 2, "b": 1},
            ]
        ).encode()
    ).hexdigest()
    assert plan_file == {
        "version": 1, "generation": 0, "shards": 2, "items": 12, "image_bytes": sum(sizes.values()),
        "listing_sha256": listing, "lists": lists,
        "settings": {
            "images": str(tmp_path / "photos"), "model_sha256": model_sha256, "variant": "tiny", "precision": "fp32",
            "front_end": "images", "preparation": {"size": "default"}, "outputs": ["class_token"], "dtype": "float16",
            "normalised": True, "batch": 5, "forms": [],
        },
    }  # fmt: skip
    assert [json.loads(line) for line in (out / "_plan" / lists / "00000.jsonl").read_text().splitlines()] == [
        [name, sizes[name], name] for name in names if shard_of(name, 2) == 0
    ]
    plan_sha256 = plan.Plan.model_validate(plan_file).sha256
    parts = {}
    for shard in (0, 1):
        raw = (out / f"part-0000{shard}-of-00002.parquet").read_bytes()
        failed = sum(shard_of(name, 2) == shard for name in ("03.png", "08.png"))
        parts[f"part-0000{shard}-of-00002.parquet"] = {
            "rows": sum(shard_of(name, 2) == shard for name in names), "failed": failed,
            "sha256": hashlib.sha256(raw).hexdigest(), "size_bytes": len(raw),
        }  # fmt: skip
    content = {"rows": 12, "failed": 2, "plans": [plan_sha256], "parts": parts}
    assert (out / "_SUCCESS.json").read_text() == json.dumps(content, indent=1) + "\n"
    metadata = pq.read_schema(out / "part-00000-of-00002.parquet").metadata
    told = {key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"dinoexport.")}
    assert told.pop("dinoexport.version")
    assert told == {
        "dinoexport.model": model_sha256, "dinoexport.variant": "tiny", "dinoexport.precision": "fp32",
        "dinoexport.runtime": "written down", "dinoexport.preparation": "images {'size': 'default'}",
        "dinoexport.normalised": "L2", "dinoexport.plan": plan_sha256,
    }  # fmt: skip


def test_a_finished_run_is_not_done_again(embedded: Any, model: Model, tmp_path: Path) -> None:
    first = embedded(shards=3)
    model.batches.clear()
    planned: list[Any] = []
    again = embedded(shards=None, planned=lambda *what: planned.append(what))
    assert model.batches == planned == [] and again.layout is None
    assert (again.rows, again.failed, again.done_before, again.complete) == (first.rows, first.failed, 3, True)
    # What a shard came to is counted from its part where nothing says so.
    success = (tmp_path / "out" / "_SUCCESS.json").read_text()
    for path in [tmp_path / "out" / "_SUCCESS.json", *(tmp_path / "out").rglob("*.done.json")]:
        path.unlink()
    assert embedded(shards=3).failed == 2
    assert (tmp_path / "out" / "_SUCCESS.json").read_text() == success and model.batches == []
    # A record of another plan counts for nothing.
    other = json.loads(success)
    other["plans"], other["parts"]["part-00000-of-00003.parquet"]["failed"] = ["0" * 64], 9
    (tmp_path / "out" / "_SUCCESS.json").write_text(json.dumps(other))
    assert embedded(shards=3).failed == 2 and (tmp_path / "out" / "_SUCCESS.json").read_text() == success


def test_what_is_missing_is_done(embedded: Any, model: Model, photos: dict[str, Any], tmp_path: Path) -> None:
    embedded(shards=3)
    whole = rows(tmp_path / "out")
    (tmp_path / "out" / "part-00001-of-00003.parquet").unlink()
    model.batches.clear()
    planned: list[Any] = []
    done = embedded(shards=3, planned=lambda plans, layout: planned.append((len(plans), layout.workers > 0)))
    assert (done.done_before, done.complete, planned) == (2, True, [(1, True)])
    usable = [name for name, pixels in photos.items() if shard_of(name, 3) == 1 and pixels is not None]
    assert sum(batch[0] for batch in model.batches) == len(usable) and rows(tmp_path / "out") == whole


def test_a_part_of_the_shards(embedded: Any, photos: dict[str, Any], tmp_path: Path) -> None:
    """0/2 and 1/2 of three shards: two and one. Only when both are there the run is complete."""
    first = embedded(shards=3, part=(0, 2))
    assert (first.shards, first.complete) == (2, False) and not (tmp_path / "out" / "_SUCCESS.json").exists()
    assert first.rows == sum(shard_of(name, 3) != 1 for name in photos)
    second = embedded(shards=3, part=(1, 2))
    assert (second.shards, second.complete, second.rows) == (1, True, 12 - first.rows)
    assert second.failed + first.failed == 2
    assert rows(tmp_path / "out") == expected(photos, tmp_path / "photos")


def test_failed_rows_are_tried_again(embedded: Any, model: Model, photos: dict[str, Any], tmp_path: Path) -> None:
    """Only they are, and the other rows stay as they are."""
    embedded()
    before = rows(tmp_path / "out")
    picture = np.full((4, 6, 3), 7, np.uint8)
    Image.fromarray(picture).save(tmp_path / "photos" / "03.png")
    model.batches.clear()
    assert embedded().failed == 2, "not without being asked to"
    again = embedded(retry_failed=True)
    assert (again.rows, again.failed, again.done_before) == (12, 1, 0)
    assert model.batches == [(2, 3, 4, 6)], "the repaired and the white one"
    photos["03.png"] = picture.transpose(2, 0, 1)[None].astype(np.float32)
    assert rows(tmp_path / "out") == before | expected(photos, tmp_path / "photos")
    (tmp_path / "photos" / "08.png").write_bytes((tmp_path / "photos" / "03.png").read_bytes())
    assert embedded(retry_failed=True).failed == 0
    model.batches.clear()
    assert embedded(retry_failed=True).done_before == 1 and model.batches == []


def test_more_pictures_are_an_extension(embedded: Any, model: Model, photos: dict[str, Any], tmp_path: Path) -> None:
    embedded(shards=2)
    assert embedded(shards=2, extend=True).shards == 2, "nothing is new"
    more = fill(tmp_path / "photos", 15)
    model.batches.clear()
    assert embedded(shards=2).rows == 12, "not without being asked to"
    done = embedded(shards=2, extend=True)
    assert (done.rows, done.shards, done.done_before, done.complete) == (15, 4, 2, True)
    assert sum(batch[0] for batch in model.batches) == 3
    names = {path.name for path in (tmp_path / "out").glob("*.parquet")}
    assert names == {f"{kind}part-0000{i}-of-00002.parquet" for kind in ("", "extension-1-") for i in (0, 1)}
    assert rows(tmp_path / "out") == expected(more, tmp_path / "photos")
    assert embedded(shards=2, extend=True).done_before == 4


def test_too_many_failures_are_an_error_that_keeps_everything(embedded: Any, tmp_path: Path) -> None:
    assert embedded(max_failed=2 / 12).failed == 2
    with pytest.raises(ValidationFailed) as told:
        embedded(max_failed=1.9 / 12)
    assert told.value.message == "2 of 12 images could not be embedded, more than 15.83%; their rows say why."
    with pytest.raises(ValidationFailed, match="2 of 12"):
        embedded("new", max_failed=0.0)
    assert len(rows(tmp_path / "new")) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "dtype 'float32', not 'float16'"), ({"shards": 3}, "2 shards, not 3"),
        ({"outputs": ["class_token"]}, "outputs ('class_token', 'patch_tokens'), not ('class_token',)"),
        ({"normalised": True, "shards": 1}, "normalised False, not True; 2 shards, not 1"),
        ({"size": "4x6"}, "forms (), not ('5x4x6',)"),
    ],
)  # fmt: skip
def test_another_run_is_refused(options: dict[str, Any], words: str, embedded: Any, tmp_path: Path) -> None:
    embedded(shards=2)
    with pytest.raises(UsageError) as told:
        embedded(**({"shards": 2} | options))
    assert told.value.message.startswith(f"{tmp_path / 'out'} holds another run: it has ")
    assert words in told.value.message


def test_the_same_pictures_elsewhere_are_the_same_run(embedded: Any, model: Model, tmp_path: Path) -> None:
    embedded()
    fill(tmp_path / "moved")
    assert embedded(images=str(tmp_path / "moved")).done_before == 1
    (tmp_path / "moved" / "00.png").rename(tmp_path / "moved" / "renamed.png")
    with pytest.raises(UsageError, match=r"images '.*photos', not '.*moved'"):
        embedded(images=str(tmp_path / "moved"))


def test_a_folder_of_something_else_is_refused(embedded: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "_plan").mkdir(parents=True)
    for i in range(7):
        (tmp_path / "out" / f"f{i}").touch()
    with pytest.raises(UsageError, match=r"no run of embed wrote: f0, f1, f2, f3, f4\.$"):
        embedded()
    for i in range(7):
        (tmp_path / "out" / f"f{i}").unlink()
    assert embedded().rows == 12


def test_no_picture(embedded: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"none lists no image\.$"):
        embedded(images=str(tmp_path / "none"))


@pytest.mark.parametrize("verdict", ["failed", "unjudged"])
def test_only_bundles_that_passed(verdict: str, embedded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run.bundle, "read_manifest", lambda _: manifest(verdict=verdict))
    with pytest.raises(ValidationFailed, match=f"bundle is {verdict}; only bundles that passed"):
        embedded()


def test_another_bundle_is_refused_by_the_worker(
    embedded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    embedded()
    (tmp_path / "out" / "part-00000-of-00001.parquet").unlink()
    job = embedder.Job(
        bundle="b", out=str(tmp_path / "out"), images=str(tmp_path / "photos"), threads=1, decoders=1
    )  # fmt: skip
    assert [column.name for column in embedder.Embedder(job).columns] == list(OUTPUTS)
    monkeypatch.setattr(run.bundle, "read_manifest", lambda _: manifest(recipe={"a": 3}))
    with pytest.raises(UsageError, match="b is not the bundle that the run in"):
        embedder.Embedder(job)


def test_items_that_kill_are_rows_with_a_reason(embedded: Any, tmp_path: Path) -> None:
    """With `begins`, each item is named before it is decoded."""
    embedded()
    job = embedder.Job(bundle="b", out=str(tmp_path / "out"), images=str(tmp_path / "photos"), threads=1, decoders=1)
    (known,) = plan.read_all(embedder.store.open_place(job.out))
    begun: list[str] = []
    done = embedder.Embedder(job).embed(known, 0, known_bad={"01.png": "it kills"}, begins=begun.append)
    assert begun == [f"{i:02}.png" for i in range(12)] and (done.rows, done.failed) == (12, 3)
    found = rows(tmp_path / "out")
    assert found["01.png"]["error"] == "it kills" and found["01.png"]["sha256"] is None


def test_named_and_learnt_sizes(embedded: Any, model: Model, tmp_path: Path) -> None:
    """Named sizes have forms of a whole batch; learnt ones are learnt once, whatever comes to the folder later."""
    embedded("named", size="8x2,4x6,8x2")
    settings = json.loads((tmp_path / "named" / "_plan" / "0.json").read_text())["settings"]
    sizes = [{"batch": 1, "height": height, "width": width} for height, width in ((8, 2), (4, 6), (8, 2))]
    assert settings["preparation"] == {"sizes": sizes} and settings["forms"] == ["5x4x6", "5x8x2"]
    for wrong in ("2x8x2", "8", "8x3", "bigger"):
        with pytest.raises(UsageError):
            embedded("wrong", size=wrong)
    embedded("learnt", size="nearest")
    settings = json.loads((tmp_path / "learnt" / "_plan" / "0.json").read_text())["settings"]
    assert (settings["front_end"], settings["preparation"], settings["forms"]) == ("nearest", {"learnt": 1}, [])
    fill(tmp_path / "photos", 15)
    assert embedded("learnt", size="nearest", extend=True).rows == 15
    assert model.samples == [tmp_path / "photos"]
    pq.write_table(pa.table({"image": [b"no picture"]}), tmp_path / "images.parquet")
    with pytest.raises(UsageError, match="learns sizes from files on a local disk"):
        embedded("table", images=str(tmp_path / "images.parquet"), size="nearest")


def test_states_follow_each_batch(embedded: Any) -> None:
    """Rows are told a batch of five at a time, with the failures among them; then the shard."""
    states: list[State] = []
    embedded(shards=1, watch=states.append)
    seen = [(s.rows, s.failed, s.shards) for s in states]
    assert seen[-1] == (12, 2, 1) and [s[0] for s in seen] == [5, 10, 12, 12, 12]
    assert [s[1] for s in seen[:2]] == [1, 1], "the white picture is found when its batch runs"
    assert {(s.rows_total, s.shards_total) for s in states} == {(12, 1)}
    embedded("three", shards=3, watch=states.append)
    assert (states[-1].rows, states[-1].rows_total, states[-1].shards_total) == (12, 12, 3)


def test_there_are_shards_for_all_who_take_a_part(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For three workers here, and as many wherever the other parts are embedded."""
    asked: list[int] = []
    monkeypatch.setattr(run.plans, "make", lambda *_, workers, **__: asked.append(workers))
    for part in ((0, 1), (1, 4)):
        with pytest.raises(UsageError, match="lists no image"):
            embedded(workers=3, part=part)
    assert asked == [3, 12]


# verify


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"normalised": True, "shards": 3}])
def test_what_was_written_is_verified(options: dict[str, Any], embedded: Any, tmp_path: Path) -> None:
    embedded(**options)
    steps: list[Any] = []
    asked = (tmp_path / "bundle", str(tmp_path / "photos"), str(tmp_path / "out"))
    found = verify.verify(*asked, seed=1, progress=lambda *step: steps.append(step))
    shards = options.get("shards", 1)
    assert found.passed and (found.sampled, found.changed, found.damaged) == (10, (), ())
    assert found.lines == ("10 rows were embedded again",)
    assert steps == [("reading parts", i + 1, shards) for i in range(shards)] + [
        ("embedding again", i + 1, 10) for i in range(10)
    ]


def test_a_thousandth_is_sampled(embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 16 rows and at most 1000, from as many parts as there are."""
    assert (verify._SHARE, verify._LEAST, verify._MOST) == (0.001, 16, 1000)
    embedded(shards=2)
    monkeypatch.setattr(verify, "_LEAST", 1)
    asked = (tmp_path / "bundle", str(tmp_path / "photos"), str(tmp_path / "out"))
    for share, most, sampled in ((0.5, 1000, 6), (0.5, 4, 4), (0.01, 1000, 1)):
        monkeypatch.setattr(verify, "_SHARE", share)
        monkeypatch.setattr(verify, "_MOST", most)
        assert verify.verify(*asked, seed=2).sampled == sampled


def test_what_is_wrong_is_found(embedded: Any, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded(shards=2)
    asked = (tmp_path / "bundle", str(tmp_path / "photos"), str(tmp_path / "out"))
    picture = Image.open(tmp_path / "photos" / "01.png").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    picture.save(tmp_path / "photos" / "01.png")
    (tmp_path / "photos" / "02.png").unlink()
    found = verify.verify(*asked, seed=0)
    assert set(found.changed) == {"01.png", "02.png"} and found.sampled == 8 and found.passed
    monkeypatch.setattr(
        embedder.opening, "opened", lambda *_: (lambda i: {n: 1.1 * a for n, a in model(i).items()}, "")
    )
    found = verify.verify(*asked, seed=0)
    assert found.report is not None and not found.passed and not found.damaged
    part = tmp_path / "out" / f"part-0000{shard_of('00.png', 2)}-of-00002.parquet"
    part.write_bytes(part.read_bytes() + b"x")
    found = verify.verify(*asked, seed=0)
    assert found.damaged == (part.name,) and not found.passed and found.lines[0] == f"damaged: {part.name}"
    with pytest.raises(UsageError, match=r"empty holds no run\.$"):
        verify.verify(asked[0], asked[1], str(tmp_path / "empty"))


def test_a_vector_of_another_length_is_wrong(embedded: Any, model: Model, tmp_path: Path, monkeypatch: Any) -> None:
    """Its direction alone does not prove it."""
    embedded(outputs=["class_token"])
    monkeypatch.setattr(
        embedder.opening, "opened", lambda *_: (lambda i: {n: 1.1 * a for n, a in model(i).items()}, "")
    )
    found = verify.verify(tmp_path / "bundle", str(tmp_path / "photos"), str(tmp_path / "out"))
    assert found.report is not None and not found.passed


def test_rows_are_embedded_again_with_every_processor(
    embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime chooses its threads, and as many decode as there are processors."""
    embedded()
    jobs: list[embedder.Job] = []

    def recorded(job: embedder.Job) -> embedder.Embedder:
        jobs.append(job)
        return embedder.Embedder(job)

    monkeypatch.setattr(verify, "Embedder", recorded)
    monkeypatch.setattr(verify.cpu, "usable_cpus", lambda: 3)
    place, images, out = tmp_path / "bundle", str(tmp_path / "photos"), str(tmp_path / "out")
    assert verify.verify(place, images, out).passed
    assert jobs == [embedder.Job(bundle=str(place), out=out, images=images, threads=0, decoders=3)]


def test_a_sample_of_nothing_proves_nothing(embedded: Any, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    embedded(images=str(tmp_path / "broken"), max_failed=1.0)
    found = verify.verify(tmp_path / "bundle", str(tmp_path / "broken"), str(tmp_path / "out"))
    assert not found.passed and found.lines == ("0 rows were embedded again: nothing to compare",)

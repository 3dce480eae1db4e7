"""`embed`: its sizes, what it refuses, what counts as an image, its plan and its command line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.embed import opening, run, sources, verify
from dinoexport.embed import plan as plans
from dinoexport.embed.embedder import Prepared, model_of
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed
from dinoexport.pipeline.request import build_request
from dinoexport.runtime import sizes
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import store
from tests.conftest import DATA
from tests.embed.conftest import BROKEN, COUNT, fill, picture
from tests.embed.runs import LENIENT, command, hashes, in_workers, rows_of


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
    for size, said in (("28x2800", "2800"), ("nearst", "is not a size"), ("4x28x28", "is not HxW")):
        with pytest.raises(UsageError, match=said):
            run.embed(tiny, str(photos), str(tmp_path / "x"), size=size, **LENIENT)
    graphs = {tiny / graph.file: graph.graph() for graph in bundle.read_manifest(tiny).graphs}
    monkeypatch.setattr(sizes, "_APART_MAX", {Precision.FP32: -1.0})  # no form is near enough
    with pytest.raises(ValidationFailed, match="cannot be used: its answers are off"):
        opening._with_forms(graphs, Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32), ("4x28x84",))


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
    in_workers(
        monkeypatch,
        tmp_path,
        "import dinoexport.embed.opening as e\n"
        "real = e.runners.driven\n"
        "def driven(model, opened):\n"
        "    run = real(model, opened)\n"
        "    return lambda inputs: {n: a * 1.001 for n, a in run(inputs).items()}\n"
        "e.runners.driven = driven\n",
    )
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

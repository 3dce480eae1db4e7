"""`validate --images`: whatever folder a user gives, the measures of its images, and the page of those that differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinoexport import cli, images
from dinoexport.errors import UsageError
from dinoexport.models.dinov2 import cases
from dinoexport.pipeline import build as pipeline
from dinoexport.report import mismatches
from dinoexport.spec import Arrays, Case, silent
from dinoexport.validation import downstream, evaluate, judge, user_files, validate_bundle
from dinoexport.validation.user_files import Aggregate
from tests.conftest import DATA, HEARING_SIGINT
from tests.image_inputs import taken


def noise(seed: int, side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle that is held to the shipped limits."""
    folder = tmp_path_factory.mktemp("streamed")
    tiny = (DATA / "tiny_swiglu.toml").read_text().replace('"tiny_cases"', '"dinov2"')
    (folder / "tiny.toml").write_text(tiny)
    request = pipeline.build_request(str(folder / "tiny.toml"), weights="synthetic:0", out=folder / "bundle")
    pipeline.export_only(request)
    return request.out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twelve, a class of one in a folder of a folder, one of no class, and what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for label, first in (("cats", 0), ("dogs", 100)):
        (folder / label).mkdir()
        for i in range(12):
            noise(first + i).save(folder / label / f"{i}.png")
    (folder / "owls" / "snowy").mkdir(parents=True)
    noise(200).save(folder / "owls" / "snowy" / "one.png")
    noise(201).save(folder / "loose.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_validate_reports_all_measures(built: Path, pictures: Path) -> None:
    validated = validate_bundle.validate(built, images=pictures)
    assert validated.aggregate is not None and validated.aggregate.agreement is not None
    found = {m.figure: m for m in validated.aggregate.agreement.measures}
    assert {name: m.items for name, m in found.items()} == {
        "recall": 26, "knn_agreement": 24, "probe_agreement": 24, "correspondence": 26,
    }  # fmt: skip
    assert all(m.bound is not None and m.bound.holds for m in found.values()) and validated.report.passed
    assert (
        found["knn_agreement"].of == "class_token" and found["probe_agreement"].of == "class_token + mean_patch_token"
    )
    said = "\n".join(validated.aggregate.agreement.said)
    assert "remains to learn from: owls" in said and "items without a class are left out: 1" in said
    assert [row.output for row in validated.report.rows[-4:]] == list(found)
    assert len(validated.skipped) == 1


def test_a_missed_limit_fails_the_verb_and_names_the_images(
    built: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures' features exchanged between the candidate's answers: every token is right, of another picture."""
    right = user_files._item
    exchanged: dict[str, Arrays] = {}

    def wrong(*args: Any) -> downstream.ItemFeatures:
        item = right(*args)
        exchanged[item.name] = item.candidate
        if item.name == "dogs/11.png":
            object.__setattr__(item, "candidate", exchanged["cats/0.png"])
        return item

    monkeypatch.setattr(user_files, "_item", wrong)
    result = CliRunner().invoke(cli.app, ["validate", str(built), "--images", str(pictures), "--json"])
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    recall = next(m for m in told["agreement"]["measures"] if m["figure"] == "recall")
    assert "dogs/11.png" in {d["item"] for d in recall["differs"]} and not recall["bound"]["holds"]
    assert "Decisions, candidate against PyTorch" in result.stderr
    assert "recall differs: dogs/11.png: " in result.stderr and "skipped: " in result.stderr


def test_interrupted_by_ctrl_c_and_taken_over(built: Path, pictures: Path, tmp_path: Path) -> None:
    """A process of its own, interrupted when it has kept something."""
    cache = tmp_path / "resumed"
    script = (
        "import sys, dinoexport.validation.validate_bundle as p; p._IMAGES_AT_ONCE = 3; "
        "import dinoexport.cli as c; sys.argv = ['dinoexport', *sys.argv[1:]]; c.main()"
    )
    words = [*HEARING_SIGINT, sys.executable, "-c", script, "validate", str(built), "--images", str(pictures)]
    environment = os.environ | {"DINOEXPORT_CACHE": str(cache)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(cache.rglob("*.npz")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(2)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted" in told, told
    kept = len(list(cache.rglob("*.npz")))
    assert 0 < kept < 26 and not list(cache.rglob("*.partial"))
    again = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{kept} of 26 results come from an interrupted run" in again.stdout
    assert not list(cache.rglob("*.npz"))


def test_without_scikit_learn_it_says_so_before_anything_is_asked(
    built: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(evaluate, "compute_reference", lambda *_, **__: pytest.fail("it was asked"))
    result = CliRunner().invoke(cli.app, ["validate", str(built), "--images", str(pictures)])
    assert result.exit_code == 4 and "sklearn is not installed" in result.stderr


def test_one_image_is_judged_and_what_it_cannot_show_is_said(built: Path, tmp_path: Path) -> None:
    noise(1).save(tmp_path / "one.png")
    validated = validate_bundle.validate(built, images=tmp_path)
    assert validated.report.passed and validated.aggregate is not None and validated.aggregate.agreement is not None
    assert [m.figure for m in validated.aggregate.agreement.measures] == ["correspondence"]
    assert len(validated.aggregate.agreement.said) == 2


@pytest.mark.parametrize("content", ["nothing", "hidden", "links", "text"])
def test_a_folder_without_images_is_one_error(built: Path, tmp_path: Path, content: str) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    noise(1).save(elsewhere / "x.png")
    if content == "hidden":
        (folder / ".thumbnails").mkdir()
        noise(1).save(folder / ".thumbnails" / "x.png")
        noise(1).save(folder / ".x.png")
    if content == "links":
        (folder / "x.png").symlink_to(elsewhere / "x.png")
        (folder / "more").symlink_to(elsewhere)
    if content == "text":
        (folder / "x.png").write_text("a cat")
    with pytest.raises(UsageError, match="holds no image that can be read") as caught:
        validate_bundle.validate(built, images=folder)
    assert ("a link that leads out of the folder" in caught.value.message) == (content == "links")
    assert ("a link to a folder, which is not followed" in caught.value.message) == (content == "links")


def test_classes_are_the_folders_directly_within(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/deep/er/2.png", "b/3.png", "4.png", "a/.hidden/5.png", ".git/6.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(1, side=14).save(tmp_path / name)
    (tmp_path / "b" / "7.png").symlink_to(tmp_path / "a" / "1.png")
    found = {
        c.name: c.label
        for c in cases.from_folder(tmp_path, taken(as_bytes=True), progress=silent)
        if isinstance(c, Case)
    }
    assert found == {"4.png": "", "a/1.png": "a", "a/deep/er/2.png": "a", "b/3.png": "b", "b/7.png": "b"}


def test_the_page_shows_the_images_that_differ(
    built: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = user_files._item
    page = tmp_path / "page.html"

    def wrong(*args: Any) -> downstream.ItemFeatures:
        item = right(*args)
        if item.name == "dogs/11.png":
            flipped = {name: -vector for name, vector in item.candidate.items()}
            object.__setattr__(item, "candidate", flipped)
        return item

    words = ["validate", str(built), "--images", str(pictures), "--page", str(page)]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    html = page.read_text()
    assert "PASSED" in html and "<img" not in html and "broken.jpg" in html and "owls" in html
    monkeypatch.setattr(user_files, "_item", wrong)
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1 and f"Page: {page}" in result.stdout
    html = page.read_text()
    assert '<img alt="dogs/11.png" src="data:image/jpeg;base64,' in html and "FAILED" in html
    assert "PyTorch finds" in html and "instead:" in html and "recall" in html
    assert "<script" not in html and "http:" not in html and "https:" not in html
    assert not list(tmp_path.glob(".*"))


def test_names_in_the_page_are_no_markup() -> None:
    hostile = "<script>alert(1)</script>.png"
    differs = downstream.Differs(item=hostile, how="otherwise", lost=(hostile,))
    measure = downstream.Measure(
        figure="recall", of="v", value=0.5, items=3, detail="", bound=None, differs=(differs,) * 30
    )
    found = downstream.Agreement(measures=(measure,), said=())
    report = judge.Report(candidate="ours", reference="exact", rows=())
    shown = SimpleNamespace(
        manifest=SimpleNamespace(variant="v", precision="fp32"),
        report=report,
        aggregate=Aggregate(report=report, agreement=found, said=()),
        skipped=(hostile,),
    )
    html = mismatches.render(shown, found, {})  # type: ignore[arg-type]
    assert "<script" not in html and "&lt;script&gt;" in html and "And 6 more." in html


@pytest.mark.parametrize(
    ("page", "with_images", "words"),
    [("page.html", False, "Add --images DIR"), ("absent/page.html", True, "folder that exists"), (".", True, "a file")],
)
def test_a_page_that_cannot_be_is_refused_before_anything_is_asked(
    built: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page: str,
    with_images: bool,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--images", str(pictures)] if with_images else []
    result = CliRunner().invoke(cli.app, ["validate", str(built), "--page", page, *given])
    assert result.exit_code == 2 and words in result.stderr


def test_only_the_cases_that_are_wanted_are_read(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    load = images.load
    monkeypatch.setattr(images, "load", lambda path: opened.append(path.name) or load(path))
    found = list(cases.from_folder(pictures, taken(as_bytes=True), progress=silent, only={"cats/3.png", "absent.png"}))
    assert [case.name for case in found if isinstance(case, Case)] == ["cats/3.png"] and opened == ["3.png"]
    assert len(found) == 1

"""report.html: complete, escaped, the same bytes for the same build, and right when a browser renders it."""

from __future__ import annotations

import os
import re
import shutil
import webbrowser
from functools import partial
from html import unescape
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinoexport import bundle, cli, family
from dinoexport.bundle import reference_file
from dinoexport.config import resources
from dinoexport.config.recipe import Recipe
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import pictures
from dinoexport.pipeline import build as pipeline
from dinoexport.report import html_report, mismatches
from dinoexport.spec import Precision, silent
from dinoexport.validation import downstream, error_analysis, judge, user_files
from dinoexport.weights import checkpoint
from tests.conftest import DATA, chromium

HOSTILE = "<script>alert(1)</script> & 'quotes'"
of_case = partial(pictures.of_case, patch=14, preprocessing=Preprocessing())


def recipe_with_photographs(folder: Path) -> str:
    """The tiny recipe judged on two photographs besides its own cases; a reason and a licence that hold markup."""
    (folder / "images").mkdir()
    for name in ("chelsea.png", "rocket.jpg"):
        shutil.copy(resources.folder("validate") / "images" / name, folder / "images")
    cases = (DATA / "tiny_cases.toml").read_text()
    for name, prepare, files in (
        ("two", "evaluation", ["chelsea.png", "rocket.jpg"]),
        ("own", "own_size", ["rocket.jpg"]),
    ):
        cases += f'\n[[cases]]\nname = "{name}"\nwhy = "{HOSTILE}"\nphotographs = {files}\nprepare = "{prepare}"\n'
    (folder / "seen.toml").write_text(cases)
    recipe = (DATA / "tiny_swiglu_reg.toml").read_text().replace('"tiny_cases"', '"seen"')
    (folder / "tiny.toml").write_text(recipe.replace('family = "dinov2"', f'family = "dinov2"\nlicence = "{HOSTILE}"'))
    return str(folder / "tiny.toml")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp16 bundle with photographs."""
    folder = tmp_path_factory.mktemp("page")
    request = pipeline.build_request(
        recipe_with_photographs(folder), weights="synthetic-stress:0", precision=Precision.FP16, out=folder / "bundle"
    )
    pipeline.build(request)
    return request.out


@pytest.fixture(scope="module")
def rejected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights that overflow fp16."""
    folder = tmp_path_factory.mktemp("rejected")
    request = pipeline.build_request(
        recipe_with_photographs(folder),
        weights="synthetic-stress:0:100000",
        precision=Precision.FP16,
        out=folder / "bundle",
    )
    with pytest.raises(pipeline.Rejected):
        pipeline.build(request, keep_rejected=True)
    return request.out


def test_page_says_everything(built: Path) -> None:
    html = unescape((built / bundle.REPORT_HTML).read_text())
    manifest = bundle.verify(built)
    assert "PASSED" in html and manifest.checkpoint.sha256 in html
    for row in manifest.report["rows"]:
        assert row["case"] in html and (row["output"] in html or row["output"] == error_analysis.RANGE)
        for bound in row["bounds"] if row["distance"] else ():
            assert bound["reason"] in html and html_report._figure(bound["limit"]) in html, bound["figure"]
            assert html_report._figure(bound["value"]) in html
    for word in (
        "blocks.2_tokens",
        "Sizes tried",
        "register_tokens: relative error of each",
        "fp16's maximum",
        "same inputs again",
    ):
        assert word in html, word
    assert all(version in html for version in manifest.versions.values())
    assert "--weights synthetic-stress:0:300 --target cpu --precision fp16" in html
    assert all(text in html for text in manifest.card.values())


def test_what_people_look_at_first_comes_first(built: Path) -> None:
    """The verdict, the pictures and the error by block; the table of all rows comes after them."""
    html = (built / bundle.REPORT_HTML).read_text()
    parts = [
        '<div class="verdict',
        "<h2>Pictures</h2>",
        "<h2>Error by block</h2>",
        "<h2>Every output of every case</h2>",
    ]
    places = [html.index(part) for part in parts]
    assert places == sorted(places)


def test_rejected_page_names_the_overflow(rejected: Path) -> None:
    html = (rejected / bundle.REPORT_HTML).read_text()
    assert "FAILED" in html and "PASSED" not in html
    assert "fp16 overflows in blocks.1/matmul_5 (MatMul)" in html


def test_nothing_leaves_the_page_and_nothing_in_it_is_markup(built: Path) -> None:
    html = (built / bundle.REPORT_HTML).read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "default-src 'none'" in html
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert links and all(link.startswith("data:image/") for link in links)


def test_the_pictures_are_of_every_photograph(built: Path) -> None:
    """Six a photograph: itself, PyTorch, its own fp16 and the candidate with the error of each."""
    html = (built / bundle.REPORT_HTML).read_text()
    titles = re.findall(r'<img alt="([^"]+)"', html)
    candidate = bundle.read_manifest(built).report["candidate"]
    own = "PyTorch's own fp16"
    assert list(map(unescape, titles)) == ["Photograph", "PyTorch", own, "Cosine error", candidate, "Cosine error"] * 3


def test_what_pytorch_makes_of_it_in_fp16_is_kept_whole_for_photographs_alone(built: Path) -> None:
    """float16 holds an fp16 model's answers exactly; the page draws them, and nothing else needs them."""
    manifest = bundle.read_manifest(built)
    model = family.find("dinov2").model(Recipe.model_validate(manifest.recipe))
    for e in reference_file.read(built / bundle.REFERENCE).expectations:
        assert bool(e.own_outputs) == e.case.shown
        if e.case.name == "own":
            recipe = Recipe.model_validate(manifest.recipe)
            weights = checkpoint.open_checkpoint(model, recipe, "synthetic-stress:0", progress=silent)
            (asked,) = model.reference(weights.read, [e.case.inputs], precision=Precision.FP16, progress=silent)
            assert all(np.array_equal(asked[name], kept) for name, kept in e.own_outputs.items())
            assert e.own_outputs.keys() == e.outputs.keys()


@pytest.fixture(scope="module")
def with_engine(built: Path) -> Path:
    """The page of the same bundle, as if an engine had been executed too: its patches are a little off."""
    manifest = bundle.read_manifest(built)
    model = family.find("dinov2").model(Recipe.model_validate(manifest.recipe))
    reference = reference_file.read(built / bundle.REFERENCE)
    kept = {
        name: html_report.Kept(
            answers={e.case.name: {n: a * scale for n, a in e.outputs.items()} for e in reference.expectations},
            errors={"patch_tokens": [np.array([1e-3, 2e-3])]},
        )
        for name, scale in (("the graph", 1.0), ("tensorrt 11.4.0.106 on NVIDIA A100-SXM4-40GB, fp16", 1.001))
    }
    report = judge.Report(candidate="the graph", reference=reference.name, rows=())
    path = built.parent / "with_engine.html"
    path.write_text(html_report.render(manifest, model, report, None, reference, kept), encoding="utf-8")
    return path


def test_an_engine_that_was_executed_has_a_column_of_its_own(with_engine: Path) -> None:
    titles = [unescape(title) for title in re.findall(r'<img alt="([^"]+)"', with_engine.read_text())]
    engine = "tensorrt 11.4.0.106 on NVIDIA A100-SXM4-40GB, fp16"
    columns = ["PyTorch's own fp16", "Cosine error", "the graph", "Cosine error", engine, "Cosine error"]
    assert titles == ["Photograph", "PyTorch", *columns] * 3


def test_errors_of_one_image_share_a_scale() -> None:
    tokens = np.random.RandomState(0).standard_normal((1, 6, 5))
    near, far = tokens.copy(), tokens.copy()
    near[0, 0, 0] += 0.1
    far[0, 0, 0] += 1.0
    ((*_, dark, _, bright),) = of_case(np.zeros((1, 3, 28, 42), np.float32), tokens, {"near": near, "far": far})
    first = [np.asarray(Image.open(BytesIO(picture.data))).reshape(-1, 3)[0] for picture in (dark, bright)]
    assert first[1].tolist() == [253, 231, 37] and first[0][0] < 80, "the smaller error is nearly dark"
    assert bright.caption.startswith("of far: dark 0") and dark.caption.startswith("of near: dark 0")


def test_colours_of_known_tokens() -> None:
    """Tokens along one direction: its largest component's order is the order of the first colour's brightness."""
    tokens = np.zeros((1, 6, 5))
    tokens[0, :, 2] = [0, 1, 2, 3, 4, 5]
    pixels = np.zeros((1, 3, 30, 43), np.float32)  # 2 x 3 patches and a rest that is cropped
    shifted = tokens.copy()
    shifted[0, 4] = [0, 5, 0, 0, 0]
    ((photograph, exact, ours, heat),) = of_case(pixels, tokens, {"ours": shifted})
    assert Image.open(BytesIO(photograph.data)).size == (42, 28)
    reds = np.asarray(Image.open(BytesIO(exact.data)))[..., 0].reshape(-1)
    assert list(reds) == sorted(reds) and reds[0] == 0 and reds[-1] == 255
    changed = np.asarray(Image.open(BytesIO(exact.data))) != np.asarray(Image.open(BytesIO(ours.data)))
    assert changed.any(axis=2).reshape(-1).tolist() == [False] * 4 + [True, False]
    bright = np.asarray(Image.open(BytesIO(heat.data))).reshape(-1, 3)
    assert (bright == [253, 231, 37]).all(axis=1).tolist() == [False] * 4 + [True, False]
    assert "bright 1.0e+00" in heat.caption, "orthogonal tokens have cosine error one"


def test_tokens_that_are_not_finite_are_drawn_and_counted() -> None:
    tokens = np.random.RandomState(0).standard_normal((1, 6, 5))
    broken = tokens.copy()
    broken[0, 3] = np.nan
    ((_, _, _, heat),) = of_case(np.zeros((1, 3, 28, 42), np.float32), tokens, {"ours": broken})
    assert "1 patches are not finite" in heat.caption


def test_histogram_counts_every_vector() -> None:
    parts = [np.array([1e-3, 1e-2, 0.0]), np.array([np.nan, 1e-2, np.inf])]
    histogram = html_report._histogram("out", parts)
    assert histogram.vectors == 6 and histogram.not_finite == 2
    assert sum(count for _, count, _ in histogram.bins) == 4
    assert (histogram.smallest, histogram.largest) == (1e-3, 1e-2)
    assert histogram.bins[0][1] == 2 and histogram.bins[-1][1] == 2, "zero counts as the smallest"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, "1"), (0.9999, "1 - 1.0e-04"), (3.14e-7, "3.1e-07"), (0.5, "0.5"), (42.0, "42"), (65504.0, "65,504"),
        (2e9, "2.0e+09"), (0.0, "0"), (0.01, "0.01"), (-0.0099, "-9.9e-03"), (0.99, "0.99"), (99.4, "99"),
        (100.0, "100"), (100.4, "100"), (-1234.0, "-1,234"), (999_999.0, "999,999"), (1e6, "1.0e+06"),
        (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_figures(value: float, shown: str) -> None:
    assert html_report._figure(value) == shown


def test_report_verb(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    shown = CliRunner().invoke(cli.app, ["report", str(built)])
    assert shown.exit_code == 0 and str(built / bundle.REPORT_HTML) in shown.stdout and not opened
    assert CliRunner().invoke(cli.app, ["report", str(built), "--open"]).exit_code == 0
    assert opened == [(built / bundle.REPORT_HTML).as_uri()]
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    (copy / bundle.REPORT_HTML).write_text("<script>stolen</script>")
    damaged = CliRunner().invoke(cli.app, ["report", str(copy), "--open"])
    assert damaged.exit_code == 1 and "damaged" in damaged.stderr and len(opened) == 1


def test_report_of_a_bundle_without_one(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    pipeline.export_only(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=out))
    result = CliRunner().invoke(cli.app, ["report", str(out)])
    assert result.exit_code == 2 and "never validated" in result.stderr


# What a browser finds: boxes past the window's edge, text wider than its box, images that did not load.
CUT_OFF = """() => [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  const clipped = e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline' && !e.closest('svg');
  return box.right > innerWidth + 1 || box.left < -1 || clipped;
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 60))"""
MISSING = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"


@pytest.fixture(scope="module")
def browser() -> Any:
    """A headless Chromium of the machine's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root, as containers do.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=chromium(), args=sandbox)
        yield started
        started.close()


@pytest.mark.browser
@pytest.mark.parametrize("which", ["built", "rejected", "with_engine"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_rendered(width: int, scheme: Any, which: str, request: pytest.FixtureRequest, browser: Any) -> None:
    """No error, no request, no missing image, nothing cut off; dark is dark."""
    path = request.getfixturevalue(which)
    path = path / bundle.REPORT_HTML if path.is_dir() else path
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: problems.append(r.url) if not r.url.startswith(("data:", "file:")) else None)
    tab.goto(path.as_uri())
    assert tab.evaluate(MISSING) == [] and tab.evaluate("document.images.length") == (
        24 if which == "with_engine" else 18
    )
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    (red,) = re.findall(r"rgb\((\d+)", tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (int(red) < 64) == (scheme == "dark")
    assert problems == []
    tab.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_images_that_differ_is_rendered(width: int, tmp_path: Path, browser: Any) -> None:
    """A long name without a space, more neighbours than are shown, a picture for each: nothing cut off or missing."""
    name = f"{'n' * 120}.png"
    ((photograph, *_),) = of_case(np.zeros((1, 3, 28, 42), np.float32), np.ones((1, 6, 5)), {})
    differs = downstream.Differs(item=name, how="otherwise", lost=(name,) * 9, instead=(name,) * 9)
    measure = downstream.Measure(
        figure="recall", of="v", value=0.5, items=3, detail="by chance", bound=None, differs=(differs,) * 2
    )
    found = downstream.Agreement(measures=(measure,), said=("left out",))
    report = judge.Report(candidate="ours", reference="exact", rows=())
    shown: Any = SimpleNamespace(
        manifest=SimpleNamespace(variant="v", precision="fp32"),
        report=report,
        aggregate=user_files.Aggregate(report=report, agreement=found, said=()),
        skipped=(),
    )
    (tmp_path / "differ.html").write_text(mismatches.render(shown, found, {name: photograph}))
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto((tmp_path / "differ.html").as_uri())
    assert tab.evaluate(MISSING) == [] and tab.evaluate("document.images.length") == 2 * (1 + 3 + 3)
    assert tab.evaluate(CUT_OFF) == [] and tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()

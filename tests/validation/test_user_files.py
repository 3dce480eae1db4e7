"""A user's own files: streamed, resumed after an interruption, judged together; and whatever folder they give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinoexport import cli, images
from dinoexport.bundle.reference_file import Reference
from dinoexport.cli import formatting
from dinoexport.config.limits import Limits, load_validation
from dinoexport.errors import BuildError, OutsideProfile, UsageError
from dinoexport.models.dinov2 import cases
from dinoexport.pipeline import build as pipeline
from dinoexport.report import mismatches
from dinoexport.spec import Arrays, Case, Expectation, Precision, silent
from dinoexport.system.cache import cache_folder
from dinoexport.validation import downstream, evaluate, judge, user_files, validate_bundle
from dinoexport.validation.user_files import Aggregate
from tests.conftest import DATA, HEARING_SIGINT
from tests.image_inputs import taken

LIMITS = load_validation("dinov2", beside=None)[0].limits[Precision.FP32]


class Numbers:
    """Uses of a model that takes a number and answers with vectors made of it."""

    neighbours_by = classified_by = ("mean",)

    def features(self, outputs: Arrays) -> dict[str, Any]:
        return {"mean": outputs["tokens"][0].mean(axis=0)}

    def second_view(self, inputs: Arrays) -> dict[str, Any]:
        return {"number": inputs["number"] + 0.5}

    def matches(self, outputs: Arrays, of_view: Arrays) -> Any:
        return (outputs["tokens"][0] @ of_view["tokens"][0].T).argmax(axis=1)


def numbered(count: int, classes: int = 2) -> Iterator[Case]:
    for i in range(count):
        label = f"class{i % classes}"
        yield Case(name=f"{label}/{i}", why="a number", inputs={"number": np.array([float(i)])}, label=label)


def answer(inputs: Arrays, tokens: int = 4) -> dict[str, Any]:
    """(1, tokens, 8), of the number alone."""
    seed = int(2 * inputs["number"][0])
    return {"tokens": np.random.RandomState(seed).standard_normal((1, tokens, 8)).astype(np.float32)}


class Run:
    """`streamed.judge_own` over numbers, with what it asked PyTorch for."""

    def __init__(self, *, stop_at: int | None = None, candidate: Any = answer, held_to: Limits = LIMITS) -> None:
        self.asked: list[str] = []
        self.stop_at, self.candidate, self.held_to = stop_at, candidate, held_to

    def ask(self, chunk: Sequence[Case]) -> Reference:
        for case in chunk:
            if len(self.asked) == self.stop_at:
                raise KeyboardInterrupt
            self.asked.append(case.name)
        expectations = tuple(Expectation(case=case, outputs=answer(case.inputs)) for case in chunk)
        return Reference(name="exact", limits=self.held_to, expectations=expectations, refusals=())

    def judged(self, candidate: Any, reference: Reference) -> judge.Report:
        return judge.judge(
            candidate, reference.expectations, (), self.held_to, candidate_name="ours", reference_name="exact"
        )

    def __call__(self, some: Any, *, at_once: int = 4, identity: Sequence[str] = ("a bundle",)) -> Aggregate:
        return user_files.judge_own(
            Numbers(),
            some,
            self.candidate,
            self.held_to,
            ask=self.ask,
            exact=lambda inputs: [answer(arrays) for arrays in inputs],
            judged=self.judged,
            names=("ours", "exact"),
            identity=identity,
            at_once=at_once,
        )


def kept_files() -> list[Path]:
    return sorted((cache_folder() / "validated").rglob("*.npz"))


# Streamed and resumed


def test_all_are_judged_one_by_one_and_together() -> None:
    run = Run()
    aggregate = run(numbered(30))
    assert run.asked == [case.name for case in numbered(30)]
    assert aggregate.report.passed and aggregate.said == ()
    assert [row.case for row in aggregate.report.rows[:30]] == run.asked
    assert aggregate.agreement is not None
    found = {measure.figure: (measure.value, measure.items) for measure in aggregate.agreement.measures}
    assert found == dict.fromkeys(("recall", "knn_agreement", "probe_agreement", "correspondence"), (1.0, 30))
    assert kept_files() == [], "a verdict is made anew the next time"


def test_an_interrupted_run_goes_on_where_it_stopped() -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=13)(numbered(30))
    assert len(kept_files()) == 12, "three whole steps of four"
    run = Run()
    aggregate = run(numbered(30))
    assert run.asked == [case.name for case in numbered(30)][12:]
    assert aggregate.said == ("12 of 30 results come from an interrupted run",)
    at_one_go = Run()(numbered(30))
    assert aggregate.report.to_json() == at_one_go.report.to_json() and aggregate.agreement == at_one_go.agreement
    assert kept_files() == []


def test_what_is_kept_is_found_by_content_and_called_as_today() -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=8)(numbered(12))
    renamed = [Case(name=f"new/{i}", why="renamed", inputs={"number": np.array([float(i)])}) for i in (3, 50, 7)]
    run = Run()
    aggregate = run(renamed)
    assert run.asked == ["new/50"]
    assert [row.case for row in aggregate.report.rows if row.output == "tokens"] == ["new/3", "new/50", "new/7"]


@pytest.mark.parametrize("changed", ["bundle", "limits"])
def test_of_anything_else_nothing_is_taken_over(changed: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=8)(numbered(12))
    stricter = LIMITS.model_copy(update={"recall_min": None, "times_own_error_max": LIMITS.relative_l2_max})
    run = Run(held_to=stricter if changed == "limits" else LIMITS)
    aggregate = run(numbered(12), identity=("another bundle" if changed == "bundle" else "a bundle",))
    assert len(run.asked) == 12 and aggregate.said == ()


def test_what_is_damaged_is_asked_again_and_no_pickle_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=12)(numbered(16))
    truncated, hostile, empty, foreign, *_ = kept_files()
    truncated.write_bytes(truncated.read_bytes()[:200])

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was here"),)

    np.savez(hostile, **{"facts.json": np.array([Hostile()], dtype=object)})  # type: ignore[arg-type]
    empty.write_bytes(b"")
    np.savez(foreign, **{"facts.json": np.frombuffer(b'{"rows": 3}', np.uint8)})
    run = Run()
    aggregate = run(numbered(16))
    assert len(run.asked) == 4 + 4 and aggregate.report.passed
    assert aggregate.said == ("8 of 16 results come from an interrupted run",)
    assert not (tmp_path / "was here").exists()


def test_figures_that_are_not_finite_are_kept_as_they_are() -> None:
    def broken(inputs: Arrays) -> dict[str, Any]:
        return {"tokens": answer(inputs)["tokens"] * (np.nan if inputs["number"][0] == 2 else 1)}

    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=4, candidate=broken)(numbered(24))
    aggregate = Run(candidate=broken)(numbered(24))
    assert aggregate.said[0].startswith("4 of 24")
    assert [row.case for row in aggregate.report.failures] == ["class0/2"]
    assert aggregate.agreement is not None
    assert "1 of 24 have no usable output and are left out here" in aggregate.agreement.said


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "file"))
    aggregate = Run()(numbered(24))
    assert aggregate.report.passed and "cannot be written" in aggregate.said[0]


def test_two_runs_at_once_do_not_harm_each_other() -> None:
    """One ends, and clears what it kept, while the other is in the middle."""

    def slow() -> Iterator[Case]:
        for i, case in enumerate(numbered(24)):
            if i == 13:
                assert Run()(numbered(24)).report.passed
                assert kept_files() == []
            yield case

    assert Run()(slow()).report.passed
    assert kept_files() == []


@pytest.mark.slow("judges ten thousand files, whose memory must not grow with their number")
def test_ten_thousand_are_streamed() -> None:
    """No more outputs live at once than a step has, and of ten thousand inputs no more either."""
    alive, most = 0, 0

    def counted(array: Any) -> Any:
        nonlocal alive, most

        def gone() -> None:
            nonlocal alive
            alive -= 1

        alive += 1
        most = max(most, alive)
        weakref.finalize(array, gone)
        return array

    def candidate(inputs: Arrays) -> dict[str, Any]:
        return {"tokens": counted(np.full((1, 2, 8), 1 + inputs["number"][0] % 7, np.float32))}

    def ask(chunk: Sequence[Case]) -> Reference:
        expectations = tuple(Expectation(case=case, outputs=candidate(case.inputs)) for case in chunk)
        return Reference(name="exact", limits=LIMITS, expectations=expectations, refusals=())

    def inputs() -> Iterator[Case]:
        for i in range(10_000):
            yield Case(name=str(i), why="a number", inputs={"number": counted(np.array([float(i)]))})

    def judged(recorded: Any, reference: Reference) -> judge.Report:
        for expectation in reference.expectations:
            recorded(expectation.case.inputs)
        bound = judge.Bound(figure="relative_l2", value=1.0, limit=2.0, reason="of the tests", holds=True)
        rows = (
            judge.Row(case=e.case.name, why="", output="tokens", shape=(), distance=None, bounds=(bound,))
            for e in reference.expectations
        )
        return judge.Report(candidate="ours", reference="exact", rows=tuple(rows))

    aggregate = user_files.judge_own(
        Numbers(),
        inputs(),
        candidate,
        LIMITS,
        ask=ask,
        exact=lambda views: [candidate(arrays) for arrays in views],
        judged=judged,
        names=("ours", "exact"),
        identity=(),
        at_once=50,
    )
    assert aggregate.agreement is not None and aggregate.agreement.measures[0].items == 10_000
    assert len(aggregate.report.rows) >= 10_000
    # Of each step: inputs, both sides' answers, views' answers; and those of the step before that are not gone yet.
    assert most < 10 * 50
    shown = formatting.report_rows(aggregate.report)
    assert len(shown) < 200 and "--json has them all" in shown[-1]["case"]


# A candidate that is wrong


def test_a_candidate_that_breaks_on_the_second_view_has_no_correspondence() -> None:
    def breaking(inputs: Arrays) -> dict[str, Any]:
        if inputs["number"][0] == 2.5:
            raise BuildError("broken")
        if inputs["number"][0] == 4.5:
            raise OutsideProfile("too large")
        return answer(inputs)

    aggregate = Run(candidate=breaking)(numbered(24))
    assert aggregate.agreement is not None
    (measure,) = [m for m in aggregate.agreement.measures if m.figure == "correspondence"]
    assert measure.items == 23 and [d.item for d in measure.differs] == ["class0/2"]
    assert measure.value == pytest.approx(22 / 23)


def test_what_the_profiles_leave_out_is_not_covered_and_has_no_features() -> None:
    def narrow(inputs: Arrays) -> dict[str, Any]:
        if inputs["number"][0] == 3:
            raise OutsideProfile("too large")
        return answer(inputs)

    aggregate = Run(candidate=narrow)(numbered(24))
    assert aggregate.report.not_covered == ("class1/3",)
    assert aggregate.agreement is not None and aggregate.agreement.measures[0].items == 23


def test_a_candidate_of_another_shape_or_name_is_left_out() -> None:
    for wrong in (lambda i: {"tokens": answer(i, tokens=5)["tokens"]}, lambda i: {"token": answer(i)["tokens"]}):
        aggregate = Run(candidate=wrong)(numbered(24))
        assert not aggregate.report.passed
        assert aggregate.agreement is not None and aggregate.agreement.measures == ()
        assert aggregate.agreement.said == ("24 of 24 have no usable output and are left out here",)


# The whole of it, on files


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

"""What verbs print of their results, to the letter, with stand-ins of the work: for people, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.bundle import signing
from dinoexport.cli import build, embed, engines, inspect, serve, terminal
from dinoexport.embed import run as embedding
from dinoexport.embed import verify as verifying
from dinoexport.embed.run import Embedded
from dinoexport.embed.verify import VerifiedRows
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline import compile_bundle
from dinoexport.pipeline.fit import flow
from dinoexport.pipeline.fit.classifiers import HeldOutScores
from dinoexport.report import mismatches
from dinoexport.serving import check as checking
from dinoexport.serving.check import Checked
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.validation import validate_bundle
from dinoexport.validation.determinism import Determinism
from dinoexport.validation.error_analysis import Growth
from dinoexport.validation.judge import Report
from tests.cli.test_formatting import bound, row, step
from tests.command_line import run

PASSED = Report(candidate="ONNX", reference="PyTorch", rows=(row(bound("relative_l2", 0.1, 1.0)),))
FAILED = Report(candidate="ONNX", reference="PyTorch", rows=(row(bound("relative_l2", 2.0, 1.0)),))
KEY = SimpleNamespace(fingerprint="0123456789abcdef" * 4)


def manifest(**changed: Any) -> Any:
    facts = {
        "verdict": "passed", "synthetic": "", "cpu": None, "engines": (), "report": {}, "precision": Precision.FP32,
        "checkpoint": SimpleNamespace(assumed={"a": 1}, notes=("a note",)), "recipe": {"name": "tiny"},
        "stage_keys": {"export": "1"},
    }  # fmt: skip
    return SimpleNamespace(**facts | changed)


def dumped(**facts: Any) -> Any:
    return SimpleNamespace(model_dump=lambda *, mode: {"mode": mode} | facts)


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle is where it is said to be, and the key of every file is ours."""

    @contextmanager
    def destination(out: str | None) -> Iterator[Path | None]:
        yield out and Path(out)  # type: ignore[misc]

    for module in (inspect, embed, engines):
        monkeypatch.setattr(module, "folder_of", Path)
    for module in (build, engines):
        monkeypatch.setattr(module, "destination", destination)
    monkeypatch.setattr(signing, "open_signer", lambda _key, *, ask: KEY)


def below_table(shown: Any) -> list[str]:
    """The title of the first table, and the lines after the last."""
    assert shown.exit_code == 0, shown.output
    title, *_, below = shown.stdout.partition("\n")[0], shown.stdout.rpartition("┘\n")[2]
    return [title.strip(), *below.splitlines()]


# build and export


class Building:
    """What is built; a test changes it."""

    def __init__(self) -> None:
        self.text: Any = None
        self.auto = False
        self.settled = SimpleNamespace(made=False, notes=(), assumed={})
        self.built = SimpleNamespace(
            report=PASSED, manifest=manifest(), folder=Path("bundles/tiny"), reused=(),
            engines=SimpleNamespace(report=None, not_run=""),
        )  # fmt: skip
        self.asked: dict[str, Any] = {}

    def request(self, _variant: str | None, **how: Any) -> Any:
        self.asked = how
        return SimpleNamespace(settled=self.settled, auto=self.auto, model=SimpleNamespace(text=self.text))

    def build(self, _request: Any, **how: Any) -> Any:
        self.asked |= how
        return self.built


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> Building:
    made = Building()
    monkeypatch.setattr(pipeline, "build_request", made.request)
    monkeypatch.setattr(pipeline, "build", made.build)
    monkeypatch.setattr(pipeline, "export_only", made.build)
    return made


BUILT = {
    "bundle": "bundles/tiny", "verdict": "passed", "reused": [], "assumed": {"a": 1}, "notes": ["a note"],
    "recipe": {"name": "tiny"}, "cpu": None, "engines": [], "not_run": "",
}  # fmt: skip


def test_build(building: Building) -> None:
    shown = run("build", "tiny")
    assert below_table(shown) == [
        "PASSED: ONNX, against PyTorch", "", "Bundle: bundles/tiny", "Report: bundles/tiny/report.html",
        "Next:   dinoexport inspect bundles/tiny",
        "        dinoexport validate bundles/tiny   (on the machine that will serve it; needs no torch)",
    ]  # fmt: skip
    assert json.loads(run("build", "tiny", "--json").stdout) == BUILT | {
        "report": PASSED.to_json(), "signed_by": None,
    }  # fmt: skip


def test_build_of_all_there_is_to_say(building: Building) -> None:
    building.text, building.auto = "it generates", True
    building.built.reused = ("export", "reference")
    building.built.engines = SimpleNamespace(report=FAILED, not_run="no GPU here")
    building.built.manifest = manifest(
        synthetic="its weights", cpu=dumped(), engines=(dumped(file="a"), dumped(file="b")),
        report={"precision": {"fp32": ["head"], "trials": [1, 2]}},
    )  # fmt: skip
    command = ("build", "tiny", "--out", "s3://b/tiny", "--sign", "k.pem", "--force", "--keep-rejected")
    assert json.loads(run(*command, "--json").stdout) == BUILT | {
        "bundle": "s3://b/tiny", "reused": ["export", "reference"], "cpu": {"mode": "json"}, "not_run": "no GPU here",
        "engines": [{"mode": "json", "file": "a"}, {"mode": "json", "file": "b"}], "report": PASSED.to_json(),
        "signed_by": KEY.fingerprint,
    }  # fmt: skip
    assert (building.asked["force"], building.asked["keep_rejected"], building.asked["signer"]) == (True, True, KEY)
    building.built.manifest.cpu, building.built.manifest.engines = None, ()
    building.settled = SimpleNamespace(made=False, notes=("they are public",), assumed={"size": 5})
    shown = run(*command)
    assert shown.stdout.splitlines()[1] == "ASSUMED: size = 5; nothing beside the weights says so"
    assert shown.stdout.count("against PyTorch") == 2, "the engines have a table too"
    assert below_table(shown) == [
        "Weights: they are public",
        "Reused: export, reference (nothing they depend on changed; --force makes them again)",
        "",
        "Note:   its weights are synthetic, so the outputs mean nothing; they were compared with PyTorch's",
        "Bundle: s3://b/tiny",
        "Report: bundles/tiny/report.html",
        "Signed: by key 0123456789abcdef, just now",
        "Precision: fp32 with head in fp32: 2 combinations tried",
        "Text:   there is no tokenizer beside the weights; generate and deploy need one in the bundle",
        "Next:   dinoexport inspect s3://b/tiny",
        "        dinoexport validate s3://b/tiny   (on the machine that will serve it; needs no torch)",
    ]
    building.built.manifest.stage_keys = {"text": "1"}
    assert "tokenizer" not in run(*command).stdout


def test_export(building: Building) -> None:
    building.built.reused = ("export",)
    reused = "Reused: export (nothing they depend on changed; --force makes them again)\n"
    unjudged = "UNJUDGED: nothing was measured\n"
    assert run("export", "tiny x").stdout == (
        f"{reused}Bundle: bundles/tiny   {unjudged}Next:   dinoexport build 'tiny x' makes a validated one\n"
    )
    assert run("export", "--weights", "a b.pth", "--out", "here").stdout == (
        f"{reused}Bundle: here   {unjudged}Next:   dinoexport build --weights 'a b.pth' makes a validated one\n"
    )
    assert json.loads(run("export", "tiny", "--json").stdout) == BUILT | {"reused": ["export"]}


# validate


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `validate` finds; a test changes it. asked: how it was called. pages: what was written."""
    found = SimpleNamespace(
        report=PASSED, manifest=manifest(), skipped=(), aggregate=None, not_run="", recorded=False, not_recorded="",
        growth=None, way=Way(runtime=Runtime.OPENVINO, precision=Precision.FP32), asked={}, pages=[],
    )  # fmt: skip

    def validate(_folder: Path, **how: Any) -> Any:
        found.asked = how
        return found

    monkeypatch.setattr(validate_bundle, "validate", validate)
    monkeypatch.setattr(signing, "signed_by", lambda _folder: "f" * 64)
    monkeypatch.setattr(signing, "verify", lambda _folder, _key: SimpleNamespace(manifest="the signed manifest"))
    monkeypatch.setattr(mismatches, "check", lambda *_: None)
    monkeypatch.setattr(mismatches, "write", lambda page, _validated, images, **_: found.pages.append((page, images)))
    return found


PROVES = "ONNX, on this machine, gives PyTorch's outputs for the 1 cases the bundle carries, within the limits"
OPEN = ["other inputs and sizes", "that the weights are the authors' own"]
WHO = "who made the bundle (--verify KEY)"
FACTS = {"skipped": [], "not_run": "", "recorded": False, "not_recorded": "", "signed_by": "f" * 64, "verified": False}


def test_validate(validated: Any) -> None:
    assert json.loads(run("validate", "B", "--json").stdout) == FACTS | {
        "bundle": "B", "report": PASSED.to_json(), "proves": PROVES, "does_not_prove": [*OPEN, WHO],
    }  # fmt: skip
    assert validated.asked["signer"] is None and validated.asked["signed"] is None and not validated.pages
    assert below_table(run("validate", "B")) == [
        "PASSED: ONNX, against PyTorch", "Signed: by key ffffffffffffffff, not verified; --verify KEY does that",
        f"Proves: {PROVES}.", f"Not:    {'; '.join([*OPEN, WHO])}.",
    ]  # fmt: skip


def test_validate_with_keys_on_images_of_ones_own(validated: Any) -> None:
    """Signing counts where it passed; a page needs images."""
    agreement = SimpleNamespace(measures=(), table=[], lines=["too few"])
    validated.aggregate = SimpleNamespace(agreement=agreement, said=["of 5"], to_json=lambda: {"items": 5})
    validated.skipped, validated.not_recorded = ("x.png: broken",), "it is read-only"
    validated.manifest = manifest(engines=(engine(),))
    command = ("validate", "B", "--images", "I", "--page", "p.html", "--sign", "k.pem", "--verify", "p.pem")
    facts = json.loads(run(*command, "--json").stdout)
    proves = PROVES.replace("the 1 cases the bundle carries", "those of your images that could be read")
    assert facts == FACTS | {
        "bundle": "B", "report": PASSED.to_json(), "proves": proves, "does_not_prove": OPEN, "items": 5,
        "page": "p.html", "skipped": ["x.png: broken"], "not_recorded": "it is read-only", "verified": True,
        "signed_by": KEY.fingerprint,
    }  # fmt: skip
    assert (validated.asked["signer"], validated.asked["signed"]) == (KEY, "the signed manifest")
    assert below_table(run(*command)) == [
        "PASSED: ONNX, against PyTorch",
        "Engine: model.plan for SM 8.0, tensorrt 10.1, fp16, 1.0 MB. Built; executed: no.",
        "        it is read-only",
        "Signed: by key 0123456789abcdef, just now",
        f"Proves: {proves}.",
        f"Not:    {'; '.join(OPEN)}.",
        "of 5",
        "too few",
        "skipped: x.png: broken",
        "Page: p.html",
    ]
    assert validated.pages == 2 * [(Path("p.html"), Path("I"))]
    validated.not_run = "no GPU here"
    assert "        no GPU here" in below_table(run(*command))
    pageless = run("validate", "B", "--images", "I", "--json")
    assert json.loads(pageless.stdout)["page"] is None and len(validated.pages) == 3
    assert run("validate", "B", "--page", "p.html").exit_code == 0 and len(validated.pages) == 3


def engine() -> Any:
    return SimpleNamespace(
        file="model.plan", compute_capabilities=("8.0",), runtime="tensorrt", runtime_version="10.1", precision="fp16",
        size_bytes=1_000_000, executed="no", fused_attentions=None, attentions=1, caution="",
        model_dump=lambda *, mode: {"mode": mode, "file": "model.plan"},
    )  # fmt: skip


def test_validate_that_fails(validated: Any) -> None:
    """A key that would sign did not: who signed before is said."""
    validated.report = FAILED
    growth = Growth(case="one", rule="twice", steps=(step("a", holds=True),))
    validated.growth = growth
    ended = run("validate", "B", "--sign", "k.pem", "--json")
    assert ended.exit_code == 1
    assert json.loads(ended.stdout) == FACTS | {
        "error": "B does not give PyTorch's outputs on this machine.", "exit_code": 1,
        "next_step": "The table shows each figure beside its limit.", "report": FAILED.to_json(),
        "growth": growth.to_json(),
    }  # fmt: skip
    assert ended.stderr.startswith("FAILED: ONNX, against PyTorch") and "Inside the graph" not in ended.stderr
    shown = run("validate", "B")
    assert shown.exit_code == 1 and "Proves" not in shown.stdout and "Inside the graph" not in shown.stdout
    validated.growth = None
    explained = run("validate", "B", "--explain")
    assert "Inner values were not compared: OpenVINO ran this bundle and does not show them.\n" in explained.stdout
    validated.growth = growth
    assert "Inside the graph, on one; expected: twice" in run("validate", "B", "--explain").stdout


# embed


def test_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"out": "O", "rows": 9, "failed": 1, "shards": 3, "done_before": 2}
    asked: list[Any] = []

    def embed_it(*places: Any, **how: Any) -> Embedded:
        asked.append((places, how["outputs"], how["part"], how["max_failed"], how["normalised"]))
        return Embedded(**facts, complete="--normalise" not in command, layout=None)  # type: ignore[arg-type]

    monkeypatch.setattr(embedding, "embed", embed_it)
    command: list[str] = ["embed", "B", "--images", "I", "--out", "O"]
    first = "Rows:   9 in 3 shards (2 done before), 1 failed\nFolder: O"
    assert run(*command).stdout == f"{first}\n"
    assert json.loads(run(*command, "--json").stdout) == facts | {"complete": True, "workers": None}
    command += ["--normalise", "--outputs", "a, b", "--shard", "1/4", "--max-failed", "5%"]
    assert run(*command).stdout == f"{first}   not complete: other shards are still to be done\n"
    assert asked[::2] == [
        ((Path("B"), "I", "O"), None, (0, 1), 0.01, False),
        ((Path("B"), "I", "O"), ["a", "b"], (1, 4), 0.05, True),
    ]


@pytest.mark.parametrize("report", [PASSED, FAILED, None])
def test_embed_verify(report: Report | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = VerifiedRows(sampled=3, changed=("a.jpg",), damaged=(), report=report)
    monkeypatch.setattr(verifying, "verify", lambda *_, **__: found)
    command = ("embed", "B", "--images", "I", "--out", "O", "--verify")
    shown, as_json = run(*command), run(*command, "--json")
    assert shown.exit_code == as_json.exit_code == (0 if report is PASSED else 1)
    verdict = "" if report is None else "PASSED" if report is PASSED else "FAILED"
    for text in (shown.stdout, as_json.stderr):
        assert text.startswith(f"{verdict}: ONNX, against PyTorch" if verdict else found.lines[0])
        assert all(line in text for line in found.lines)
    facts = {"sampled": 3, "changed": ["a.jpg"], "parts": []}
    if report is PASSED:
        assert json.loads(as_json.stdout) == facts | {"report": PASSED.to_json()}
    else:
        told = json.loads(as_json.stdout)
        assert told["exit_code"] == 1 and {key: told[key] for key in facts} == facts and "report" not in told


# check


@pytest.mark.parametrize("report", [PASSED, FAILED])
def test_check(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def check(*places: Any, **how: Any) -> Checked:
        asked.append((places, how["model"], how["quick"], how["timeout_s"], how["headers"], how["ca"]))
        return Checked(model="tiny", report=report, latency_ms={"one": 12.34})

    monkeypatch.setattr(serve, "folder_of", Path)
    monkeypatch.setattr(checking, "check", check)
    command = ("check", "http://host", "B")
    shown, as_json = run(*command), run(*command, "--quick", "--model", "tiny", "--timeout-s", "3", "--json")
    facts = {"model": "tiny", "latency_ms": {"one": 12.34}, "report": report.to_json()}
    assert asked == [
        (("http://host", Path("B")), None, False, 60.0, None, None),
        (("http://host", Path("B")), "tiny", True, 3.0, None, None),
    ]
    if report is PASSED:
        assert json.loads(as_json.stdout) == facts and as_json.stderr == ""
        assert shown.stdout.startswith("PASSED: ONNX, against PyTorch") and "12.3" in shown.stdout
        return
    assert (shown.exit_code, as_json.exit_code) == (1, 1)
    told = "error: tiny at http://host:8000 does not give PyTorch's outputs.\n  next: "
    for table, error in ((shown.stdout, shown.stderr), (as_json.stderr, as_json.stderr)):
        assert table.startswith("FAILED: ONNX, against PyTorch") and told in error and "12.3" not in table
    found = json.loads(as_json.stdout)
    assert found["exit_code"] == 1 and {key: found[key] for key in facts} == facts


# compile and merge, fit


@pytest.mark.parametrize("report", [PASSED, None])
@pytest.mark.parametrize("reused", [True, False])
def test_merge(report: Report | None, reused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(
        folder=Path("O"), manifest=manifest(engines=(engine(),)), reused=reused, notes=("two cards",),
        engines=SimpleNamespace(report=report, not_run="no GPU here"),
    )  # fmt: skip
    monkeypatch.setattr(compile_bundle, "merge", lambda *_, **__: made)
    command = ("merge", "A", "B", "--out", "O")
    assert json.loads(run(*command, "--json").stdout) == {
        "bundle": "O", "engines": [{"mode": "json", "file": "model.plan"}], "reused": reused, "not_run": "no GPU here",
        "notes": ["two cards"], "report": report and report.to_json(),
    }  # fmt: skip
    lines = [
        "Bundle: O" + ("   (the engines were there already)" if reused else ""),
        "Engine: model.plan for SM 8.0, tensorrt 10.1, fp16, 1.0 MB. Built; executed: no.",
        "        no GPU here",
        "note: two cards",
    ]
    shown = run(*command)
    if report is None:
        assert shown.stdout.splitlines() == lines
    else:
        assert below_table(shown) == ["PASSED: ONNX, against PyTorch", *lines]


def test_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten worst are named."""
    worst = tuple((f"{number}.jpg", "cat", "dog", 0.9) for number in range(11))
    held = HeldOutScores(
        images=20, right=9, accuracy=0.45, interval=(0.25, 0.66), recall={"cat": 0.4, "dog": 0.5},
        counts={"cat": 10, "dog": 10}, confusions=worst,
    )  # fmt: skip
    made = SimpleNamespace(folder=Path("F"), held=held, said=("few images",))
    monkeypatch.setattr(flow, "fit", lambda *_, **__: made)
    shown = run("fit", "B", "--images", "I")
    assert below_table(shown) == [
        "Held-out accuracy: 45.0% of 20 images (95 % interval 25.0% to 66.0%); the classifier was not fitted on them",
        *(f"{number}.jpg: cat classified as dog with 90%" for number in range(10)),
        "note: few images",
        "",
        "Bundle: F",
        "Report: F/report.html",
    ]
    assert "cat   │ 40% of 10" in shown.stdout
    told = json.loads(run("fit", "B", "--images", "I", "--json").stdout)
    assert (told["bundle"], told["said"], len(told["held_out"]["confusions"])) == ("F", ["few images"], 11)


# A report


@pytest.mark.parametrize("to_stderr", [None, False, True])
def test_a_report_goes_to_stdout_unless_that_is_for_json(to_stderr: bool | None, capsys: Any) -> None:
    where: dict[str, bool] = {} if to_stderr is None else {"to_stderr": to_stderr}
    repeats = Determinism(cases=("one",), again=0.0, alone=2e-5, one_thread=None)
    report = Report(candidate="ONNX", reference="PyTorch", rows=PASSED.rows, determinism=repeats)
    terminal.show_report(report, **where)
    terminal.show_ways(manifest(engines=(engine(),)), **where)
    out, err = capsys.readouterr()
    shown, other = (err, out) if to_stderr else (out, err)
    assert other == "" and shown.startswith("PASSED: ONNX, against PyTorch")
    assert shown.rpartition("┘\n")[2].splitlines() == [
        "Repeatability: same inputs again: bit-identical; alone and in a batch: 2.0e-05 apart",
        "Engine: model.plan for SM 8.0, tensorrt 10.1, fp16, 1.0 MB. Built; executed: no.",
    ]


def test_a_table_is_as_wide_as_what_it_is_printed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    console = lambda *, stderr: SimpleNamespace(is_terminal=True, width=90 if stderr else 80)  # noqa: E731
    monkeypatch.setattr("rich.console.Console", console)
    assert (terminal.columns(), terminal.columns(to_stderr=False), terminal.columns(to_stderr=True)) == (80, 80, 90)

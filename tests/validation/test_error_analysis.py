"""Massive activations, overflow that a CPU hides, and where an error leaves its expected growth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.cli import formatting
from dinoexport.config.limits import Limit, Limits
from dinoexport.errors import ValidationFailed
from dinoexport.models.dinov2 import fold
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Case, Graph, Precision, Runtime, Way, silent
from dinoexport.validation import error_analysis, validate_bundle
from dinoexport.validation.answers import Bound
from dinoexport.validation.judge import Report, Row
from dinoexport.weights.checkpoint import open_checkpoint
from tests.conftest import DATA, as_if_chosen

TINY = str(DATA / "tiny_swiglu_reg.toml")
OVERFLOW = "synthetic-stress:0:100000"


def streams(recipe: str, weights: str) -> list[Any]:
    """PyTorch's residual streams after the stem and each block, on a batch of noise."""
    request = pipeline.build_request(recipe)
    checkpoint = open_checkpoint(request.model, request.recipe, weights, progress=silent)
    arrays = {"pixels": np.random.RandomState(0).standard_normal((2, 3, 112, 126)).astype(np.float32)}
    answers = request.model.reference(checkpoint.read, [arrays], precision=Precision.FP32, progress=silent, inside=True)
    return [answers[0][name] for name in request.model.probes["model"]]


@pytest.mark.parametrize("recipe", ["vits14", TINY, str(DATA / "tiny_swiglu.toml")], ids=lambda path: Path(path).stem)
def test_stress_weights_have_massive_activations(recipe: str) -> None:
    """As Sun et al. define them: above 100 and about a thousand times the median, in few channels of few tokens."""
    plain, stressed = streams(recipe, "synthetic:0"), streams(recipe, "synthetic-stress:0")
    at = 1 + (len(stressed) - 1) // 3
    for i, (without, stream) in enumerate(zip(plain, stressed, strict=True)):
        magnitudes = np.abs(stream)
        massive = magnitudes > 100
        if i < at:
            assert not massive.any() and not (np.abs(without) > 100).any()
            continue
        assert not (np.abs(without) > 100).any()
        assert 100 * np.median(magnitudes) < magnitudes.max() < 3000 * np.median(magnitudes)
        assert 1 <= massive.any(axis=(0, 1)).sum() <= 3, "channels"
        assert 0 < massive.any(axis=2).mean() < 0.05, "tokens"
        assert massive[:, 0].any(axis=1).all(), "the class token of every image"


def test_a_higher_peak_overflows_fp16() -> None:
    assert max(np.abs(stream).max() for stream in streams(TINY, OVERFLOW)) > 65504
    assert max(np.abs(stream).max() for stream in streams(TINY, "synthetic-stress:0")) < 65504 / 50


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An fp16 build that overflows: (order, what was raised)."""
    out = tmp_path_factory.mktemp("overflow") / "bundle"
    request = pipeline.build_request(TINY, weights=OVERFLOW, precision=Precision.FP16, out=out)
    with pytest.raises(pipeline.Rejected) as rejected:
        pipeline.build(request)
    return request, rejected.value


def test_overflow_is_named_and_never_published(overflowing: Any) -> None:
    """ONNX Runtime's CPU hides it: every output of the tokens passes. The tensor, the block and the value are named."""
    request, rejected = overflowing
    assert not request.out.exists()
    rows = rejected.report.rows
    assert all(row.passed for row in rows if row.output != error_analysis.RANGE)
    assert not any(row.passed for row in rows if row.output == error_analysis.RANGE)
    largest = np.abs(streams_of_case(request, "batch")[2]).max()
    for word in ("blocks.1/", "(MatMul)", "blocks.1_tokens", f"{largest:,.0f}"):
        assert word in rejected.message, word


def streams_of_case(request: pipeline.BuildRequest, name: str) -> list[Any]:
    checkpoint = open_checkpoint(request.model, request.recipe, request.weights, progress=silent)
    inputs = [case.inputs for case in request.cases if case.name == name]
    (answer,) = request.model.reference(checkpoint.read, inputs, precision=Precision.FP32, progress=silent, inside=True)
    return [answer[name] for name in request.model.probes["model"]]


def test_the_first_value_that_overflows_in_torch_is_the_named_one(overflowing: Any) -> None:
    """PyTorch's own fp16, run beside, overflows in the same block and in none before."""
    request, rejected = overflowing
    checkpoint = open_checkpoint(request.model, request.recipe, request.weights, progress=silent)
    inputs = [case.inputs for case in request.cases if case.name == "batch"]
    (answer,) = request.model.reference(checkpoint.read, inputs, precision=Precision.FP16, progress=silent, inside=True)
    first = next(name for name in request.model.probes["model"] if not np.isfinite(answer[name]).all())
    assert first == "blocks.1_tokens" and "blocks.1/" in rejected.message


def test_a_weight_that_fp16_cannot_hold_is_named(tmp_path: Path) -> None:
    request = pipeline.build_request(
        TINY, weights="synthetic-stress:0:9000000", precision=Precision.FP16, out=tmp_path / "bundle"
    )
    with pytest.raises(ValidationFailed, match=r"blocks\.1\.last_weight_IO reaches [\d,]+, more than float16"):
        pipeline.build(request)
    assert not request.out.exists()


def test_fp16_within_range_says_how_far(tmp_path: Path) -> None:
    request = pipeline.build_request(
        TINY, weights="synthetic-stress:0", precision=Precision.FP16, out=tmp_path / "bundle"
    )
    report = pipeline.build(request).report
    assert report is not None
    rows = [row for row in report.rows if row.output == error_analysis.RANGE]
    assert [row.case for row in rows] == [case.name for case in request.cases]
    for row in rows:
        # The largest fp16 value is the residual stream's own, which PyTorch has in fp32.
        largest = max(np.abs(stream).max() for stream in streams_of_case(request, row.case))
        assert row.bounds[0].value == pytest.approx(largest, rel=2e-3)
    content = json.loads((request.out / bundle.REPORT_JSON).read_text())
    assert [step["name"] for step in content["growth"]["steps"]] == list(request.model.probes["model"])


def test_an_fp32_graph_has_no_fp16_rows(tmp_path: Path) -> None:
    report = pipeline.build(
        pipeline.build_request(TINY, weights=OVERFLOW.replace("100000", "30"), out=tmp_path / "b")
    ).report
    assert report is not None and not any(row.output == error_analysis.RANGE for row in report.rows)


@pytest.mark.parametrize("block", [0, 2])
def test_explain_names_the_block_with_the_wrong_fold(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fold.Folded.block

    def without_layer_scale(self: Any, i: int) -> Any:
        wrong = f"blocks.{block}.ls2.gamma"
        read = lambda name: 1.01 * self.read(name) if name == wrong else self.read(name)  # noqa: E731
        return right(fold.Folded(arch=self.arch, read=read), i)

    monkeypatch.setattr(fold.Folded, "block", without_layer_scale)
    request = pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "bundle")
    with pytest.raises(pipeline.Rejected, match=rf"starts growing faster than expected at blocks\.{block}_tokens"):
        pipeline.build(request, keep_rejected=True)
    shown = CliRunner().invoke(cli.app, ["validate", str(request.out), "--explain"])
    assert shown.exit_code == 1 and f"starts growing faster than expected at blocks.{block}_tokens" in shown.stdout
    told = json.loads(CliRunner().invoke(cli.app, ["validate", str(request.out), "--explain", "--json"]).stdout)
    holds = [step["holds"] for step in told["growth"]["steps"]]
    assert holds.index(False) == block + 1


def test_an_error_after_the_last_block_is_told_from_one_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold.Folded.head
    wrong = lambda self: right(fold.Folded(arch=self.arch, read=lambda name: 1.01 * self.read(name)))  # noqa: E731
    monkeypatch.setattr(fold.Folded, "head", wrong)
    with pytest.raises(pipeline.Rejected, match=r"as expected up to blocks\.2_tokens: it starts after that"):
        pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "bundle"))


def test_explain_of_a_bundle_that_passes(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", precision=Precision.FP16, out=out))
    validated = validate_bundle.validate(out, explained=True)
    assert validated.report.passed and validated.growth is not None and validated.growth.leaves is None
    shown = CliRunner().invoke(cli.app, ["validate", str(out), "--explain"]).stdout
    assert "as expected everywhere" in shown and "times median" in shown


@pytest.mark.parametrize(("asked", "ran"), [(None, Runtime.OPENVINO), (Runtime.ONNXRUNTIME, Runtime.ONNXRUNTIME)])
def test_explain_is_about_the_runtime_that_was_asked_for(
    asked: Runtime | None, ran: Runtime, tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    chosen = Way(runtime=Runtime.OPENVINO, precision=Precision.FP32, threads=1)
    other = as_if_chosen(tiny_bundle, tmp_path / "other", chosen)
    validated = validate_bundle.validate(other, runtime=asked, explained=True)
    assert validated.way is not None and validated.way.runtime is ran
    (line,) = formatting.explained(validated.report, validated.growth, validated.way)
    if ran is Runtime.OPENVINO:
        assert validated.growth is None and line.startswith("Inner values were not compared: OpenVINO ran")
    else:
        assert validated.growth is not None and line == "The error is as expected everywhere."


def limits(relative_l2: float, times: float | None = None) -> Limits:
    def limit(value: float) -> Limit:
        return Limit(value=value, reason="a limit that only a test knows")

    ones = {f"cosine_{which}_min": limit(0.0) for which in ("mean", "p01", "worst")}
    own = None if times is None else limit(times)
    return Limits(relative_l2_max=limit(relative_l2), worst_l2_max=limit(1.0), times_own_error_max=own, **ones)


def test_growth_follows_the_figures_by_hand() -> None:
    reference = {"a": np.array([[3.0, 4.0]]), "b": np.array([[3.0, 4.0]])}
    candidate = {"a": np.array([[3.0, 4.01]]), "b": np.array([[3.0, 4.2]])}
    grown = error_analysis.growth("case", ["a", "b"], candidate, reference, None, limits(0.01))
    assert [step.relative_l2 for step in grown.steps] == pytest.approx([0.002, 0.04])
    assert [step.expected for step in grown.steps] == pytest.approx([0.005, 0.01])
    assert grown.leaves is grown.steps[1]
    assert grown.steps[0].largest == 4.0 and grown.steps[0].times_median == pytest.approx(4 / 3.5)
    assert grown.steps[0].reference_norm == 5.0 and grown.steps[0].fp16_headroom == 65504 / 4
    own = {"a": np.array([[3.0, 4.004]]), "b": np.array([[np.inf, 4.0]])}
    beside = error_analysis.growth("case", ["a", "b"], candidate, reference, own, limits(0.1, times=2))
    assert [step.expected for step in beside.steps] == pytest.approx([0.0016, 0.1]), (
        "where PyTorch overflows: the limit"
    )
    assert beside.leaves is beside.steps[0]
    infinite = error_analysis.growth("case", ["a"], {"a": np.array([[np.nan, 1]])}, reference, None, limits(1.0))
    assert infinite.leaves is infinite.steps[0]
    json.dumps(infinite.to_json(), allow_nan=False)


def test_causes_in_words() -> None:
    """What overflows comes before where the error grows; a report that passed with an error as expected has none."""

    def row(output: str, value: float, problem: str = "") -> Row:
        bound = Bound(figure="relative_l2", value=value, limit=1.0, reason="a test", holds=value <= 1.0)
        return Row(case="one", why="", output=output, shape=(1,), distance=None, bounds=(bound,), problem=problem)

    def report(*rows: Row) -> Report:
        return Report(candidate="c", reference="r", rows=rows)

    def grown(*steps: tuple[float, bool]) -> error_analysis.Growth:
        made = (
            error_analysis.GrowthStep(name=f"value {i}", relative_l2=0.5, expected=0.25, norm=1, reference_norm=1,
                                      largest=largest, times_median=1, holds=holds)
            for i, (largest, holds) in enumerate(steps)
        )  # fmt: skip
        return error_analysis.Growth(case="one", rule="", steps=tuple(made))

    over, wrong, right = row(error_analysis.RANGE, 0, "it overflows"), row("tokens", 2.0), row("tokens", 0.5)
    assert error_analysis.causes(report(wrong, over), None) == ["it overflows on one"]
    assert error_analysis.causes(report(over), grown((65504.0, False))) == ["it overflows on one"]
    assert error_analysis.causes(report(over), grown((1.0, True), (65505.0, True), (1e6, True)))[1] == (
        "PyTorch's fp32 reaches 65,505 in value 1; the largest fp16 number is 65,504"
    )
    assert error_analysis.causes(report(wrong), grown((1.0, True), (1.0, False), (1.0, False))) == [
        "on one the error starts growing faster than expected at value 1: 5.0e-01 where 2.5e-01 is expected"
    ]
    assert error_analysis.causes(report(wrong), grown((1.0, True), (1.0, True))) == [
        "on one the error is as expected up to value 1: it starts after that"
    ]
    assert error_analysis.causes(report(right), grown((1.0, True))) == error_analysis.causes(report(wrong), None) == []


def test_nan_inside_the_graph_is_an_overflow_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is driven twice keeps what the worse call had; the first value that is not finite is named."""
    calls = iter([{"a/largest": 3.0, "b/largest": np.nan}, {"a/largest": 2.0, "b/largest": 1.0}])
    monkeypatch.setattr(error_analysis.ort, "open_edited", lambda *args, **kwargs: lambda arrays: next(calls))
    largest: dict[str, float] = {}
    measured = {"a/largest": "a (Add)", "b/largest": "b (Mul)"}
    run = error_analysis._keeping(
        b"", measured, Path("model.onnx"), Graph(name="g", inputs=(), outputs=(), dims=()), largest
    )
    assert run({}) == run({}) == {}
    assert largest["a (Add)"] == 3.0 and np.isnan(largest["b (Mul)"])
    row = error_analysis._range_row(Case(name="case", why="a test", inputs={}), largest)
    assert not row.passed and row.problem == "fp16 overflows in b (Mul)"
    assert error_analysis._range_row(Case(name="case", why="a test", inputs={}), {"a (Add)": 3.0}).passed


def test_the_streams_are_the_tokens_before_the_norm() -> None:
    """The probes' last value through torch's own layer norm is the model's answer."""
    request = pipeline.build_request(TINY, weights="synthetic:0")
    checkpoint = open_checkpoint(request.model, request.recipe, "synthetic:0", progress=silent)
    inputs = [request.cases[0].inputs]
    (answer,) = request.model.reference(checkpoint.read, inputs, precision=Precision.FP32, progress=silent, inside=True)
    last = torch.from_numpy(answer[request.model.probes["model"][-1]])
    weight, bias = (torch.from_numpy(checkpoint.read(f"norm.{name}")) for name in ("weight", "bias"))
    normed = torch.nn.functional.layer_norm(last, (last.shape[-1],), weight, bias, 1e-6)
    assert torch.equal(normed[:, 0], torch.from_numpy(answer["class_token"]))


@pytest.mark.parametrize(
    ("largest", "holds", "problem"),
    [(65504.0, True, ""), (65504.5, False, "fp16 overflows in a (Add)"), (0.5, True, "")],
)
def test_the_largest_fp16_number_is_in_range(largest: float, holds: bool, problem: str) -> None:
    row = error_analysis._range_row(Case(name="case", why="a test", inputs={}), {"a (Add)": largest, "b (Mul)": 0.25})
    assert (row.problem, row.why, row.case) == (problem, "a test", "case")
    assert row.bounds == (
        Bound(
            figure="largest",
            value=largest,
            limit=65504.0,
            reason="fp16's maximum; a (Add) is closest to it",
            holds=holds,
        ),
    )


@pytest.mark.parametrize(("largest", "headroom"), [(65504.0, 1.0), (0.5, 131008.0), (0.0, float("inf"))])
def test_headroom_is_how_often_the_largest_value_fits(largest: float, headroom: float) -> None:
    values = {"a": np.array([[largest, 0.0]])}
    (step,) = error_analysis.growth("case", ["a"], values, values, None, limits(0.01)).steps
    assert step.fp16_headroom == headroom


def test_small_values_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_analysis.ort, "open_edited", lambda *args, **kwargs: lambda arrays: {"largest": 0.5})
    largest: dict[str, float] = {}
    graph = Graph(name="g", inputs=(), outputs=(), dims=())
    error_analysis._keeping(b"", {"largest": "a (Add)"}, Path("model.onnx"), graph, largest)({})
    assert largest == {"a (Add)": 0.5}


@pytest.mark.parametrize(
    ("own", "times", "expected", "rule"),
    [
        (None, None, 0.01, "the limit 0.01, reached linearly at the last part"),
        (None, 2.0, 0.01, "the limit 0.01, reached linearly at the last part"),
        ([[3.0, 4.0]], None, 0.01, "the limit 0.01, reached linearly at the last part"),
        ([[3.0, 4.0]], 2.0, 0.0, "2 times the error of PyTorch itself there, in the same precision"),
        ([[3.0, 5.0]], 2.0, 0.4, "2 times the error of PyTorch itself there, in the same precision"),
    ],
)
def test_what_error_is_expected(own: Any, times: float | None, expected: float, rule: str) -> None:
    """A multiple of PyTorch's own error only with both; an equal value is as expected even where no error is."""
    values = {"a": np.array([[3.0, 4.0]])}
    beside = None if own is None else {"a": np.array(own)}
    grown = error_analysis.growth("case", ["a"], values, values, beside, limits(0.01, times))
    assert (grown.steps[0].expected, grown.rule, grown.leaves) == (pytest.approx(expected), rule, None)

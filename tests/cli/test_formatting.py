"""Results as lines and rows: what a person reads of a report, an engine, a choice of runtime, a deployment."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.cli import formatting
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.validation.answers import Bound
from dinoexport.validation.error_analysis import Growth, GrowthStep
from dinoexport.validation.judge import Report, Row
from dinoexport.validation.metrics import Distance, Divergence

LOWER = ("within_1.25", "label_agreement", "cosine_mean")


def bound(figure: str, value: float, limit: float) -> Bound:
    holds = value >= limit if figure in LOWER else value <= limit
    return Bound(figure=figure, value=value, limit=limit, holds=holds, reason="chosen for this test")


def row(*bounds: Bound, case: str = "one", **facts: Any) -> Row:
    return Row(**{
        "case": case, "why": "", "output": "tokens", "shape": (1, 5), "distance": None, "bounds": bounds
    } | facts)  # fmt: skip


def report(*rows: Row) -> Report:
    return Report(candidate="c", reference="r", rows=rows)


DISTANCE = Distance(
    relative_l2=0.0123, worst_l2=0.0456, cosine_mean=1, cosine_p01=1, cosine_worst=0.987654321, max_abs=7.89,
    finite=True,
)  # fmt: skip


def test_a_row_of_vectors() -> None:
    """With the strictest limit, and each limit that is missed."""
    bounds = (bound("relative_l2", 0.0123, 0.05), bound("relative_l2", 0.0123, 0.01), bound("cosine_mean", 0.5, 0.9))
    (shown,) = formatting.report_rows(report(row(*bounds, distance=DISTANCE)))
    assert shown == {
        "case": "one", "output": "tokens", "shape": "1 x 5", "relative L2": "1.2e-02", "limit": "1.0e-02",
        "worst vector": "4.6e-02", "worst cosine": "0.98765432", "largest abs": "7.9e+00",
        "verdict": "FAILED relative_l2 0.0123, limit 0.01; cosine_mean 0.5, limit 0.9",
    }  # fmt: skip


def test_a_row_that_could_not_be_measured() -> None:
    (shown,) = formatting.report_rows(report(row(problem="another shape")))
    assert shown["verdict"] == "FAILED another shape"
    assert {shown[name] for name in ("relative L2", "limit", "worst vector", "worst cosine", "largest abs")} == {""}
    (nan,) = formatting.report_rows(report(row(bound("relative_l2", float("nan"), 0.1))))
    assert nan["verdict"] == "FAILED relative_l2 nan, limit 0.1"


def test_rows_of_distributions_labels_and_ranges() -> None:
    divergence = Divergence(kl_mean=0.00123, kl_worst=1, top1_kept=1, top1_gap=0)
    rows = formatting.report_rows(report(
        row(bound("kl_mean", 0.00123, 0.01), distance=DISTANCE, divergence=divergence),
        row(bound("label_agreement", 0.991, 0.99), figures={"label_agreement": 0.99123, "mean_iou": 0.98765}),
        row(bound("largest_difference", 0.5, 2.0), distance=DISTANCE, figures={"within_1.25": 0.5}),
        row(bound("largest", 1234.0, 65504.0), distance=DISTANCE),
    ))  # fmt: skip
    assert [shown["measure"] for shown in rows] == [
        "KL 1.2e-03 (limit 1.0e-02)", "same label 99.12% (limit 99.00%), mIoU 0.9877", "within 1.25 50.00%", "",
    ]  # fmt: skip
    assert [shown["largest abs"] for shown in rows] == ["7.9e+00", "", "7.9e+00 (limit 2.0e+00)", "1.2e+03"]
    assert rows[0]["worst cosine"] == "", "it says nothing of distributions"


@pytest.mark.parametrize(
    ("shown", "nearness"),
    [
        (row(bound("relative_l2", 0.5, 2.0), bound("largest_difference", 3.0, 4.0)), 0.75),
        (row(bound("label_agreement", 0.995, 0.99), bound("relative_l2", 0.1, 1.0)), 0.5),
        (row(bound("within_1.25", 1.0, 1.0), bound("relative_l2", 0.0, 0.0)), 0.0),
        (row(bound("worst_l2", 0.9, 1.0)), 0.0),
        (row(bound("relative_l2", 2.0, 1.0)), float("inf")),
        (row(), float("inf")),
    ],
)
def test_how_near_a_row_is_to_its_limits(shown: Row, nearness: float) -> None:
    assert formatting._closeness(shown) == pytest.approx(nearness)


@pytest.mark.parametrize("count", [150, 151, 1400])
def test_of_many_rows_those_nearest_to_their_limits(count: int) -> None:
    rows = [row(bound("relative_l2", i / count, 1.0), case=f"case {i}") for i in range(count)]
    shown = [line["case"] for line in formatting.report_rows(report(*rows))]
    if count == 150:
        assert shown == [f"case {i}" for i in range(150)]
    else:
        assert shown[:-1] == [f"case {i}" for i in range(count - 1, count - 151, -1)]
        assert shown[-1] == f"and {count - 150:,} more; --json has them all"


def step(name: str, *, holds: bool) -> GrowthStep:
    return GrowthStep(
        name=name, relative_l2=0.00123, expected=0.01, norm=12.3456, reference_norm=12.3, largest=6550.4,
        times_median=99.6, holds=holds,
    )  # fmt: skip


def test_growth() -> None:
    growth = Growth(
        case="one", rule="a rule", steps=(step("a", holds=True), step("b", holds=False), step("c", holds=False))
    )
    rows = formatting.growth_rows(growth)
    assert rows[0] == {
        "value": "a", "relative L2": "1.2e-03", "expected": "1.0e-02", "mean norm": "12.35", "PyTorch's": "12.3",
        "largest": "6550", "times median": "100", "fits fp16": "10 times", "verdict": "ok",
    }  # fmt: skip
    assert [shown["verdict"] for shown in rows] == ["ok", "FIRST OVER", "over"]


def test_growth_that_explains_nothing() -> None:
    fine = report(row(bound("relative_l2", 0.1, 1.0)))
    onnxruntime = Way(runtime=Runtime.ONNXRUNTIME, threads=1, precision=Precision.FP32)
    openvino = Way(runtime=Runtime.OPENVINO, threads=1, precision=Precision.FP32)
    assert "OpenVINO ran this bundle" in formatting.explained(fine, None, openvino)[0]
    assert "no output has an error" in formatting.explained(fine, None, onnxruntime)[0]
    as_expected = Growth(case="one", rule="", steps=(step("a", holds=True),))
    assert formatting.explained(fine, as_expected, onnxruntime) == ["The error is as expected everywhere."]


def engine(**changes: Any) -> Any:
    return SimpleNamespace(**{
        "file": "model.plan", "compute_capabilities": ("8.0", "9.0"), "runtime": "tensorrt", "runtime_version": "10.1",
        "precision": "fp16", "size_bytes": 12_345_678, "executed": False, "fused_attentions": 12, "attentions": 12,
        "caution": "",
    } | changes)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, []),
        ({"fused_attentions": None, "attentions": None}, []),
        ({"fused_attentions": 11}, ["        warning: attention is fused in 11 of 12 places."]),
        (
            {"fused_attentions": 0, "precision": "fp32", "caution": "slow"},
            [
                "        warning: attention is fused in 0 of 12 places; TensorRT fuses it in fp16 only.",
                "        caution: slow",
            ],
        ),
    ],
)
def test_engines(changes: dict[str, Any], more: list[str]) -> None:
    made = engine(**changes)
    manifest: Any = SimpleNamespace(engines=(made,))
    first = f"Engine: model.plan for SM 8.0, 9.0, tensorrt 10.1, {made.precision}, 12.3 MB. Built; executed: False."
    assert formatting.engine_lines(manifest) == [first, *more]
    assert formatting.engine_lines(manifest, "no GPU here") == [first, "        no GPU here", *more]


def facts(**changes: Any) -> Any:
    way = Way(runtime=Runtime.ONNXRUNTIME, threads=2, precision=Precision.FP32)
    other = Way(runtime=Runtime.OPENVINO, threads=1, precision=Precision.FP32)
    measured = [SimpleNamespace(way=way, median_ms=12.34), SimpleNamespace(way=other, median_ms=1234.56)]
    return SimpleNamespace(cpu=SimpleNamespace(**{
        "chosen": way, "runtime_version": "1.20", "arithmetic": {"fp32": 9}, "machine": "a CPU", "usable_cpus": 2,
        "measured": measured, "load": "batch 1", "refused": {}, "times_fp32": None, "others_share": 0.0,
        "basis": "measured",
    } | changes))  # fmt: skip


CROWDED = f"other processes had {formatting.choice.CROWDED_SHARE:.0%} of the CPUs"
CHOSEN = [
    "Runs:   onnxruntime 1.20, 2 threads, fp32 (9 products in fp32) on a CPU, 2 CPUs",
    "             12.3 ms for batch 1: onnxruntime, 2 threads, fp32, chosen",
    "           1234.6 ms for batch 1: openvino, 1 thread, fp32",
]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, CHOSEN),
        (
            {"measured": [], "times_fp32": 0.5},
            [CHOSEN[0], "        the only runtime there was to choose from; nothing was timed"],
        ),
        (
            {"refused": {"openvino": "it is wrong"}, "times_fp32": 0.5},
            [
                *CHOSEN,
                "        openvino was left out: it is wrong",
                "        0.50 times the time of the fastest fp32 there",
            ],
        ),
        ({"others_share": formatting.timing.NOISY_SHARE}, CHOSEN),
        (
            {"others_share": formatting.choice.CROWDED_SHARE, "basis": "known"},
            [
                *CHOSEN,
                f"        noisy: {CROWDED} while this was measured; CPU time and the best of many visits decided too",
                "        ways with equal times: chosen is what was faster here when the machine was quiet",
            ],
        ),
        (
            {"others_share": 0.99, "basis": "usual"},
            [
                *CHOSEN,
                "        noisy: other processes had 99% of the CPUs while this was measured; only CPU time decided",
                "        ways with equal times: chosen is what is usually the faster one",
            ],
        ),
    ],
)
def test_the_choice_of_a_runtime(changes: dict[str, Any], lines: list[str]) -> None:
    assert formatting.cpu_lines(facts(**changes)) == lines


def test_a_bundle_that_runs_on_no_cpu_says_nothing_of_it() -> None:
    manifest: Any = SimpleNamespace(cpu=None)
    assert formatting.cpu_lines(manifest) == []


def test_precisions() -> None:
    plain: Any = SimpleNamespace(precision=Precision.FP16, report={})
    mixed: Any = SimpleNamespace(
        precision=Precision.FP16, report={"precision": {"fp32": ["a", "b"], "trials": [1, 2, 3]}}
    )
    nothing: Any = SimpleNamespace(precision=Precision.FP16, report={"precision": {"fp32": [], "trials": [1]}})
    assert formatting.precision(plain) == "fp16"
    assert formatting.precision(mixed) == "fp16 with a, b in fp32: 3 combinations tried"
    assert formatting.precision(nothing) == "fp16 with nothing in fp32: 1 combinations tried"


@pytest.mark.parametrize(
    ("known", "words"),
    [({"by_us": True}, "just now"), ({"verified": True}, "verified"), ({}, "not verified; --verify KEY does that")],
)
def test_signatures(known: dict[str, bool], words: str) -> None:
    assert formatting.signature_lines("0123456789abcdefGHI", **known) == [f"Signed: by key 0123456789abcdef, {words}"]
    assert formatting.signature_lines(None, **known) == []


@pytest.mark.parametrize("own", [True, False])
def test_what_a_verdict_proves(own: bool) -> None:
    rows = report(row(), row(), row(case="two"))
    says, left_open = formatting.proven(rows, own_images=own, not_run="", verified=True)
    assert ("those of your images" if own else "the 2 cases the bundle carries") in says
    assert left_open == ["other inputs and sizes", "that the weights are the authors' own"]
    more = Report(candidate="c", reference="r", rows=(row(),), not_covered=("a", "b"))
    assert formatting.proven(more, own_images=own, not_run="no GPU", verified=False)[1][2:] == [
        "2 cases outside the engine's profiles", "a GPU, which did not run it", "who made the bundle (--verify KEY)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("repository", "previous", "note", "where"),
    [(Path("/a b"), 1, "a note", "'/a b'"), ("s3://bucket/models", None, "", "BUNDLE")],
)
def test_a_deployment(repository: Path | str, previous: int | None, note: str, where: str) -> None:
    deployed: Any = SimpleNamespace(
        name="tiny", version=2, previous=previous, repository=repository, models=("tiny", "tiny_graph"), note=note,
        retired=("old",),
    )  # fmt: skip
    lines = formatting.deployed_lines(deployed)
    assert lines[0] == f"Serving: tiny version 2{' (before: 1)' if previous else ''}, in {repository}"
    assert lines[1:] == [
        "Models:  tiny, tiny_graph", *([f"Note:    {note}"] if note else []),
        "Next, to make a running server load it:",
        "         curl -X POST HOST:8000/v2/repository/models/old/unload",
        "         curl -X POST HOST:8000/v2/repository/models/tiny/load",
        "         curl -X POST HOST:8000/v2/repository/models/tiny_graph/load",
        f"         dinoexport check http://HOST:8000 {where} --model tiny",
    ]  # fmt: skip


def test_latencies_and_shapes() -> None:
    assert formatting.latency_rows({"a": 1.26, "b": 1000.0}) == [
        {"case": "a", "latency ms": "1.3"}, {"case": "b", "latency ms": "1000.0"},
    ]  # fmt: skip
    assert formatting.shape_of(["batch", 3, "height"]) == "batch x 3 x height"

"""The parts of report.html by themselves: the commands it shows, its figures, and where its charts put things."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.bundle import HeadManifest, Manifest
from dinoexport.bundle.manifest import CheckpointFacts
from dinoexport.report import html_report
from dinoexport.spec import Case, Dim, Expectation, Graph, Precision, Tensor
from dinoexport.validation.answers import Bound
from dinoexport.validation.error_analysis import RANGE, Growth, GrowthStep
from dinoexport.validation.judge import Report, Row

HASH = "0" * 64


def manifest(**changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "variant": "vits14", "family": "dinov2", "precision": Precision.FP16, "target": "cpu", "verdict": "unjudged",
        "recipe": {}, "checkpoint": CheckpointFacts(source="my weights.pth", sha256=HASH, licence="none"),
        "graphs": (), "files": (), "stage_keys": {}, "versions": {}, "card": {}, "report": {},
        "created": datetime(2025, 1, 1, tzinfo=UTC),
    }  # fmt: skip
    return Manifest(**facts | changes)


def head(**changes: Any) -> HeadManifest:
    return HeadManifest(**{"kind": "nyu_linear", "dataset": "NYU", "terms": "none"} | changes)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (None, ""),
        (head(source="https://dl.example/head.pth"), " --head nyu_linear"),
        (head(source="my head.pth"), " --head nyu_linear --head-weights 'my head.pth'"),
        (head(), ""),
        (head(source="fitted here", file="head.safetensors"), ""),
    ],
    ids=["no head", "published", "a file", "in the checkpoint", "fitted"],
)
def test_a_head_is_asked_for_again(given: HeadManifest | None, options: str) -> None:
    commands = html_report._repeat(manifest(head=given))
    assert commands == [
        f"dinoexport build vits14 --weights 'my weights.pth'{options} --target cpu --precision fp16",
        "dinoexport validate BUNDLE",
    ]


def test_the_commands_of_other_bundles() -> None:
    published = CheckpointFacts(source="https://dl.example/vits14.pth", sha256=HASH, licence="none")
    assert html_report._repeat(manifest(checkpoint=published, report={"precision": {"trials": []}}))[0] == (
        "dinoexport build vits14 --target cpu --precision auto"
    )
    own = html_report._repeat(manifest(variant="own", report={"fit": {"head": "logreg", "balanced": True}}))
    assert own == [
        "dinoexport build RECIPE.toml --weights 'my weights.pth' --target cpu --precision fp16",
        "# the recipe is the object `recipe` in manifest.json",
        "dinoexport fit BUNDLE_WITHOUT_HEAD --images DIR --head logreg --balanced --out BUNDLE",
        "dinoexport validate BUNDLE",
    ]
    plain = html_report._fit(manifest(report={"fit": {"head": "linear", "balanced": False}}))
    assert plain == ["dinoexport fit BUNDLE_WITHOUT_HEAD --images DIR --head linear --out BUNDLE"]


def test_facts_of_a_bundle_with_parts_in_fp32_and_a_head() -> None:
    kept = manifest(head=head(source="nyu.pth", sha256=HASH), report={"precision": {"fp32": ["mlp", "scores"]}})
    assert html_report._facts(kept) == {
        "weights": "my weights.pth", "their SHA-256": HASH, "head": "nyu_linear", "head's weights": "nyu.pth",
        "head's SHA-256": HASH, "licence": "none", "precision": "fp16, with mlp, scores in fp32",
    }  # fmt: skip
    assert html_report._facts(manifest())["precision"] == "fp16"
    assert html_report._model_name(kept) == "vits14 with nyu_linear"
    assert html_report._model_name(manifest(head=head())) == html_report._model_name(manifest()) == "vits14"


def row(*bounds: tuple[str, float, float, str], output: str = "class_token", case: str = "one") -> Row:
    made = tuple(
        Bound(figure=figure, value=value, limit=limit, holds=value <= limit, reason=reason)
        for figure, value, limit, reason in bounds
    )
    return Row(case=case, why="a test", output=output, shape=(1,), distance=None, bounds=made)


def report(*rows: Row) -> Report:
    return Report(candidate="c", reference="r", rows=rows)


def test_the_closest_limit_is_an_upper_one() -> None:
    """The largest share of its limit; lower limits, limits of zero and what is not finite have no share."""
    first = row(("relative_l2", 0.5, 1.0, ""), ("cosine_mean", 0.9, 0.1, ""), ("worst_l2", 3.0, 0.0, ""))
    second = row(("worst_l2", math.inf, 1.0, ""), ("largest", 1.2, 2.0, ""), case="two")
    found = html_report._closest(report(first, second))
    assert found == (second, second.bounds[1])
    assert html_report._closest(report(row(("cosine_mean", 0.9, 0.1, "")))) is None
    assert html_report._based_on(report(first, second, second)) == "3 checks of 2 cases against 7 limits"


def test_a_limit_that_varies_is_one_row() -> None:
    rows = (
        row(("relative_l2", 0, 0.5, "measured"), ("worst_l2", 0, 2.0, "measured")),
        row(("relative_l2", 0, 0.25, "measured"), ("relative_l2", 0, 0.125, "own")),
        row(("relative_l2", 0, 9.0, "measured"), output=RANGE),
    )
    assert html_report._limits(report(*rows)) == [
        ("relative_l2", "0.25 to 0.5", "measured"), ("worst_l2", "2", "measured"), ("relative_l2", "0.12", "own"),
    ]  # fmt: skip


def growth(*steps: tuple[float, float]) -> Growth:
    made = tuple(
        GrowthStep(name=str(i), relative_l2=error, expected=expected, norm=1, reference_norm=1, largest=1,
                   times_median=1, holds=True)
        for i, (error, expected) in enumerate(steps)
    )  # fmt: skip
    return Growth(case="one", rule="a test", steps=made)


def test_growth_is_drawn_by_powers_of_ten() -> None:
    """From the power below the smallest error to the largest; what is not finite fills the chart."""
    bars = html_report._growth_bars(growth((0.0, 1e-3), (2e-3, 1e-1), (math.nan, 10.0), (math.inf, 1.0)))
    assert [bar.length for bar in bars] == [0.0, pytest.approx(25 * math.log10(2), abs=0.005), 100.0, 100.0]
    assert [bar.mark for bar in bars] == [0.0, 50.0, 100.0, 75.0]
    assert [(bar.length, bar.mark) for bar in html_report._growth_bars(growth((0.0, 0.0)))] == [(0.0, 0.0)]


def test_an_output_that_is_right_or_lost_everywhere_has_a_histogram() -> None:
    zero = html_report._histogram("a", [np.zeros(3), np.zeros(2)])
    assert (zero.vectors, zero.smallest, zero.largest, zero.not_finite) == (5, 1.0, 1.0, 0)
    assert sum(count for _, count, _ in zero.bins) == 5 and max(share for *_, share in zero.bins) == 1.0
    lost = html_report._histogram("a", [np.array([np.nan, np.inf])])
    assert lost.bins == [] and lost.not_finite == lost.vectors == 2
    (first, *_, last) = html_report._histogram("a", [np.array([1e-3, 0.0, 10.0, 10.0])]).bins
    assert first == (pytest.approx(1e-3), 2, 1.0) and last == (pytest.approx(10 ** (1 - 0.1)), 2, 1.0)


def sizes_of(*dims: Dim, **cases: tuple[int, int]) -> Any:
    graph = Graph(
        name="model",
        inputs=(Tensor(name="pixels", dtype="float32", shape=(1, *(dim.name for dim in dims)), meaning=""),),
        outputs=(),
        dims=dims,
    )
    expectations = [
        Expectation(case=Case(name=name, why="", inputs={"pixels": np.zeros((1, *shape))}), outputs={})
        for name, shape in cases.items()
    ]
    other = Expectation(case=Case(name="other", why="", inputs={"text": np.zeros(1)}), outputs={})
    reference: Any = SimpleNamespace(expectations=[*expectations, other])
    return html_report._sizes([graph], reference)


def dim(name: str, least: int, most: int) -> Dim:
    return Dim(name=name, min=least, opt=least, max=most)


def test_sizes_lie_between_the_ends_of_their_dimensions() -> None:
    made = sizes_of(
        dim("height", 10, 1000), dim("width", 100, 10_000), low=(10, 100), high=(1000, 10_000), half=(100, 1000),
        again=(100, 1000), some=(20, 100),
    )  # fmt: skip
    assert (made.x, made.y, made.x_range, made.y_range) == ("width", "height", (100, 10_000), (10, 1000))
    assert made.points == [
        (0.0, 0.0, "low: height 10, width 100"), (0.0, 15.05, "some: height 20, width 100"),
        (50.0, 50.0, "half, again: height 100, width 1000"), (100.0, 100.0, "high: height 1000, width 10000"),
    ]  # fmt: skip


@pytest.mark.parametrize("dims", [[dim("a", 1, 9)], [dim("a", 1, 9), dim("b", 3, 3)], [dim("a", 0, 9), dim("b", 1, 9)]])
def test_sizes_that_vary_in_one_direction_are_not_drawn(dims: list[Dim]) -> None:
    assert sizes_of(*dims) is None


def sizes_of_batches(width_max: int) -> Any:
    """Of batches of 1 to 4 images of 10 to 1000 rows and 10 or more columns; the second case is a mask of no batch."""
    graph = Graph(
        name="model",
        inputs=(
            Tensor(name="pixels", dtype="float32", shape=("batch", "height", "width"), meaning=""),
            Tensor(name="mask", dtype="float32", shape=("height", "width"), meaning=""),
            Tensor(name="rows", dtype="float32", shape=("height",), meaning=""),
        ),
        outputs=(),
        dims=(dim("batch", 1, 4), dim("height", 10, 1000), dim("width", 10, width_max)),
    )
    cases = [
        Case(name="one", why="", inputs={"pixels": np.zeros((2, 10, 100))}),
        Case(name="mask", why="", inputs={"mask": np.zeros((1000, 10))}),
        Case(name="rows", why="", inputs={"rows": np.zeros(10)}),
    ]
    reference: Any = SimpleNamespace(expectations=[Expectation(case=case, outputs={}) for case in cases])
    return html_report._sizes([graph], reference)


def test_the_two_widest_dimensions_are_drawn() -> None:
    """For the cases that have both; a dimension that begins at 1 is as wide as its greatest size."""
    made = sizes_of(dim("batch", 1, 4), dim("height", 10, 1000), dim("width", 10, 100))
    assert made is None, "no case has them"
    made = sizes_of_batches(100)
    assert made is not None and (made.x, made.y) == ("width", "height")
    assert made.points == [(0.0, 100.0, "mask: height 1000, width 10"), (100.0, 0.0, "one: height 10, width 100")]
    made = sizes_of_batches(30)
    assert made is not None and (made.x, made.y) == ("height", "batch")
    assert made.points == [(0.0, 50.0, "one: batch 2, height 10")]

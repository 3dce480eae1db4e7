"""What a person sees of a bundle with a head: the page, the table of a build, and `diff`."""

from __future__ import annotations

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.cli import formatting
from dinoexport.config.limits import load_validation
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import OutputKind, Precision, Runtime
from dinoexport.validation import bundle_diff
from dinoexport.validation.answers import compare
from dinoexport.validation.judge import Report, Row
from tests.conftest import DATA


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Built:
    """Label maps in fp16, so that some pixels differ."""
    request = pipeline.build_request(
        str(DATA / "tiny_heads.toml"),
        weights="synthetic:3",
        head="ade20k_linear",
        head_weights="synthetic:3",
        precision=Precision.FP16,
        target="cpu",
        runtime=Runtime.ONNXRUNTIME,
        out=tmp_path_factory.mktemp("headed") / "bundle",
    )
    return pipeline.build(request)


def test_the_page_shows_the_measures_people_know(built: pipeline.Built) -> None:
    page = (built.folder / bundle.REPORT_HTML).read_text(encoding="utf-8")
    assert "<th>same label</th><th>decided</th><th>mIoU</th>" in page
    assert "within 1.25 times" not in page, "a column is there for figures that a row has"
    assert built.report is not None
    labels = [row for row in built.report.rows if row.output == "labels"]
    assert labels and all(f"{row.figures['mean_iou']:.4f}" in page for row in labels)


def test_the_page_says_how_to_build_it_again(built: pipeline.Built) -> None:
    page = (built.folder / bundle.REPORT_HTML).read_text(encoding="utf-8")
    assert "<title>tiny_heads with ade20k_linear, fp16, for cpu" in page
    assert "dinoexport build RECIPE.toml --weights synthetic:3 --head ade20k_linear --head-weights synthetic:3" in page
    assert built.manifest.head is not None and built.manifest.head.sha256 is not None
    assert built.manifest.head.sha256 in page


def test_the_page_says_that_synthetic_weights_mean_nothing(built: pipeline.Built) -> None:
    """Random depths and labels look like answers; of a file's weights nothing is said."""
    page = (built.folder / bundle.REPORT_HTML).read_text(encoding="utf-8")
    assert "The weights are synthetic: what the model answers, and the pictures of it, mean nothing." in page
    real = built.manifest.checkpoint.changed(source="vits14.pth")
    assert built.manifest.head is not None
    assert built.manifest.model_copy(update={"checkpoint": real}).synthetic == "the weights of the head"
    head = built.manifest.head.model_copy(update={"source": "nyu.pth"})
    assert built.manifest.model_copy(update={"checkpoint": real, "head": head}).synthetic == ""


def test_the_table_of_a_build_has_the_labels_measure(built: pipeline.Built) -> None:
    assert built.report is not None
    shown = [row for row in formatting.report_rows(built.report) if row["output"] == "labels"]
    assert shown and all(row["worst cosine"] == "" for row in shown)
    for row, found in zip(shown, (row for row in built.report.rows if row.output == "labels"), strict=True):
        same = f"same label {found.figures['label_agreement']:.2%} (limit 97.00%)"
        assert row["measure"] == f"{same}, mIoU {found.figures['mean_iou']:.4f}"


def test_probabilities_and_depths_have_their_limits_in_the_table() -> None:
    """The figures of a row by hand; a table without such outputs has no column for them."""

    def row(output: str, kind: OutputKind, answer: list[float]) -> Row:
        expected = np.array([[1.0, 2.0]])
        found = compare(kind, np.array([answer]), expected, limits, None)
        return Row(
            case="a", why="", output=output, shape=(1, 2), distance=found.distance, bounds=found.bounds,
            figures=found.figures,
        )  # fmt: skip

    limits = load_validation("dinov2_heads", beside=None)[0].limits[Precision.FP16]
    rows = (row("probabilities", "probabilities", [1.01, 2.0]), row("depth", "depth", [1.0, 2.6]))
    shares, depth = formatting.report_rows(Report(candidate="ours", reference="theirs", rows=rows))
    assert (shares["largest abs"], shares["limit"], shares["measure"]) == ("1.0e-02 (limit 2.0e-02)", "", "")
    assert depth["measure"] == "within 1.25 50.00% (limit 99.90%)" and depth["limit"] == "1.0e-02"
    (alone,) = formatting.report_rows(Report(candidate="ours", reference="theirs", rows=rows[:1]))
    assert "measure" not in alone


def test_labels_are_compared_as_labels(built: pipeline.Built) -> None:
    outputs = bundle_diff.compare(built.folder, built.folder)["Outputs"]
    of_labels = [row for row in outputs if row["output"] == "labels"]
    assert {row["second from first"] for row in of_labels} == {"0.00% differ"}
    assert all(row["second from PyTorch"].endswith("% differ") for row in of_labels)

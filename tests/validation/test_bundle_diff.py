"""`diff`: what differs is named with its figures, what is the same is not, and what cannot be compared is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.bundle import reference_file
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import ort
from dinoexport.spec import Precision
from dinoexport.validation import bundle_diff
from dinoexport.validation.metrics import distance
from tests.conftest import DATA

TINY = DATA / "tiny_swiglu.toml"


def build(folder: Path, name: str, **changes: Any) -> Path:
    request = pipeline.build_request(str(TINY), **{"weights": "synthetic:0", "out": folder / name, **changes})
    pipeline.build(request)
    return request.out


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights in fp32 and fp16."""
    folder = tmp_path_factory.mktemp("compare")
    return build(folder, "fp32"), build(folder, "fp16", precision=Precision.FP16)


@pytest.fixture(scope="module")
def compared(bundles: tuple[Path, Path]) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(CliRunner().invoke(cli.app, ["diff", *map(str, bundles), "--json"]).stdout)
    return shown


def test_a_bundle_and_itself(bundles: tuple[Path, Path]) -> None:
    same = bundle_diff.compare(bundles[0], bundles[0])
    assert same["What differs"] == []
    assert {(row["same bytes"], row["second / first"]) for row in same["Files"]} == {("yes", "1.00")}
    assert [row["operation"] for row in same["Operations"]] == ["all"]
    assert {row["second from first"] for row in same["Outputs"]} == {"0.0e+00"}


def test_only_what_differs_is_named(compared: dict[str, Any]) -> None:
    assert compared["What differs"] == [{"what": "precision", "first": "fp32", "second": "fp16"}]


def test_files(compared: dict[str, Any], bundles: tuple[Path, Path]) -> None:
    rows = {row["file"]: row for row in compared["Files"]}
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in bundles]
    row = rows["model.onnx.data"]
    assert [row["first, bytes"], row["second, bytes"]] == sizes and row["same bytes"] == "no"
    assert row["second / first"] == f"{sizes[1] / sizes[0]:.2f}" and sizes[1] < sizes[0]


def test_operations(compared: dict[str, Any], bundles: tuple[Path, Path]) -> None:
    """Counted by hand from the files: fp16 adds casts."""
    graphs = [onnx.load(folder / "model.onnx", load_external_data=False).graph for folder in bundles]
    casts = [sum(node.op_type == "Cast" for node in graph.node) for graph in graphs]
    rows = {row["operation"]: [row["first"], row["second"]] for row in compared["Operations"]}
    assert rows["Cast"] == casts and casts[0] < casts[1]
    assert rows["all"] == [len(graph.node) for graph in graphs] and "MatMul" not in rows


def test_outputs_are_measured_on_the_same_inputs(compared: dict[str, Any], bundles: tuple[Path, Path]) -> None:
    reference = reference_file.read(bundles[0] / bundle.REFERENCE)
    answers = []
    for folder in bundles:
        (graph,) = bundle.read_manifest(folder).graphs
        run = ort.open_graph(folder / graph.file, graph.graph())
        answers.append([run(expectation.case.inputs) for expectation in reference.expectations])
    by_hand = [
        f"{distance(second[name], first[name]).relative_l2:.1e}"
        for first, second in zip(*answers, strict=True)
        for name in sorted(first)
    ]
    assert [row["second from first"] for row in compared["Outputs"]] == by_hand
    assert all(
        float(row["first from PyTorch"]) < 1e-5 < float(row["second from PyTorch"]) for row in compared["Outputs"]
    )


def test_speed_is_measured_for_every_case(compared: dict[str, Any]) -> None:
    assert [row["case"] for row in compared["Speed"]] == ["batch", "cropped"]
    assert all(float(row["first, ms"]) > 0 and float(row["second / first"]) > 0 for row in compared["Speed"])


def test_other_weights_and_outputs_are_named(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "more.toml"
    recipe.write_text(TINY.read_text() + "\n[graph]\nlast_blocks = 1\n")
    (tmp_path / "tiny_cases.toml").write_text((DATA / "tiny_cases.toml").read_text())
    request = pipeline.build_request(str(recipe), weights="synthetic:1", out=tmp_path / "more")
    pipeline.build(request)
    found = bundle_diff.compare(bundles[0], request.out)
    differing = {row["what"] for row in found["What differs"]}
    assert {"weights", "weights' SHA-256", "recipe.graph.last_blocks"} <= differing
    rows = {(row["case"], row["output"]): row for row in found["Outputs"]}
    assert rows[("batch", "block_2_class_token")]["second from first"] == "not there"
    assert float(rows[("batch", "class_token")]["second from first"]) > 0.1


def test_what_cannot_be_compared(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "bytes.toml"
    recipe.write_text(TINY.read_text() + '\n[graph]\ninput = "images"\n')
    (tmp_path / "tiny_cases.toml").write_text((DATA / "tiny_cases.toml").read_text())
    request = pipeline.build_request(str(recipe), weights="synthetic:0", out=tmp_path / "bytes")
    pipeline.export_only(request)
    with pytest.raises(UsageError, match="same inputs"):
        bundle_diff.compare(bundles[0], request.out)
    with pytest.raises(UsageError, match="without a reference"):
        bundle_diff.compare(request.out, request.out)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in bundles[1].iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ValidationFailed, match="damaged"):
        bundle_diff.compare(bundles[0], damaged)


def test_without_onnx_the_rest_is_compared(bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = bundle_diff.compare(*bundles)
    assert found["Operations"] == [{"operation": "not compared: onnx is not installed", "first": "", "second": ""}]
    assert found["Outputs"] and found["Speed"]


def test_shown_as_tables(bundles: tuple[Path, Path]) -> None:
    shown = CliRunner().invoke(cli.app, ["diff", *map(str, bundles)])
    assert shown.exit_code == 0
    assert all(word in shown.stdout for word in ("What differs", "precision", "model.onnx.data", "Cast", "Speed"))
    assert "What differs: nothing" in CliRunner().invoke(cli.app, ["diff", str(bundles[0]), str(bundles[0])]).stdout

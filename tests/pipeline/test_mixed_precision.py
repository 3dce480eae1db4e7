"""`--precision auto`: the smallest set of parts in fp32, found in few trials, recorded, or a clear verdict."""

from __future__ import annotations

import json
from itertools import combinations
from math import ceil, log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.bundle.reference_file import Reference
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.models.dinov2 import fold
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline import mixed_precision
from dinoexport.spec import Case, Expectation, Precision
from dinoexport.validation import validate_bundle
from dinoexport.validation.answers import Bound
from dinoexport.validation.error_analysis import RANGE
from dinoexport.validation.judge import Report, Row
from tests.conftest import DATA

TINY = str(DATA / "tiny_swiglu_reg.toml")
PARTS = tuple("abcdefgh")


@given(st.sets(st.frozensets(st.sampled_from(PARTS), min_size=1), min_size=1, max_size=4))
def test_smallest_set(sufficient: set[frozenset[str]]) -> None:
    """Whatever sets suffice: what is found suffices, and no smaller part of it does, by trying all of them."""
    asked = []

    def holds(parts: tuple[str, ...]) -> bool:
        asked.append(parts)
        return any(enough <= set(parts) for enough in sufficient)

    found = mixed_precision.smallest(PARTS, holds)
    assert any(enough <= set(found) for enough in sufficient) and () not in asked, "that none suffice is known"
    for size in range(len(found)):
        assert not any(any(e <= set(some) for e in sufficient) for some in combinations(found, size))
    needed = len(found)
    assert len(asked) <= 2 * needed * (1 + ceil(log2(len(PARTS) / needed)))


def test_earlier_parts_are_preferred() -> None:
    assert mixed_precision.smallest(PARTS, lambda parts: bool({"b", "g"} & set(parts))) == ("b",)


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose second block overflows fp16, repaired by the command itself."""
    out = tmp_path_factory.mktemp("auto") / "bundle"
    weights = ("--weights", "synthetic-stress:0:100000")
    result = CliRunner().invoke(cli.app, ["build", TINY, *weights, "--precision", "auto", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "Precision: fp16 with residual, blocks.1 in fp32: 8 combinations tried" in result.stdout
    return out


def test_overflow_is_repaired_where_it_is(repaired: Path) -> None:
    """By hand: the sum of block 1 overflows the stream, its product overflows the block. Nothing else does."""
    tried = json.loads((repaired / bundle.PRECISION).read_text())
    assert tried["fp32"] == ["residual", "blocks.1"]
    by_parts = {tuple(trial["fp32"]): trial for trial in tried["trials"]}
    assert "blocks.1/matmul" in by_parts[()]["failed_by"]
    assert not by_parts[("blocks.1",)]["passed"] and by_parts[("residual", "blocks.1")]["passed"]
    manifest = bundle.verify(repaired)
    assert manifest.verdict == "passed" and manifest.precision is Precision.FP16
    assert manifest.report["precision"] == tried
    assert manifest.recipe["graph"]["fp32"] == ["blocks.1"] and manifest.recipe["graph"]["residual"] == "fp32"
    assert validate_bundle.validate(repaired).report.passed
    assert "residual, blocks.1 in fp32" in CliRunner().invoke(cli.app, ["inspect", str(repaired)]).stdout


def test_only_what_must_is_fp32_in_the_graph(repaired: Path) -> None:
    """By the weights' own types in the file: block 1's are fp32, the other blocks' projections fp16."""
    graph = onnx.load(repaired / "model.onnx", load_external_data=False).graph
    types = {weight.name: weight.data_type for weight in graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert {types[name] for name in types if name.startswith("blocks.1.")} == {full}
    for block in (0, 2):
        assert {types[f"blocks.{block}.{name}_weight_IO"] for name in ("qkv", "proj", "first", "last")} == {half}
        assert types[f"blocks.{block}.norm1_weight_D"] == full, "norms follow the residual stream"


def test_trials_are_reused(repaired: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic-stress:0:100000", precision="auto", out=repaired)
    assert "precision" in pipeline.build(request).reused


def test_what_holds_is_left_alone(tmp_path: Path) -> None:
    built = pipeline.build(
        pipeline.build_request(TINY, weights="synthetic:0", precision="auto", out=tmp_path / "bundle")
    )
    assert built.manifest.report["precision"] == {
        "fp32": [], "trials": [{"fp32": [], "passed": True, "failed_by": ""}],
    }  # fmt: skip


def test_nothing_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong fold is no matter of precision: the verdict says so after two trials, and nothing is published."""
    right = fold.Folded.head
    wrong = lambda self: right(fold.Folded(arch=self.arch, read=lambda name: 1.1 * self.read(name)))  # noqa: E731
    monkeypatch.setattr(fold.Folded, "head", wrong)
    asked: list[Any] = []
    problems = mixed_precision._problems
    monkeypatch.setattr(mixed_precision, "_problems", lambda *args: asked.append(args) or problems(*args))
    request = pipeline.build_request(TINY, weights="synthetic:0", precision="auto", out=tmp_path / "bundle")
    with pytest.raises(
        pipeline.NothingHolds, match=r"even with all of residual, norms, softmax, blocks\.0.*relative_l2"
    ):
        pipeline.build(request)
    assert len(asked) == 2 and not request.out.exists()


@pytest.mark.parametrize("part", ["norms", "softmax", "blocks.2"])
def test_each_part_is_in_the_graph(part: str) -> None:
    """A promoted part changes the traced pieces' arithmetic to fp32 and nothing else's."""
    import torch

    request = pipeline.build_request(TINY, weights="synthetic:0", precision=Precision.FP16)
    _, form = mixed_precision.promoted(request.recipe, request.model, (part,))
    (graph,) = form.graphs
    blocks = [call.piece.module for call in form.calls(graph, lambda name: np.zeros(())) if "block" in call.scope]
    seen = [(block.body, block.norms, block.scores) for block in blocks]
    half, full = torch.float16, torch.float32
    assert (
        seen
        == {
            "norms": [(half, full, half)] * 3,
            "softmax": [(half, half, full)] * 3,
            "blocks.2": [(half, half, half)] * 2 + [(full, full, full)],
        }[part]
    )


def test_a_head_is_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DPT head is the first part that goes back to fp32, because it costs least there; then its graph is fp32."""
    request = pipeline.build_request(
        str(DATA / "tiny_heads.toml"),
        weights="synthetic:0",
        head="nyu_dpt",
        head_weights="synthetic:0",
        precision="auto",
    )

    def problems(form: Any, *_: Any) -> dict[str, str]:
        (graph,) = form.graphs
        *_, head = form.calls(graph, lambda name: np.zeros(()))
        return {} if head.piece.arguments["body"] == "float32" else {"odd_grid": "inf in the head"}

    monkeypatch.setattr(mixed_precision, "_problems", problems)
    reference = Reference(name="none", limits=request.limits, expectations=(), refusals=(), kinds={})
    nothing: Any = None
    found = mixed_precision.search(request.recipe, request.model, nothing, reference, tmp_path)
    assert found.fp32 == ("head",) and found.trials[0].failed_by == "inf in the head"
    recipe, form = mixed_precision.promoted(request.recipe, request.model, found.fp32)
    assert recipe.graph["fp32"] == ["head"] and form.promotable == request.model.promotable


def test_a_model_that_overflows_before_its_head_is_repaired(repaired: Path, tmp_path: Path) -> None:
    """A linear head is fp32 anyway: of the backbone what overflows goes back, and no more than without a head."""
    request = pipeline.build_request(
        TINY, weights="synthetic-stress:0:100000", head="linear", head_weights="synthetic:0", precision="auto",
        out=tmp_path / "bundle",
    )  # fmt: skip
    built = pipeline.build(request)
    found = built.manifest.report["precision"]
    assert not found["trials"][0]["passed"] and "overflows" in found["trials"][0]["failed_by"]
    assert found["fp32"] == bundle.read_manifest(repaired).report["precision"]["fp32"] == ["residual", "blocks.1"]
    assert built.manifest.verdict == "passed" and built.manifest.precision is Precision.FP16
    assert {output for row in built.manifest.report["rows"] for output in [row["output"]]} >= {
        "logits",
        "probabilities",
    }
    graph = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False).graph
    half = {weight.name for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16}
    assert {name.split("_")[0] for name in half} >= {"blocks.0.qkv", "blocks.2.qkv"}
    assert not [name for name in half if name.startswith(("head.", "blocks.1."))]
    assert validate_bundle.validate(tmp_path / "bundle").report.passed


def row(case: str, *bounds: tuple[float, float], output: str = "y", problem: str = "") -> Row:
    made = tuple(
        Bound(figure=f"figure {i}", value=value, limit=limit, reason="a test", holds=value <= limit)
        for i, (value, limit) in enumerate(bounds)
    )
    return Row(case=case, why="", output=output, shape=(), distance=None, bounds=made, problem=problem)


def test_a_trial_fails_by_the_first_figure_of_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What overflows comes before what is merely inexact; nothing stays of the graphs that were tried."""
    rows = (
        row("right", (0.1, 1.0)), row("both", (0.5, 1.0), (2.0, 1.0), (3.0, 1.0)), row("both", (4.0, 1.0), output="z"),
        row("no answer", problem="it raised"), row("over", (2.0, 1.0)),
        row("over", output=RANGE, problem="the sum overflows"),
        row("late", (0.5, 1.0)), row("late", (7.0, 1.0), output="z"),
    )  # fmt: skip
    written: list[Any] = []
    given = Report(candidate="a form", reference="r", rows=rows)
    monkeypatch.setattr(
        mixed_precision, "export", lambda graph, calls, place, **_: written.append((graph.name, calls, place))
    )
    monkeypatch.setattr(mixed_precision.runners, "open_candidate", lambda _form, graphs: sorted(graphs))
    monkeypatch.setattr(
        mixed_precision.evaluate, "judged",
        lambda opened, reference, name: written.append(([path.name for path in opened], reference.refusals)) or given,
    )  # fmt: skip
    monkeypatch.setattr(
        mixed_precision.evaluate, "with_ranges", lambda report, _form, _graphs, cases: written.append(cases) or report
    )
    case = Case(name="right", why="", inputs={})
    limits: Any = None
    reference = Reference(
        name="r", limits=limits, expectations=(Expectation(case=case, outputs={}),), refusals=(case,), kinds={}
    )
    form: Any = SimpleNamespace(graphs=(SimpleNamespace(name="model"),), calls=lambda graph, read: (graph.name, read))
    checkpoint: Any = SimpleNamespace(read="read")
    assert mixed_precision._problems(form, checkpoint, reference, tmp_path, {}) == {
        "both": "both/y: figure 1 2, limit 1", "no answer": "no answer/y: it raised",
        "over": "the sum overflows on over", "late": "late/z: figure 0 7, limit 1",
    }  # fmt: skip
    (name, calls, place), *others = written
    assert (name, calls) == ("model", ("model", "read")) and place.parent == tmp_path and not place.exists()
    assert others == [(["model.onnx"], ()), [case]]


def test_weights_that_a_precision_cannot_hold_fail_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any, **__: Any) -> None:
        raise ValidationFailed("blocks.1 overflows", next_step="x")

    monkeypatch.setattr(mixed_precision, "export", export)
    form: Any = SimpleNamespace(graphs=("model",), calls=lambda *_: ())
    cases = [Expectation(case=Case(name=name, why="", inputs={}), outputs={}) for name in "ab"]
    reference: Any = SimpleNamespace(expectations=cases)
    checkpoint: Any = SimpleNamespace(read=None)
    assert mixed_precision._problems(form, checkpoint, reference, tmp_path, {}) == dict.fromkeys(
        "ab", "blocks.1 overflows"
    )


def test_parts_in_a_recipe_are_checked(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "vits14"\nname = "mine"\nprecision = "fp16"\n[graph]\nfp32 = ["block.3"]\n')
    with pytest.raises(UsageError, match=r"no part 'block\.3'\. Did you mean 'blocks\.3'"):
        pipeline.build_request(str(recipe))


def test_export_refuses_auto(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="export measures nothing"):
        pipeline.export_only(pipeline.build_request(TINY, weights="synthetic:0", precision="auto", out=tmp_path / "b"))

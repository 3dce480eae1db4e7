"""What only a GPU can show. Skipped where there is none; `--require gpu` makes that a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoexport import bundle
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Runtime
from dinoexport.validation import validate_bundle
from tests.conftest import DATA

TINY = str(DATA / "tiny_swiglu_reg.toml")


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_plan_is_built_run_and_judged(precision: str, tmp_path: Path) -> None:
    request = pipeline.build_request(
        TINY, weights="synthetic:0", precision=precision, runtime=Runtime.TENSORRT, out=tmp_path / "bundle"
    )
    built = pipeline.build(request)
    assert built.engines.report is not None and built.engines.report.passed
    (facts,) = bundle.verify(request.out).engines
    assert facts.executed.startswith(f"on {facts.device} at ")
    assert facts.fused_attentions == (facts.attentions if precision == "fp16" else 0)
    assert facts.weight_bytes is None or facts.weight_bytes > 0
    assert validate_bundle.validate(request.out).recorded


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_several_profiles_and_a_stripped_plan(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        Path(TINY).read_text()
        + "[profiles.one]\nbatch = { min = 1, opt = 1, max = 1 }\n"
        + "[profiles.many]\nbatch = { min = 1, opt = 4, max = 4 }\n"
        + '[engine]\nprofiles = ["one", "many"]\nstrip_weights = true\ncompatibility = "same-cc"\n'
    )
    (tmp_path / "tiny_cases.toml").write_bytes((DATA / "tiny_cases.toml").read_bytes())
    request = pipeline.build_request(
        str(recipe), weights="synthetic:0", runtime=Runtime.TENSORRT, out=tmp_path / "bundle"
    )
    built = pipeline.build(request)
    assert built.engines.report is not None and built.engines.report.passed and not built.engines.report.not_covered


@pytest.mark.gpu
def test_an_rtx_engine_is_built_run_and_judged(tmp_path: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", runtime=Runtime.TENSORRT_RTX, out=tmp_path / "bundle")
    built = pipeline.build(request)
    assert built.engines.report is not None and built.engines.report.passed

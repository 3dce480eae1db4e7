"""What only a GPU can show. Skipped where there is none; `--require gpu` makes that a failure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dinoexport
from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.config import resources
from dinoexport.config.target import load_target
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Precision, Runtime
from dinoexport.system import hardware
from dinoexport.validation import validate_bundle
from dinoexport.validation.metrics import distance
from tests.conftest import DATA

TINY = str(DATA / "tiny_swiglu_reg.toml")
TINY_TEXT = str(DATA / "tiny_llama.toml")


def _rtx_runs_here() -> bool:
    """Whether the target of this machine's GPU is built with TensorRT-RTX."""
    capabilities = {gpu.compute_capability for gpu in hardware.gpus()[:1]}
    targets = map(load_target, resources.names("recipes/targets"))
    return any(capabilities & {*t.compute_capabilities} and Runtime.TENSORRT_RTX in t.runtimes for t in targets)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.FP32])
@pytest.mark.parametrize("recipe", [TINY, TINY_TEXT])
def test_a_graph_is_judged_on_the_gpu_that_will_run_it(recipe: str, precision: Precision, tmp_path: Path) -> None:
    request = pipeline.build_request(
        recipe, weights="synthetic:0", precision=precision, runtime=Runtime.ONNXRUNTIME, out=tmp_path / "bundle"
    )
    built = pipeline.build(request)
    (gpu, *_) = hardware.gpus()
    assert built.report is not None and built.report.passed
    kind = {"fp16": "f16", "bf16": "bf16", "fp32": "f32"}[precision]
    assert f"on {gpu.name}, {precision} (" in built.report.candidate and f"products in {kind}" in built.report.candidate
    assert "on the CPU" not in built.report.candidate, "a product that the GPU has no kernel for"

    validated = validate_bundle.validate(request.out)
    assert validated.report.passed and validated.report.candidate == built.report.candidate and not validated.not_run
    reference = reference_file.read(request.out / bundle.REFERENCE)
    expected = next(e for e in reference.expectations if e.outputs)
    with dinoexport.load(request.out, device="gpu") as on_gpu:
        assert gpu.name in on_gpu.runs_on
        answers = on_gpu(expected.case.inputs)
    if precision is not Precision.BF16:  # whose graph runs on a CPU only in OpenVINO
        with dinoexport.load(request.out, device="cpu") as on_cpu:
            assert "on the CPU" in on_cpu.runs_on
            for name, there in answers.items():
                here = on_cpu(expected.case.inputs)[name]
                assert not np.array_equal(there, here), f"{name}: the same to the bit: both ran in one place"
                assert distance(there, here).relative_l2 < (1e-5 if precision is Precision.FP32 else 1e-2)


@pytest.mark.gpu
def test_the_cuda_provider_is_what_runs(tmp_path: Path) -> None:
    """With fp32's own arithmetic: TF32 would give a relative error of 1e-4 and more."""
    request = pipeline.build_request(
        TINY, weights="synthetic:3", precision=Precision.FP32, runtime=Runtime.ONNXRUNTIME, out=tmp_path / "bundle"
    )
    report = pipeline.build(request).report
    assert report is not None
    assert max(row.distance.relative_l2 for row in report.rows if row.distance) < 5e-6


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.FP32])
def test_a_plan_is_built_run_and_judged(precision: Precision, tmp_path: Path) -> None:
    request = pipeline.build_request(
        TINY, weights="synthetic:0", precision=precision, runtime=Runtime.TENSORRT, out=tmp_path / "bundle"
    )
    built = pipeline.build(request)
    assert built.engines.report is not None and built.engines.report.passed
    (facts,) = bundle.verify(request.out).engines
    assert facts.executed.startswith(f"on {facts.device} at ")
    assert facts.fused_attentions == (facts.attentions if precision is Precision.FP16 else 0)
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
@pytest.mark.skipif(not _rtx_runs_here(), reason="TensorRT-RTX does not know this GPU")
def test_an_rtx_engine_is_built_run_and_judged(tmp_path: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", runtime=Runtime.TENSORRT_RTX, out=tmp_path / "bundle")
    built = pipeline.build(request)
    assert built.engines.report is not None and built.engines.report.passed

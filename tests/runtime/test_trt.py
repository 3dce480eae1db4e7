"""How an engine is run: against a stand-in for GPU and TensorRT in host memory (`standin/gpu.py`), and labelled so.

What this cannot show, that the calls do on a GPU what NVIDIA's pages say, `test_on_gpu.py` shows where there is one.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import EngineFacts, Manifest
from dinoexport.config.recipe import Range
from dinoexport.engines.profiles import profile
from dinoexport.errors import BuildError, InputRefused, MissingRequirement, OutsideProfile, UsageError
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline import preflight
from dinoexport.report import html_report
from dinoexport.runtime import engine_header, ort, trt
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Graph, Precision, Runtime
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu
from dinoexport.validation import validate_bundle
from tests.conftest import DATA
from tests.standin.gpu import Device

A100 = Gpu(
    index=0,
    name="NVIDIA A100-SXM4-40GB",
    uuid="GPU-1",
    compute_capability="8.0",
    memory_bytes=4 * 10**10,
    driver="580.1",
)
SMALL = {
    "batch": Range(min=1, opt=1, max=1),
    "height": Range(min=14, opt=14, max=28),
    "width": Range(min=14, opt=14, max=28),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny recipe with an fp32 graph."""
    out = tmp_path_factory.mktemp("published") / "bundle"
    pipeline.build(
        pipeline.build_request(str(DATA / "tiny_swiglu_reg.toml"), weights="synthetic:0", target="cpu", out=out)
    )
    return out


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The stand-in, where `runtime/trt.py` will look for CUDA and TensorRT."""
    made = Device()
    bindings: Any = types.ModuleType("cuda.bindings")
    bindings.runtime = made.cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", made.tensorrt())
    monkeypatch.setattr(trt, "require", lambda *_: None)
    return made


def graph_of(published: Path) -> Graph:
    return bundle.read_manifest(published).graphs[0].graph()


def opened(published: Path, folder: Path, **named: dict[str, Range]) -> trt.Engine:
    """The bundle's graph as the stand-in's engine, with these profiles."""
    graph = graph_of(published)
    (folder / "model.plan").write_bytes(b"ONNX" + str(published / "model.onnx").encode())
    profiles = [profile(name, graph, ranges) for name, ranges in named.items()]
    return trt.open_engine(folder / "model.plan", graph, runtime=Runtime.TENSORRT, profiles=profiles)


def pixels(*shape: int, seed: int = 0) -> dict[str, Any]:
    return {"pixels": np.random.default_rng(seed).standard_normal(shape, np.float32)}


def test_answers_are_the_graphs_whatever_came_before(published: Path, tmp_path: Path, device: Device) -> None:
    """Sizes up and down, back and forth between profiles, again and again: what is stale would show."""
    engine = opened(published, tmp_path, small=SMALL, whole={})
    exact = ort.open_graph(published / "model.onnx", graph_of(published))
    shapes = [(1, 3, 14, 14), (1, 3, 28, 14), (4, 3, 42, 28), (1, 3, 14, 14), (2, 3, 14, 14), (1, 3, 28, 14)]
    for seed, shape in enumerate([shape for shape in shapes for _ in range(4)]):
        inputs = pixels(*shape, seed=seed)
        answers, expected = engine(inputs), exact(inputs)
        assert answers.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(answers[name], array)
    assert [context.profile for context in device.opened[0].contexts] == [0, 1]


def test_a_fixed_shape_is_replayed_and_allocates_nothing(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    engine(pixels(2, 3, 28, 28))
    after_the_first = device.calls.count("malloc")
    for seed in range(9):
        engine(pixels(2, 3, 28, 28, seed=seed))
    assert device.calls.count("malloc") == after_the_first
    assert (device.calls.count("run"), device.calls.count("replay")) == (1, 9)
    engine(pixels(1, 3, 14, 14))
    assert device.calls.count("malloc") == after_the_first, "smaller shapes fit the buffers that are there"
    assert device.calls[-2:] == ["graph destroyed", "run"]


def test_kernels_that_cannot_be_captured_just_run(published: Path, tmp_path: Path, device: Device) -> None:
    device.captures = False
    engine = opened(published, tmp_path, whole={})
    exact = ort.open_graph(published / "model.onnx", graph_of(published))
    for seed in range(3):
        inputs = pixels(1, 3, 14, 14, seed=seed)
        np.testing.assert_array_equal(engine(inputs)["class_token"], exact(inputs)["class_token"])
    assert device.calls.count("replay") == 0 and device.calls.count("error cleared") == 1


def test_results_are_the_callers_own(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    first = engine(pixels(1, 3, 14, 14, seed=1))["class_token"]
    kept = first.copy()
    engine(pixels(1, 3, 14, 14, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_a_strided_input_is_read_as_it_looks(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    wide = pixels(1, 3, 14, 28)["pixels"]
    strided = {"pixels": wide[..., ::2]}
    packed = {"pixels": np.ascontiguousarray(wide[..., ::2])}
    np.testing.assert_array_equal(engine(strided)["class_token"], engine(packed)["class_token"])


def test_what_no_profile_covers_is_refused(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, small=SMALL)
    with pytest.raises(OutsideProfile, match="small"):
        engine(pixels(2, 3, 14, 14))
    with pytest.raises(InputRefused, match="outside 1 to 4"):
        engine(pixels(5, 3, 14, 14))
    assert not device.opened[0].contexts


def test_close_gives_everything_back(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    for _ in range(3):
        engine(pixels(1, 3, 14, 14))
    engine.close()
    assert not device.buffers and device.calls[-1] == "destroy" and "graph destroyed" in device.calls


def test_a_full_device_and_a_broken_engine_are_one_error(published: Path, tmp_path: Path, device: Device) -> None:
    device.memory_bytes = 1000
    with pytest.raises(BuildError, match="cudaErrorMemoryAllocation"):
        opened(published, tmp_path, whole={})(pixels(1, 3, 28, 28))
    (tmp_path / "model.plan").write_bytes(b"ftrt")
    with pytest.raises(BuildError, match=r"cannot open model\.plan"):
        trt.open_engine(tmp_path / "model.plan", graph_of(published), runtime=Runtime.TENSORRT, profiles=[])


def with_engine(published: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the bundle that holds the stand-in's engine as well."""
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = bundle.read_manifest(folder)
    (folder / "model.plan").write_bytes(b"ONNX" + str(folder / "model.onnx").encode())
    (folder / "model.plan.log").write_text("built")
    graph = manifest.graphs[0].graph()
    facts: dict[str, Any] = {
        "graph": "model", "file": "model.plan", "runtime": "tensorrt", "runtime_version": "11.4.0.106",
        "compute_capabilities": ["8.0"], "device": A100.name, "precision": "fp32",
        "profiles": {"whole": dict(profile("whole", graph, {}).shapes)}, "size_bytes": 1, "weight_bytes": None,
        "scratch_bytes": 0, "attentions": 2, "fused_attentions": 0, "build_s": 1.0, "peak_memory_bytes": 1,
        "log": "model.plan.log", "log_sha256": "0" * 64,
    }  # fmt: skip
    new = bundle.describe(folder, ["model.plan", "model.plan.log"], "engine")
    engines = (EngineFacts.model_validate(facts | changes),)
    manifest = manifest.model_copy(update={"engines": engines, "files": (*manifest.files, *new)})
    assert bundle.rewrite_manifest(folder, manifest)
    return folder


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: (A100,))
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _: "11.4.0.106")


def test_validate_on_the_target_finishes_the_proof(published: Path, tmp_path: Path, device: Device, a100: None) -> None:
    folder = with_engine(published, tmp_path / "bundle")
    validated = validate_bundle.validate(folder)
    assert validated.report.passed and validated.recorded and not validated.not_run
    assert validated.report.candidate == "tensorrt 11.4.0.106 on NVIDIA A100-SXM4-40GB, fp32"
    (facts,) = bundle.verify(folder).engines
    assert facts.executed.startswith("on NVIDIA A100-SXM4-40GB at 20") and facts.report["passed"]
    assert "replay" in device.calls, "what was asked again was answered by the graph that was captured"
    assert validated.report.determinism is not None and validated.report.determinism.one_thread is None
    assert validate_bundle.validate(folder, runtime=Runtime.ONNXRUNTIME).report.candidate.startswith(
        ("ONNX Runtime", "OpenVINO")
    )


def test_without_a_gpu_the_graph_is_judged_and_it_is_said(published: Path, tmp_path: Path) -> None:
    folder = with_engine(published, tmp_path / "bundle")
    before = (folder / bundle.MANIFEST).read_bytes()
    validated = validate_bundle.validate(folder)
    assert validated.report.passed and not validated.recorded
    assert validated.not_run == "model.plan was not run: no GPU here."
    assert (folder / bundle.MANIFEST).read_bytes() == before
    with pytest.raises(MissingRequirement, match="no GPU here"):
        validate_bundle.validate(folder, runtime=Runtime.TENSORRT)
    with pytest.raises(UsageError, match="nothing for tensorrt_rtx"):
        validate_bundle.validate(folder, runtime=Runtime.TENSORRT_RTX)


def test_a_wrong_engine_is_found_out_and_not_recorded(
    published: Path, tmp_path: Path, device: Device, a100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.standin import gpu

    right = gpu.Context._outputs
    monkeypatch.setattr(gpu.Context, "_outputs", lambda self: {n: a * 1.001 for n, a in right(self).items()})
    folder = with_engine(published, tmp_path / "bundle")
    validated = validate_bundle.validate(folder)
    assert not validated.report.passed and not validated.recorded
    assert bundle.read_manifest(folder).engines[0].executed == "never"


def test_cases_outside_the_profiles_are_listed_not_passed(
    published: Path, tmp_path: Path, device: Device, a100: None
) -> None:
    graph = graph_of(published)
    single = {"single": dict(profile("single", graph, {"batch": Range(min=1, opt=1, max=1)}).shapes)}
    report = validate_bundle.validate(with_engine(published, tmp_path / "bundle", profiles=single)).report
    assert report.passed and report.not_covered == ("batch",)
    assert {row.case for row in report.rows} == {"cropped"}
    none = {"none": dict(profile("none", graph, {"batch": Range(min=4, opt=4, max=4)}).shapes)}
    report = validate_bundle.validate(with_engine(published, tmp_path / "other", profiles=none)).report
    assert not report.passed and not report.rows, "an engine that answers nothing proves nothing"


def test_build_on_a_gpu_judges_the_engine_or_rejects_it(
    published: Path, device: Device, a100: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole pipeline with the stand-in for compiler and GPU: passed and recorded, or rejected with its figures."""
    from dinoexport.engines import builder
    from dinoexport.system import subprocess_job
    from tests.standin import gpu

    def compiles(_module: str, job: dict[str, Any], log: Path, **_: Any) -> subprocess_job.Finished:
        stays = tmp_path / "onnx"  # the stage's folder moves on
        stays.mkdir(exist_ok=True)
        for name in ("model.onnx", "model.onnx.data"):
            (stays / name).write_bytes(Path(job["onnx"]).with_name(name).read_bytes())
        Path(job["engine"]).write_bytes(b"ONNX" + str(stays / "model.onnx").encode())
        log.write_text("[I] built")
        said = {"scratch_bytes": 5, "weight_bytes": None, "layers": []}
        return subprocess_job.Finished(said=said, peak_memory_bytes=7)

    monkeypatch.setattr(subprocess_job, "run", compiles)
    monkeypatch.setattr(builder, "require", lambda *_: None)
    monkeypatch.setattr(preflight, "require", lambda *_: None)
    header = engine_header.Header(runtime=Runtime.TENSORRT, version="11.4.0.106")
    monkeypatch.setattr(engine_header, "read_header", lambda _: header)
    request = pipeline.build_request(
        str(DATA / "tiny_swiglu_reg.toml"), weights="synthetic:0", precision=Precision.FP32, out=tmp_path / "bundle"
    )
    assert (request.chosen.name, request.runtime) == ("a100", Runtime.TENSORRT), "the GPU that is here"
    drawn: list[dict[str, html_report.Kept]] = []
    render = html_report.render
    monkeypatch.setattr(html_report, "render", lambda *args: drawn.append(args[-1]) or render(*args))
    built = pipeline.build(request)
    assert built.engines.report is not None and built.engines.report.passed
    assert built.report is not None
    assert list(drawn[0]) == [built.report.candidate, built.engines.report.candidate], "the page is given both answers"
    assert drawn[0][built.engines.report.candidate].errors and built.engines.report.determinism is not None
    manifest = bundle.verify(request.out)
    assert manifest.engines[0].executed.startswith("on NVIDIA A100") and manifest.engines[0].scratch_bytes == 5

    right = gpu.Context._outputs
    monkeypatch.setattr(gpu.Context, "_outputs", lambda self: {n: a * 1.001 for n, a in right(self).items()})
    before: Manifest = bundle.read_manifest(request.out)
    with pytest.raises(pipeline.Rejected) as rejected:
        pipeline.build(request)
    assert rejected.value.report.candidate.startswith("tensorrt")
    assert bundle.read_manifest(request.out) == before, "the good one stays"
    with pytest.raises(pipeline.Rejected):
        pipeline.build(request, keep_rejected=True)
    rejected_manifest = bundle.read_manifest(request.out)
    assert rejected_manifest.verdict == "rejected"
    (facts,) = rejected_manifest.engines
    assert facts.executed == "never" and not facts.report["passed"]

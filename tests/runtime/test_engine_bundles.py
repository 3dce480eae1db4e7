"""Bundles with an engine, where there is a GPU: against the stand-in of `standin/gpu.py`, and labelled so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dinoexport
from dinoexport import bundle, cli
from dinoexport.bundle import EngineFacts, Manifest, signing
from dinoexport.config.recipe import Range
from dinoexport.engines.profiles import profile
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline import preflight
from dinoexport.report import html_report
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Precision, Profile, Runtime
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu
from dinoexport.validation import validate_bundle
from tests.conftest import DATA
from tests.runtime.test_trt import graph_of, published, stand_in
from tests.standin import face, gpu
from tests.standin.gpu import Device

__all__ = ["published"]
A100 = Gpu(
    index=0,
    name="NVIDIA A100-SXM4-40GB",
    uuid="GPU-1",
    compute_capability="8.0",
    memory_bytes=4 * 10**10,
    driver="580.1",
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The stand-in with the face of the newest TensorRT."""
    return stand_in(face.VERSIONS[-1], monkeypatch)


def with_engine(published: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the bundle that holds the stand-in's engine as well."""
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = bundle.read_manifest(folder)
    graph = manifest.graphs[0].graph()
    profiles = changes.get("profiles") or {"whole": dict(profile("whole", graph, {}).shapes)}
    found = [Profile(name=name, shapes=shapes) for name, shapes in profiles.items()]
    (folder / "model.plan").write_bytes(gpu.plan(folder / "model.onnx", found))
    (folder / "model.plan.log").write_text("built")
    facts: dict[str, Any] = {
        "graph": "model", "file": "model.plan", "runtime": "tensorrt", "runtime_version": "11.4.0.106",
        "compute_capabilities": ["8.0"], "device": A100.name, "precision": "fp32",
        "profiles": profiles, "size_bytes": 1, "weight_bytes": None,
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


def test_a_merged_bundle_is_judged_on_each_of_its_cards(
    published: Path, tmp_path: Path, device: Device, a100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This card's engine is opened and recorded; the other's is neither, and its own verdict stays."""
    folder = with_engine(published, tmp_path / "bundle")
    (folder / "model.sm90.plan").write_bytes((folder / "model.plan").read_bytes())
    manifest = bundle.read_manifest(folder)
    h100 = manifest.engines[0].changed(file="model.sm90.plan", compute_capabilities=("9.0",), device="NVIDIA H100")
    files = (*manifest.files, *bundle.describe(folder, ["model.sm90.plan"], "engine"))
    both = manifest.model_copy(update={"engines": (h100, *manifest.engines), "files": files})
    assert bundle.rewrite_manifest(folder, both)
    assert validate_bundle.validate(folder).recorded
    theirs, ours = bundle.verify(folder).engines
    assert theirs.executed == "never" and ours.executed.startswith("on NVIDIA A100")
    monkeypatch.setattr(
        hardware, "gpus", lambda: (dataclasses.replace(A100, name="NVIDIA H100", compute_capability="9.0"),)
    )
    assert validate_bundle.validate(folder).report.candidate.endswith("on NVIDIA H100, fp32")
    theirs, again = bundle.verify(folder).engines
    assert theirs.executed.startswith("on NVIDIA H100") and again == ours
    monkeypatch.setattr(hardware, "gpus", lambda: (dataclasses.replace(A100, compute_capability="8.9"),))
    with pytest.raises(MissingRequirement, match=r"model.sm90.plan is for SM 9.0.*model.plan is for SM 8.0"):
        validate_bundle.validate(folder, runtime=Runtime.TENSORRT)


def test_a_plan_that_holds_code_runs_only_for_who_is_known(
    published: Path, tmp_path: Path, device: Device, a100: None
) -> None:
    device.host_code = True
    folder = with_engine(published, tmp_path / "bundle", version_compatible=True)
    validated = validate_bundle.validate(folder)
    assert validated.report.passed and "holds code that would run on this machine" in validated.not_run
    assert not device.opened, "the graph was judged instead"
    with pytest.raises(MissingRequirement, match="its author is unknown") as refused:
        validate_bundle.validate(folder, runtime=Runtime.TENSORRT)
    assert "--verify KEY" in refused.value.next_step and "--trust-plan" in refused.value.next_step
    assert validate_bundle.validate(folder, trust_plan=True).report.candidate.startswith("tensorrt 11.4")
    assert bundle.read_manifest(folder).engines[0].executed.startswith("on NVIDIA A100")


@pytest.mark.parametrize(
    ("words", "trusted"), [((), False), (("--trust-plan",), True), (("--verify", "their.pub"), True)]
)
def test_the_command_line_trusts_a_signature_that_holds_or_the_users_word(
    words: tuple[str, ...], trusted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[bool] = []

    def validate(_folder: Path, **settings: Any) -> Any:
        asked.append(settings["trust_plan"] or settings["signed"] is not None)
        raise UsageError("enough", next_step="")

    monkeypatch.setattr(validate_bundle, "validate", validate)
    monkeypatch.setattr(
        signing, "verify", lambda folder, _key: signing.Verified(fingerprint="theirs", manifest=object())
    )
    monkeypatch.setattr(signing, "signed_by", lambda _folder: None)
    assert CliRunner().invoke(cli.app, ["validate", str(tmp_path), *words]).exit_code == 2
    assert asked == [trusted]


@pytest.mark.parametrize(
    ("words", "trusted"), [({}, False), ({"trust_plan": True}, True), ({"verify": "their.pub"}, True)]
)
def test_python_trusts_the_same(
    words: dict[str, Any], trusted: bool, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def validate(_folder: Path, **settings: Any) -> Any:
        asked.append(settings["trust_plan"])
        raise UsageError("enough", next_step="")

    monkeypatch.setattr(validate_bundle, "validate", validate)
    manifest = bundle.read_manifest(published)
    monkeypatch.setattr(signing, "verify", lambda *_: signing.Verified(fingerprint="theirs", manifest=manifest))
    with pytest.raises(UsageError, match="enough"):
        dinoexport.load(published, **words).validate()
    assert asked == [trusted]


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

    def compiles(module: str, job: dict[str, Any], log: Path, **_: Any) -> subprocess_job.Finished:
        if module == "dinoexport.engines.inspector":
            said = {"scratch_bytes": 5, "weight_bytes": None, "layers": []}
            return subprocess_job.Finished(said=said, peak_memory_bytes=7)
        stays = tmp_path / "onnx"  # the stage's folder moves on
        stays.mkdir(exist_ok=True)
        for name in ("model.onnx", "model.onnx.data"):
            (stays / name).write_bytes(Path(job["onnx"]).with_name(name).read_bytes())
        profiles = [Profile(name="", shapes=shapes) for shapes in job["profiles"]]
        Path(job["engine"]).write_bytes(gpu.plan(stays / "model.onnx", profiles))
        log.write_text("[I] built")
        return subprocess_job.Finished(said={}, peak_memory_bytes=7)

    monkeypatch.setattr(subprocess_job, "run", compiles)
    monkeypatch.setattr(builder, "require", lambda *_: None)
    monkeypatch.setattr(preflight, "require", lambda *_: None)
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

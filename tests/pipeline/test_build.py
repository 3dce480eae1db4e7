"""A build as a whole: what it publishes, what it reuses, and that nothing that befalls it leaves half a bundle."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed, WeightsError
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.stages.export import graph_recipe
from dinoexport.spec import Precision
from dinoexport.system import untrusted
from dinoexport.validation import evaluate, validate_bundle
from tests.conftest import DATA, HEARING_SIGINT

TINY = str(DATA / "tiny_swiglu_reg.toml")


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "dinoexport", *args]


def build_command(out: Path) -> list[str]:
    """With one runtime: measuring which is fastest takes as long as all the rest of a small build."""
    return command("build", TINY, "--weights", "synthetic:0", "--out", str(out), "--runtime", "onnxruntime")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle, built once. PyTorch's answers are read once for all stages: they are the largest file but one."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    opened: list[str] = []
    real = untrusted._open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrusted, "_open", lambda path, *more: opened.append(path.name) or real(path, *more))
        pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", out=out))
    assert opened.count(bundle.REFERENCE) == 2, "hashed when it is written, then read"
    return out


def leftovers(folder: Path) -> list[str]:
    """Everything in `folder` that is neither a finished bundle nor a finished stage."""
    return sorted(
        path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".part", ".tmp", ".previous"))
    )


def test_bundle_is_all_there(built: Path) -> None:
    manifest = bundle.verify(built)
    assert {file.name for file in manifest.files} == {
        "model.onnx", "model.onnx.data", "reference.npz", "report.json", "report.html", "sbom.cdx.json",
    }  # fmt: skip
    assert {path.name for path in built.iterdir()} == {file.name for file in manifest.files} | {bundle.MANIFEST}
    assert manifest.verdict == "passed" and manifest.checkpoint.source == "synthetic:0"
    assert {"torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "python"} <= manifest.versions.keys()
    assert "bias" in manifest.card and "limits" in manifest.card and "intended_use" in manifest.card
    report = json.loads((built / bundle.REPORT_JSON).read_text())
    assert report["passed"] and len(report["rows"]) == 3 * 2
    assert manifest.report["rows"] == report["rows"]
    assert leftovers(built.parent) == []
    assert [path.name for path in built.parent.iterdir()] == ["bundle"]


def test_onnx_says_where_it_came_from(built: Path) -> None:
    import onnx

    onnx.checker.check_model(built / "model.onnx", full_check=True)
    model = onnx.load(built / "model.onnx", load_external_data=False)
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts["dinoexport.variant"] == "tiny_swiglu_reg"
    assert facts["dinoexport.checkpoint_sha256"] == bundle.read_manifest(built).checkpoint.sha256
    assert json.loads(facts["dinoexport.recipe"])["model"]["depth"] == 3
    assert "torch" in json.loads(facts["dinoexport.versions"])
    assert str(Path.home()).encode() not in (built / "model.onnx").read_bytes()
    locations = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}


def test_the_graph_says_nothing_that_did_not_decide_it(tmp_path: Path) -> None:
    """Addresses of heads, an engine's choices and tables left at their defaults are no part of the graph's bytes."""
    (tmp_path / "plain.toml").write_text('base = "vits14"\n')
    (tmp_path / "more.toml").write_text(
        'base = "vits14"\n[preprocess]\n[heads.mine]\nurl = "https://example.org/head.pth"\n'
    )
    plain, more = (graph_recipe(pipeline.build_request(str(tmp_path / f"{name}.toml"))) for name in ("plain", "more"))
    assert plain.keys() == {
        "family",
        "graph",
        "licence",
        "model",
        "name",
        "precision",
        "profile",
        "validation",
        "weights",
    }
    assert more == plain | {"name": more["name"]}


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    """In fp16, for which there is one runtime: nothing is chosen by the clock."""
    built = tmp_path / "bundle"
    pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", precision=Precision.FP16, out=built))
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    again = [*build_command(tmp_path / "again"), "--precision", "fp16"]
    subprocess.run(again, check=True, capture_output=True, env=environment)
    for name in ("model.onnx", "model.onnx.data", "reference.npz", "report.html", "sbom.cdx.json"):
        assert (built / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_same_weights_at_another_path_are_the_same_graph(tmp_path: Path) -> None:
    import safetensors.numpy

    request = pipeline.build_request(TINY)
    tensors = {name: request.model.synthetic(name, 0) for name in request.model.tensors}
    graphs = set()
    for name in ("here", "there"):
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
        weights = str(tmp_path / f"{name}.safetensors")
        built = pipeline.export_only(pipeline.build_request(TINY, weights=weights, out=tmp_path / "bundle"))
        graphs.add((built.folder / "model.onnx").read_bytes())
        assert built.manifest.checkpoint.source == f"{name}.safetensors", "its name, not where somebody keeps it"
    assert len(graphs) == 1 and built.reused == ("export",)
    assert str(tmp_path).encode() not in graphs.pop()


def test_reuse_follows_the_key(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def reused(**changes: Any) -> tuple[str, ...]:
        force = changes.pop("force", False)
        return pipeline.build(
            pipeline.build_request(TINY, **{"weights": "synthetic:0", "out": out, **changes}), force=force
        ).reused

    assert reused() == ()
    assert reused() == ("export", "reference")
    assert reused(force=True) == ()
    assert reused(weights="synthetic:1") == ()
    assert reused(weights="synthetic:1", precision=Precision.FP16) == ()


def test_tampered_stage_is_not_reused(tmp_path: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "bundle")
    pipeline.build(request)
    data = request.out / "model.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    assert pipeline.build(request).reused == ("reference",)


def test_validate_needs_no_torch_and_no_network(built: Path) -> None:
    """A process in which importing torch, onnx or opening a socket is an error."""
    script = (
        "import socket, sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors'): sys.modules[name] = None\n"
        "socket.socket.connect = None\n"
        "from dinoexport.cli import main\n"
        f"sys.argv = ['dinoexport', 'validate', {str(built)!r}, '--json']\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["report"]["passed"]


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "reference.npz", "report.json", "report.html", "manifest.json"]
)
def test_validate_notices_a_changed_byte(built: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in built.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / name).read_bytes())
    content[random.randrange(len(content))] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValidationFailed):
        validate_bundle.validate(copy)


def test_wrong_tokens_publish_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One LayerScale is left out of the fold: the judge sees it, nothing appears, the exit code is 1."""
    from dinoexport.models.dinov2 import fold

    right = fold.Folded.block

    def without_layer_scale(self: Any, i: int) -> Any:
        read = lambda name: np.ones_like(self.read(name)) if name == "blocks.1.ls1.gamma" else self.read(name)  # noqa: E731
        return right(fold.Folded(arch=self.arch, read=read), i)

    monkeypatch.setattr(fold.Folded, "block", without_layer_scale)
    request = pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "bundle")
    with pytest.raises(pipeline.Rejected) as rejected:
        pipeline.build(request)
    assert rejected.value.exit_code == 1 and rejected.value.report.failures
    assert not request.out.exists()
    with pytest.raises(pipeline.Rejected):
        pipeline.build(request, keep_rejected=True)
    assert bundle.verify(request.out).verdict == "rejected"
    assert not validate_bundle.validate(request.out).report.passed


def test_rejected_build_leaves_the_old_bundle(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "bundle")
    pipeline.build(request)
    before = (request.out / bundle.MANIFEST).read_bytes()
    monkeypatch.setattr(type(request.model), "drive", lambda self, runners, inputs: {})
    with pytest.raises(pipeline.Rejected):
        pipeline.build(request)
    assert (request.out / bundle.MANIFEST).read_bytes() == before


def test_export_is_marked_unjudged(tmp_path: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "bundle")
    exported = pipeline.export_only(request)
    assert exported.manifest.verdict == "unjudged" and not (request.out / bundle.REFERENCE).exists()
    with pytest.raises(UsageError, match="without a reference"):
        validate_bundle.validate(request.out)
    assert pipeline.build(request).reused == ("export",)


def test_validate_on_images_of_ones_own(built: Path, tmp_path: Path) -> None:
    from PIL import Image

    for i, size in enumerate([(300, 200), (224, 500)]):
        noise = np.random.RandomState(i).randint(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    validated = validate_bundle.validate(built, images=tmp_path)
    assert validated.report.passed and {row.case for row in validated.report.rows} == {"0.png", "1.png"}
    assert len(validated.skipped) == 1 and "broken.jpg" in validated.skipped[0]
    with pytest.raises(ValidationFailed, match="not what the bundle was built from"):
        validate_bundle.validate(built, images=tmp_path, weights="synthetic:1")


def test_many_images_are_asked_a_few_at_a_time(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more images are held at once than are answered at once, and no image is lost or asked twice."""
    from PIL import Image

    for i in range(7):
        noise = np.random.RandomState(i).randint(0, 256, (60, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(validate_bundle, "_IMAGES_AT_ONCE", 3)
    asked: list[int] = []
    ask = evaluate.compute_reference
    monkeypatch.setattr(
        evaluate,
        "compute_reference",
        lambda m, c, cases, *a, **k: asked.append(len(cases)) or ask(m, c, cases, *a, **k),
    )
    validated = validate_bundle.validate(built, images=tmp_path, explained=True)
    assert asked == [3, 3, 1] and validated.report.passed
    assert [row.case for row in validated.report.rows[::3]] == [f"{i}.png" for i in range(7)]
    assert validated.growth is not None and validated.growth.case in {f"{i}.png" for i in range(7)}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL leaves no bundle or a whole one, and the next run succeeds; the seed is in the failure's message."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    out = tmp_path / "bundle"
    started = time.monotonic()
    subprocess.run(build_command(tmp_path / "timing"), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    for _ in range(4):
        process = subprocess.Popen(build_command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.0) * whole_s)
        process.kill()
        process.wait()
        if out.exists():
            assert bundle.verify(out).verdict == "passed", f"seed {seed}"
    finished = subprocess.run(build_command(out), check=False, capture_output=True, text=True)
    assert finished.returncode == 0, f"seed {seed}: {finished.stderr}"
    assert bundle.verify(out).verdict == "passed"
    assert leftovers(tmp_path) == [], f"seed {seed}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "bundle"
    words = [*HEARING_SIGINT, *build_command(out)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("tracing"))
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert not out.exists() and leftovers(tmp_path) == []


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the kernel refuses the write in the same way."""

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = subprocess.run(
        build_command(tmp_path / "bundle"), check=False, capture_output=True, text=True, preexec_fn=small_files_only
    )
    assert result.returncode == 4, result.stderr
    assert "No room left" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "bundle").exists() and leftovers(tmp_path) == []


def test_too_little_disk_is_seen_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(MissingRequirement, match="needs about"):
        pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "bundle"))


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MissingRequirement, match="cannot be written"):
        pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "file" / "bundle"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("somebody's")
    with pytest.raises(UsageError, match="is not a bundle"):
        pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path / "data"))
    assert (tmp_path / "data" / "precious").read_text() == "somebody's"


def test_nan_in_the_weights_publishes_nothing(tmp_path: Path) -> None:
    import safetensors.numpy

    model = pipeline.build_request(TINY).model
    tensors = {name: model.synthetic(name, 0) for name in model.tensors}
    tensors["blocks.2.mlp.w3.weight"][5, 5] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "nan.safetensors")
    request = pipeline.build_request(TINY, weights=str(tmp_path / "nan.safetensors"), out=tmp_path / "bundle")
    with pytest.raises(WeightsError, match=r"blocks\.2\.mlp\.w3\.weight .* NaN"):
        pipeline.build(request)
    assert not request.out.exists() and leftovers(tmp_path) == []


def test_impossible_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no target"):
        pipeline.build_request(TINY, target="cpux")

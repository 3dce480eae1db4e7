"""`compile` and `merge`: engines from a bundle's own ONNX, without torch, onnx or the checkpoint.

TensorRT-RTX compiles here for real. Classic TensorRT needs its card; where a test is about what becomes of its plans, a
plan of our own stands in for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.bundle import onnx_file, signing
from dinoexport.engines import builder
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline import compile_bundle as compiling
from dinoexport.pipeline import preflight
from dinoexport.pipeline.stages import engine as engine_stage
from dinoexport.serving.triton import model_repository
from dinoexport.spec import Runtime
from dinoexport.system import files, hardware
from dinoexport.validation import evaluate, judge
from tests.conftest import DATA
from tests.standin import plans

# On a machine that only serves none of these is there; an import of one fails the test.
_BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'onnx', 'onnxscript', 'onnx_ir', 'cyclonedx', 'jinja2', 'sklearn'}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return real(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
"""


@pytest.fixture(scope="module")
def built(tiny_bundle: Path) -> Path:
    """A tiny fp32 bundle without an engine."""
    return tiny_bundle


@pytest.fixture(scope="module")
def for_l4(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled by a process that has neither torch nor onnx, into another bundle."""
    folder = tmp_path_factory.mktemp("l4")
    (folder / "sitecustomize.py").write_text(_BARE)
    words = [
        "compile",
        str(built),
        "--target",
        "l4",
        "--runtime",
        "tensorrt_rtx",
        "--out",
        str(folder / "out"),
        "--json",
    ]
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ran = subprocess.run(
        [sys.executable, "-m", "dinoexport", *words],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout)
    assert "no GPU here" in said["not_run"] and "cyclonedx" in said["notes"][0] and said["report"] is None
    return folder / "out"


def test_compiles_without_torch(built: Path, for_l4: Path) -> None:
    before, after = bundle.read_manifest(built), bundle.verify(for_l4)
    (engine,) = after.engines
    assert (engine.runtime, engine.compute_capabilities, engine.executed) == (Runtime.TENSORRT_RTX, ("8.9",), "never")
    assert engine.attentions == 3 and after.target == "l4" and after.verdict == "passed"
    assert {f.name: f.sha256 for f in before.files if f.name.startswith("model.onnx")}.items() <= {
        f.name: f.sha256 for f in after.files
    }.items()
    assert {path.name for path in for_l4.iterdir()} == {f.name for f in after.files} | {bundle.MANIFEST}
    assert before.engines == () and bundle.verify(built) == before  # the other one was left alone
    assert json.loads((for_l4 / bundle.ENGINES).read_text())[0]["file"] == "model.rtx"


def test_attentions_are_counted_as_onnx_shows_them(built: Path) -> None:
    import onnx

    nodes = onnx.load(built / "model.onnx", load_external_data=False).graph.node
    assert onnx_file.attention_count(built / "model.onnx") == sum(node.op_type == "Softmax" for node in nodes) == 3


def fake_plan(onnx: Path, graph: Any, folder: Path, **asked: Any) -> builder.BuiltEngine:
    """`builder.build` without a compiler, another plan each time."""
    return plans.written(graph, folder, capabilities=tuple(asked["compute_capabilities"]), content=os.urandom(100))


def on(card: str, capability: str, patch: pytest.MonkeyPatch) -> None:
    """As if this machine had the card and classic TensorRT."""
    gpu = hardware.Gpu(
        index=0, name=card, uuid="GPU-1", compute_capability=capability, memory_bytes=80 * 10**9, driver="590.1"
    )
    patch.setattr(hardware, "gpus", lambda: (gpu,))
    patch.setattr(preflight, "compiler", lambda *_: None)
    patch.setattr(engine_stage.builder, "build", fake_plan)


def test_plans_of_several_cards_become_one_bundle(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled on an A100 and on an H100, merged, deployed: Triton chooses by the compute capability."""
    for card, capability in (("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA H100 80GB HBM3", "9.0")):
        with monkeypatch.context() as patch:
            on(card, capability, patch)
            compiled = compiling.compile_bundle(built, out=tmp_path / capability)
            assert compiled.manifest.engines[0].device == card
    merged = compiling.merge(tmp_path / "8.0", tmp_path / "9.0", out=tmp_path / "both")
    assert [engine.file for engine in merged.manifest.engines] == ["model.sm80.plan", "model.sm90.plan"]
    assert bundle.verify(tmp_path / "both") == merged.manifest and merged.manifest.target == "a100 + h100"
    for name, card in (("model.sm80.plan", "8.0"), ("model.sm90.plan", "9.0")):
        assert files.sha256(tmp_path / "both" / name) == files.sha256(tmp_path / card / "model.plan")
    model_repository.deploy(tmp_path / "both", tmp_path / "models", triton="26.08")
    config = (tmp_path / "models" / "tiny_swiglu" / "config.pbtxt").read_text()
    for capability, name in (("8.0", "model.sm80.plan"), ("9.0", "model.sm90.plan")):
        assert f'key: "{capability}"\n  value: "{name}"' in config
    with pytest.raises(UsageError, match=r"engine of model for SM 8\.0"):
        compiling.merge(tmp_path / "both", tmp_path / "8.0", out=tmp_path / "twice")
    with pytest.raises(UsageError, match=r"26\.07 has 11\.1\.0"):
        model_repository.deploy(tmp_path / "both", tmp_path / "others", triton="26.07")


def test_merge_refuses_what_is_not_the_same(for_l4: Path, built: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no engine"):
        compiling.merge(for_l4, built, out=tmp_path / "x")
    other = tmp_path / "other"
    pipeline.build(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:1", out=other))
    manifest = bundle.read_manifest(other)
    theirs = manifest.model_copy(update={"engines": bundle.read_manifest(for_l4).engines})
    object.__setattr__(theirs, "files", (*theirs.files, *bundle.read_manifest(for_l4).files[-3:]))
    with pytest.raises(UsageError, match="do not hold the same graphs"):
        compiling._check_mergeable((for_l4, other), (bundle.read_manifest(for_l4), theirs))


def test_in_place_reused_and_signed_again(for_l4: Path, tmp_path: Path) -> None:
    """Added by exchange; made once; a signed bundle is left alone or signed again."""
    import shutil

    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    place = tmp_path / "place"
    shutil.copytree(for_l4, place)
    again = compiling.compile_bundle(place, target="l4", runtime=Runtime.TENSORRT_RTX)
    assert again.reused and bundle.verify(place).engines == bundle.read_manifest(for_l4).engines
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "sign.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "verify.pem").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    signer = signing.open_signer(tmp_path / "sign.pem", ask=lambda: "")
    compiling.compile_bundle(place, target="l4", runtime=Runtime.TENSORRT_RTX, signer=signer)
    signing.verify(place, tmp_path / "verify.pem")
    with pytest.raises(UsageError, match="is signed, and engines added"):
        compiling.compile_bundle(place, target="l4", runtime=Runtime.TENSORRT_RTX)
    signing.verify(place, tmp_path / "verify.pem")


def test_engines_that_are_wrong_change_nothing(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    place = tmp_path / "place"
    shutil.copytree(built, place)
    before = {path.name: files.sha256(path) for path in place.iterdir()}
    wrong = judge.Report(candidate="a", reference="b", rows=())  # an empty report proves nothing and fails
    monkeypatch.setattr(
        evaluate, "judge_engines", lambda _m, engines, *_, **__: evaluate.EngineVerdict(facts=(), report=wrong)
    )
    on("NVIDIA A100-SXM4-80GB", "8.0", monkeypatch)
    with pytest.raises(compiling.EnginesRejected, match="was left as it was"):
        compiling.compile_bundle(place)
    assert {path.name: files.sha256(path) for path in place.iterdir()} == before


def test_refusals(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no GPU, so there is no default target"):
        compiling.compile_bundle(built)
    with pytest.raises(MissingRequirement, match="built on that card itself"):
        compiling.compile_bundle(built, target="a100", runtime=Runtime.TENSORRT)
    with pytest.raises(UsageError, match="There is no engine to compile for cpu"):
        compiling.compile_bundle(built, target="cpu")
    with monkeypatch.context() as patch:
        on("NVIDIA A100-SXM4-80GB", "8.0", patch)
        patch.undo()
        gpu = hardware.Gpu(
            index=0, name="NVIDIA A100", uuid="GPU-1", compute_capability="8.0", memory_bytes=10**6, driver="590.1"
        )
        patch.setattr(hardware, "gpus", lambda: (gpu,))
        with pytest.raises(MissingRequirement, match="tensorrt is not installed"):
            compiling.compile_bundle(built)
        patch.setattr(preflight, "compiler", lambda *_: None)
        with pytest.raises(MissingRequirement, match=r"NVIDIA A100 has 0\.0 GB"):
            compiling.compile_bundle(built)
    manifest = bundle.read_manifest(built)
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(built, bad)
    (bad / bundle.MANIFEST).write_bytes(manifest.model_copy(update={"verdict": "rejected"}).to_bytes())
    with pytest.raises(ValidationFailed, match="is rejected"):
        compiling.compile_bundle(bad, target="l4")
    shown = CliRunner().invoke(cli.app, ["compile", str(built), "--target", "l5"])
    assert shown.exit_code == 2 and "Did you mean 'l4'" in shown.stderr

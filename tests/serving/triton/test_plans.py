"""TensorRT plans in a model repository: which file for which card, and which server can load them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dinoexport.errors import UsageError
from dinoexport.serving.triton import model_repository
from tests.serving.triton.plans import plan_facts, with_plans
from tests.serving.triton.repositories import parsed

pytestmark = pytest.mark.usefixtures("fixed_latencies")


def test_plans(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    plans = [plan_facts(f"model.sm{cc.replace('.', '')}.plan", cc, profiles=2) for cc in ("8.0", "9.0")]
    with_plans(monkeypatch, tmp_path / "bundle", *plans)
    deployed = model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton="26.08")
    assert deployed.backend == "tensorrt_plan"
    config = parsed(tmp_path / "models" / "tiny_swiglu" / "config.pbtxt")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert dict(config.cc_model_filenames) == {"8.0": "model.sm80.plan", "9.0": "model.sm90.plan"}
    assert {p.name for p in (tmp_path / "models/tiny_swiglu/1").glob("*.plan")} == {
        "model.sm80.plan",
        "model.sm90.plan",
    }
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 4]
    (group,) = config.instance_group
    assert group.kind == group.KIND_GPU and list(group.profile) == ["0", "1"]
    strategy = config.parameters["execution_context_allocation_strategy"].string_value
    assert strategy == "ON_PROFILE_CHANGE"


def test_one_plan_of_one_profile(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    with_plans(monkeypatch, tmp_path / "bundle", plan_facts("model.plan", "8.0"))
    model_repository.deploy(tmp_path / "bundle", tmp_path / "models")
    config = parsed(tmp_path / "models" / "tiny_swiglu" / "config.pbtxt")
    assert config.default_model_filename == "model.plan" and not config.cc_model_filenames
    assert not config.instance_group[0].profile
    assert "execution_context_allocation_strategy" not in config.parameters


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("26.07", "Triton 26.07 has 11.1.0"),
        ("26.10=11.4.0", "has 11.4.0"),
        ("26.10", "is not known here"),
    ],
)
def test_a_plan_that_cannot_load_is_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str, words: str
) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    with_plans(monkeypatch, tmp_path / "bundle", plan_facts("model.plan", "8.0"))
    with pytest.raises(UsageError, match=words):
        model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton=tag)
    assert not (tmp_path / "models").exists()
    model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton="26.10=11.2.1")


def test_stripped_and_version_compatible_plans(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    plan = plan_facts("model.plan", "8.0")
    plan.stripped = True
    with_plans(monkeypatch, tmp_path / "bundle", plan)
    with pytest.raises(UsageError, match="holds no weights"):
        model_repository.deploy(tmp_path / "bundle", tmp_path / "models")
    model_repository.deploy(tmp_path / "bundle", tmp_path / "models", backend="onnxruntime", triton="26.07")
    plan.stripped, plan.version_compatible = False, True
    assert model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton="26.07").backend == "tensorrt_plan"
    assert "version-compatible=true" in (tmp_path / "models" / "tiny_swiglu" / "config.pbtxt").read_text()

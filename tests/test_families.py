"""Every family passes the conformance kit, and a second family goes through the whole product as files of its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dinoexport import cli, family
from dinoexport.pipeline import build as pipeline
from dinoexport.validation import validate_bundle
from tests import conformance
from tests.conftest import DATA

TOY = Path(__file__).parent / "toy_family"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy family, installed; its recipe."""
    monkeypatch.syspath_prepend(str(TOY))
    return TOY / "toy.toml"


@pytest.mark.parametrize("recipe", ["tiny_swiglu", "tiny_swiglu_reg"])
def test_dinov2_conforms(recipe: str, tmp_path: Path) -> None:
    request = pipeline.build_request(str(DATA / f"{recipe}.toml"))
    conformance.check(request.model, request.cases, tmp_path)


def test_toy_conforms(toy: Path, tmp_path: Path) -> None:
    request = pipeline.build_request(str(toy))
    conformance.check(request.model, request.cases, tmp_path)


def test_toy_is_built_and_validated(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    built = CliRunner().invoke(cli.app, ["build", str(toy), "--weights", "synthetic:3", "--out", str(out), "--json"])
    assert built.exit_code == 0, built.output
    assert {path.name for path in out.glob("*.onnx")} == {"prefill.onnx", "step.onnx"}
    validated = validate_bundle.validate(out)
    assert validated.report.passed
    assert {row.shape for row in validated.report.rows} == {(2, 4, 11), (1, 4, 11)}


def test_toy_with_a_wrong_cache_is_rejected(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = pipeline.build_request(str(toy), weights="synthetic:3", out=tmp_path / "bundle")
    right = type(request.model).drive

    def forgetful(self, runners, inputs):
        def step(arrays):
            return runners["step"]({**arrays, "past": np.zeros_like(arrays["past"])})

        return right(self, {**runners, "step": step}, inputs)

    monkeypatch.setattr(type(request.model), "drive", forgetful)
    with pytest.raises(pipeline.Rejected):
        pipeline.build(request)
    assert not (tmp_path / "bundle").exists()


def test_schema_knows_both_families(toy: Path) -> None:
    printed = json.loads(CliRunner().invoke(cli.app, ["schema"]).stdout)
    assert len(printed["properties"]["model"]["anyOf"]) == len(family.installed()) >= 2


def test_other_code_of_a_family_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any module of its package, also in one that the model's class is not in."""
    package = tmp_path / "plugged"
    (package / "roles").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "roles" / "__init__.py").write_text("class Model: ...\n")
    helper = package / "helper.py"
    helper.write_text("ANSWER = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("plugged.roles").Model()
    before = family.code_of(model)
    helper.write_text("ANSWER = 2\n")
    assert family.code_of(model) != before

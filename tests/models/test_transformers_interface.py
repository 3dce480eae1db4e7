"""The folder that transformers' own tools open: the same tokens there, at sizes where their exports are wrong.

optimum and transformers.js run in environments of their own, which make test makes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle, images
from dinoexport.errors import UsageError
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import synthetic
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Precision
from dinoexport.validation import validate_bundle
from dinoexport.validation.metrics import distance
from tests.conftest import DATA

ROOT = DATA.parent.parent
OPTIMUM, NODE = ROOT / ".interop" / "optimum", ROOT / ".interop" / "node"
PHOTOGRAPH = min((ROOT / "validate" / "images").glob("*.*g"))
# (batch, height, width): none of them 518, where every export is right.
SIZES = ((2, 28, 42), (1, 224, 308), (1, 70, 98))
LIMIT = 1e-5


def recipe(folder: Path, variant: str, **graph: Any) -> Path:
    """A tiny variant with transformers' interface."""
    choices = {"interface": '"transformers"'} | graph
    table = "\n[graph]\n" + "".join(f"{key} = {value}\n" for key, value in choices.items())
    shutil.copy(DATA / "tiny_cases.toml", folder)
    (folder / "theirs.toml").write_text((DATA / f"{variant}.toml").read_text() + table)
    return folder / "theirs.toml"


@pytest.fixture(scope="module", params=["tiny_swiglu", "tiny_swiglu_reg"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    path = recipe(folder, request.param)
    pipeline.build(pipeline.build_request(str(path), weights="synthetic:0", out=folder / request.param))
    return folder / request.param


def expected(built: Path, pixels: Any) -> Any:
    """The plain upstream formulation's tokens on the same weights, by the names of the family's own graph."""
    table = bundle.read_manifest(built).recipe["name"]
    own = pipeline.build_request(str(DATA / f"{table}.toml")).model
    (answer,) = own.reference(
        lambda name: own.synthetic(name, 0), [{"pixels": pixels}], precision=Precision.FP32, progress=lambda *_: None
    )
    parts = [answer["class_token"][:, None], *([answer["register_tokens"]] if "register_tokens" in answer else [])]
    return np.concatenate([*parts, answer["patch_tokens"]], axis=1)


def test_is_judged_and_complete(built: Path) -> None:
    manifest = bundle.verify(built)
    assert manifest.verdict == "passed"
    assert {"config.json", "preprocessor_config.json"} <= {file.name for file in manifest.files}
    assert [tensor["name"] for tensor in manifest.graphs[0].inputs] == ["pixel_values"]
    assert [tensor["name"] for tensor in manifest.graphs[0].outputs] == ["last_hidden_state", "pooler_output"]
    assert validate_bundle.validate(built).report.passed


def test_users_images_are_judged_too(built: Path, tmp_path: Path) -> None:
    """Neighbours, classes and matches go by the tokens taken apart."""
    for i, path in enumerate(sorted((ROOT / "validate" / "images").glob("*.*g"))[:2]):
        shutil.copy(path, tmp_path / f"{i}{path.suffix}")
    validated = validate_bundle.validate(built, images=tmp_path, weights="synthetic:0")
    assert validated.report.passed and validated.aggregate is not None


def test_transformers_itself_reads_the_config(built: Path) -> None:
    """Their model made from our config.json has exactly the checkpoint's parameters."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(built)
    theirs = transformers.AutoModel.from_config(config)
    manifest = bundle.read_manifest(built)
    own = pipeline.build_request(str(DATA / f"{manifest.variant}.toml")).model
    wanted = sum(int(np.prod(shape)) for shape in own.tensors.values())
    assert sum(parameter.numel() for parameter in theirs.parameters()) == wanted


def test_optimum_gives_the_same_tokens(built: Path, tmp_path: Path) -> None:
    if not OPTIMUM.is_dir():
        pytest.skip("no optimum here: make .interop/.ready installs it")
    inputs = {f"noise{i}": synthetic.pixels(*size, i) for i, size in enumerate(SIZES)}
    picture = np.asarray(images.load(PHOTOGRAPH))
    np.savez(tmp_path / "in.npz", **inputs, photo=picture)
    environment = {**os.environ, "PYTHONPATH": str(OPTIMUM), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).parent.parent / "interop" / "ort_model.py"
    ran = subprocess.run(
        [sys.executable, str(script), str(built), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    for name, pixels in inputs.items():
        assert distance(found[f"{name}/last_hidden_state"], expected(built, pixels)).relative_l2 <= LIMIT, name
    # Their processor, told by our preprocessor_config.json, prepares a photograph as ours does: to a step of a byte.
    ours = Preprocessing().normalised(Preprocessing().prepared(images.load(PHOTOGRAPH))[None])
    assert found["photo/pixels"].shape == ours.shape
    assert np.abs(found["photo/pixels"] - ours).max() <= 1.01 / 255 / 0.224


def test_transformers_js_gives_the_same_tokens(built: Path, tmp_path: Path) -> None:
    if not (NODE / "node_modules").is_dir():
        pytest.skip("no transformers.js here: make .interop/.ready installs it where there is Node")
    script = NODE / "transformers_js.mjs"
    shutil.copy(Path(__file__).parent.parent / "interop" / "transformers_js.mjs", script)
    for i, size in enumerate(SIZES):
        pixels = synthetic.pixels(*size, i)
        (tmp_path / "in.f32").write_bytes(pixels.tobytes())
        ran = subprocess.run(
            ["node", str(script), str(built), str(tmp_path / "in.f32"), *map(str, size), str(tmp_path / "out.f32")],
            capture_output=True, text=True, check=False, cwd=NODE,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-2000:]
        said = json.loads(ran.stdout.splitlines()[-1])
        assert said["pooled"] == [size[0], 96] and said["prepared"] == [1, 3, 224, 224]
        assert abs(said["value"] - (90 / 255 - 0.485) / 0.229) < 1e-4
        tokens = np.frombuffer((tmp_path / "out.f32").read_bytes(), np.float32).reshape(said["tokens"])
        assert distance(tokens, expected(built, pixels)).relative_l2 <= LIMIT, size


def test_what_it_cannot_be_combined_with(tmp_path: Path) -> None:
    for choice in ({"input": '"images"'}, {"blocks": "[1]"}, {"last_blocks": "2"}):
        with pytest.raises(UsageError, match="interface transformers takes"):
            pipeline.build_request(str(recipe(tmp_path, "tiny_swiglu", **choice)))

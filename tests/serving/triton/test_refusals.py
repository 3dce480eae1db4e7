"""What `deploy` refuses, and that nothing of it is left; repositories that somebody else can write to."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dinoexport import bundle
from dinoexport.errors import DinoexportError, UsageError, ValidationFailed
from dinoexport.pipeline import build as pipeline
from dinoexport.serving.triton import model_repository
from tests.conftest import DATA
from tests.serving.triton.repositories import VERBS, snapshot

pytestmark = pytest.mark.usefixtures("fixed_latencies")


@pytest.mark.parametrize("tag", ["latest", "26.8", "24.1O", "", "26.08-py3"])
def test_what_is_no_tag_is_refused_whatever_is_served(built: Path, tmp_path: Path, tag: str) -> None:
    with pytest.raises(UsageError, match="not a tag of a Triton image") as caught:
        model_repository.deploy(built, tmp_path / "models", backend="python", triton=tag)
    assert "--triton 26.08" in caught.value.next_step and not (tmp_path / "models").exists()


def test_what_is_refused_leaves_nothing(built: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(built, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.onnx.data").write_bytes(b"other")
    unjudged = pipeline.export_only(
        pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=tmp_path / "unjudged")
    ).folder
    with pytest.raises(ValidationFailed, match="unjudged"):
        model_repository.deploy(unjudged, repository)
    with pytest.raises(ValidationFailed, match="damaged"):
        model_repository.deploy(tmp_path / "damaged", repository)
    for name in ("../evil", "A", "", "a" * 65):
        with pytest.raises(UsageError, match="not a name"):
            model_repository.deploy(built, repository, name=name or " ")
    with pytest.raises(UsageError, match="no TensorRT plan"):
        model_repository.deploy(built, repository, backend="tensorrt_plan")
    with pytest.raises(UsageError, match="no folder"):
        model_repository.deploy(built, repository, samples=tmp_path / "absent")
    assert not repository.exists()


def test_a_rejected_bundle_is_refused(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "rejected")
    manifest = bundle.read_manifest(built).model_copy(update={"verdict": "rejected"})
    (tmp_path / "rejected" / bundle.MANIFEST).write_bytes(manifest.to_bytes())
    with pytest.raises(ValidationFailed, match="rejected"):
        model_repository.deploy(tmp_path / "rejected", tmp_path / "models")


def test_a_strangers_model_is_never_touched(built: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "models" / "tiny_swiglu_images"
    (stranger / "1").mkdir(parents=True)
    (stranger / "config.pbtxt").write_text('backend: "python"\n')
    before = snapshot(tmp_path / "models")
    with pytest.raises(UsageError, match="was not deployed under"):
        model_repository.deploy(built, tmp_path / "models")
    assert snapshot(tmp_path / "models") == before


def hostile(models: Path, kind: str, secret: Path) -> None:
    """A repository somebody else could write to."""
    if kind == "a version's configuration is a link":
        (models / "tiny" / "1" / "config.pbtxt").unlink()
        (models / "tiny" / "1" / "config.pbtxt").symlink_to(secret)
    elif kind == "a version is a link":
        shutil.rmtree(models / "tiny" / "1")
        (models / "tiny" / "1").symlink_to(secret.parent)
    elif kind == "a pipe":
        (models / "tiny" / "1" / "config.pbtxt").unlink()
        os.mkfifo(models / "tiny" / "1" / "config.pbtxt")
    elif kind == "a neighbour with a pipe":
        (models / "tiny_other").mkdir()
        os.mkfifo(models / "tiny_other" / "config.pbtxt")
    elif kind == "a neighbour with a device":
        (models / "tiny_other").mkdir()
        (models / "tiny_other" / "config.pbtxt").symlink_to("/dev/zero")
    elif kind == "the record is a link":
        (models / "tiny.releases.json").unlink()
        (models / "tiny.releases.json").symlink_to(secret)
    elif kind == "the record is huge":
        (models / "tiny.releases.json").write_bytes(b" " * (2 << 20))
    elif kind == "another record":
        (models / "tiny.releases.json").write_text('{"name": "tiny", "served": [7]}')
    else:
        (models / "tiny" / "config.pbtxt").write_text("version_policy {\n" * 50_000)


HOSTILE = [
    "a version's configuration is a link", "a version is a link", "a pipe", "a neighbour with a pipe",
    "a neighbour with a device", "the record is a link", "the record is huge", "another record", "a quadratic policy",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused_or_harmless(built: Path, tmp_path: Path, kind: str) -> None:
    models, secret = tmp_path / "models", tmp_path / "elsewhere" / "config.pbtxt"
    secret.parent.mkdir()
    secret.write_text("# dinoexport deployed this as tiny\nthe secret\n")
    for _ in range(2):
        model_repository.deploy(built, models, name="tiny")
    hostile(models, kind, secret)
    started = time.monotonic()
    for verb in ("rollback", "second"):
        with suppress(DinoexportError):
            VERBS[verb](built, models)
        for path in models.glob("*/config.pbtxt"):
            if path.is_file() and not path.is_symlink():
                assert "the secret" not in path.read_text()
    assert secret.read_text().endswith("the secret\n") and time.monotonic() - started < 20


@pytest.mark.parametrize("address", ["s3://bucket/models", "gs://b/m", "https://host/models", "S3:/b"])
def test_an_address_is_no_folder(built: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is an address"):
        model_repository.deploy(built, Path(address))
    assert not list(tmp_path.glob("[sSgh]*"))

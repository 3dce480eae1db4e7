"""Bundles as OCI artifacts: pushed by oras-py, pulled by tag and by digest, and no byte believed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.bundle import registry as artifacts
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed
from tests.stores.oci_registry import ENDLESS_BYTES, Registry

HTTP: Any = {"plain_http": True}
TITLE = "org.opencontainers.image.title"


@pytest.fixture
def registry() -> Iterator[Registry]:
    running = Registry()
    yield running
    running.stop()


def artifact_of(registry: Registry) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(registry.store["v1"])
    return found


def test_pushed_and_pulled(registry: Registry, tiny: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny, own)
    (own / bundle.SIGNATURE).write_bytes(b"a signature")
    shown = CliRunner().invoke(cli.app, ["push", str(own), f"{registry.host}/a/tiny:v1", "--plain-http", "--json"])
    assert shown.exit_code == 0, shown.output
    pinned = json.loads(shown.stdout)["reference"]
    assert pinned == f"{registry.host}/a/tiny@sha256:{hashlib.sha256(registry.store['v1']).hexdigest()}"
    for number, reference in enumerate((pinned, f"{registry.host}/a/tiny:v1")):
        out = tmp_path / str(number)
        shown = CliRunner().invoke(cli.app, ["pull", reference, "--out", str(out), "--plain-http", "--json"])
        assert shown.exit_code == 0 and json.loads(shown.stdout)["reference"] == pinned, shown.output
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in own.iterdir()}
    assert artifact_of(registry)["annotations"]["dinoexport.verdict"] == "passed"


def test_a_registry_that_answers_something_else(registry: Registry, tiny: Path, tmp_path: Path) -> None:
    pinned = artifacts.push(tiny, f"{registry.host}/tiny:v1", **HTTP)
    digest = pinned.rpartition("@")[2]
    honest = dict(registry.store)
    layers = {
        layer["annotations"]["org.opencontainers.image.title"]: layer for layer in artifact_of(registry)["layers"]
    }
    for damage, said in (
        ("artifact", "another artifact"),
        ("layer", "does not have the digest"),
        ("missing", "is not in the artifact"),
        ("no bundle", "is not a bundle"),
        ("other file", "damaged"),
    ):
        registry.store.clear()
        registry.store.update(honest)
        reference = f"{registry.host}/tiny:v1"
        changed = artifact_of(registry)
        if damage == "artifact":
            registry.store[digest] = registry.store["v1"] + b" "
            reference = pinned
        elif damage == "layer":
            registry.store[layers["model.onnx"]["digest"]] = b"of somebody else"
        elif damage == "missing":
            changed["layers"] = [layer for layer in changed["layers"] if layer != layers["model.onnx"]]
        elif damage == "no bundle":
            changed["layers"] = changed["layers"][:1]
        else:  # a whole layer in the place of another
            for layer in changed["layers"]:
                if layer["annotations"][TITLE] == "model.onnx":
                    layer["digest"] = layers["report.json"]["digest"]
        if damage not in ("artifact", "layer"):
            registry.store["v1"] = json.dumps(changed).encode()
        with pytest.raises(ValidationFailed, match=said):
            artifacts.pull(reference, tmp_path / "out", **HTTP)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["artifact", "manifest.json", "model.onnx"])
def test_a_registry_that_does_not_stop(which: str, registry: Registry, tiny: Path, tmp_path: Path) -> None:
    """What it sends is refused by its length: it fills neither the disk nor the memory."""
    artifacts.push(tiny, f"{registry.host}/tiny:v1", **HTTP)
    digests = {layer["annotations"][TITLE]: layer["digest"] for layer in artifact_of(registry)["layers"]}
    registry.handler.endless = digests.get(which, "v1")
    with pytest.raises(ValidationFailed, match="is larger than"):
        artifacts.pull(f"{registry.host}/tiny:v1", tmp_path / "out", **HTTP)
    assert not list(tmp_path.iterdir()) and registry.handler.sent_bytes < ENDLESS_BYTES


def test_what_is_refused(registry: Registry, tiny: Path, tmp_path: Path) -> None:
    for reference in ("tiny", "tiny:v1", f"{registry.host}/tiny", f"{registry.host}/../x:v1", "https://x/y:v1"):
        with pytest.raises(UsageError, match=r"names nothing|no tag"):
            artifacts.push(tiny, reference, **HTTP)
    with pytest.raises(MissingRequirement, match="answers 404"):
        artifacts.pull(f"{registry.host}/none:v1", tmp_path / "out", **HTTP)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        artifacts.pull(f"{registry.host}/tiny:v1", tmp_path / "there", **HTTP)
    registry.handler.refuses = 400  # oras asks again for two minutes after a 500
    with pytest.raises(MissingRequirement, match="registry") as raised:
        artifacts.push(tiny, f"{registry.host}/tiny:v1", **HTTP)
    assert "secret" not in raised.value.message
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    (damaged / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValidationFailed, match="damaged"):
        artifacts.push(damaged, f"{registry.host}/tiny:v1", **HTTP)

"""The bill of materials: valid by CycloneDX's own schema, complete, and the same bytes for the same bundle."""

from __future__ import annotations

import json
from email.message import Message
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import pytest

from dinoexport import bundle
from dinoexport.bundle import CheckpointFacts, Manifest, sbom
from dinoexport.errors import MissingRequirement
from dinoexport.pipeline import build as pipeline
from tests.bundle.test_bundle import listed, manifest, sha256
from tests.conftest import DATA

VERSIONS = {"dinoexport": "0.1.0", "torch": "2.13.0+cpu", "tensorrt_rtx_cu13": "1.7.1.116", "python": "3.11.2"}
PUBLISHED = CheckpointFacts(source="https://example.org/vits14.pth", sha256=sha256(b"weights"), licence="Apache-2.0")


def check(document: str) -> None:
    """By CycloneDX's own schema. Its parsers of formats take 4 s to load, which not every worker is to wait for."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document) is None


def bill(**changes: Any) -> dict[str, Any]:
    found = sbom.of(manifest(**{"versions": VERSIONS, "checkpoint": PUBLISHED, **changes}))
    check(found)
    content: dict[str, Any] = json.loads(found)
    return content


def by_ref(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["bom-ref"]: component for component in content["components"]}


def test_everything_that_went_in_is_listed_with_its_hash() -> None:
    files = (
        listed("model.onnx", b"graph"),
        listed("model.onnx.data", b"weights"),
        listed("model.plan", b"p", "engine"),
    )
    content = bill(files=files)
    found = by_ref(content)
    for file in files:
        component = found[f"file:{file.name}"]
        assert component["hashes"] == [{"alg": "SHA-256", "content": file.sha256}]
        assert {"name": "dinoexport:stage", "value": file.stage} in component["properties"]
    checkpoint = found["checkpoint"]
    assert (
        checkpoint["type"] == "machine-learning-model"
        and content["metadata"]["component"]["type"] == checkpoint["type"]
    )
    assert checkpoint["hashes"] == [{"alg": "SHA-256", "content": sha256(b"weights")}]
    assert checkpoint["externalReferences"] == [{"type": "distribution", "url": "https://example.org/vits14.pth"}]
    assert checkpoint["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert found["package:torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert found["package:tensorrt_rtx_cu13"]["purl"] == "pkg:pypi/tensorrt-rtx-cu13@1.7.1.116"
    assert found["package:dinoexport"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert all(found[f"package:{name}"]["version"] == number for name, number in VERSIONS.items())
    assert {found[f"package:{name}"]["scope"] for name in VERSIONS} == {"excluded"}, "none of them is shipped"
    assert len(found) == 1 + len(files) + len(VERSIONS)
    (whole,) = [entry["dependsOn"] for entry in content["dependencies"] if entry["ref"] == "bundle"]
    assert sorted(whole) == sorted(found)


def test_synthetic_weights_are_called_so() -> None:
    checkpoint = by_ref(bill(checkpoint=manifest().checkpoint))["checkpoint"]
    assert ", synthetic;" in checkpoint["description"] and "externalReferences" not in checkpoint
    assert "licenses" not in checkpoint, "nobody licensed them"


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "<script>\n& 'x'"},
        {"checkpoint": PUBLISHED.model_copy(update={"licence": "Apache-2.0 (today); the card said CC-BY-NC"})},
        {"checkpoint": PUBLISHED.model_copy(update={"source": "/home/someone/my weights.pth"})},
        {"checkpoint": PUBLISHED.model_copy(update={"source": "https://example.org/a b?c=<d>"})},
        {"versions": {}},
    ],
)
def test_any_words_make_a_valid_bill(changes: dict[str, Any]) -> None:
    bill(**changes)


def test_the_same_bundle_has_the_same_bill() -> None:
    first = sbom.of(manifest(versions=VERSIONS))
    assert first == sbom.of(manifest(versions=dict(reversed(VERSIONS.items()))))
    other = json.loads(sbom.of(manifest(versions=VERSIONS, files=(listed("model.onnx", b"other"),))))
    assert other["serialNumber"] != json.loads(first)["serialNumber"]


def licence(monkeypatch: pytest.MonkeyPatch, *fields: tuple[str, str]) -> str:
    """Of a package whose metadata have these fields."""
    message = Message()
    for name, value in fields:
        message[name] = value
    monkeypatch.setattr(sbom, "metadata", lambda _name: message)
    return sbom._licence_of("any")


BSD, MIT = "License :: OSI Approved :: BSD License", "License :: OSI Approved :: MIT License"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([("License-Expression", "MIT"), ("License", "BSD"), ("Classifier", BSD)], "MIT"),
        ([("License", " BSD "), ("Classifier", MIT)], "BSD"),
        ([("License", "x" * 64), ("Classifier", MIT)], "x" * 64),
        ([("License", "x" * 65), ("Classifier", MIT)], "MIT License"),
        ([("License", "Copyright\nof all"), ("Classifier", MIT)], "MIT License"),
        (
            [("License", ""), ("Classifier", BSD), ("Classifier", "Topic :: Any"), ("Classifier", MIT)],
            "BSD License and MIT License",
        ),
        ([("Classifier", "License :: Public Domain")], "Public Domain"),
        ([], ""),
    ],
)
def test_the_licence_of_a_package(fields: list[tuple[str, str]], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert licence(monkeypatch, *fields) == words


def test_the_licence_of_what_is_not_installed() -> None:
    assert (sbom._licence_of("python"), sbom._licence_of("no-such-package")) == ("PSF-2.0", "")


def test_a_bill_is_written_for_readers() -> None:
    """Sorted, a key a line; the only tool is dinoexport itself."""
    found = sbom.of(manifest(versions=VERSIONS))
    content = json.loads(found)
    assert found == json.dumps(content, indent=1, sort_keys=True) + "\n"
    assert [tool["name"] for tool in content["metadata"]["tools"]["components"]] == ["dinoexport"]
    del content["serialNumber"]
    digest = sha256(json.dumps(content, sort_keys=True).encode())
    assert json.loads(found)["serialNumber"] == uuid5(NAMESPACE_URL, digest).urn


def test_a_build_carries_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    request = pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=out)
    pipeline.export_only(request)
    found: Manifest = bundle.verify(out)
    raw = (out / bundle.SBOM).read_bytes()
    check(raw.decode())
    components = by_ref(json.loads(raw))
    hashes = {ref: component["hashes"][0]["content"] for ref, component in components.items() if "hashes" in component}
    for file in found.files:
        assert file.name == bundle.SBOM or hashes[f"file:{file.name}"] == file.sha256
    assert hashes["checkpoint"] == found.checkpoint.sha256
    for package in ("torch", "onnx", "onnx-ir", "onnxscript", "safetensors"):
        assert components[f"package:{package}"]["version"] == version(package)
        assert components[f"package:{package}"]["licenses"], package
    pipeline.export_only(request, force=True)
    assert (out / bundle.SBOM).read_bytes() == raw
    monkeypatch.setitem(__import__("sys").modules, "cyclonedx", None)
    with pytest.raises(MissingRequirement, match="cyclonedx is not installed"):
        pipeline.export_only(request)

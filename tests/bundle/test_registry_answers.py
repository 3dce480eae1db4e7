"""Bundles in a registry that is a dict: what is pushed, what a pull believes, and what its errors say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from dinoexport import bundle
from dinoexport.bundle import registry as artifacts
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed

REFERENCE = "registry.example:5000/a/tiny:v1"
NAMES = ("model.onnx", "model.onnx.data", bundle.REFERENCE, bundle.MANIFEST)


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    """Layers by their digest, one artifact, and what it was asked to push."""

    prefix = "https"

    def __init__(self) -> None:
        self.layers: dict[str, bytes] = {}
        self.artifact = b""
        self.pushed: dict[str, Any] = {}
        self.auth = SimpleNamespace(load_configs=lambda _container: None)

    def hold(self, contents: dict[str, bytes]) -> None:
        """An artifact of these files."""
        self.layers = {digest(content): content for content in contents.values()}
        layers = [
            {"digest": digest(content), "annotations": {artifacts._TITLE: name}} for name, content in contents.items()
        ]
        self.artifact = json.dumps({"layers": layers}).encode()

    def push(self, reference: str, **facts: Any) -> None:
        self.pushed = {"reference": reference, **facts}
        self.hold(
            {Path(file.rpartition(":")[0]).name: Path(file.rpartition(":")[0]).read_bytes() for file in facts["files"]}
        )

    def get_container(self, reference: str) -> Any:
        return SimpleNamespace(manifest_url=lambda: reference)

    @contextmanager
    def do_request(self, url: str, method: str, *, headers: dict[str, str], stream: bool) -> Iterator[Any]:
        assert (url, method, stream) == (f"https://{self.asked}", "GET", True)
        assert headers == {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        yield answer(self.artifact)

    @contextmanager
    def get_blob(self, reference: str, layer: str, *, stream: bool) -> Iterator[Any]:
        assert reference == self.asked and stream
        yield answer(self.layers[layer])

    asked = REFERENCE


def answer(content: bytes) -> Any:
    """In pieces of three bytes."""
    pieces = [content[at : at + 3] for at in range(0, len(content), 3)]
    return SimpleNamespace(raise_for_status=lambda: None, iter_content=lambda _size: iter(pieces))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    monkeypatch.setattr(artifacts, "_registry", lambda plain_http: made)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("signed", [False, True])
def test_pushed_and_pulled(signed: bool, small: Path, registry: Registry, tmp_path: Path) -> None:
    """By its tag, and by the digest that the push returned; the signature too, if there is one."""
    if signed:
        (small / bundle.SIGNATURE).write_bytes(b"a signature")
    pinned = artifacts.push(small, REFERENCE)
    assert pinned == f"registry.example:5000/a/tiny@{digest(registry.artifact)}"
    names = [*NAMES, bundle.SIGNATURE] if signed else NAMES
    assert registry.pushed == {
        "reference": REFERENCE,
        "files": [f"{small / name}:application/vnd.dinoexport.bundle.file" for name in names],
        "disable_path_validation": True,
        "manifest_annotations": {
            "org.opencontainers.image.licenses": "Apache-2.0",
            "dinoexport.variant": "vits14",
            "dinoexport.verdict": "passed",
        },
        "quiet": True,
    }
    told: list[tuple[str, int, int]] = []
    for reference in (REFERENCE, pinned):
        registry.asked = reference
        told.clear()
        out = tmp_path / "new" / reference[-2:]
        assert artifacts.pull(reference, out, progress=lambda *words: told.append(words)) == pinned
        assert contents(out) == contents(small) and [path.name for path in out.parent.glob(".*")] == []
        pulls = [words for words in told if words[0].startswith("pulling")]
        assert pulls == [(f"pulling {name}", 0, (small / name).stat().st_size) for name in NAMES[:3]]


def test_what_cannot_be_pushed(small: Path, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tag to push to"):
        artifacts.push(small, f"registry.example/tiny@{digest(b'')}")
    with pytest.raises(UsageError, match="names nothing in a registry"):
        artifacts.push(small, "registry.example/tiny")
    odd = small.rename(tmp_path / "a:b")
    with pytest.raises(UsageError, match="has a colon in its path"):
        artifacts.push(odd, REFERENCE)
    assert not registry.pushed


def test_an_answer_that_is_not_the_bundle(small: Path, registry: Registry, tmp_path: Path) -> None:
    """Another artifact than was asked for by digest, one without a file, a changed layer, and one that is too large."""
    whole, out = contents(small), tmp_path / "out"
    registry.hold(whole)
    registry.asked = f"registry.example/tiny@{digest(b'another')}"
    with pytest.raises(ValidationFailed, match=f"answers with another artifact, {digest(registry.artifact)}"):
        artifacts.pull(registry.asked, out)
    registry.asked = REFERENCE
    for name, problem in ((bundle.MANIFEST, "is not a bundle"), ("model.onnx", "model.onnx is not in the artifact")):
        registry.hold({key: content for key, content in whole.items() if key != name})
        with pytest.raises(ValidationFailed, match=problem):
            artifacts.pull(REFERENCE, out)
    for content, problem in (
        (b"grapj", "does not have the digest of its layer"),
        (b"graph!", "is larger than 5 bytes"),
    ):
        registry.hold(whole)
        registry.layers[digest(b"graph")] = content
        with pytest.raises(ValidationFailed, match=f"model.onnx {problem}"):
            artifacts.pull(REFERENCE, out)
    for raw in (b"[]", b"{}", b"no json", b'{"layers": [{"digest": "x"}]}'):
        registry.artifact = raw
        with pytest.raises(ValidationFailed, match="is not a bundle"):
            artifacts.pull(REFERENCE, out)
    assert not out.exists() and not [*tmp_path.glob(".*")]
    out.mkdir()
    with pytest.raises(UsageError, match="is there already"):
        artifacts.pull(REFERENCE, out)


def of_status(code: int | None) -> requests.HTTPError:
    response = None if code is None else SimpleNamespace(status_code=code)
    return requests.HTTPError("secret", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "problem", "next_step"),
    [
        (of_status(401), "the registry answers 401.", "Check the name and `docker login`."),
        (of_status(403), "the registry answers 403.", "Check the name and `docker login`."),
        (of_status(404), "the registry answers 404.", "Check the name and `docker login`."),
        (of_status(402), "the registry answers 402.", "Try again later."),
        (of_status(405), "the registry answers 405.", "Try again later."),
        (of_status(500), "the registry answers 500.", "Try again later."),
        (of_status(None), "the registry answers an error.", "Try again later."),
        (ValueError("secret"), "the registry refuses.", "Check the address"),
        (requests.exceptions.InvalidURL("secret"), "the registry cannot be reached or broke off.", "Check the address"),
        (requests.ConnectionError("secret"), "the registry cannot be reached or broke off.", "Check the address"),
        (ConnectionResetError("secret"), "the registry cannot be reached or broke off.", "Check the address"),
    ],
    ids=str,
)
def test_an_error_is_one_sentence_without_the_answer(error: Exception, problem: str, next_step: str) -> None:
    with pytest.raises(MissingRequirement) as caught, artifacts._errors("host/x:v1"):
        raise error
    assert caught.value.message == f"host/x:v1: {problem}" and caught.value.next_step.startswith(next_step)

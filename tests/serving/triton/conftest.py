"""A bundle to deploy, built or written down, and latencies that are not measured, for tests of model repositories."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport import bundle, family
from dinoexport.bundle import BundleFile, reference_file
from dinoexport.runtime import cpu
from dinoexport.serving.triton import batching, model_repository
from tests.serving.triton.test_made_models import GRAPH, manifest, reference

CONTENT = {name: name.encode() for name in ("model.onnx", "model.onnx.data", "reference.npz", "report.html")}


@pytest.fixture
def built(tiny_bundle: Path) -> Path:
    """A tiny bundle, which no test changes."""
    return tiny_bundle


@pytest.fixture
def fixed_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deploy` gets these figures in place of measured ones, so that what follows from them is known."""
    monkeypatch.setattr(batching, "measure", lambda *_, **__: {1: 10.0, 2: 18.0, 4: 36.0})


class Given:
    """What the next deployment is of; a test changes it."""

    def __init__(self) -> None:
        self.ends: tuple[Any, ...] = ()
        self.head: Any = None
        self.verdict = "passed"
        self.changes: dict[str, Any] = {}

    def manifest(self) -> Any:
        files = tuple(
            BundleFile(name=name, stage="export", sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))
            for name, raw in CONTENT.items()
        )
        return manifest(files=files, verdict=self.verdict, to_bytes=lambda: b"manifest", **self.changes)

    def model(self) -> Any:
        return SimpleNamespace(
            text=None, graphs=(GRAPH,), head_facts=self.head, front_ends=lambda *_, **__: self.ends
        )  # fmt: skip


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Given:
    made = Given()
    (tmp_path / "bundle").mkdir()
    for name, raw in CONTENT.items():
        (tmp_path / "bundle" / name).write_bytes(raw)
    monkeypatch.setattr(bundle, "read_manifest", lambda _: made.manifest())
    monkeypatch.setattr(bundle, "check_graphs", lambda *_: None)
    monkeypatch.setattr(reference_file, "read", lambda _: reference(9, 3))
    monkeypatch.setattr(model_repository, "parse", lambda _kind, recipe, **_: recipe)
    monkeypatch.setattr(family, "find", lambda _: SimpleNamespace(model=lambda _recipe: made.model()))
    monkeypatch.setattr(cpu, "open_graphs", lambda *_: {"model": None})
    monkeypatch.setattr(batching, "measure", lambda *_, **__: {1: 10.0})
    return made

"""Bundles that need no build."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoexport import bundle
from tests.bundle.test_bundle import listed, manifest


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle that passed, with three small files."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    contents = {"model.onnx": b"graph", "model.onnx.data": b"weights", bundle.REFERENCE: b"answers"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = tuple(listed(name, content) for name, content in contents.items())
    (folder / bundle.MANIFEST).write_bytes(manifest(verdict="passed", files=files).to_bytes())
    return folder

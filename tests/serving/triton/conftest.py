"""A bundle to deploy, and latencies that are not measured, for tests of model repositories."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoexport.serving.triton import batching


@pytest.fixture
def built(tiny_bundle: Path) -> Path:
    """A tiny bundle, which no test changes."""
    return tiny_bundle


@pytest.fixture
def fixed_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deploy` gets these figures in place of measured ones, so that what follows from them is known."""
    monkeypatch.setattr(batching, "measure", lambda *_, **__: {1: 10.0, 2: 18.0, 4: 36.0})

"""What all tests share: variants small enough to build in seconds, and PyTorch held to two threads."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "cache"))

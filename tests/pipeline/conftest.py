"""A folder in which tests of the workspace build."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to build in."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"

"""A folder in which tests of the workspace build, and a workspace that only records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to build in."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


class RecordedWork:
    """A workspace that makes every stage in a folder of its own, and knows what it was asked for."""

    force = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: dict[str, tuple[str, bool]] = {}
        self.known: Mapping[str, str] | None = None
        self.told: list[tuple[str, int, int]] = []

    def progress(self, what: str, done: int, total: int) -> None:
        self.told.append((what, done, total))

    def stage(self, name: str, key: str, make: Any, *, costly: bool = False) -> Any:
        self.asked[name] = (key, costly)
        place = self.folder / name
        place.mkdir()
        self.known = make(place)
        return SimpleNamespace(name=name, key=key, folder=place, files=())


@pytest.fixture
def work(tmp_path: Path) -> Any:
    """See RecordedWork."""
    return RecordedWork(tmp_path)

"""What all tests share: where the data is, hypothesis profiles, and a cache of each test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from dinoexport import tuning
from dinoexport.spec import Precision

# CI repeats the same examples every time, so that a red run is about the change; everywhere else new ones are sought.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("seek", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "seek")

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is chosen by the clock: with one runtime there is no choice. Tests of the choice take this back."""
    monkeypatch.setitem(tuning.RUNTIMES, Precision.FP32, ("onnxruntime",))

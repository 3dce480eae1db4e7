"""The scripts of `benchmarks/` and `scripts/` still find what they import: nobody runs them every day."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"{folder}.{path.stem}" for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_a_script_can_be_imported(module: str) -> None:
    assert importlib.import_module(module).__doc__

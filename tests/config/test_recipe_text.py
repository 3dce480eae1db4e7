"""A recipe written as TOML and read again is the same one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoexport.config import recipe as recipes


@pytest.mark.parametrize("name", recipes.variants())
def test_written_and_read_again(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    (tmp_path / "own.toml").write_text(recipes.to_toml(recipe))
    assert recipes.load(str(tmp_path / "own.toml")) == recipe


def test_defaults_are_not_written_and_every_table_has_its_head() -> None:
    text = recipes.to_toml(recipes.load("vits14"))
    assert text.endswith("\n") and not text.endswith("\n\n") and "\n\n[model]\n" in text
    assert all(" = " in line or line.startswith("[") for line in text.splitlines() if line), text

"""Locate packaged data: `recipes/` (what to build) and `validate/` (limits and cases).

In a wheel they are inside the package; in a checkout they are the top-level folders.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def folder(name: str) -> Path:
    """The folder `recipes`, `recipes/targets` or `validate`, wherever this installation keeps it."""
    packaged = _PACKAGE / "shipped_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def names(name: str) -> tuple[str, ...]:
    """The names of the TOML files in a shipped folder, without suffix, in natural order."""
    stems = [path.stem for path in folder(name).glob("*.toml")]
    return tuple(sorted(stems, key=lambda stem: (len(stem), stem)))

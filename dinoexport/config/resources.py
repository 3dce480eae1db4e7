"""The data that comes with the code: `recipes/` (what to build) and `validate/` (what counts as right).

In a wheel they lie inside the package; in a checkout they are the top-level folders.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def folder(name: str) -> Path:
    """The folder `recipes`, `recipes/targets` or `validate`, wherever this installation keeps it."""
    packaged = _PACKAGE / "shipped_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def names(name: str) -> tuple[str, ...]:
    """The TOML files in a shipped folder, without their ending, in the order a person would list them."""
    stems = [path.stem for path in folder(name).glob("*.toml")]
    return tuple(sorted(stems, key=lambda stem: (len(stem), stem)))

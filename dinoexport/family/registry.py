"""Kinds of models: what a family provides, and how an installed one is found."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import dinoexport
from dinoexport.config.recipe import Recipe
from dinoexport.errors import UsageError
from dinoexport.family.pieces import Shapes
from dinoexport.family.roles import Model
from dinoexport.spec import closest
from dinoexport.system import files

GROUP = "dinoexport.families"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact about a model from a file of the user.

    key: the recipe's, dotted, as `model.num_heads`. source: the file and key, as `config.json: num_heads`.
    """

    key: str
    value: Any
    source: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """Facts about a model from its weights and the files beside them. notes: what was chosen and left out."""

    facts: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()


class Family(Protocol):
    """A kind of model."""

    def model(self, recipe: Recipe) -> Model:
        """The variant a recipe describes; a UsageError that names what is wrong in `[model]` or `[graph]`."""

    def table_schemas(self) -> Mapping[str, Any]:
        """JSON schemas of the recipe tables that are the family's own: `model` and `graph`, `preprocess` if any."""


@runtime_checkable
class DescribesWeights(Protocol):
    """A family that recognises a model by a user's weights and the files beside them."""

    def recipe_from(self, weights: Path, found: Shapes) -> Recipe | None:
        """The recipe for the weights at `weights`, a file or a folder, from their tensors and the files beside them.

        found: their tensors. None if they are not this family's; raises UsageError if they are and a value that the
        recipe needs is nowhere to be found.
        """

    def described(self, recipe: Recipe, weights: Path, found: Shapes) -> Description:
        """The facts in the weights and the files beside them about what `recipe` describes.

        The caller refuses facts that contradict the recipe or one another, and adds the rest to it.
        """

    def assumed(self, recipe: Recipe) -> tuple[Fact, ...]:
        """Values that weights cannot show: each with its default, which recipe or file can replace, and the reason."""


@runtime_checkable
class SplitsTensors(Protocol):
    """A family whose published checkpoints hold parts of one tensor in several files."""

    def split_axis(self, name: str) -> int | None:
        """Along which axis the parts of the tensor `name` are joined; None for one that is whole in each file."""


def split_axis(name: str) -> int | None:
    """The installed families' answer for a tensor in several files, before its family is known."""
    axes = (known.split_axis(name) for known in map(find, installed()) if isinstance(known, SplitsTensors))
    return next((axis for axis in axes if axis is not None), None)


def installed() -> tuple[str, ...]:
    """The names of the families that are installed."""
    return tuple(sorted({entry.name for entry in _entries(tuple(sys.path))}))


def find(name: str) -> Family:
    """The installed family called `name`."""
    for entry in _entries(tuple(sys.path)):
        if entry.name == name:
            family: Family = entry.load()
            return family
    raise UsageError(
        f"No model family {name!r} is installed.{closest(name, installed())}",
        next_step=f"Installed families: {', '.join(installed()) or 'none; reinstall dinoexport'}.",
    )


@cache
def _entries(_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The families' entry points on this search path; looking through all packages takes longer than a recipe."""
    return tuple(entry_points(group=GROUP))


def code_of(model: object) -> str:
    """The hash of dinoexport's code and the family's: results of other code are not reused."""
    own = Path(dinoexport.__file__)
    brought = _outermost(type(model).__module__) or own
    sources = sorted({path for module in (own, brought) for path in _sources(module)})
    return hashlib.sha256("".join(files.sha256(path) for path in sources).encode()).hexdigest()


def _sources(module: Path) -> tuple[Path, ...]:
    """A package's source files, or the one file of a module that is not a package."""
    return tuple(module.parent.rglob("*.py")) if module.name == "__init__.py" else (module,)


def _outermost(module: str) -> Path | None:
    """The file of the outermost package around a module, or of the module itself: a family has modules by role."""
    parts = module.split(".")
    around = (sys.modules.get(".".join(parts[:n])) for n in range(1, len(parts) + 1))
    files_of = (getattr(found, "__file__", None) for found in around)  # None for a namespace package
    return next((Path(file) for file in files_of if file), None)

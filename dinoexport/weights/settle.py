"""Reconcile a recipe with a user's weights: facts from the files are added, and contradictions stop the build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dinoexport import family
from dinoexport.config import recipe as recipes
from dinoexport.config.recipe import Recipe
from dinoexport.errors import UsageError
from dinoexport.family import DescribesWeights, Fact, Family, Shapes
from dinoexport.spec import SYNTHETIC, Progress
from dinoexport.weights import checkpoint, formats

_WEIGHTS = "the weights"


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A recipe with all known facts of its weights.

    assumed: key -> its value and the reason, if neither the recipe nor a file gives one. notes: what was chosen
    and left out in the file. made: whether the recipe was derived from the weights.
    """

    recipe: Recipe
    assumed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    made: bool = False


def settle(recipe: Recipe | None, source: str | None, *, prefix: str | None, progress: Progress) -> Settled:
    """The recipe, or one derived from the weights at `source`, with every fact in their files.

    Raises UsageError if recipe and files disagree, or if there is neither a recipe nor a family that recognises the
    weights.
    """
    if source is None or source.startswith(SYNTHETIC):
        if prefix is not None:
            raise UsageError("--prefix applies to a weight file.", next_step="Give it with --weights PATH.")
        if recipe is None:
            raise UsageError(
                "There is no variant to build.",
                next_step="Name one of dinoexport list, or give your weights as --weights PATH.",
            )
        return Settled(recipe=recipe)
    if recipe is not None and not isinstance(family.find(recipe.family), DescribesWeights):
        return Settled(recipe=recipe)
    path = Path(source)
    found = formats.shapes_of(path, prefix=prefix, split_axis=family.split_axis)
    published = _published(checkpoint.digest_of(source, progress=progress))
    made = recipe is None
    if recipe is None:
        recipe = recipes.load(published) if published else _recipe_from(path, found)
    known: Family = family.find(recipe.family)
    if not isinstance(known, DescribesWeights):
        return Settled(recipe=recipe, made=made)
    description = known.described(recipe, path, found)
    settled = _with_facts(recipe, description.facts, made=made and not published)
    if published:
        return Settled(recipe=settled, notes=description.notes, made=made)
    said = set() if made else set(_flat(recipe))
    said |= {fact.key for fact in description.facts}
    assumed = [fact for fact in known.assumed(settled) if fact.key not in said]
    settled = _with_facts(settled, assumed, made=True)
    return Settled(
        recipe=_as_yours(settled),
        assumed={fact.key: f"{_shown(fact.value)}, {fact.source}" for fact in assumed},
        notes=description.notes,
        made=made,
    )


def _published(digest: str) -> str | None:
    """The shipped variant whose published weights have this hash."""
    named = (
        name
        for name, recipe in _shipped(recipes.variants()).items()
        for file in recipe.weights
        if file.sha256 == digest
    )
    return next(named, None)


@cache
def _shipped(variants: tuple[str, ...]) -> Mapping[str, Recipe]:
    """Every shipped recipe by its name; a process reads them once, in 70 ms."""
    return {name: recipes.load(name) for name in variants}


def _recipe_from(path: Path, found: Shapes) -> Recipe:
    made = {
        name: recipe
        for name in family.installed()
        if isinstance(known := family.find(name), DescribesWeights)
        and (recipe := known.recipe_from(path, found)) is not None
    }
    if len(made) != 1:
        what = f"match several families: {', '.join(made)}" if made else "match no installed family"
        raise UsageError(
            f"The weights at {path} {what}.",
            next_step="Name the variant, or give a recipe; docs/add-a-variant.md says what is in one.",
        )
    return next(iter(made.values()))


def _with_facts(recipe: Recipe, facts: Iterable[Fact], *, made: bool) -> Recipe:
    """The recipe with `facts`. made: whether it came from the same files, so that only they can disagree."""
    facts = tuple(facts)

    def source(key: str, value: Any) -> str:
        """What a made recipe has from a file, that file says."""
        agreeing = (fact.source for fact in facts if fact.key == key and _same(fact.value, value))
        return next(agreeing, _WEIGHTS) if made else "the recipe"

    says: dict[str, Fact] = {
        key: Fact(key=key, value=value, source=source(key, value)) for key, value in _flat(recipe).items()
    }
    tables = recipe.model_dump(mode="python", include={"model", "preprocess"})
    for fact in facts:
        before = says.get(fact.key)
        if before is not None and not _same(before.value, fact.value):
            raise UsageError(
                f"{_says(before)} {fact.key} = {_shown(before.value)}, {_says(fact)} {_shown(fact.value)}.",
                next_step="Correct the wrong one: dinoexport does not guess.",
            )
        says.setdefault(fact.key, fact)
        table, _, key = fact.key.partition(".")
        tables[table].setdefault(key, fact.value)
    return recipe.changed(**tables)


def _says(fact: Fact) -> str:
    return f"{fact.source} {'say' if fact.source == _WEIGHTS else 'says'}"


def _flat(recipe: Recipe) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, table in (("model", recipe.model), ("preprocess", recipe.preprocess))
        for key, value in table.items()
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    # A single number stands for both sides.
    if isinstance(one, int) and isinstance(other, list | tuple):
        return all(one == side for side in other)
    if isinstance(other, int) and isinstance(one, list | tuple):
        return _same(other, one)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)


def _shown(value: Any) -> str:
    return "[" + ", ".join(map(_shown, value)) + "]" if isinstance(value, list | tuple) else str(value)


def _as_yours(recipe: Recipe) -> Recipe:
    """The recipe without the facts of the published weights: their name, their licence, their address."""
    if not recipe.weights:
        return recipe
    shipped = _shipped(recipes.variants())
    name = f"{recipe.name}{checkpoint.YOURS}" if recipe.name in shipped else recipe.name
    licence = "yours" if recipe.licence in {other.licence for other in shipped.values()} else recipe.licence
    return recipe.changed(name=name, licence=licence, weights=())

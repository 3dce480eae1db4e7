"""When two sources say the same of a model, and whom an error names when they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinoexport import family
from dinoexport.config import recipe as recipes
from dinoexport.config.recipe import Recipe
from dinoexport.errors import UsageError
from dinoexport.family import Description, Fact
from dinoexport.weights import checkpoint, formats, settle
from dinoexport.weights.settle import Settled
from tests.checkpoint_files import TINY, settled


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (3, 3, True),
        (3, 4, False),
        ("a", "a", True),
        (True, False, False),
        (1e-5, 1.0000005e-5, True),  # as far apart as two roundings to fp32
        (1e-5, 1.000002e-5, False),
        (1e6, 1e6 + 0.9, True),
        (1e6, 1e6 + 1.1, False),
        (-2.0, 2.0, False),
        (0.0, 0.0, True),
        (1.0, 1, True),
        (2, 2.0000001, False),
        ([1, 2], (1, 2), True),
        ([1, 2], [1, 2, 3], False),
        ([1, 2], [1, 3], False),
        ([0.5], [0.50000001], True),
        (14, [14, 14], True),
        ((14, 14), 14, True),
        (14, [14, 16], False),
        ([14, 16], 14, False),
        ([1.0], 1.0, False),
        ("ab", ["a", "b"], False),
    ],
)
def test_values_that_say_the_same(one: Any, other: Any, same: bool) -> None:
    """Fractions to a millionth of the larger; one whole number stands for both sides."""
    assert settle._same(one, other) is settle._same(other, one) is same


def fact(value: Any, source: str) -> Fact:
    return Fact(key="model.embed_dim", value=value, source=source)


def test_facts_that_disagree() -> None:
    """The recipe's own value, or for a recipe made of the same files the one that says it."""
    two = (
        Fact(key="model.depth", value=48, source="z.json: depth"),
        fact(48, "a.json: dim"),
        fact(64, "b.json: width"),
    )
    with pytest.raises(UsageError) as caught:
        settle._with_facts(TINY, two, made=True)
    assert caught.value.message.startswith("the weights say model.depth = 2, z.json: depth says 48.")
    for made, says in ((True, "a.json: dim says"), (False, "the recipe says")):
        with pytest.raises(UsageError) as caught:
            settle._with_facts(TINY, two[1:], made=made)
        assert caught.value.message == f"{says} model.embed_dim = 48, b.json: width says 64."


def test_facts_fill_in_what_a_recipe_leaves_out() -> None:
    found = settle._with_facts(TINY, [fact(48, "a"), Fact(key="model.patch_size", value=7, source="b")], made=False)
    assert found.model == TINY.model | {"patch_size": 7}


def test_a_recipe_of_its_own_was_not_made_of_weights() -> None:
    for source in (None, "synthetic:0"):
        assert settled(source) == Settled(recipe=TINY, assumed={}, notes=(), made=False)


class Silent:
    """A family that recognises nothing of its models' weights."""


class Describing:
    """A family whose files say `facts`, and whose weights do not show the activation and the mean."""

    def __init__(self, *facts: Fact) -> None:
        self.facts = facts

    def recipe_from(self, weights: Path, found: Any) -> Recipe | None:
        return TINY.changed(name=weights.stem, licence="yours") if found == SHAPES else None

    def described(self, recipe: Recipe, weights: Path, found: Any) -> Description:
        return Description(facts=self.facts, notes=(f"{recipe.name} in {weights}",))

    def assumed(self, recipe: Recipe) -> tuple[Fact, ...]:
        return (
            Fact(key="model.activation", value="gelu", source="as published"),
            Fact(key="preprocess.mean", value=[0.5, 0.25], source="ImageNet's"),
        )


SHAPES = {"fc.weight": (2, 3)}
SHIPPED = TINY.changed(name="shipped", licence="MIT", weights=[{"url": "https://a.example/w.pth", "sha256": "5" * 64}])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """One family and one shipped recipe, and a file with this hash."""

    def install(known: Any, digest: str = "6" * 64) -> None:
        for place, name, value in (
            (family, "find", lambda _: known),
            (family, "installed", lambda: ("dinov2",)),
            (recipes, "variants", lambda: ("shipped",)),
            (recipes, "load", {"shipped": SHIPPED}.__getitem__),
            (checkpoint, "digest_of", lambda source, progress: digest),
            (formats, "shapes_of", lambda path, prefix, split_axis: SHAPES),
        ):
            monkeypatch.setattr(place, name, value)

    return install


def test_a_family_that_recognises_nothing(installed: Callable[..., None]) -> None:
    """A recipe is taken as it is, and the published weights' one is known by their hash."""
    installed(Silent(), "5" * 64)
    assert settled("w.pth") == Settled(recipe=TINY)
    assert settled("w.pth", None) == Settled(recipe=SHIPPED, made=True)


def test_what_files_and_recipe_leave_out_is_assumed(installed: Callable[..., None]) -> None:
    mean = [0.5, 0.25]
    installed(Describing(Fact(key="model.patch_size", value=7, source="a.json: patch")))
    stated = TINY.changed(preprocess={"mean": [0.0, 0.0]})
    assert settled("w.pth", stated) == Settled(
        recipe=stated.changed(model=TINY.model | {"patch_size": 7, "activation": "gelu"}),
        assumed={"model.activation": "gelu, as published"},
        notes=("tiny in w.pth",),
    )
    both = {"model.activation": "gelu, as published", "preprocess.mean": "[0.5, 0.25], ImageNet's"}
    model = TINY.model | {"patch_size": 7, "activation": "gelu"}
    assert settled("w.pth") == Settled(
        recipe=TINY.changed(model=model, preprocess={"mean": mean}), assumed=both, notes=("tiny in w.pth",)
    )
    assert settled("own.pth", None) == Settled(
        recipe=TINY.changed(name="own", licence="yours", model=model, preprocess={"mean": mean}),
        assumed=both,
        notes=("own in own.pth",),
        made=True,
    )
    installed(Describing(Fact(key="model.activation", value="relu", source="a.json: act")))
    assert settled("own.pth", None).assumed == {"preprocess.mean": "[0.5, 0.25], ImageNet's"}


def test_published_weights_assume_nothing(installed: Callable[..., None]) -> None:
    installed(Describing(), "5" * 64)
    assert settled("w.pth", None) == Settled(recipe=SHIPPED, notes=("shipped in w.pth",), made=True)
    assert settled("w.pth", TINY) == Settled(recipe=TINY, notes=("tiny in w.pth",))


@pytest.mark.parametrize(
    ("recipe", "digest", "says"),
    [(TINY, "6", "the recipe says"), (TINY, "5", "the recipe says"), (None, "5", "the recipe says"),
     (None, "6", "the weights say")],
)  # fmt: skip
def test_a_recipe_made_of_the_weights_says_nothing_itself(
    recipe: Recipe | None, digest: str, says: str, installed: Callable[..., None]
) -> None:
    installed(Describing(fact(64, "a.json: dim")), digest * 64)
    with pytest.raises(UsageError) as caught:
        settled("w.pth", recipe)
    assert caught.value.message == f"{says} model.embed_dim = 48, a.json: dim says 64."


def test_only_weights_of_a_known_shape_make_a_recipe(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(Describing())
    monkeypatch.setattr(formats, "shapes_of", lambda path, prefix, split_axis: {})
    with pytest.raises(UsageError, match=r"The weights at w\.pth match no installed family\."):
        settled("w.pth", None)


@pytest.mark.parametrize(
    ("changes", "name", "licence"),
    [
        ({}, "shipped-yours", "yours"),
        ({"name": "mine"}, "mine", "yours"),
        ({"licence": "BSD"}, "shipped-yours", "BSD"),
    ],
)
def test_weights_of_another_hash_are_yours(
    changes: dict[str, Any], name: str, licence: str, installed: Callable[..., None]
) -> None:
    installed(Describing())
    found = settled("w.pth", SHIPPED.changed(**changes)).recipe
    assert (found.name, found.licence, found.weights) == (name, licence, ())
    nowhere = SHIPPED.changed(weights=(), **changes)
    found = settled("w.pth", nowhere).recipe
    assert (found.name, found.licence) == (nowhere.name, nowhere.licence)

"""When two sources say the same of a model, and whom an error names when they do not."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport.errors import UsageError
from dinoexport.family import Fact
from dinoexport.weights import settle
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

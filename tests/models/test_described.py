"""What the weights' shapes say: a recipe for them, facts for a recipe, and what they do not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dinoexport.config.recipe import Range, Recipe
from dinoexport.errors import UsageError
from dinoexport.family import Fact
from dinoexport.models.dinov2 import described
from dinoexport.models.dinov2.config import Architecture

Shape = tuple[int, ...]
MODEL = {"embed_dim": 128, "depth": 3, "num_heads": 2, "feed_forward": "mlp", "register_count": 0}


def shapes_of(**model: Any) -> dict[str, Shape]:
    return dict(Architecture.model_validate(MODEL | model).tensors)


def recipe_of(**model: Any) -> Recipe:
    side = Range(min=14, opt=28, max=70)
    return Recipe(
        name="tiny", family="dinov2", validation="tiny_cases", model=MODEL | model,
        profile={"batch": Range(min=1, opt=1, max=2), "height": side, "width": side},
    )  # fmt: skip


def beside(folder: Path, **config: Any) -> Path:
    """The path of weights in `folder`, with a configuration of Hugging Face beside them if one is given."""
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "dinov2", **config}))
    return folder / "My ViT.pth"


@pytest.mark.parametrize(
    ("model", "native"),
    [
        ({}, 518),
        ({"feed_forward": "swiglu", "register_count": 4}, 518),
        ({"patch_size": 16, "position_side": 14}, 224),
        # The profile has at most 73 patches a side, more than the table of some models.
        ({"patch_size": 16, "position_side": 73}, 1168),
        ({"patch_size": 16, "position_side": 90}, 1168),
    ],
)
def test_a_recipe_made_from_weights(model: dict[str, Any], native: int, tmp_path: Path) -> None:
    made = described.recipe_from(beside(tmp_path), shapes_of(**model))
    patch = model.get("patch_size", 14)
    side = Range(min=patch, opt=native, max=73 * patch)
    one = Range(min=1, opt=1, max=1)
    assert made == Recipe(
        name="my-vit", family="dinov2", validation="dinov2", licence="yours",
        model=MODEL | {key: value for key, value in model.items() if key in MODEL},
        graph={"input": "pixels", "sizes": "crop"},
        profile={"batch": Range(min=1, opt=1, max=16), "height": side, "width": side},
        profiles={"latency": {"batch": one}},
    )  # fmt: skip


def test_a_table_that_is_no_square_gives_one_patch(tmp_path: Path) -> None:
    made = described.recipe_from(beside(tmp_path), shapes_of() | {"pos_embed": (1, 12, 128)})
    assert made is not None and made.profile["height"].opt == 14


def test_no_recipe_without_a_whole_backbone(tmp_path: Path) -> None:
    assert described.recipe_from(beside(tmp_path), {"fc.weight": (2, 2)}) is None
    assert described.recipe_from(beside(tmp_path), {"cls_token": (1, 1, 128), "pos_embed": (1, 10, 128)}) is None


def test_heads_of_64_channels_unless_a_file_says_otherwise(tmp_path: Path) -> None:
    for width, heads in ((64, 1), (384, 6)):
        made = described.recipe_from(beside(tmp_path), shapes_of(embed_dim=width, num_heads=1))
        assert made is not None and made.model["num_heads"] == heads
    made = described.recipe_from(beside(tmp_path, num_attention_heads=8), shapes_of())
    assert made is not None and made.model["num_heads"] == 8


@pytest.mark.parametrize(("kernel", "width"), [((100, 3, 14, 14), 100), ((128, 588), 0)])
def test_widths_whose_heads_are_not_known(kernel: Shape, width: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        described.recipe_from(beside(tmp_path), shapes_of() | {"patch_embed.proj.weight": kernel})
    assert (refused.value.message, refused.value.next_step) == (
        f"The weights are {width} wide and do not show how many attention heads they have.",
        "Put their config.json beside them, or write a recipe with num_heads.",
    )  # fmt: skip


def test_what_the_weights_do_not_show(tmp_path: Path) -> None:
    weights = beside(tmp_path, num_attention_heads=8)
    odd = shapes_of() | {"patch_embed.proj.weight": (128, 588), "register_tokens": (4, 128)}
    with pytest.raises(UsageError) as refused:
        described.recipe_from(weights, odd)
    assert refused.value.message == f"{weights}: the weights do not show embed_dim, register_count."


@pytest.mark.parametrize(
    ("shown", "facts"),
    [
        ({}, {}),
        (
            {"patch_size": 16, "position_side": 24, "mlp_hidden": 300},
            {"patch_size": 16, "position_side": 24, "mlp_hidden": 300},
        ),
        ({"qkv_bias": False, "layer_scale": False}, {"qkv_bias": False, "layer_scale": False}),
        # Of another width or depth: another model's, which the loader names.
        ({"depth": 2, "patch_size": 16}, {}),
        ({"embed_dim": 64, "patch_size": 16}, {}),
    ],
)
def test_facts_for_a_recipe(shown: dict[str, Any], facts: dict[str, Any], tmp_path: Path) -> None:
    """Only those that are not the defaults; the loader compares the architecture's own tensor by tensor."""
    found = described.described(recipe_of(), beside(tmp_path), shapes_of(**shown))
    assert sorted(found.facts, key=lambda fact: fact.key) == [
        Fact(key=f"model.{key}", value=facts[key], source="the weights") for key in sorted(facts)
    ]
    assert found.notes == ()


def test_a_stated_default_is_compared(tmp_path: Path) -> None:
    found = described.described(recipe_of(patch_size=16, qkv_bias=True), beside(tmp_path), shapes_of())
    assert found.facts == (
        Fact(key="model.patch_size", value=14, source="the weights"),
        Fact(key="model.qkv_bias", value=True, source="the weights"),
    )


@pytest.mark.parametrize(
    ("changed", "hidden"),
    [
        ({"feed_forward": "swiglu"}, {}),
        ({"feed_forward": "swiglu", "mlp_hidden": 300}, {"model.mlp_hidden": 300}),
    ],
)
def test_the_width_of_a_swiglu(changed: dict[str, Any], hidden: dict[str, int], tmp_path: Path) -> None:
    """It is the last matrix's: the first is twice as high."""
    found = described.described(recipe_of(feed_forward="swiglu"), beside(tmp_path), shapes_of(**changed))
    assert {fact.key: fact.value for fact in found.facts} == hidden


def test_a_last_matrix_of_another_rank_says_nothing(tmp_path: Path) -> None:
    odd = shapes_of() | {"blocks.0.mlp.fc2.weight": (1, 128, 300)}
    assert described.described(recipe_of(), beside(tmp_path), odd).facts == ()


@pytest.mark.parametrize("channels", [1, 4])
def test_further_channels_must_be_declared(channels: int, tmp_path: Path) -> None:
    expected = (
        f"The weights take images of {channels} channels, and the recipe does not say so.",
        f"Write a recipe with in_chans = {channels} in [model], and give [preprocess] a mean and std for each channel.",
    )
    shapes = shapes_of(in_chans=channels)
    with pytest.raises(UsageError) as refused:
        described.described(recipe_of(), beside(tmp_path), shapes)
    assert (refused.value.message, refused.value.next_step) == expected
    with pytest.raises(UsageError) as refused:
        described.recipe_from(beside(tmp_path), shapes)
    assert (refused.value.message, refused.value.next_step) == expected
    assert described.described(recipe_of(in_chans=channels), beside(tmp_path), shapes).facts == ()
    said = beside(tmp_path, num_channels=channels)
    assert [fact.key for fact in described.described(recipe_of(), said, shapes).facts] == [
        "model.in_chans", "model.register_count",
    ]  # fmt: skip


def test_what_is_assumed_of_weights_alone() -> None:
    def values(**model: Any) -> dict[str, tuple[Any, str]]:
        return {fact.key: (fact.value, fact.source) for fact in described.assumed(recipe_of(**model))}

    without = values()
    assert without == {
        "model.interpolate_offset": (0.1, "as the published models without registers"),
        "model.interpolate_antialias": (False, "as the published models without registers"),
        "model.layer_norm_eps": (1e-6, "as all published models"),
        "model.activation": ("gelu", "as all published models"),
        "model.num_heads": (2, "64 channels a head, as all published models"),
        "preprocess.mean": ((0.485, 0.456, 0.406), "ImageNet's"),
        "preprocess.std": ((0.229, 0.224, 0.225), "ImageNet's"),
    }
    registers = {
        "model.interpolate_offset": (0.0, "as the published models with registers"),
        "model.interpolate_antialias": (True, "as the published models with registers"),
    }
    assert values(register_count=4) == without | registers
    assert set(without) - set(values(in_chans=4)) == {"preprocess.mean", "preprocess.std"}


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_table_of_positions_says_nothing(rows: int, tmp_path: Path) -> None:
    """The check of the weights' shapes then refuses it by name."""
    made = described.recipe_from(beside(tmp_path), shapes_of() | {"pos_embed": (1, rows, 128)})
    assert made is not None and made.profile["height"] == Range(min=14, opt=14, max=1022)
    assert "position_side" not in made.model


def test_a_table_of_one_patch_is_a_square(tmp_path: Path) -> None:
    found = described.described(recipe_of(), beside(tmp_path), shapes_of() | {"pos_embed": (1, 2, 128)})
    assert {fact.key: fact.value for fact in found.facts}["model.position_side"] == 1

"""Derive facts, and if needed a recipe, from DINOv2 weights and the files beside them; list what neither shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.family import Description, Fact, Shapes
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import beside, layouts
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.search import search
from dinoexport.weights.config_file import name_of

_HEAD_WIDTH = 64  # of every published DINOv2
_RGB = 3
_PROFILE_PATCHES_MAX = 73  # 1022 pixels for patches of 14
# Derived from the weights when a recipe is made; if there is a recipe, the loader compares tensor by tensor.
_OF_THE_ARCHITECTURE = ("embed_dim", "depth", "register_count", "feed_forward")


def described(recipe: Recipe, weights: Path, found: Shapes) -> Description:
    """Facts from the weights and the files beside them, for `recipe`; and what was chosen and left out."""
    arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
    chosen = search(found, width=arch.embed_dim, depth=arch.depth)
    if chosen is None:
        return Description(facts=beside.facts(weights))
    seen = _seen(_in_published_layout(found, arch))
    said = beside.facts(weights)
    defaults = _defaults(arch)
    if (seen.get("embed_dim"), seen.get("depth")) != (arch.embed_dim, arch.depth):
        seen = {}  # another model's; the loader reports whose
    facts = [
        Fact(key=f"model.{key}", value=value, source="the weights")
        for key, value in seen.items()
        if key not in _OF_THE_ARCHITECTURE and (key in recipe.model or value != defaults.get(key))
    ]
    _channels_are_said(seen, [*recipe.model, *(fact.key.removeprefix("model.") for fact in said)])
    return Description(facts=(*(f for f in facts if f.key != "model.in_chans"), *said), notes=chosen.notes)


def _in_published_layout(found: Shapes, arch: Architecture | None = None) -> Shapes:
    def unread(name: str) -> Any:
        raise AssertionError(f"{name} was read to see what the model is")

    width, depth = (arch.embed_dim, arch.depth) if arch else (None, None)
    return layouts.adapt(found, unread, width=width, depth=depth)[0]


def _defaults(arch: Architecture) -> dict[str, Any]:
    """The default values of `[model]`."""
    plain = Architecture(
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads,
        feed_forward=arch.feed_forward,
        register_count=arch.register_count,
    )
    return plain.model_dump() | {"mlp_hidden": plain.hidden_dim}


def _seen(shapes: Shapes) -> dict[str, Any]:
    """The facts of `[model]` that tensors of the published layout show."""
    seen: dict[str, Any] = {}
    kernel, table = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    blocks = [match for name in shapes if (match := re.match(r"blocks\.(\d+)\.(.+)", name))]
    inside = {match[2] for match in blocks}
    if len(kernel) == 4:
        seen |= {"embed_dim": kernel[0], "in_chans": kernel[1], "patch_size": kernel[2]}
    if len(table) == 3 and table[1] > 1 and (side := math.isqrt(table[1] - 1)) ** 2 == table[1] - 1:
        seen["position_side"] = side
    if blocks:
        seen["depth"] = 1 + max(int(match[1]) for match in blocks)
        seen["feed_forward"] = "swiglu" if "mlp.w12.weight" in inside else "mlp"
        seen["qkv_bias"] = "attn.qkv.bias" in inside
        seen["layer_scale"] = bool({"ls1.gamma", "ls2.gamma"} & inside)
    last = shapes.get("blocks.0.mlp.w3.weight", shapes.get("blocks.0.mlp.fc2.weight", ()))
    if len(last) == 2:
        seen["mlp_hidden"] = last[1]
    registers = shapes.get("register_tokens", (1, 0, 0))
    if len(registers) == 3:
        seen["register_count"] = registers[1]
    return seen


def _channels_are_said(seen: Mapping[str, Any], said: list[str]) -> None:
    """Refuses additional channels that the recipe does not declare, because their meaning is unknown."""
    if seen.get("in_chans", _RGB) != _RGB and "in_chans" not in said:
        raise UsageError(
            f"The weights take images of {seen['in_chans']} channels, and the recipe does not say so.",
            next_step=f"Write a recipe with in_chans = {seen['in_chans']} in [model], and give [preprocess] a mean and "
            "std for each channel.",
        )


def recipe_from(weights: Path, found: Shapes) -> Recipe | None:
    """A recipe for the weights at `weights`; None if they hold no DINOv2."""
    chosen = search(found)
    if chosen is None or not chosen.backbone.is_whole:
        return None
    seen = _seen(_in_published_layout(found))
    said = {fact.key: fact for fact in beside.facts(weights)}
    _channels_are_said(seen, [key.removeprefix("model.") for key in said])
    model = {key: seen[key] for key in _OF_THE_ARCHITECTURE if key in seen}
    heads = said.get("model.num_heads")
    model["num_heads"] = heads.value if heads else _assumed_heads(seen)
    if missing := [key for key in _OF_THE_ARCHITECTURE if key not in model]:
        raise UsageError(
            f"{weights}: the weights do not show {', '.join(missing)}.",
            next_step="Write a recipe: docs/add-a-variant.md.",
        )
    patch, side = seen["patch_size"], seen.get("position_side", 1)
    native = min(side, _PROFILE_PATCHES_MAX) * patch
    pixels = {"min": patch, "opt": native, "max": _PROFILE_PATCHES_MAX * patch}
    table = {
        "name": name_of(weights),
        "family": "dinov2",
        "validation": "dinov2",
        "licence": "yours",
        "model": model,
        "graph": {"input": "pixels", "sizes": "crop"},
        "profile": {"batch": {"min": 1, "opt": 1, "max": 16}, "height": pixels, "width": pixels},
        "profiles": {"latency": {"batch": {"min": 1, "opt": 1, "max": 1}}},
    }
    return parse(Recipe, table, where=f"the recipe for {weights}")


def _assumed_heads(seen: Mapping[str, Any]) -> int:
    width = seen.get("embed_dim", 0)
    if not width or width % _HEAD_WIDTH:
        raise UsageError(
            f"The weights are {width} wide and do not show how many attention heads they have.",
            next_step="Put their config.json beside them, or write a recipe with num_heads.",
        )
    return int(width // _HEAD_WIDTH)


def assumed(recipe: Recipe) -> tuple[Fact, ...]:
    """Values that weights do not show. If the number of heads is unknown, it assumes heads of 64 channels."""
    arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
    like = "models with registers" if arch.register_count else "models without registers"
    published = f"as the published {like}"
    shown = Preprocessing()
    facts = [
        Fact(key="model.interpolate_offset", value=float(arch.offset), source=published),
        Fact(key="model.interpolate_antialias", value=arch.antialias, source=published),
        Fact(key="model.layer_norm_eps", value=arch.layer_norm_eps, source="as all published models"),
        Fact(key="model.activation", value=arch.activation, source="as all published models"),
        # Every recipe that a person wrote states this; it is assumed if the recipe was derived from weights.
        Fact(
            key="model.num_heads",
            value=arch.num_heads,
            source=f"{_HEAD_WIDTH} channels a head, as all published models",
        ),
    ]
    if arch.in_chans == _RGB:
        facts += [
            Fact(key="preprocess.mean", value=shown.mean, source="ImageNet's"),
            Fact(key="preprocess.std", value=shown.std, source="ImageNet's"),
        ]
    return tuple(facts)

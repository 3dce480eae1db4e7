"""The model of a recipe: a backbone with or without a head, or one with the interface of Hugging Face's tools."""

from __future__ import annotations

from dinoexport import images
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import serving
from dinoexport.models.dinov2.config import Architecture, GraphChoices
from dinoexport.models.dinov2.heads.model import HeadedModel, backbone_graph, joined
from dinoexport.models.dinov2.model import Dinov2Model
from dinoexport.models.dinov2.transformers_interface import TransformersModel


def of(recipe: Recipe) -> Dinov2Model | HeadedModel:
    """The variant of a recipe; raises UsageError that names errors in `[model]`, `[graph]` or `[head]`."""
    arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
    choices = parse(GraphChoices, backbone_graph(recipe), where=f"recipe {recipe.name}, [graph]")
    try:
        choices.chosen_blocks(arch.depth)
        choices.fp32_parts(arch.depth)
    except ValueError as error:
        raise UsageError(
            f"recipe {recipe.name}, [graph]: {error}.", next_step="Choose blocks and parts of the model."
        ) from None
    wanted = {"batch", "height", "width"}
    if set(recipe.profile) != wanted:
        raise UsageError(
            f"recipe {recipe.name}, [profile]: has {sorted(recipe.profile)}, needs {sorted(wanted)}.",
            next_step="Give each dynamic dimension its min, opt and max.",
        )
    ends = [(d, r.min, r.max) for d, r in recipe.profile.items() if d != "batch"]
    patch = arch.patch_size
    if wrong := [f"{d} {low}..{high}" for d, low, high in ends if low % patch or high % patch]:
        raise UsageError(
            f"recipe {recipe.name}, [profile]: {', '.join(wrong)} must begin and end at multiples of {patch}.",
            next_step=f"Patches are {patch} pixels a side; {patch}, {16 * patch} and {73 * patch} are legal.",
        )
    kind: type[Dinov2Model] = Dinov2Model
    if choices.interface == "transformers" and not recipe.head:
        kind = TransformersModel
    backbone = kind(recipe=recipe, arch=arch, choices=choices, preprocessing=_preprocessing(recipe, arch, choices))
    return joined(recipe, backbone) if recipe.head else backbone


def _preprocessing(recipe: Recipe, arch: Architecture, choices: GraphChoices) -> Preprocessing:
    """The table `[preprocess]`, with a mean and a deviation for each channel."""
    table = dict(recipe.preprocess)
    if arch.in_chans != serving.RGB and not {"mean", "std"} & table.keys() and choices.input == "pixels":
        # The graph takes normalised pixels, so this only prepares the photographs of the validation.
        table |= {
            name: [values[i % len(values)] for i in range(arch.in_chans)]
            for name, values in (("mean", images.IMAGENET_MEAN), ("std", images.IMAGENET_STD))
        }
    read = parse(Preprocessing, table, where=f"recipe {recipe.name}, [preprocess]")
    if len(read.mean) != arch.in_chans:
        raise UsageError(
            f"recipe {recipe.name}, [preprocess]: mean and std have {len(read.mean)} channels, "
            f"[model] in_chans is {arch.in_chans}.",
            next_step="Give mean and std a value for each channel.",
        )
    return read

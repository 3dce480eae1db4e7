"""What listings and reports show about a variant."""

from __future__ import annotations

from collections.abc import Mapping

from dinoexport.config.recipe import Recipe
from dinoexport.models.dinov2.config import Architecture


def facts(arch: Architecture) -> Mapping[str, int | str]:
    """Width, depth, heads, feed-forward and registers."""
    return {
        "width": arch.embed_dim,
        "depth": arch.depth,
        "heads": arch.num_heads,
        "feed_forward": f"{arch.feed_forward} {arch.hidden_dim}",
        "registers": arch.register_count,
    }


def card(recipe: Recipe, arch: Architecture, *, sizes: str) -> Mapping[str, str]:
    """From the model card of DINOv2-S/B/L/g in the upstream repository (MODEL_CARD.md), if it is one of them.

    sizes: what the graph does with an image whose sides are not multiples of a patch: `crop`, `strict`, or a head's
    `pad`.
    """
    patch = arch.patch_size
    done = {
        "crop": "cropped to the closest smaller multiple",
        "strict": "refused",
        "pad": "padded around to the next multiple, and its answer is resized to the image",
    }
    off_grid = f"An image whose sides are not multiples of {patch} is {done[sizes]}."
    if not recipe.weights:
        return {
            "model": f"yours: {recipe.name}, a {arch.native_size}-pixel ViT of DINOv2's architecture, patch {patch}",
            "training_data": "yours: nothing is known of it here",
            "intended_use": "yours to say",
            "limits": off_grid,
            "bias": "yours to measure; the published models' biases are in their model card, not here",
        }
    return {
        "model": f"DINOv2 {recipe.name}: {arch.native_size}-pixel ViT, patch {patch}, trained on LVD-142M",
        "intended_use": "Vision backbone: k-NN and linear classification on the class token (alone or with the "
        "mean patch token), retrieval by nearest neighbours, depth and segmentation by linear layers on "
        "patch tokens.",
        "limits": f"{off_grid} Fine-tuning is possible for small gains and increases bias towards the fine-tuning "
        "labels.",
        "bias": "Despite training without annotations, significant biases remain toward rich households from "
        "Western countries.",
    }

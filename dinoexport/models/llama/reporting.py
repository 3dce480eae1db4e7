"""What listings and reports show about a decoder."""

from __future__ import annotations

from collections.abc import Mapping

from dinoexport.config.recipe import Recipe
from dinoexport.models.llama.config import Architecture


def facts(arch: Architecture) -> Mapping[str, int | str]:
    """Widths, depth, heads, vocabulary, base and context."""
    return {
        "width": arch.dim,
        "depth": arch.layers,
        "heads": arch.heads,
        "kv_heads": arch.kv_heads,
        "feed_forward": f"gated {arch.hidden_dim}",
        "vocabulary": arch.vocabulary,
        "rope_theta": f"{arch.rope_theta:g}",
        "context": arch.context,
    }


def card(recipe: Recipe) -> Mapping[str, str]:
    """The recipe's `[card]`."""
    own = {
        "intended_use": "yours to say: nothing beside the weights does",
        "limits": "yours to measure; what it writes may be wrong",
    }
    return {"model": f"{recipe.name}: a decoder of the Llama architecture", **(recipe.card or own)}

"""Llama-type decoders: Llama 2, Code Llama and models of the same architecture.

Implements `dinoexport.family`. Touvron et al. 2023, arXiv:2307.09288; Rozière et al. 2023, arXiv:2308.12950.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoexport.config.recipe import Recipe
from dinoexport.family import Description, Fact, Shapes
from dinoexport.models.llama import described, layouts, model
from dinoexport.models.llama.config import Architecture, GraphChoices


class Llama:
    """The family `llama`."""

    def model(self, recipe: Recipe) -> model.LlamaModel:
        """See `model`."""
        return model.of(recipe)

    def table_schemas(self) -> Mapping[str, Any]:
        """JSON schemas of the recipe tables that are the family's own."""
        return {"model": Architecture.model_json_schema(), "graph": GraphChoices.model_json_schema()}

    def recipe_from(self, weights: Path, found: Shapes) -> Recipe | None:
        """See `described`."""
        return described.recipe_from(weights, found)

    def described(self, recipe: Recipe, weights: Path, found: Shapes) -> Description:
        """See `described`."""
        return described.described(recipe, weights, found)

    def assumed(self, recipe: Recipe) -> tuple[Fact, ...]:
        """See `described`."""
        return described.assumed(recipe)

    def split_axis(self, name: str) -> int | None:
        """See `layouts`."""
        return layouts.split_axis(name)


FAMILY = Llama()

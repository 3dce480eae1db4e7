"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023, arXiv:2309.16588): ViT-S/B/L/g.

Implements `dinoexport.family`. Upstream code: github.com/facebookresearch/dinov2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoexport.config.recipe import Recipe
from dinoexport.family import Description, Fact, Shapes
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import described, variant
from dinoexport.models.dinov2.config import Architecture, GraphChoices
from dinoexport.models.dinov2.heads.kinds import HeadTable
from dinoexport.models.dinov2.heads.model import HeadedModel
from dinoexport.models.dinov2.model import Dinov2Model


class Dinov2:
    """The family `dinov2`."""

    def model(self, recipe: Recipe) -> Dinov2Model | HeadedModel:
        """See `variant`."""
        return variant.of(recipe)

    def table_schemas(self) -> Mapping[str, Any]:
        """JSON schemas of the recipe tables that are the family's own."""
        return {
            "model": Architecture.model_json_schema(),
            "graph": GraphChoices.model_json_schema(),
            "head": HeadTable.model_json_schema(),
            "preprocess": Preprocessing.model_json_schema(),
        }

    def recipe_from(self, weights: Path, found: Shapes) -> Recipe | None:
        """See `described`."""
        return described.recipe_from(weights, found)

    def described(self, recipe: Recipe, weights: Path, found: Shapes) -> Description:
        """See `described`."""
        return described.described(recipe, weights, found)

    def assumed(self, recipe: Recipe) -> tuple[Fact, ...]:
        """See `described`."""
        return described.assumed(recipe)


FAMILY = Dinov2()

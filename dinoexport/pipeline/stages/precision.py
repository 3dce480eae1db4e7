"""Stage `precision`: with `--precision auto`, the parts of the graph that stay fp32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoexport import bundle, family
from dinoexport.errors import ValidationFailed
from dinoexport.pipeline import mixed_precision
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.stages.reference import ReferenceOutputs
from dinoexport.pipeline.versions import RUNTIMES, versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.weights.checkpoint import Checkpoint


class NothingHolds(ValidationFailed):
    """`--precision auto` found no combination within the limits."""


def search_precision(
    work: Workspace, request: BuildRequest, checkpoint: Checkpoint, reference: ReferenceOutputs
) -> tuple[Stage, BuildRequest]:
    """The request with the smallest set of fp32 parts that holds the limits; raises NothingHolds if none does."""
    model = request.model

    def make(folder: Path) -> None:
        found = mixed_precision.search(
            request.recipe, model, checkpoint, reference.stored, folder, progress=work.progress
        )
        if found.fp32 is None:
            raise NothingHolds(
                f"Nothing was published: {request.precision} misses its limits even with all of "
                f"{', '.join(model.promotable)} in fp32 ({found.trials[-1].failed_by}).",
                next_step="Build it with --precision fp32.",
            )
        (folder / bundle.PRECISION).write_text(json.dumps(found.to_json(), indent=1) + "\n")

    key = key_of(code=family.code_of(model), reference=reference.stage.key, runtimes=versions_of(RUNTIMES))
    stage = work.stage("precision", key, make, costly=True)
    recipe, promoted = mixed_precision.promoted(request.recipe, model, tried(stage)["fp32"])
    return stage, replace(request, recipe=recipe, model=promoted)


def tried(stage: Stage) -> dict[str, Any]:
    """The combinations that the precision stage tried, and the one it found."""
    content: dict[str, Any] = json.loads((stage.folder / bundle.PRECISION).read_text())
    return content

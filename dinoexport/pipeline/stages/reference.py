"""Stage `reference`: PyTorch's outputs for every case."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoexport import bundle, family
from dinoexport.bundle import reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.stages.export import graph_recipe
from dinoexport.pipeline.versions import TRACERS, versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.spec import Array
from dinoexport.validation import evaluate
from dinoexport.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ReferenceOutputs:
    """The finished stage and the content of its file, read once for all later stages."""

    stage: Stage
    stored: Reference


def compute_reference(work: Workspace, request: BuildRequest, checkpoint: Checkpoint) -> ReferenceOutputs:
    """PyTorch's outputs for every case, as stored in the bundle's file."""

    def make(folder: Path) -> None:
        reference = evaluate.compute_reference(
            request.model,
            checkpoint,
            request.cases,
            request.limits,
            precision=request.precision,
            judge_code=request.judge_code,
            kinds=evaluate.kinds_of(request.model.graphs),
            progress=work.progress,
        )
        reference_file.write(folder / bundle.REFERENCE, reference)

    key = key_of(
        code=family.code_of(request.model),
        checkpoint=checkpoint.identity,
        recipe=graph_recipe(request),
        limits=request.limits.model_dump(mode="json"),
        cases=[
            (
                *(case.name, case.why, case.expect_refusal, case.neighbours, case.shown),
                *(case.distributions, dict(case.choices), _digest(case.inputs)),
            )
            for case in request.cases
        ],
        judge_code=request.judge_code,
        versions=versions_of(TRACERS),
    )
    stage = work.stage("reference", key, make, costly=True)
    return ReferenceOutputs(stage=stage, stored=reference_file.read(stage.folder / bundle.REFERENCE))


def _digest(arrays: Mapping[str, Array]) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}

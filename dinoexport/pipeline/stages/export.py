"""Stage `export`: the traced graphs with their weights, as ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from dinoexport import family
from dinoexport.graph import onnx_writer, traces
from dinoexport.graph.onnx_writer import Traces
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.stages.weights import head_metadata
from dinoexport.pipeline.versions import TRACERS, versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.spec import Array
from dinoexport.weights.checkpoint import Checkpoint

# Waits for the traced graphs and returns them.
Traced = Callable[[], Traces]
# What changes neither the graph nor PyTorch's outputs: settings of engines and runtimes, where heads and weights are
# had, and what people are told.
_NOT_THE_GRAPHS = {"engine", "profiles", "sizes", "heads", "card", "obtain"}


def tracing(request: BuildRequest, *, fresh: bool, ahead: Sequence[str] = ()) -> AbstractContextManager[Traced]:
    """Begins tracing in a thread before the checkpoint is there. fresh: no kept trace is used. ahead: see the writer's.

    Pieces whose traces are kept need no torch.
    """

    def unread(name: str) -> Array:
        raise AssertionError(f"tracing read the weight {name}")

    model = request.model
    return onnx_writer.tracing(
        lambda: [call for graph in model.graphs for call in model.calls(graph, unread)],
        trace=partial(onnx_writer.traced, trace=partial(traces.of, fresh=fresh)),
        ahead=ahead,
    )


def export_graphs(work: Workspace, request: BuildRequest, checkpoint: Checkpoint, traced: Traced) -> Stage:
    """The traced graphs with their weights. Neither the path of the weights nor engine settings change a byte."""
    metadata = {
        "dinoexport.variant": request.recipe.name,
        # Only the hash: the same weights at another path must give the same bytes.
        "dinoexport.checkpoint_sha256": checkpoint.sha256,
        **head_metadata(request, checkpoint),
        "dinoexport.licence": request.recipe.licence,
        "dinoexport.recipe": json.dumps(graph_recipe(request), sort_keys=True),
        "dinoexport.versions": json.dumps(versions_of(TRACERS), sort_keys=True),
    }

    def make(folder: Path) -> Mapping[str, str]:
        known = {}
        for graph in request.model.graphs:
            calls = request.model.calls(graph, checkpoint.read)
            exported = onnx_writer.export(
                graph,
                calls,
                folder,
                metadata=metadata,
                traces=traced(),
                trace=partial(traces.of, fresh=work.force),
                progress=work.progress,
            )
            known[exported.data.name] = exported.data_sha256
        if isinstance(request.model, family.HasCompanionFiles):
            for name, content in request.model.companion_files.items():
                (folder / name).write_bytes(content)
        return known

    return work.stage("export", key_of(code=family.code_of(request.model), metadata=metadata), make, costly=True)


def graph_recipe(request: BuildRequest) -> dict[str, Any]:
    """The part of the recipe that decides the graph and the reference outputs, ready for json.dumps.

    Fields at their defaults are left out, so that one which a later version adds leaves the bytes of older graphs as
    they are.
    """
    recipe = request.recipe
    unused = _NOT_THE_GRAPHS if recipe.head else _NOT_THE_GRAPHS | {"head_validation"}
    return recipe.model_dump(mode="json", include=set(recipe.model_dump(exclude=unused, exclude_defaults=True)))

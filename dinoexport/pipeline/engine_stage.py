"""The engine stage: an engine from each graph, and what is known of it before it runs. Needs neither torch nor weights.

One function for a build, which has just exported the graphs, and for `compile`, which finds them in a bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import dinoexport
from dinoexport import bundle, family
from dinoexport.bundle import BundleFile, EngineFacts
from dinoexport.config.recipe import EngineChoices, Target
from dinoexport.engines import builder
from dinoexport.family import Model
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.runtime import engine_header
from dinoexport.spec import Graph, Precision, Profile, Runtime
from dinoexport.system import files, hardware
from dinoexport.system.hardware import Gpu

NAME = "engine"


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What decides an engine besides the graph. gpu: the one a classic plan is built on. profiles: by graph."""

    model: Model
    precision: Precision
    target: Target
    runtime: Runtime
    choices: EngineChoices
    profiles: Mapping[str, tuple[Profile, ...]]
    gpu: Gpu | None


def make(work: Workspace, request: EngineRequest, folder: Path, graph_files: Sequence[BundleFile]) -> Stage:
    """The stage for the graphs in `folder`, whose files are `graph_files`."""

    def compile_all(into: Path) -> None:
        facts = [
            _compiled(work, request, folder / f"{graph.name}.onnx", graph, into).model_dump(mode="json")
            for graph in request.model.graphs
        ]
        (into / bundle.ENGINES).write_text(json.dumps(facts, indent=1) + "\n")

    key = key_of(
        code=family.code_of(request.model),
        exported=sorted(file.sha256 for file in graph_files),
        target=request.target.model_dump(mode="json"),
        runtime=request.runtime,
        choices=request.choices.model_dump(mode="json"),
        profiles={name: [asdict(profile) for profile in found] for name, found in request.profiles.items()},
        gpu=request.gpu,
        versions=[
            dinoexport.__version__,
            engine_header.installed_version(request.runtime),
            hardware.installed("polygraphy"),
        ],
    )
    return work.stage(NAME, key, compile_all)


def facts_in(stage: Stage) -> tuple[EngineFacts, ...]:
    """What the stage found out about its engines."""
    content = json.loads((stage.folder / bundle.ENGINES).read_text())
    return tuple(EngineFacts.model_validate(facts) for facts in content)


def _compiled(work: Workspace, request: EngineRequest, onnx: Path, graph: Graph, folder: Path) -> EngineFacts:
    choices, gpu, profiles = request.choices, request.gpu, request.profiles[graph.name]
    made = builder.build(
        onnx,
        graph,
        folder,
        runtime=request.runtime,
        profiles=profiles,
        compute_capabilities=request.target.compute_capabilities,
        choices=choices,
        gpu=gpu,
        progress=work.progress,
    )
    return EngineFacts(
        graph=graph.name,
        file=made.path.name,
        runtime=request.runtime,
        runtime_version=made.runtime_version,
        compute_capabilities=made.compute_capabilities,
        device=gpu.name if gpu else "",
        compatibility=choices.compatibility,
        version_compatible=choices.version_compatible,
        stripped=choices.strip_weights,
        precision=request.precision,
        profiles={profile.name: dict(profile.shapes) for profile in profiles},
        size_bytes=made.size_bytes,
        weight_bytes=made.weight_bytes,
        scratch_bytes=made.scratch_bytes,
        attentions=made.attentions,
        fused_attentions=made.fused_attentions,
        build_s=round(made.build_s, 1),
        peak_memory_bytes=made.peak_memory_bytes,
        log=made.log.name,
        log_sha256=files.sha256(made.log),
        caution=request.target.cautions.get(request.runtime, ""),
    )

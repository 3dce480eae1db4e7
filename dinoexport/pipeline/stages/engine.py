"""Stage `engine`: an engine from each graph. Needs only the graphs' files: no checkpoint, no cases, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dinoexport import bundle
from dinoexport.bundle import BundleFile, EngineFacts
from dinoexport.bundle.reference_file import Reference
from dinoexport.engines import builder
from dinoexport.family import Runnable
from dinoexport.pipeline.request import EngineRequest
from dinoexport.pipeline.versions import versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.report import html_report
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Graph, Progress
from dinoexport.system import files
from dinoexport.system.hardware import Gpu
from dinoexport.validation import evaluate


def compile_engines(
    work: Workspace, request: EngineRequest, onnx_folder: Path, onnx_files: Sequence[BundleFile]
) -> Stage:
    """Builds an engine from each of the request's graphs, `onnx_files` in `onnx_folder`, and writes their facts."""

    def make(folder: Path) -> None:
        facts = [
            _compile(request, onnx_folder / f"{graph.name}.onnx", graph, folder, work.progress)
            for graph in request.graphs
        ]
        content = [engine_facts.model_dump(mode="json") for engine_facts in facts]
        (folder / bundle.ENGINES).write_text(json.dumps(content, indent=1) + "\n")

    key = key_of(
        code=request.code,
        exported=[file.sha256 for file in onnx_files],
        target=request.target.model_dump(mode="json"),
        runtime=request.runtime,
        choices=request.choices.model_dump(mode="json"),
        profiles={name: [asdict(profile) for profile in found] for name, found in request.profiles.items()},
        gpu=gpu_facts(request.gpu),
        versions=[TABLE[request.runtime].installed_version(), versions_of(("polygraphy",))],
    )
    return work.stage("engine", key, make, costly=True)


def gpu_facts(gpu: Gpu | None) -> Mapping[str, object] | None:
    """The facts of a card that its plans depend on: not which one of several equal cards it is."""
    return None if gpu is None else asdict(replace(gpu, index=0, uuid=""))


def _compile(request: EngineRequest, onnx: Path, graph: Graph, folder: Path, progress: Progress) -> EngineFacts:
    target, choices, gpu = request.target, request.choices, request.gpu
    made = builder.build(
        onnx,
        graph,
        folder,
        runtime=request.runtime,
        profiles=request.profiles[graph.name],
        compute_capabilities=target.compute_capabilities,
        choices=choices,
        gpu=gpu,
        progress=progress,
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
        profiles={profile.name: dict(profile.shapes) for profile in request.profiles[graph.name]},
        size_bytes=made.size_bytes,
        weight_bytes=made.weight_bytes,
        scratch_bytes=made.scratch_bytes,
        attentions=made.attentions,
        fused_attentions=made.fused_attentions,
        build_s=round(made.build_s, 1),
        peak_memory_bytes=made.peak_memory_bytes,
        log=made.log.name,
        log_sha256=files.sha256(made.log),
        caution=" ".join(filter(None, (target.cautions.get(request.runtime), made.not_looked_at))),
    )


def judge_engines(
    model: Runnable,
    engines_folder: Path,
    onnx_folder: Path,
    reference: Reference,
    kept: dict[str, html_report.Kept],
    *,
    progress: Progress,
) -> evaluate.EngineVerdict:
    """Validates the engines on every case if this machine's GPU can run them; if not, returns the reason.

    Outputs that the report draws are added to `kept`, under the name of the candidate.
    """
    content = json.loads((engines_folder / bundle.ENGINES).read_text())
    engines: Mapping[Path, EngineFacts] = {
        engines_folder / facts.file: facts for facts in map(EngineFacts.model_validate, content)
    }
    seen = html_report.Kept()
    verdict = evaluate.judge_engines(
        model,
        engines,
        {onnx_folder / f"{graph.name}.onnx": graph for graph in model.graphs},
        reference,
        watch=lambda candidate: html_report.keeping(candidate, reference.expectations, seen),
        progress=progress,
    )
    if verdict.report is not None:
        kept[verdict.report.candidate] = seen
    return verdict

"""The stages of a build. Each is made once, and again only when something it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dinoexport
from dinoexport import bundle, family
from dinoexport.bundle import CpuFacts, EngineFacts, HeadManifest, Manifest, reference_file, sbom
from dinoexport.engines import builder
from dinoexport.errors import ValidationFailed
from dinoexport.graph import quantise as quantiser
from dinoexport.graph.onnx_writer import Traces
from dinoexport.graph.onnx_writer import export as write_onnx
from dinoexport.graph.onnx_writer import tracing as begin_tracing
from dinoexport.pipeline import mixed_precision
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.report import html_report
from dinoexport.runtime import autotune, engine_header, runners
from dinoexport.spec import Array, CpuRuntime, Graph, Precision, Progress
from dinoexport.system import files, hardware
from dinoexport.validation import evaluate, judge
from dinoexport.validation.error_analysis import Growth
from dinoexport.weights.checkpoint import Checkpoint, open_checkpoint

# What decides a stage's bytes besides our own code.
TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
_RUNTIMES = ("onnxruntime", "openvino", "numpy")
_QUANTISERS = ("onnxruntime", "onnx", "onnx-ir")
_ABSENT = "not installed"
# Waits for what is being traced, and gives it.
Traced = Callable[[], Traces]
# The same graphs as stages, by the runtime that takes them so.
Forms = Mapping[CpuRuntime, Stage]
# What an engine is built for and how: it changes neither the graph nor what PyTorch answers.
_ENGINE_ONLY = {"engine", "profiles"}


class NothingHolds(ValidationFailed):
    """`--precision auto` found no form of the graph that holds the limits."""


def open_weights(request: BuildRequest, progress: Progress) -> Checkpoint:
    """The checkpoint, and the head's own file where the model has one."""
    return open_checkpoint(
        request.model, request.recipe, request.weights, head_source=request.head_weights, progress=progress
    )


def head_of(request: BuildRequest, checkpoint: Checkpoint) -> HeadManifest | None:
    """What the manifest says of the model's head."""
    facts = request.model.head_facts
    if facts is None:
        return None
    found = checkpoint.head
    return HeadManifest(**asdict(facts), source=found.source if found else "", sha256=found.sha256 if found else None)


def _head_metadata(request: BuildRequest, checkpoint: Checkpoint) -> dict[str, str]:
    """What the ONNX file itself says of its head: whose weights, and what its classes are called."""
    facts = request.model.head_facts
    if facts is None:
        return {}
    found = {"dinoexport.head": facts.kind}
    if checkpoint.head is not None:
        found["dinoexport.head_sha256"] = checkpoint.head.sha256
    return found | ({"dinoexport.classes": json.dumps(facts.classes)} if facts.classes else {})


def tracing(request: BuildRequest) -> AbstractContextManager[Traced]:
    """The export stage's tracing, begun in a thread before the checkpoint is there."""

    def unread(name: str) -> Array:
        raise AssertionError(f"tracing read the weight {name}")

    return begin_tracing(
        lambda: [call for graph in request.model.graphs for call in request.model.calls(graph, unread)]
    )


def export(work: Workspace, request: BuildRequest, checkpoint: Checkpoint, traced: Traced) -> Stage:
    """The traced graphs with their weights. Neither where the weights lay nor what an engine is for changes a byte."""
    recipe = request.recipe.model_dump(mode="json", exclude=_ENGINE_ONLY)
    versions = versions_of(TRACERS)
    metadata = {
        "dinoexport.variant": request.recipe.name,
        # The hash alone: the same weights at another path must give the same bytes.
        "dinoexport.checkpoint_sha256": checkpoint.sha256,
        **_head_metadata(request, checkpoint),
        "dinoexport.licence": request.recipe.licence,
        "dinoexport.recipe": json.dumps(recipe, sort_keys=True),
        "dinoexport.versions": json.dumps(versions, sort_keys=True),
    }

    def make(folder: Path) -> None:
        for graph in request.model.graphs:
            calls = request.model.calls(graph, checkpoint.read)
            write_onnx(graph, calls, folder, metadata=metadata, traces=traced(), progress=work.progress)

    return work.stage("export", key_of(code=family.code_of(request.model), metadata=metadata), make)


def forms(work: Workspace, request: BuildRequest, plain: Stage) -> Forms:
    """What each runtime of a CPU takes the graphs as: the export itself, or in int8 a twin made for it."""
    if request.precision is not Precision.INT8:
        return dict.fromkeys(request.cpu_runtimes, plain)
    integer = _quantised(work, plain, quantiser.to_int8)
    if "openvino" not in autotune.runtimes(request.precision, request.cpu_runtimes):
        return {"onnxruntime": integer}
    return {"onnxruntime": integer, "openvino": _quantised(work, integer, quantiser.with_wide_products)}


def _quantised(work: Workspace, source: Stage, form: Callable[[Path, Path], object]) -> Stage:
    def make(folder: Path) -> None:
        onnx_files = [file.name for file in source.files if file.name.endswith(".onnx")]
        for done, name in enumerate(onnx_files, start=1):
            form(source.folder / name, folder)
            work.progress("quantising", done, len(onnx_files))

    return work.stage("quantise", key_of(source=source.key, versions=versions_of(_QUANTISERS)), make)


def tune(request: BuildRequest, forms: Forms, plain: Stage, progress: Progress) -> CpuFacts:
    """The fastest way to run the graphs on this machine; with less precision than fp32, beside fp32."""
    wanted = autotune.GraphForms(
        precision=request.precision, graphs={runtime: _graphs(request, stage) for runtime, stage in forms.items()}
    )
    fp32 = autotune.GraphForms(
        precision=Precision.FP32, graphs=dict.fromkeys(request.cpu_runtimes, _graphs(request, plain))
    )
    lowered = request.precision in (Precision.BF16, Precision.INT8)
    return autotune.tune(request.model, wanted, fp32 if lowered else None, progress=progress)


def _graphs(request: BuildRequest, exported: Stage) -> dict[Path, Graph]:
    return {exported.folder / f"{graph.name}.onnx": graph for graph in request.model.graphs}


def reference(work: Workspace, request: BuildRequest, checkpoint: Checkpoint) -> Stage:
    """PyTorch's answers to every case."""

    def make(folder: Path) -> None:
        reference = evaluate.compute_reference(
            request.model,
            checkpoint,
            request.cases,
            request.limits,
            precision=request.precision,
            judge_code=request.judge_code,
            progress=work.progress,
        )
        reference_file.write(folder / bundle.REFERENCE, reference)

    key = key_of(
        code=family.code_of(request.model),
        checkpoint=checkpoint.identity,
        recipe=request.recipe.model_dump(mode="json", exclude=_ENGINE_ONLY),
        limits=request.limits.model_dump(mode="json"),
        cases=[
            (case.name, case.why, case.expect_refusal, case.neighbours, case.shown, _digest(case.inputs))
            for case in request.cases
        ],
        judge_code=request.judge_code,
        versions=versions_of(TRACERS),
    )
    return work.stage("reference", key, make)


def precision(
    work: Workspace, request: BuildRequest, checkpoint: Checkpoint, reference: Stage
) -> tuple[Stage, BuildRequest]:
    """The request with the smallest set of parts in fp32 that holds the limits; raises NothingHolds if none does."""

    def make(folder: Path) -> None:
        stored = reference_file.read(reference.folder / bundle.REFERENCE)
        found = mixed_precision.search(
            request.recipe, request.model, checkpoint, stored, folder, progress=work.progress
        )
        if found.fp32 is None:
            raise NothingHolds(
                f"Nothing was published: {request.precision} misses its limits even with all of "
                f"{', '.join(request.model.promotable)} in fp32 ({found.trials[-1].failed_by}).",
                next_step="Build it with --precision fp32.",
            )
        (folder / bundle.PRECISION).write_text(json.dumps(found.to_json(), indent=1) + "\n")

    stage = work.stage(
        "precision",
        key_of(code=family.code_of(request.model), reference=reference.key, runtimes=versions_of(_RUNTIMES)),
        make,
    )
    recipe, model = mixed_precision.promoted(request.recipe, request.model, tried(stage)["fp32"])
    return stage, replace(request, recipe=recipe, model=model)


def tried(stage: Stage) -> dict[str, Any]:
    """What the precision stage tried and found."""
    content: dict[str, Any] = json.loads((stage.folder / bundle.PRECISION).read_text())
    return content


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The graph's verdict. growth: of its error inside, where that can be followed.

    kept: what is worth a picture, by the name of the candidate; an engine that is judged later adds its own.
    """

    stage: Stage
    report: judge.Report
    growth: Growth | None
    kept: dict[str, html_report.Kept]


def judge_graph(
    work: Workspace,
    request: BuildRequest,
    checkpoint: Checkpoint,
    exported: Stage,
    reference: Stage,
    facts: CpuFacts | None,
) -> Judged:
    """Judges what lies on the disk, the very files that will be published, run as they will be; and looks inside."""
    stored = reference_file.read(reference.folder / bundle.REFERENCE)
    graphs = _graphs(request, exported)
    way = facts.chosen if facts else runners.graph_way(request.precision)
    kept = html_report.Kept()
    candidate = runners.open_candidate(request.model, graphs, way)
    name = runners.candidate_name(request.precision, way, facts.arithmetic if facts else {})
    report = evaluate.judged(
        html_report.keeping(candidate, stored.expectations, kept), stored, name, progress=work.progress
    )
    one_thread = runners.with_one_thread(request.model, graphs, way)
    report = evaluate.with_determinism(report, stored, candidate, one_thread)
    report = evaluate.with_ranges(report, request.model, graphs, request.cases, progress=work.progress)
    growth = evaluate.growth_of(
        report,
        [expectation.case for expectation in stored.expectations],
        request.model,
        graphs,
        checkpoint,
        request.limits,
        way=way,
        precision=request.precision,
        progress=work.progress,
    )
    content = {
        **report.to_json(),
        **({"growth": growth.to_json()} if growth else {}),
        "cpu": facts and facts.model_dump(mode="json"),
        "versions": versions_of(_RUNTIMES),
        "machine": platform.machine(),
    }

    def make(folder: Path) -> None:
        (folder / bundle.REPORT_JSON).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    stage = work.stage("judge", key_of(report=content), make)
    return Judged(stage=stage, report=report, growth=growth, kept={name: kept})


def report_page(
    work: Workspace,
    request: BuildRequest,
    manifest: Manifest,
    reference: Stage,
    judged: Judged,
) -> Stage:
    """The verdict to look at, of everything the manifest says but the time."""

    def make(folder: Path) -> None:
        stored = reference_file.read(reference.folder / bundle.REFERENCE)
        html = html_report.render(manifest, request.model, judged.report, judged.growth, stored, judged.kept)
        (folder / bundle.REPORT_HTML).write_text(html, encoding="utf-8")

    key = key_of(
        code=family.code_of(request.model),
        template=files.sha256(html_report.TEMPLATE),
        manifest=manifest.model_dump(mode="json", exclude={"created"}),
        versions=versions_of((*html_report.PACKAGES, "pillow")),
    )
    return work.stage("page", key, make)


def bill_of_materials(work: Workspace, manifest: Manifest) -> Stage:
    """What went into the bundle that `manifest` describes; last, because it lists every other file."""
    content = sbom.of(manifest)

    def make(folder: Path) -> None:
        (folder / bundle.SBOM).write_text(content, encoding="utf-8")

    return work.stage("sbom", key_of(content=content), make)


def engines(work: Workspace, request: BuildRequest, exported: Stage) -> Stage:
    """An engine from each judged graph, and what is known of each before it is run."""

    def make(folder: Path) -> None:
        facts = [
            _compile(work, request, exported.folder / f"{graph.name}.onnx", graph, folder)
            for graph in request.model.graphs
        ]
        content = [engine_facts.model_dump(mode="json") for engine_facts in facts]
        (folder / bundle.ENGINES).write_text(json.dumps(content, indent=1) + "\n")

    key = key_of(
        code=family.code_of(request.model),
        exported=[file.sha256 for file in exported.files],
        target=request.chosen.target.model_dump(mode="json"),
        runtime=request.runtime,
        choices=request.recipe.engine.model_dump(mode="json"),
        profiles={name: [asdict(profile) for profile in found] for name, found in request.profiles.items()},
        gpu=request.builder_gpu,
        versions=[engine_header.installed_version(request.runtime), versions_of(("polygraphy",))],
    )
    return work.stage("engine", key, make)


def _compile(work: Workspace, request: BuildRequest, onnx: Path, graph: Graph, folder: Path) -> EngineFacts:
    target, choices, gpu = request.chosen.target, request.recipe.engine, request.builder_gpu
    made = builder.build(
        onnx,
        graph,
        folder,
        runtime=request.runtime,
        profiles=request.profiles[graph.name],
        compute_capabilities=target.compute_capabilities,
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
        caution=target.cautions.get(request.runtime, ""),
    )


def judge_engines(
    work: Workspace, request: BuildRequest, stages: Mapping[str, Stage], judged: Judged
) -> evaluate.EngineVerdict:
    """The engines over every case, where this machine's GPU can run them; else the reason why it was not done.

    What of their answers is worth a picture joins `judged.kept`.
    """
    folder, exported = stages["engine"].folder, stages["export"].folder
    content = json.loads((folder / bundle.ENGINES).read_text())
    engines = [EngineFacts.model_validate(facts) for facts in content]
    stored = reference_file.read(stages["reference"].folder / bundle.REFERENCE)
    kept = html_report.Kept()
    verdict = evaluate.judge_engines(
        request.model,
        {folder / facts.file: facts for facts in engines},
        {exported / f"{graph.name}.onnx": graph for graph in request.model.graphs},
        stored,
        watch=lambda candidate: html_report.keeping(candidate, stored.expectations, kept),
        progress=work.progress,
    )
    if verdict.report is not None:
        judged.kept[verdict.report.candidate] = kept
    return verdict


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of `packages`, and our own."""
    found = {package: hardware.installed(package) or _ABSENT for package in packages}
    return {"dinoexport": dinoexport.__version__} | found


def versions_in(request: BuildRequest) -> dict[str, str]:
    """The versions of all that may have had a part in a bundle, as far as it is installed."""
    compilers = (*engine_header.PACKAGES[request.runtime], "polygraphy") if request.runtime.has_engine else ()
    found = versions_of((*TRACERS, *_RUNTIMES, "safetensors", "pillow", *html_report.PACKAGES, *compilers)) | {
        "python": platform.python_version()
    }
    return {package: version for package, version in found.items() if version != _ABSENT}


def _digest(arrays: Mapping[str, Array]) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}

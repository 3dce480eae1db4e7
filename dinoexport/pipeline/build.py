"""The whole flow: recipe -> checkpoint -> traced graph -> ONNX -> validated against PyTorch -> engine -> bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dinoexport import bundle
from dinoexport.bundle import CheckpointFacts, CpuFacts, GraphFacts, Manifest, Verdict, sbom
from dinoexport.bundle.signing import Signer
from dinoexport.errors import UsageError, ValidationFailed, require
from dinoexport.graph import tracer
from dinoexport.graph.onnx_writer import PACKAGES
from dinoexport.pipeline import preflight
from dinoexport.pipeline.request import BuildRequest, build_request
from dinoexport.pipeline.stages.engine import compile_engines, judge_engines
from dinoexport.pipeline.stages.export import export_graphs, tracing
from dinoexport.pipeline.stages.judge import follow_error, judge_graph, record_verdict
from dinoexport.pipeline.stages.precision import NothingHolds, search_precision, tried
from dinoexport.pipeline.stages.quantise import forms_of
from dinoexport.pipeline.stages.reference import compute_reference
from dinoexport.pipeline.stages.report import list_materials, render_report
from dinoexport.pipeline.stages.text import text_stage
from dinoexport.pipeline.stages.tune import choose_another, choose_runtime
from dinoexport.pipeline.stages.weights import head_of, open_weights
from dinoexport.pipeline.versions import versions_in
from dinoexport.pipeline.workspace import Stage, Workspace, workspace
from dinoexport.spec import Progress, silent
from dinoexport.validation import error_analysis, evaluate
from dinoexport.validation.error_analysis import Growth
from dinoexport.validation.judge import Report
from dinoexport.weights.checkpoint import Checkpoint

__all__ = ["BuildRequest", "Built", "NothingHolds", "Rejected", "build", "build_request", "export_only"]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A published bundle. reused: the stages that were not repeated. report: of the graph; engines: of the engines."""

    folder: Path
    manifest: Manifest
    reused: tuple[str, ...]
    report: Report | None = None
    engines: evaluate.EngineVerdict = evaluate.NO_ENGINE


class Rejected(ValidationFailed):
    """The build's outputs are not PyTorch's. `report` says where."""

    def __init__(self, message: str, *, next_step: str, report: Report) -> None:
        super().__init__(message, next_step=next_step)
        self.report = report


def build(
    request: BuildRequest,
    *,
    force: bool = False,
    keep_rejected: bool = False,
    signer: Signer | None = None,
    progress: Progress = silent,
) -> Built:
    """Builds a bundle whose outputs are PyTorch's, or publishes nothing and raises Rejected.

    With `keep_rejected` a failed bundle is published too, marked rejected, before Rejected is raised. `signer` signs
    what passed, and nothing else.
    """
    preflight.packages(request)
    preflight.weights_fit(request)
    with workspace(request.out, force=force, progress=progress) as work:
        preflight.disk(request)
        text = text_stage(work, request)  # a tokenizer of another model is refused before anything is traced
        with tracing(request, fresh=force, ahead=tracer.IMPORTS) as traced:
            checkpoint = open_weights(request, progress)
            plain = export_graphs(work, request, checkpoint, traced)
        if request.engine:
            preflight.memory(request.engine, plain.folder)
        reference = compute_reference(work, request, checkpoint)
        made = {"reference": reference.stage} | text
        if request.auto:
            made["precision"], request = search_precision(work, request, checkpoint, reference)
            plain = export_graphs(work, request, checkpoint, traced)
        forms = forms_of(work, request, plain)
        facts = choose_runtime(request, forms, plain, progress) if request.chosen.on_cpu else None
        exported = forms[facts.chosen.runtime] if facts else plain
        judged = judge_graph(request, exported.folder, reference.stored, facts, progress)
        while facts and not judged.report.passed and (other := choose_another(request, forms, facts, judged.report)):
            facts, exported = other, forms[other.chosen.runtime]
            judged = judge_graph(request, exported.folder, reference.stored, facts, progress)
        growth = follow_error(request, exported.folder, checkpoint, judged.report, facts, progress)
        verdict = record_verdict(work, judged.report, growth, facts)
        made = {exported.name: exported, **made, verdict.name: verdict}
        passed = judged.report.passed and not _too_slow(facts)
        engines = evaluate.NO_ENGINE
        if passed and request.engine:
            made["engine"] = compile_engines(work, request.engine, exported.folder, exported.files)
            engines = judge_engines(
                request.model, made["engine"].folder, exported.folder, reference.stored, judged.kept, progress=progress
            )
            passed = engines.report is None or engines.report.passed
        if passed or keep_rejected:
            said: Verdict = "passed" if passed else "rejected"
            manifest = _manifest(request, checkpoint, made, said, judged.report, facts, engines)
            made["page"] = page = render_report(work, request, manifest, reference.stored, judged, growth)
            manifest = manifest.with_stage(page.name, page.key, page.files)
            manifest = _publish(work, made, manifest, signer if passed else None)
    if not passed:
        raise _rejected(request, judged.report, growth, facts, engines, published=keep_rejected)
    # A verdict is never reused: this machine has just validated the bundle, even if every figure is the same as before.
    reused = tuple(
        stage.name for stage in made.values() if stage.reused and stage.name not in ("judge", "page", "sbom")
    )
    return Built(folder=request.out, manifest=manifest, reused=reused, report=judged.report, engines=engines)


def export_only(request: BuildRequest, *, force: bool = False, progress: Progress = silent) -> Built:
    """The ONNX stage alone: a bundle marked unjudged, because nothing was measured."""
    if request.auto:
        raise UsageError(
            "--precision auto chooses by measurements, and export measures nothing.",
            next_step="Use dinoexport build, or name the precision.",
        )
    require("export", *PACKAGES, *sbom.PACKAGES)
    with workspace(request.out, force=force, progress=progress) as work:
        preflight.disk(request)
        text = text_stage(work, request)  # a tokenizer of another model is refused before anything is traced
        with tracing(request, fresh=force) as traced:
            checkpoint = open_weights(request, progress)
            plain = export_graphs(work, request, checkpoint, traced)
        exported = next(iter(forms_of(work, request, plain).values()))
        made = {exported.name: exported} | text
        manifest = _manifest(request, checkpoint, made, "unjudged")
        manifest = _publish(work, made, manifest)
    return Built(folder=request.out, manifest=manifest, reused=(exported.name,) if exported.reused else ())


def _publish(work: Workspace, made: Mapping[str, Stage], manifest: Manifest, signer: Signer | None = None) -> Manifest:
    """Publishes the stages with a bill of materials, and returns the final manifest."""
    bill = list_materials(work, manifest)
    manifest = manifest.with_stage(bill.name, bill.key, bill.files)
    onnx_files = {graph.file for graph in manifest.graphs}
    for stage in made.values():
        if onnx_files & {file.name for file in stage.files}:  # an ONNX that would be refused later is not published
            bundle.check_graphs(stage.folder, manifest)
    work.publish({**made, bill.name: bill}, manifest, sign=None if signer is None else signer.signature)
    return manifest


def _too_slow(facts: CpuFacts | None) -> bool:
    """Whether a lower precision is not faster than fp32, so that its error has no benefit."""
    return facts is not None and facts.times_fp32 is not None and facts.times_fp32 >= 1


def _manifest(
    request: BuildRequest,
    checkpoint: Checkpoint,
    made: Mapping[str, Stage],
    verdict: Verdict,
    report: Report | None = None,
    facts: CpuFacts | None = None,
    engines: evaluate.EngineVerdict = evaluate.NO_ENGINE,
) -> Manifest:
    content = report.to_json() if report else {}
    if "precision" in made:
        content |= {"precision": tried(made["precision"])}
    return Manifest(
        variant=request.recipe.name,
        family=request.recipe.family,
        precision=request.precision,
        target=request.chosen.name,
        verdict=verdict,
        recipe=request.recipe.model_dump(mode="json"),
        checkpoint=CheckpointFacts(
            source=checkpoint.source,
            sha256=checkpoint.sha256,
            licence=request.recipe.licence,
            prefix=request.prefix,
            assumed=dict(request.settled.assumed),
            notes=request.settled.notes,
        ),
        head=head_of(request, checkpoint),
        graphs=tuple(GraphFacts.of(graph, f"{graph.name}.onnx") for graph in request.model.graphs),
        engines=engines.facts,
        cpu=facts,
        files=tuple(file for stage in made.values() for file in stage.files),
        stage_keys={name: stage.key for name, stage in made.items()},
        versions=versions_in(request),
        card=dict(request.model.card),
        report=content,
        created=datetime.now(UTC),
    )


def _rejected(
    request: BuildRequest,
    of_graph: Report,
    growth: Growth | None,
    facts: CpuFacts | None,
    engines: evaluate.EngineVerdict,
    *,
    published: bool,
) -> Rejected:
    report = engines.report or of_graph
    worst = ", ".join(sorted({f"{row.case}/{row.output}" for row in report.failures})[:4])
    problems = [f"its outputs are not PyTorch's ({worst})"] if worst or not report.rows else []
    problems += [] if report.passed else error_analysis.causes(report, None if engines.report else growth)
    if facts is not None and facts.times_fp32 is not None and _too_slow(facts):
        problems.append(f"{request.precision} takes {facts.times_fp32:.2f} times as long as fp32 on this machine")
    problem = "; ".join(problems)
    if published:
        message = f"{request.out} was published, marked rejected: {problem}."
        next_step = f"Do not deploy it. dinoexport inspect {request.out} shows what is in it."
    else:
        message = f"Nothing was published: {problem}."
        next_step = "The table shows each figure with its limit; --keep-rejected publishes the bundle for inspection."
    return Rejected(message, next_step=next_step, report=report)

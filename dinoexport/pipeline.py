"""The whole flow: recipe -> checkpoint -> traced graph -> ONNX -> judged against PyTorch -> bundle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import dinoexport
from dinoexport import bundle, engine, explain, family, files, judge, page, proof, repair
from dinoexport.bundle import CheckpointFacts, EngineFacts, GraphFacts, Manifest, Verdict
from dinoexport.checkpoint import Checkpoint, open_checkpoint
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed, require
from dinoexport.explain import Growth
from dinoexport.export import PACKAGES, export
from dinoexport.family import Model
from dinoexport.recipe import Limits, Recipe, Target, load, load_target, load_validation
from dinoexport.spec import Array, Case, Graph, Precision, Progress, silent
from dinoexport.workspace import Stage, Workspace, key_of, workspace

# What decides a stage's bytes besides our own code.
_TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
_RUNTIMES = ("onnxruntime", "numpy")
_COMPILERS = ("tensorrt_rtx_cu13", "polygraphy")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to build, with every decision made and every impossible one already refused."""

    recipe: Recipe
    model: Model
    precision: Precision
    target: Target
    limits: Limits
    cases: tuple[Case, ...]
    weights: str | None
    judge_code: proof.Judge
    out: Path
    auto: bool = False  # parts of the graph go back to fp32 until the limits hold


@dataclass(frozen=True, kw_only=True)
class Built:
    """A published bundle. reused: the stages whose results were taken over."""

    folder: Path
    manifest: Manifest
    reused: tuple[str, ...]
    report: judge.Report | None = None


class NothingHolds(ValidationFailed):
    """`--precision auto` found no form of the graph that holds the limits."""


class Rejected(ValidationFailed):
    """The build's outputs are not PyTorch's. `report` says where."""

    def __init__(self, message: str, *, next_step: str, report: judge.Report) -> None:
        super().__init__(message, next_step=next_step)
        self.report = report


def order(
    variant_or_path: str,
    *,
    weights: str | None = None,
    precision: Precision | Literal["auto"] | None = None,
    target: str = "cpu",
    out: Path | None = None,
    judge_code: proof.Judge = "plain",
) -> Order:
    """Reads recipe, target and validation, and refuses what cannot be built before any work is done."""
    recipe, machine = load(variant_or_path), load_target(target)
    auto = precision == "auto"
    chosen = Precision.FP16 if precision == "auto" else precision or recipe.precision or next(iter(machine.precisions))
    if chosen not in machine.precisions:
        raise UsageError(f"{target} has no {chosen}.", next_step=f"It has: {', '.join(machine.precisions)}.")
    recipe = recipe.model_copy(update={"precision": chosen})
    model = family.find(recipe.family).model(recipe)
    beside = Path(variant_or_path).parent if variant_or_path.endswith(".toml") else None
    validation, folder = load_validation(recipe.validation, beside=beside)
    return Order(
        recipe=recipe,
        model=model,
        precision=chosen,
        target=machine,
        limits=proof.limits_for(validation, chosen),
        cases=proof.cases_of(model, validation, folder),
        weights=weights,
        judge_code=judge_code,
        out=out or Path("bundles") / f"{recipe.name}-{'auto' if auto else chosen}-{machine.name}",
        auto=auto,
    )


def build(order: Order, *, force: bool = False, keep_rejected: bool = False, progress: Progress = silent) -> Built:
    """Takes a checkpoint to a bundle whose outputs are PyTorch's, or publishes nothing and raises Rejected.

    With `keep_rejected` a failed bundle is published too, marked rejected, before Rejected is raised.
    """
    _require_packages(order)
    with workspace(order.out, force=force, progress=progress) as work:
        _check_disk(order)
        checkpoint = open_checkpoint(order.model, order.recipe, order.weights, progress=progress)
        reference = _reference_stage(work, order, checkpoint)
        found = {}
        if order.auto:
            found["precision"], order = _precision_stage(work, order, checkpoint, reference)
        exported = _export_stage(work, order, checkpoint)
        judged, report, growth, kept = _judge_stage(work, order, checkpoint, exported, reference)
        stages = {stage.name: stage for stage in (exported, reference, *found.values(), judged)}
        if report.passed and order.target.runtime == "tensorrt_rtx":
            stages["engine"] = _engine_stage(work, order, exported)
        if report.passed or keep_rejected:
            verdict: Verdict = "passed" if report.passed else "rejected"
            tried = {"precision": _tried(stages["precision"])} if order.auto else {}
            manifest = _manifest(order, checkpoint, stages, verdict, report.to_json() | tried)
            shown = _page_stage(work, order, manifest, reference, report, growth, kept)
            manifest = manifest.with_stage(shown.name, shown.key, shown.files)
            stages["page"] = shown
            work.publish(stages, manifest)
    if not report.passed:
        raise _rejected(order, report, growth, published=keep_rejected)
    # A verdict is never reused: this machine has just judged, even if every figure came out as before.
    reused = tuple(stage.name for stage in stages.values() if stage.reused and stage.name not in ("judge", "page"))
    return Built(folder=order.out, manifest=manifest, reused=reused, report=report)


def export_only(order: Order, *, force: bool = False, progress: Progress = silent) -> Built:
    """The ONNX stage alone: a bundle marked unjudged, for nothing was measured."""
    if order.auto:
        raise UsageError(
            "--precision auto chooses by what it measures, and export measures nothing.",
            next_step="Use dinoexport build, or name the precision.",
        )
    require("export", *PACKAGES)
    with workspace(order.out, force=force, progress=progress) as work:
        _check_disk(order)
        checkpoint = open_checkpoint(order.model, order.recipe, order.weights, progress=progress)
        exported = _export_stage(work, order, checkpoint)
        manifest = _manifest(order, checkpoint, {"export": exported}, "unjudged", {})
        work.publish({"export": exported}, manifest)
    return Built(folder=order.out, manifest=manifest, reused=("export",) if exported.reused else ())


def _export_stage(work: Workspace, order: Order, checkpoint: Checkpoint) -> Stage:
    recipe = order.recipe.model_dump(mode="json")
    versions = _versions(_TRACERS)
    metadata = {
        "dinoexport.variant": order.recipe.name,
        # The hash alone: the same weights at another path must give the same bytes.
        "dinoexport.checkpoint_sha256": checkpoint.sha256,
        "dinoexport.licence": order.recipe.licence,
        "dinoexport.recipe": json.dumps(recipe, sort_keys=True),
        "dinoexport.versions": json.dumps(versions, sort_keys=True),
    }

    def make(folder: Path) -> None:
        for graph in order.model.graphs:
            calls = order.model.calls(graph, checkpoint.read)
            export(graph, calls, folder, metadata=metadata, progress=work.progress)

    return work.stage("export", key_of(code=_code(order), metadata=metadata), make)


def _reference_stage(work: Workspace, order: Order, checkpoint: Checkpoint) -> Stage:
    def make(folder: Path) -> None:
        reference = proof.ask_pytorch(
            order.model,
            checkpoint,
            order.cases,
            order.limits,
            precision=order.precision,
            judge_code=order.judge_code,
            progress=work.progress,
        )
        bundle.write_reference(folder / bundle.REFERENCE, reference)

    key = key_of(
        code=_code(order),
        checkpoint=checkpoint.sha256,
        recipe=order.recipe.model_dump(mode="json"),
        limits=order.limits.model_dump(mode="json"),
        cases=[(case.name, case.why, case.expect_refusal, _digest(case.inputs)) for case in order.cases],
        judge_code=order.judge_code,
        versions=_versions(_TRACERS),
    )
    return work.stage("reference", key, make)


def _precision_stage(work: Workspace, order: Order, checkpoint: Checkpoint, reference: Stage) -> tuple[Stage, Order]:
    """The order with the smallest set of parts in fp32 that holds the limits; raises NothingHolds if none does."""

    def make(folder: Path) -> None:
        stored = bundle.read_reference(reference.folder / bundle.REFERENCE)
        found = repair.repair(order.recipe, order.model, checkpoint, stored, folder, progress=work.progress)
        if found.fp32 is None:
            raise NothingHolds(
                f"Nothing was published: {order.precision} misses its limits even with all of "
                f"{', '.join(order.model.promotable)} in fp32 ({found.trials[-1].failed_by}).",
                next_step="Build it with --precision fp32.",
            )
        (folder / bundle.PRECISION).write_text(json.dumps(found.to_json(), indent=1) + "\n")

    stage = work.stage(
        "precision", key_of(code=_code(order), reference=reference.key, runtimes=_versions(_RUNTIMES)), make
    )
    recipe, model = repair.promoted(order.recipe, order.model, _tried(stage)["fp32"])
    return stage, replace(order, recipe=recipe, model=model)


def _tried(stage: Stage) -> dict[str, Any]:
    tried: dict[str, Any] = json.loads((stage.folder / bundle.PRECISION).read_text())
    return tried


def _judge_stage(
    work: Workspace, order: Order, checkpoint: Checkpoint, exported: Stage, reference: Stage
) -> tuple[Stage, judge.Report, Growth | None, page.Kept]:
    """Judges what lies on the disk, the very files that will be published, and looks inside them."""
    stored = bundle.read_reference(reference.folder / bundle.REFERENCE)
    graphs = {exported.folder / f"{graph.name}.onnx": graph for graph in order.model.graphs}
    candidate = proof.open_candidate(order.model, graphs)
    kept = page.Kept()
    candidate = page.keeping(candidate, stored.expectations, kept)
    report = proof.judged(candidate, stored, proof.candidate_name(order.precision), progress=work.progress)
    report = proof.with_ranges(report, order.model, graphs, order.cases, progress=work.progress)
    growth = proof.growth_of(
        report,
        [expectation.case for expectation in stored.expectations],
        order.model,
        graphs,
        checkpoint,
        order.limits,
        precision=order.precision,
        progress=work.progress,
    )
    inside = {"growth": growth.to_json()} if growth else {}
    content = {**report.to_json(), **inside, "versions": _versions(_RUNTIMES), "machine": platform.machine()}

    def make(folder: Path) -> None:
        (folder / bundle.REPORT).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    return work.stage("judge", key_of(report=content), make), report, growth, kept


def _page_stage(
    work: Workspace,
    order: Order,
    manifest: Manifest,
    reference: Stage,
    report: judge.Report,
    growth: Growth | None,
    kept: page.Kept,
) -> Stage:
    """The verdict to look at, of everything the manifest says but the time."""

    def make(folder: Path) -> None:
        stored = bundle.read_reference(reference.folder / bundle.REFERENCE)
        html = page.render(manifest, order.model, report, growth, stored, kept)
        (folder / bundle.PAGE).write_text(html, encoding="utf-8")

    key = key_of(
        code=_code(order),
        template=files.sha256(page.TEMPLATE),
        manifest=manifest.model_dump(mode="json", exclude={"created"}),
        versions=_versions((*page.PACKAGES, "pillow")),
    )
    return work.stage("page", key, make)


def _engine_stage(work: Workspace, order: Order, exported: Stage) -> Stage:
    """An engine from each judged graph. Compiled, not run: the verdict stays the graph's own."""

    def make(folder: Path) -> None:
        facts = [
            _compile(work, order, exported.folder / f"{graph.name}.onnx", graph, folder) for graph in order.model.graphs
        ]
        content = [engine_facts.model_dump(mode="json") for engine_facts in facts]
        (folder / bundle.ENGINES).write_text(json.dumps(content, indent=1) + "\n")

    key = key_of(
        code=_code(order),
        exported=[file.sha256 for file in exported.files],
        target=order.target.model_dump(mode="json"),
        versions=_versions(_COMPILERS),
    )
    return work.stage("engine", key, make)


def _compile(work: Workspace, order: Order, onnx: Path, graph: Graph, folder: Path) -> EngineFacts:
    made = engine.build(
        onnx, graph, folder, compute_capabilities=order.target.compute_capabilities, progress=work.progress
    )
    return EngineFacts(
        file=made.path.name,
        runtime="tensorrt_rtx",
        runtime_version=made.runtime_version,
        compute_capabilities=made.compute_capabilities,
        precision=order.precision,
        profile=engine.profile_shapes(graph),
        size_bytes=made.size_bytes,
        weight_bytes=made.weight_bytes,
        attentions=made.attentions,
        fused_attentions=made.fused_attentions,
        build_s=round(made.build_s, 1),
        peak_memory_bytes=made.peak_memory_bytes,
        log=made.log.name,
        caution=order.target.caution,
    )


def _engines(stages: Mapping[str, Stage]) -> tuple[EngineFacts, ...]:
    if "engine" not in stages:
        return ()
    content = json.loads((stages["engine"].folder / bundle.ENGINES).read_text())
    return tuple(EngineFacts.model_validate(facts) for facts in content)


def _manifest(
    order: Order, checkpoint: Checkpoint, stages: Mapping[str, Stage], verdict: Verdict, report: dict[str, Any]
) -> Manifest:
    return Manifest(
        variant=order.recipe.name,
        family=order.recipe.family,
        precision=order.precision,
        target=order.target.name,
        verdict=verdict,
        recipe=order.recipe.model_dump(mode="json"),
        checkpoint=CheckpointFacts(source=checkpoint.source, sha256=checkpoint.sha256, licence=order.recipe.licence),
        graphs=tuple(GraphFacts.of(graph, f"{graph.name}.onnx") for graph in order.model.graphs),
        engines=_engines(stages),
        files=tuple(file for stage in stages.values() for file in stage.files),
        stage_keys={name: stage.key for name, stage in stages.items()},
        versions=_versions((*_TRACERS, "onnxruntime")) | {"python": platform.python_version()},
        card=dict(order.model.card),
        report=report,
        created=datetime.now(UTC),
    )


def _rejected(order: Order, report: judge.Report, growth: Growth | None, *, published: bool) -> Rejected:
    worst = ", ".join(sorted({f"{row.case}/{row.output}" for row in report.failures})[:4])
    worst += "".join(f"; {line}" for line in explain.causes(report, growth))
    if published:
        message = f"{order.out} was published, marked rejected: its outputs are not PyTorch's ({worst})."
        next_step = f"Do not deploy it. dinoexport inspect {order.out} shows what is in it."
    else:
        message = f"Nothing was published: the outputs are not PyTorch's ({worst})."
        next_step = "The table shows each figure beside its limit; --keep-rejected publishes the bundle to look at."
    return Rejected(message, next_step=next_step, report=report)


def _require_packages(order: Order) -> None:
    """Everything a build will need, asked for before its first minute is spent."""
    require("export", *PACKAGES, *page.PACKAGES)
    require("cpu", "onnxruntime")
    if order.target.runtime == "tensorrt_rtx":
        require("rtx", *engine.PACKAGES)


def _check_disk(order: Order) -> None:
    """Refuses a build the disk cannot hold, before it is begun."""
    width = 2 if order.precision is Precision.FP16 else 4
    weights = sum(math.prod(shape) for shape in order.model.tensors.values()) * width
    needed = weights * (2 if order.target.runtime == "tensorrt_rtx" else 1)  # an engine holds them once more
    needed += 3 * sum(array.nbytes for case in order.cases for array in case.inputs.values())
    free = shutil.disk_usage(order.out.absolute().parent).free
    if free < needed:
        raise MissingRequirement(
            f"The bundle needs about {needed / 1e9:.1f} GB; {order.out.parent} has {free / 1e9:.1f} GB free.",
            next_step="Free some space, or choose another --out.",
        )


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"dinoexport": dinoexport.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _code(order: Order) -> str:
    """The hash of our own code and the family's: a stage made by other code is another stage."""
    own = Path(dinoexport.__file__)
    brought = Path(sys.modules[type(order.model).__module__].__file__ or own)
    sources = {path for module in (own, brought) for path in _sources(module)}
    return key_of(sources=[files.sha256(path) for path in sorted(sources)])


def _sources(module: Path) -> tuple[Path, ...]:
    """A package's source files, or the one file of a module that is no package."""
    return tuple(module.parent.rglob("*.py")) if module.name == "__init__.py" else (module,)


def _digest(arrays: Mapping[str, Array]) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}

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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import dinoexport
from dinoexport import bundle, engine, family, files, judge, machine, plan, profiles, proof, quantise, tuning
from dinoexport import target as targets
from dinoexport.bundle import CheckpointFacts, CpuFacts, EngineFacts, GraphFacts, Manifest, Verdict
from dinoexport.checkpoint import Checkpoint, open_checkpoint
from dinoexport.errors import MissingRequirement, ValidationFailed, require
from dinoexport.export import PACKAGES, export
from dinoexport.family import Model
from dinoexport.machine import Gpu
from dinoexport.recipe import Limits, Recipe, load, load_validation
from dinoexport.spec import Array, Case, Graph, Precision, Profile, Progress, Runtime, silent
from dinoexport.target import Chosen
from dinoexport.workspace import Stage, Workspace, key_of, workspace

# What decides a stage's bytes besides our own code.
_TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
_RUNTIMES = ("onnxruntime", "openvino", "numpy")
_QUANTISERS = ("onnxruntime", "onnx")
# What an engine is built for and how: it changes neither the graph nor what PyTorch answers.
_ENGINE_ONLY = {"engine", "profiles"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to build, with every decision made and every impossible one already refused.

    profiles: graph name -> its engine's profiles. gpu: the one an engine is built or run on, where there is one.
    """

    recipe: Recipe
    model: Model
    chosen: Chosen
    profiles: Mapping[str, tuple[Profile, ...]]
    gpu: Gpu | None
    limits: Limits
    cases: tuple[Case, ...]
    weights: str | None
    judge_code: proof.Judge
    out: Path

    @property
    def precision(self) -> Precision:
        """The arithmetic of the graph's body."""
        return self.chosen.precision

    @property
    def runtime(self) -> Runtime:
        """What will run the product."""
        return self.chosen.runtime


@dataclass(frozen=True, kw_only=True)
class Built:
    """A published bundle. reused: the stages whose results were taken over. report: the graph's; engines: theirs."""

    folder: Path
    manifest: Manifest
    reused: tuple[str, ...]
    report: judge.Report | None = None
    engines: proof.EngineVerdict = proof.NO_ENGINE


class Rejected(ValidationFailed):
    """The build's outputs are not PyTorch's. `report` says where."""

    def __init__(self, message: str, *, next_step: str, report: judge.Report) -> None:
        super().__init__(message, next_step=next_step)
        self.report = report


def order(
    variant_or_path: str,
    *,
    weights: str | None = None,
    precision: Precision | None = None,
    target: str | None = None,
    runtime: Runtime | None = None,
    engine_choices: Mapping[str, Any] = MappingProxyType({}),
    out: Path | None = None,
    judge_code: proof.Judge = "plain",
) -> Order:
    """Reads recipe, target and validation, and refuses what cannot be built before any work is done.

    target: the GPU that is here, else the CPU, when it is None. engine_choices: what to change in the recipe's
    `[engine]`.
    """
    recipe, gpus = load(variant_or_path), machine.gpus()
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine_choices)})
    chosen = targets.choose(recipe, target=target, runtime=runtime, precision=precision, gpus=gpus)
    recipe = recipe.model_copy(update={"precision": chosen.precision})
    model = family.find(recipe.family).model(recipe.model_copy(update={"precision": chosen.traced}))
    beside = Path(variant_or_path).parent if variant_or_path.endswith(".toml") else None
    validation, folder = load_validation(recipe.validation, beside=beside)
    return Order(
        recipe=recipe,
        model=model,
        chosen=chosen,
        profiles={graph.name: profiles.of(recipe, graph) for graph in model.graphs if chosen.runtime.has_engine},
        gpu=gpus[0] if gpus else None,
        limits=proof.limits_for(validation, chosen.precision),
        cases=proof.cases_of(model, validation, folder),
        weights=weights,
        judge_code=judge_code,
        out=out or Path("bundles") / f"{recipe.name}-{chosen.precision}-{chosen.target.name}",
    )


def build(order: Order, *, force: bool = False, keep_rejected: bool = False, progress: Progress = silent) -> Built:
    """Takes a checkpoint to a bundle whose outputs are PyTorch's, or publishes nothing and raises Rejected.

    With `keep_rejected` a failed bundle is published too, marked rejected, before Rejected is raised.
    """
    _require_packages(order)
    with workspace(order.out, force=force, progress=progress) as work:
        _check_disk(order)
        checkpoint = open_checkpoint(order.model, order.recipe, order.weights, progress=progress)
        plain = _export_stage(work, order, checkpoint)
        _check_memory(order, plain)
        exported = _quantise_stage(work, plain) if order.precision is Precision.INT8 else plain
        reference = _reference_stage(work, order, checkpoint)
        facts = _tune(order, exported, plain, progress) if order.chosen.on_cpu else None
        judged, report = _judge_stage(work, order, exported, reference, facts)
        passed = report.passed and not _too_slow(facts)
        stages = {stage.name: stage for stage in (exported, reference, judged)}
        engines = proof.NO_ENGINE
        if passed and order.runtime.has_engine:
            stages["engine"] = _engine_stage(work, order, exported)
            engines = _judge_engines(work, order, stages)
            passed = engines.report is None or engines.report.passed
        if passed or keep_rejected:
            verdict: Verdict = "passed" if passed else "rejected"
            manifest = _manifest(order, checkpoint, stages, verdict, report.to_json(), facts, engines.facts)
            work.publish(stages, manifest)
    if not passed:
        raise _rejected(order, engines.report or report, facts, published=keep_rejected)
    # A verdict is never reused: this machine has just judged, even if every figure came out as before.
    reused = tuple(stage.name for stage in stages.values() if stage.reused and stage is not judged)
    return Built(folder=order.out, manifest=manifest, reused=reused, report=report, engines=engines)


def export_only(order: Order, *, force: bool = False, progress: Progress = silent) -> Built:
    """The ONNX stage alone: a bundle marked unjudged, for nothing was measured."""
    require("export", *PACKAGES)
    with workspace(order.out, force=force, progress=progress) as work:
        _check_disk(order)
        checkpoint = open_checkpoint(order.model, order.recipe, order.weights, progress=progress)
        exported = _export_stage(work, order, checkpoint)
        if order.precision is Precision.INT8:
            exported = _quantise_stage(work, exported)
        manifest = _manifest(order, checkpoint, {exported.name: exported}, "unjudged", {})
        work.publish({exported.name: exported}, manifest)
    return Built(folder=order.out, manifest=manifest, reused=(exported.name,) if exported.reused else ())


def _export_stage(work: Workspace, order: Order, checkpoint: Checkpoint) -> Stage:
    recipe = order.recipe.model_dump(mode="json", exclude=_ENGINE_ONLY)
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


def _quantise_stage(work: Workspace, exported: Stage) -> Stage:
    """The int8 twins of the fp32 graphs."""

    def make(folder: Path) -> None:
        onnx_files = [file.name for file in exported.files if file.name.endswith(".onnx")]
        for done, name in enumerate(onnx_files, start=1):
            quantise.to_int8(exported.folder / name, folder)
            work.progress("quantising", done, len(onnx_files))

    key = key_of(exported=exported.key, versions=_versions(_QUANTISERS))
    return work.stage("quantise", key, make)


def _tune(order: Order, exported: Stage, plain: Stage, progress: Progress) -> CpuFacts:
    """The fastest way to run the graphs on this machine; with less precision than fp32, beside fp32."""
    wanted = tuning.Candidate(precision=order.precision, graphs=_graphs(order, exported))
    fp32 = tuning.Candidate(precision=Precision.FP32, graphs=_graphs(order, plain))
    lowered = order.precision in (Precision.BF16, Precision.INT8)
    return tuning.tune(order.model, wanted, fp32 if lowered else None, progress=progress)


def _graphs(order: Order, exported: Stage) -> dict[Path, Graph]:
    return {exported.folder / f"{graph.name}.onnx": graph for graph in order.model.graphs}


def _too_slow(facts: CpuFacts | None) -> bool:
    """Whether a lower precision gains no time, so that there is nothing to pay its error with."""
    return facts is not None and facts.times_fp32 is not None and facts.times_fp32 >= 1


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
        recipe=order.recipe.model_dump(mode="json", exclude=_ENGINE_ONLY),
        limits=order.limits.model_dump(mode="json"),
        cases=[
            (case.name, case.why, case.expect_refusal, case.neighbours, _digest(case.inputs)) for case in order.cases
        ],
        judge_code=order.judge_code,
        versions=_versions(_TRACERS),
    )
    return work.stage("reference", key, make)


def _judge_stage(
    work: Workspace, order: Order, exported: Stage, reference: Stage, facts: CpuFacts | None
) -> tuple[Stage, judge.Report]:
    """Judges what lies on the disk: the very files that will be published, read back, run as they will be."""
    stored = bundle.read_reference(reference.folder / bundle.REFERENCE)
    way = facts.chosen if facts else proof.graph_way(order.precision)
    candidate = proof.open_candidate(order.model, _graphs(order, exported), way)
    name = proof.candidate_name(order.precision, way, facts.arithmetic if facts else {})
    report = proof.judged(candidate, stored, name, progress=work.progress)
    content = {
        **report.to_json(),
        "cpu": facts and facts.model_dump(mode="json"),
        "versions": _versions(_RUNTIMES),
        "machine": platform.machine(),
    }

    def make(folder: Path) -> None:
        (folder / bundle.REPORT).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    return work.stage("judge", key_of(report=content), make), report


def _engine_stage(work: Workspace, order: Order, exported: Stage) -> Stage:
    """An engine from each judged graph, and what is known of each before it is run."""

    def make(folder: Path) -> None:
        facts = [
            _compile(work, order, exported.folder / f"{graph.name}.onnx", graph, folder) for graph in order.model.graphs
        ]
        content = [engine_facts.model_dump(mode="json") for engine_facts in facts]
        (folder / bundle.ENGINES).write_text(json.dumps(content, indent=1) + "\n")

    key = key_of(
        code=_code(order),
        exported=[file.sha256 for file in exported.files],
        target=order.chosen.target.model_dump(mode="json"),
        runtime=order.runtime,
        choices=order.recipe.engine.model_dump(mode="json"),
        profiles={name: [asdict(profile) for profile in found] for name, found in order.profiles.items()},
        gpu=_builder_gpu(order),
        versions=[plan.installed_version(order.runtime), _versions(("polygraphy",))],
    )
    return work.stage("engine", key, make)


def _builder_gpu(order: Order) -> Gpu | None:
    """A classic plan is made of kernels measured on this GPU; TensorRT-RTX compiles without looking at it."""
    return order.gpu if order.runtime is Runtime.TENSORRT else None


def _compile(work: Workspace, order: Order, onnx: Path, graph: Graph, folder: Path) -> EngineFacts:
    target, choices, gpu = order.chosen.target, order.recipe.engine, _builder_gpu(order)
    made = engine.build(
        onnx,
        graph,
        folder,
        runtime=order.runtime,
        profiles=order.profiles[graph.name],
        compute_capabilities=target.compute_capabilities,
        choices=choices,
        gpu=gpu,
        progress=work.progress,
    )
    return EngineFacts(
        graph=graph.name,
        file=made.path.name,
        runtime=order.runtime,
        runtime_version=made.runtime_version,
        compute_capabilities=made.compute_capabilities,
        device=gpu.name if gpu else "",
        compatibility=choices.compatibility,
        version_compatible=choices.version_compatible,
        stripped=choices.strip_weights,
        precision=order.precision,
        profiles={profile.name: dict(profile.shapes) for profile in order.profiles[graph.name]},
        size_bytes=made.size_bytes,
        weight_bytes=made.weight_bytes,
        scratch_bytes=made.scratch_bytes,
        attentions=made.attentions,
        fused_attentions=made.fused_attentions,
        build_s=round(made.build_s, 1),
        peak_memory_bytes=made.peak_memory_bytes,
        log=made.log.name,
        log_sha256=files.sha256(made.log),
        caution=target.cautions.get(order.runtime, ""),
    )


def _judge_engines(work: Workspace, order: Order, stages: Mapping[str, Stage]) -> proof.EngineVerdict:
    """The engines over every case, where this machine's GPU can run them; else the reason why it was not done."""
    folder, exported = stages["engine"].folder, stages["export"].folder
    content = json.loads((folder / bundle.ENGINES).read_text())
    engines = [EngineFacts.model_validate(facts) for facts in content]
    return proof.judge_engines(
        order.model,
        {folder / facts.file: facts for facts in engines},
        {exported / f"{graph.name}.onnx": graph for graph in order.model.graphs},
        bundle.read_reference(stages["reference"].folder / bundle.REFERENCE),
        progress=work.progress,
    )


def _manifest(
    order: Order,
    checkpoint: Checkpoint,
    stages: Mapping[str, Stage],
    verdict: Verdict,
    report: dict[str, Any],
    facts: CpuFacts | None = None,
    engines: tuple[EngineFacts, ...] = (),
) -> Manifest:
    return Manifest(
        variant=order.recipe.name,
        family=order.recipe.family,
        precision=order.precision,
        target=order.chosen.name,
        verdict=verdict,
        recipe=order.recipe.model_dump(mode="json"),
        checkpoint=CheckpointFacts(source=checkpoint.source, sha256=checkpoint.sha256, licence=order.recipe.licence),
        graphs=tuple(GraphFacts.of(graph, f"{graph.name}.onnx") for graph in order.model.graphs),
        engines=engines,
        cpu=facts,
        files=tuple(file for stage in stages.values() for file in stage.files),
        stage_keys={name: stage.key for name, stage in stages.items()},
        versions=_versions((*_TRACERS, "onnxruntime")) | {"python": platform.python_version()},
        card=dict(order.model.card),
        report=report,
        created=datetime.now(UTC),
    )


def _rejected(order: Order, report: judge.Report, facts: CpuFacts | None, *, published: bool) -> Rejected:
    worst = ", ".join(sorted({f"{row.case}/{row.output}" for row in report.failures})[:4])
    problems = [f"its outputs are not PyTorch's ({worst})"] if worst or not report.rows else []
    if facts is not None and facts.times_fp32 is not None and _too_slow(facts):
        problems.append(f"{order.precision} takes {facts.times_fp32:.2f} times as long as fp32 on this machine")
    problem = "; ".join(problems)
    if published:
        message = f"{order.out} was published, marked rejected: {problem}."
        next_step = f"Do not deploy it. dinoexport inspect {order.out} shows what is in it."
    else:
        message = f"Nothing was published: {problem}."
        next_step = "The table shows each figure beside its limit; --keep-rejected publishes the bundle to look at."
    return Rejected(message, next_step=next_step, report=report)


def _require_packages(order: Order) -> None:
    """Everything a build will need, asked for before its first minute is spent."""
    require("export", *PACKAGES)
    require("cpu", "onnxruntime")
    if order.chosen.on_cpu:
        tuning.ways(order.precision)
    else:
        runtime = proof.graph_way(order.precision).runtime
        require("openvino" if runtime == "openvino" else "cpu", runtime)
    if order.runtime.has_engine:
        require(plan.EXTRA[order.runtime], *engine.PACKAGES[order.runtime])


def _check_disk(order: Order) -> None:
    """Refuses a build the disk cannot hold, before it is begun."""
    width = 2 if order.chosen.traced in (Precision.FP16, Precision.BF16) else 4
    weights = sum(math.prod(shape) for shape in order.model.tensors.values()) * width
    needed = weights * (2 if order.runtime.has_engine else 1)  # an engine holds them once more
    needed += 3 * sum(array.nbytes for case in order.cases for array in case.inputs.values())
    free = shutil.disk_usage(order.out.absolute().parent).free
    if free < needed:
        raise MissingRequirement(
            f"The bundle needs about {needed / 1e9:.1f} GB; {order.out.parent} has {free / 1e9:.1f} GB free.",
            next_step="Free some space, or choose another --out.",
        )


def _check_memory(order: Order, exported: Stage) -> None:
    """Refuses an engine its card has no memory for, before the long stages are begun."""
    memory_gb = order.chosen.target.memory_gb
    if not order.runtime.has_engine or memory_gb is None:
        return
    builder = _builder_gpu(order)
    for graph in order.model.graphs:
        onnx = exported.folder / f"{graph.name}.onnx"
        engine.check_memory(
            onnx,
            graph,
            order.profiles[graph.name],
            memory_bytes=builder.memory_bytes if builder else memory_gb * 10**9,
            where=builder.name if builder else f"the smallest {order.chosen.target.name}",
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

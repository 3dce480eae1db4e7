"""From cases to a verdict: PyTorch's answers, a candidate opened from a bundle, and the judge between them.

Nothing here builds. Judging a bundle by the reference it carries needs neither torch nor the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Literal

from dinoexport import bundle, family, judge, machine, plan
from dinoexport.bundle import EngineFacts, Manifest, Reference
from dinoexport.checkpoint import Checkpoint, open_checkpoint
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed, require
from dinoexport.family import Model
from dinoexport.metrics import distance
from dinoexport.recipe import Limits, Recipe, Validation, load_validation, parse
from dinoexport.runtime import Arithmetic, cpu, trt
from dinoexport.spec import (
    Array,
    Arrays,
    Case,
    Expectation,
    Graph,
    Precision,
    Profile,
    Progress,
    Runner,
    Runtime,
    Way,
    silent,
)

Judge = Literal["plain", "hub"]
# How many of a user's images PyTorch and the candidate answer in one step: their tokens are held at once, no more.
_IMAGES_AT_ONCE = 64


def cases_of(model: Model, validation: Validation, folder: Path) -> tuple[Case, ...]:
    """All cases of a validation; files they name lie in `folder`."""
    return tuple(model.case(table, folder) for table in validation.cases)


def limits_for(validation: Validation, precision: Precision) -> Limits:
    """The limits of a precision; a UsageError when the validation has none, for a verdict needs limits."""
    if precision not in validation.limits:
        raise UsageError(
            f"The validation has no limits for {precision}.", next_step=f"Add [limits.{precision}] with reasons."
        )
    return validation.limits[precision]


def ask_pytorch(
    model: Model,
    checkpoint: Checkpoint,
    cases: Sequence[Case],
    limits: Limits,
    *,
    precision: Precision,
    judge_code: Judge,
    progress: Progress = silent,
) -> Reference:
    """PyTorch's fp32 answers to `cases`; where the limits ask for it, what its own `precision` loses on them too."""
    require("export", "torch")
    import torch

    asked = [case for case in cases if not case.expect_refusal]
    inputs = [case.inputs for case in asked]
    if judge_code == "hub":
        answers = model.upstream(checkpoint.read, inputs, progress=progress)
        name = "PyTorch fp32, the authors' own code"
    else:
        answers = model.reference(checkpoint.read, inputs, precision=Precision.FP32, progress=progress)
        name = "PyTorch fp32, plain upstream formulation"
    own_errors: list[Mapping[str, float]] = [{} for _ in asked]
    if limits.times_own_error_max is not None:
        lossy = model.reference(checkpoint.read, inputs, precision=precision, progress=progress)
        own_errors = [_own_error(ours, exact) for ours, exact in zip(lossy, answers, strict=True)]
    return Reference(
        name=f"{name} (torch {torch.__version__})",
        limits=limits,
        expectations=tuple(
            Expectation(case=case, outputs=outputs, own_error=own)
            for case, outputs, own in zip(asked, answers, own_errors, strict=True)
        ),
        refusals=tuple(case for case in cases if case.expect_refusal),
    )


def _own_error(ours: Arrays, exact: Arrays) -> dict[str, float]:
    """Relative L2 per output. Where PyTorch's own precision overflows it says nothing about a candidate: left out."""
    errors = {name: distance(ours[name], exact[name]).relative_l2 for name in exact}
    return {name: error for name, error in errors.items() if isfinite(error)}


def open_candidate(model: Model, graphs: Mapping[Path, Graph], way: Way = cpu.PLAIN) -> judge.Candidate:
    """The exported graphs opened in `way`, as the function from a case's inputs to its outputs."""
    return _driven(model, cpu.open_graphs(graphs, way))


def _driven(model: Model, runners: Mapping[str, Runner]) -> judge.Candidate:
    def answer(inputs: Arrays) -> dict[str, Array]:
        return model.drive(runners, inputs)

    return answer


def candidate_name(precision: Precision, way: Way, arithmetic: Arithmetic) -> str:
    """What the verdict is about, in words, with what really computed: never what was only asked for."""
    widened = "" if precision is way.precision else f" widened to {way.precision}"
    ran = " and ".join(f"{count} products in {kind}" for kind, count in arithmetic.items())
    return f"{cpu.title(way.runtime)} on the CPU, {precision}{widened}{ran and f' ({ran})'}"


def graph_way(precision: Precision) -> Way:
    """How the graph of a GPU's bundle is judged on a CPU. ONNX Runtime has no bf16 there; OpenVINO widens it."""
    if precision is Precision.BF16:
        return Way(runtime="openvino", precision=Precision.FP32)
    return Way(runtime="onnxruntime", precision=precision)


def way_of(manifest: Manifest) -> Way:
    """How this machine runs a bundle: as the building one did, with as many threads as the runtime likes here.

    Where only ONNX Runtime is installed it takes an fp32 graph just as well.
    """
    if manifest.cpu is None:
        return graph_way(manifest.precision)
    chosen = manifest.cpu.chosen
    if chosen.precision is Precision.FP32 and chosen.runtime not in cpu.installed():
        return cpu.PLAIN
    return Way(runtime=chosen.runtime, precision=chosen.precision)


@dataclass(frozen=True, kw_only=True)
class EngineVerdict:
    """What this machine's GPU says of a bundle's engines: `report`, or `not_run`, the reason why it was not asked."""

    facts: tuple[EngineFacts, ...]
    report: judge.Report | None = None
    not_run: str = ""


NO_ENGINE = EngineVerdict(facts=())


def judge_engines(
    model: Model,
    engines: Mapping[Path, EngineFacts],
    graphs: Mapping[Path, Graph],
    reference: Reference,
    *,
    progress: Progress = silent,
) -> EngineVerdict:
    """Judges the engines on this machine's GPU like any runtime; where it cannot run them, says why instead."""
    facts = tuple(engines.values())
    try:
        candidate, device = open_engines(model, engines, graphs)
    except MissingRequirement as missing:
        return EngineVerdict(facts=facts, not_run=missing.message)
    report = judged(candidate, reference, engine_name(facts[0], device), progress=progress)
    return EngineVerdict(facts=_executed(facts, device, report), report=report)


def open_engines(
    model: Model, engines: Mapping[Path, EngineFacts], graphs: Mapping[Path, Graph]
) -> tuple[judge.Candidate, str]:
    """The engines as the function from a case's inputs to its outputs, and the GPU that runs them.

    Raises MissingRequirement, before any is opened, when one is for another device or version.
    """
    gpus = machine.gpus()
    devices = [plan.check_runs_here(facts, gpus).name for facts in engines.values()]
    signatures = {graph.name: graph for graph in graphs.values()}
    weights = {graph.name: path for path, graph in graphs.items()}
    runners: dict[str, Runner] = {
        facts.graph: trt.open_engine(
            path,
            signatures[facts.graph],
            runtime=facts.runtime,
            profiles=[Profile(name=name, shapes=shapes) for name, shapes in facts.profiles.items()],
            weights_from=weights[facts.graph] if facts.stripped else None,
        )
        for path, facts in engines.items()
    }
    return _driven(model, runners), devices[0]


def engine_name(facts: EngineFacts, device: str) -> str:
    """What the verdict on an engine is about, in words."""
    return f"{facts.runtime} {facts.runtime_version} on {device}, {facts.precision}"


def _executed(facts: tuple[EngineFacts, ...], device: str, report: judge.Report) -> tuple[EngineFacts, ...]:
    when = f"on {device} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return tuple(f.model_copy(update={"executed": when, "report": report.to_json()}) for f in facts)


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A bundle's verdict. `skipped`: a line for each of the user's files that could not be used.

    not_run: why the bundle's engines were not asked, the graph was instead. recorded: whether the manifest now says
    that the engines passed on this machine.
    """

    manifest: Manifest
    report: judge.Report
    skipped: tuple[str, ...] = ()
    not_run: str = ""
    recorded: bool = False


def validate(
    folder: Path,
    *,
    images: Path | None = None,
    weights: str | None = None,
    runtime: Runtime | None = None,
    judge_code: Judge = "plain",
    progress: Progress = silent,
) -> Validated:
    """Judges the bundle in `folder` on this machine by the reference it carries, or by PyTorch on the user's `images`.

    Its engines, where this machine can run them, else its graph; `runtime` says which of them it must be. Every byte is
    checked first. `images` needs torch and the weights the bundle was made from: `weights`, or where the manifest says
    they came from. Raises ValidationFailed for a damaged bundle, MissingRequirement for a `runtime` that cannot run
    here; a failed verdict is in the result.
    """
    manifest = bundle.verify(folder, progress=progress)
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    if images is None and manifest.verdict == "unjudged":
        raise UsageError(
            f"{folder} was exported without a reference, so there is nothing to judge it by.",
            next_step="dinoexport build makes a judged bundle.",
        )
    opened = _open(folder, manifest, model, runtime)
    if images is None:
        reference = bundle.read_reference(folder / bundle.REFERENCE)
        report = judged(opened.candidate, reference, opened.name, progress=progress)
        recorded = bool(opened.device) and report.passed
        if recorded:
            engines = _executed(manifest.engines, opened.device, report)
            manifest = manifest.model_copy(update={"engines": engines})
            recorded = bundle.rewrite_manifest(folder, manifest)
        return Validated(manifest=manifest, report=report, not_run=opened.not_run, recorded=recorded)
    cases, skipped = _user_cases(model, images, progress)
    checkpoint = same_weights(model, recipe, manifest, weights, progress)
    limits = _limits_of(folder, manifest, recipe)
    reports = []
    for start in range(0, len(cases), _IMAGES_AT_ONCE):
        chunk = cases[start : start + _IMAGES_AT_ONCE]
        reference = ask_pytorch(
            model, checkpoint, chunk, limits, precision=manifest.precision, judge_code=judge_code, progress=progress
        )
        reports.append(judged(opened.candidate, reference, opened.name, progress=progress))
    report = judge.Report(
        candidate=opened.name,
        reference=reports[0].reference,
        rows=tuple(row for report in reports for row in report.rows),
        not_covered=tuple(name for report in reports for name in report.not_covered),
    )
    return Validated(manifest=manifest, report=report, skipped=skipped, not_run=opened.not_run)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What of a bundle is judged. device: the GPU that runs its engines; empty when it is the graph, `not_run` why."""

    candidate: judge.Candidate
    name: str
    device: str = ""
    not_run: str = ""


def _open(folder: Path, manifest: Manifest, model: Model, runtime: Runtime | None) -> _Opened:
    has = {engine.runtime for engine in manifest.engines} | {Runtime.ONNXRUNTIME}
    if runtime is not None and runtime not in has:
        raise UsageError(f"{folder} holds nothing for {runtime}.", next_step=f"It has: {', '.join(sorted(has))}.")
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    not_run = ""
    if manifest.engines and runtime is not Runtime.ONNXRUNTIME:
        try:
            engines = {folder / engine.file: engine for engine in manifest.engines}
            candidate, device = open_engines(model, engines, graphs)
            return _Opened(candidate=candidate, name=engine_name(manifest.engines[0], device), device=device)
        except MissingRequirement as missing:
            if runtime is not None:
                raise
            not_run = missing.message
    way = way_of(manifest)
    opened = cpu.open_graphs(graphs, way)
    name = candidate_name(manifest.precision, way, cpu.arithmetic(model, opened, model.loads[0].inputs))
    return _Opened(candidate=_driven(model, opened), name=name, not_run=not_run)


def judged(candidate: judge.Candidate, reference: Reference, name: str, *, progress: Progress = silent) -> judge.Report:
    """The judge's report on `candidate`, called `name`, by everything the reference holds."""
    return judge.judge(
        candidate,
        reference.expectations,
        reference.refusals,
        reference.limits,
        candidate_name=name,
        reference_name=reference.name,
        progress=progress,
    )


def _user_cases(model: Model, images: Path, progress: Progress) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    if not images.is_dir():
        raise UsageError(f"There is no folder {images}.", next_step="Give a folder of images as --images.")
    cases, skipped = model.cases_from(images, progress=progress)
    if not cases:
        listed = "".join(f"\n  {line}" for line in skipped)
        raise UsageError(f"{images} holds no image that can be read.{listed}", next_step="Give another folder.")
    return cases, skipped


def same_weights(
    model: Model, recipe: Recipe, manifest: Manifest, weights: str | None, progress: Progress
) -> Checkpoint:
    """The very weights the bundle was made from; comparing with others would blame the bundle for the difference."""
    made_from = manifest.checkpoint
    published = any(file.sha256 == made_from.sha256 for file in recipe.weights)
    source = weights or (None if published else made_from.source)
    checkpoint = open_checkpoint(model, recipe, source, progress=progress)
    if checkpoint.sha256 != made_from.sha256:
        raise ValidationFailed(
            f"{checkpoint.source} is not what the bundle was made from: {made_from.source}, "
            f"SHA-256 {made_from.sha256}.",
            next_step="Give those weights as --weights PATH.",
        )
    return checkpoint


def _limits_of(folder: Path, manifest: Manifest, recipe: Recipe) -> Limits:
    if manifest.verdict == "unjudged":
        validation, _ = load_validation(recipe.validation, beside=None)
        return limits_for(validation, manifest.precision)
    return bundle.read_reference(folder / bundle.REFERENCE).limits

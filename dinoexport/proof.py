"""From cases to a verdict: PyTorch's answers, a candidate opened from a bundle, and the judge between them.

Nothing here builds. Judging a bundle by the reference it carries needs neither torch nor the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from dinoexport import bundle, candidates, carried, explain, family, judge, steadiness, streamed
from dinoexport.bundle import EngineFacts, Manifest
from dinoexport.carried import Reference
from dinoexport.checkpoint import Checkpoint, open_checkpoint
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed, require
from dinoexport.explain import Growth
from dinoexport.family import Model
from dinoexport.metrics import distance
from dinoexport.recipe import Limits, Recipe, Validation, load_validation, parse
from dinoexport.runtime import cpu
from dinoexport.spec import (
    Array,
    Arrays,
    Case,
    Expectation,
    Graph,
    Precision,
    Progress,
    Runtime,
    Way,
    silent,
)
from dinoexport.streamed import Together

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
    asked = [case for case in cases if not case.expect_refusal]
    inputs = [case.inputs for case in asked]
    answers = _exact(model, checkpoint, inputs, judge_code, progress)
    own_errors: list[Mapping[str, float]] = [{} for _ in asked]
    seen: list[Arrays] = [{} for _ in asked]
    if limits.times_own_error_max is not None:
        lossy = model.reference(checkpoint.read, inputs, precision=precision, progress=progress)
        own_errors = [_own_error(ours, exact) for ours, exact in zip(lossy, answers, strict=True)]
        seen = [_halved(ours) if case.shown else {} for case, ours in zip(asked, lossy, strict=True)]
    return Reference(
        name=_reference_name(judge_code),
        limits=limits,
        expectations=tuple(
            Expectation(case=case, outputs=outputs, own_error=own, own_outputs=half)
            for case, outputs, own, half in zip(asked, answers, own_errors, seen, strict=True)
        ),
        refusals=tuple(case for case in cases if case.expect_refusal),
    )


def _halved(answers: Arrays) -> dict[str, Array]:
    """In float16, which holds what a 16-bit precision gave at half the size; what is out of its range becomes Inf."""
    import numpy as np

    with np.errstate(over="ignore"):
        return {name: array.astype(np.float16) for name, array in answers.items()}


def _reference_name(judge_code: Judge) -> str:
    import torch

    formulation = "the authors' own code" if judge_code == "hub" else "plain upstream formulation"
    return f"PyTorch fp32, {formulation} (torch {torch.__version__})"


def _exact(
    model: Model, checkpoint: Checkpoint, inputs: Sequence[Arrays], judge_code: Judge, progress: Progress
) -> list[dict[str, Array]]:
    if judge_code == "hub":
        return model.upstream(checkpoint.read, inputs, progress=progress)
    return model.reference(checkpoint.read, inputs, precision=Precision.FP32, progress=progress)


def _own_error(ours: Arrays, exact: Arrays) -> dict[str, float]:
    """Relative L2 per output. Where PyTorch's own precision overflows it says nothing about a candidate: left out."""
    errors = {name: distance(ours[name], exact[name]).relative_l2 for name in exact}
    return {name: error for name, error in errors.items() if isfinite(error)}


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
    watch: Callable[[judge.Candidate], judge.Candidate] = lambda candidate: candidate,
    progress: Progress = silent,
) -> EngineVerdict:
    """Judges the engines on this machine's GPU like any runtime; where it cannot run them, says why instead.

    watch: stands between the judge and the candidate, for who wants to see the answers too.
    """
    facts = tuple(engines.values())
    try:
        candidate, device = candidates.open_engines(model, engines, graphs)
    except MissingRequirement as missing:
        return EngineVerdict(facts=facts, not_run=missing.message)
    report = judged(watch(candidate), reference, candidates.engine_name(facts[0], device), progress=progress)
    report = with_steadiness(report, reference, candidate)
    return EngineVerdict(facts=_executed(facts, device, report), report=report)


def _executed(facts: tuple[EngineFacts, ...], device: str, report: judge.Report) -> tuple[EngineFacts, ...]:
    """The facts with the verdict; only an engine that passed is said to have been executed."""
    found: dict[str, Any] = {"report": report.to_json()}
    if report.passed:
        found["executed"] = f"on {device} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return tuple(f.model_copy(update=found) for f in facts)


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A bundle's verdict. `skipped`: a line for each of the user's files that could not be used.

    together: what all the others were found good for. not_run: why the bundle's engines were not asked, the graph was
    instead. recorded: whether the manifest now says that the engines passed on this machine; not_recorded: why not, if
    they did. growth: of the error inside the graph, if asked for.
    """

    manifest: Manifest
    report: judge.Report
    skipped: tuple[str, ...] = ()
    together: Together | None = None
    not_run: str = ""
    recorded: bool = False
    not_recorded: str = ""
    growth: Growth | None = None


def validate(
    folder: Path,
    *,
    images: Path | None = None,
    weights: str | None = None,
    runtime: Runtime | None = None,
    judge_code: Judge = "plain",
    explained: bool = False,
    signs: bool = False,
    progress: Progress = silent,
) -> Validated:
    """Judges the bundle in `folder` on this machine by the reference it carries, or by PyTorch on the user's `images`.

    Its engines, where this machine can run them, else its graph; `runtime` says which of them it must be. Every byte is
    checked first. A signed manifest is rewritten only for a caller who `signs` it again. `images` and `explained` need
    torch and the weights the bundle was made from: `weights`, or where the manifest says they came from.

    Raises ValidationFailed for a damaged bundle, MissingRequirement for a `runtime` that cannot run here; a failed
    verdict is in the result.
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
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    cases: Iterable[Case]
    if images is None:
        reference = carried.read(folder / bundle.REFERENCE)
        validated = _by_reference(folder, manifest, opened, reference, signs, progress)
        if not explained:
            return validated
        checkpoint = same_weights(model, recipe, manifest, weights, progress)
        cases, limits = [expectation.case for expectation in reference.expectations], reference.limits
        report = with_ranges(validated.report, model, graphs, cases, progress=progress)
        validated = replace(validated, report=report)
    else:
        skipped: list[str] = []
        cases = streamed.readable(model, images, skipped, progress)
        checkpoint = same_weights(model, recipe, manifest, weights, progress)
        limits = _limits_of(folder, manifest, recipe)
        together = _judge_own(opened, model, checkpoint, cases, graphs, manifest, limits, judge_code, progress)
        validated = Validated(
            manifest=manifest,
            report=together.report,
            skipped=tuple(skipped),
            together=together,
            not_run=opened.not_run,
        )
        if not explained:
            return validated
        cases = streamed.usable(model, images, [], silent)
    growth = growth_of(
        validated.report,
        cases,
        model,
        graphs,
        checkpoint,
        limits,
        way=candidates.way_of(manifest),
        precision=manifest.precision,
        progress=progress,
    )
    return replace(validated, growth=growth)


def _by_reference(
    folder: Path, manifest: Manifest, opened: _Opened, reference: Reference, signs: bool, progress: Progress
) -> Validated:
    """The verdict by what the bundle carries; engines that pass are written down as executed on this machine."""
    report = judged(opened.candidate, reference, opened.name, progress=progress)
    report = with_steadiness(report, reference, opened.candidate, opened.one_thread)
    passed_on_gpu = bool(opened.device and report.passed)
    not_recorded = ""
    if passed_on_gpu:
        manifest = manifest.model_copy(update={"engines": _executed(manifest.engines, opened.device, report)})
        not_recorded = _record(folder, manifest, signs)
    return Validated(
        manifest=manifest,
        report=report,
        not_run=opened.not_run,
        recorded=passed_on_gpu and not not_recorded,
        not_recorded=not_recorded,
    )


def _record(folder: Path, manifest: Manifest, signs: bool) -> str:
    """Writes down in the bundle what this machine found; the reason why not, where that cannot be."""
    if (folder / bundle.SIGNATURE).exists() and not signs:
        return (
            "Not recorded, for the bundle is signed: dinoexport validate BUNDLE --sign KEY records it and signs again."
        )
    return "" if bundle.rewrite_manifest(folder, manifest) else f"Not recorded: {folder} cannot be written."


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What of a bundle is judged. device: the GPU that runs its engines; empty when it is the graph, `not_run` why.

    one_thread: the graph with one thread, where it has more.
    """

    candidate: judge.Candidate
    name: str
    device: str = ""
    not_run: str = ""
    one_thread: judge.Candidate | None = None


def _open(folder: Path, manifest: Manifest, model: Model, runtime: Runtime | None) -> _Opened:
    has = {engine.runtime for engine in manifest.engines} | {Runtime.ONNXRUNTIME}
    if runtime is not None and runtime not in has:
        raise UsageError(f"{folder} holds nothing for {runtime}.", next_step=f"It has: {', '.join(sorted(has))}.")
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    not_run = ""
    if manifest.engines and runtime is not Runtime.ONNXRUNTIME:
        try:
            engines = {folder / engine.file: engine for engine in manifest.engines}
            candidate, device = candidates.open_engines(model, engines, graphs)
            return _Opened(candidate=candidate, name=candidates.engine_name(manifest.engines[0], device), device=device)
        except MissingRequirement as missing:
            if runtime is not None:
                raise
            not_run = missing.message
    way = candidates.way_of(manifest)
    opened = cpu.open_graphs(graphs, way)
    name = candidates.candidate_name(manifest.precision, way, cpu.arithmetic(model, opened, model.loads[0].inputs))
    return _Opened(
        candidate=candidates.driven(model, opened),
        name=name,
        not_run=not_run,
        one_thread=candidates.with_one_thread(model, graphs, way),
    )


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


def with_steadiness(
    report: judge.Report, reference: Reference, candidate: judge.Candidate, one_thread: judge.Candidate | None = None
) -> judge.Report:
    """The report with what changes when `candidate` is asked the same otherwise; one_thread: itself with one thread."""
    cases = [expectation.case for expectation in reference.expectations]
    return replace(report, steadiness=steadiness.measure(candidate, cases, one_thread))


def with_ranges(
    report: judge.Report,
    model: Model,
    graphs: Mapping[Path, Graph],
    cases: Sequence[Case],
    *,
    progress: Progress = silent,
) -> judge.Report:
    """The report with a row for each case that says whether any fp16 value inside `graphs` overflows on it."""
    rows = explain.range_rows(model, graphs, [case for case in cases if not case.expect_refusal], progress=progress)
    return replace(report, rows=(*report.rows, *rows))


def growth_of(
    report: judge.Report,
    cases: Iterable[Case],
    model: Model,
    graphs: Mapping[Path, Graph],
    checkpoint: Checkpoint,
    limits: Limits,
    *,
    way: Way,
    precision: Precision,
    progress: Progress = silent,
) -> Growth | None:
    """How the error grows inside `graphs` on the one of `cases` that says most in `report`.

    None when the family has no probes, nothing was measured that could be followed, or another runtime than ONNX
    Runtime ran the graphs, which alone shows what is inside.
    """
    told = explain.telling_case(report)
    if told is None or not model.probes or way.runtime != "onnxruntime":
        return None
    require("export", "torch", "onnx")
    case = next(case for case in cases if case.name == told)
    inside = explain.values_inside(model, graphs, case.inputs)
    names = tuple(name for probes in model.probes.values() for name in probes if name in inside)
    if not names:
        return None

    def ask(wanted: Precision) -> Arrays:
        return model.reference(checkpoint.read, [case.inputs], precision=wanted, progress=progress, inside=True)[0]

    own = ask(precision) if limits.times_own_error_max is not None else None
    return explain.growth(case.name, names, inside, ask(Precision.FP32), own, limits)


def _judge_own(
    opened: _Opened,
    model: Model,
    checkpoint: Checkpoint,
    cases: Iterable[Case],
    graphs: Mapping[Path, Graph],
    manifest: Manifest,
    limits: Limits,
    judge_code: Judge,
    progress: Progress,
) -> Together:
    """The verdict on a user's own cases, each by itself and all together; see `streamed`."""
    require("export", "torch")

    def ask(asked: Sequence[Case]) -> Reference:
        return ask_pytorch(
            model, checkpoint, asked, limits, precision=manifest.precision, judge_code=judge_code, progress=progress
        )

    def judge_them(candidate: judge.Candidate, reference: Reference) -> judge.Report:
        report = judged(candidate, reference, opened.name, progress=progress)
        return with_ranges(report, model, graphs, [e.case for e in reference.expectations], progress=progress)

    return streamed.judge_own(
        model.uses,
        cases,
        opened.candidate,
        limits,
        ask=ask,
        exact=lambda inputs: _exact(model, checkpoint, inputs, judge_code, progress),
        judged=judge_them,
        names=(opened.name, _reference_name(judge_code)),
        identity=(hashlib.sha256(manifest.to_bytes()).hexdigest(), checkpoint.sha256, family.code_of(model)),
        at_once=_IMAGES_AT_ONCE,
        progress=progress,
    )


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
    return carried.read(folder / bundle.REFERENCE).limits

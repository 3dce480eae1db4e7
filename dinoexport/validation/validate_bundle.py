"""Validate a bundle on this machine: with the reference in the bundle, or with PyTorch on a user's own files.

Nothing here builds. Validation with the bundle's reference needs neither torch nor the network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dinoexport import bundle, family
from dinoexport.bundle import Manifest, reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.bundle.signing import Signer
from dinoexport.config.limits import Limits, load_validation
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import MissingRequirement, UsageError, require
from dinoexport.family import Model, Runnable
from dinoexport.runtime import cpu, runners
from dinoexport.spec import CPU_RUNTIMES, Candidate, Case, Graph, Progress, Runtime, Way, silent
from dinoexport.validation import evaluate, judge, user_files
from dinoexport.validation.error_analysis import Growth
from dinoexport.validation.evaluate import Judge
from dinoexport.validation.user_files import Aggregate
from dinoexport.weights.checkpoint import Checkpoint

# How many of a user's images are processed in one step: only their tokens are in memory at once.
_IMAGES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A bundle's verdict. `skipped`: a line for each of the user's files that could not be used.

    aggregate: the results over all other files. not_run: why the graph was run on the CPU and not what the bundle has
    for a GPU.
    recorded: whether the manifest now records that the engines passed on this machine; not_recorded: the reason if it
    does not. growth: of the error inside the graph, on request; way: how the graph ran for it.
    """

    manifest: Manifest
    report: judge.Report
    skipped: tuple[str, ...] = ()
    aggregate: Aggregate | None = None
    not_run: str = ""
    recorded: bool = False
    not_recorded: str = ""
    growth: Growth | None = None
    way: Way | None = None


def validate(
    folder: Path,
    *,
    images: Path | None = None,
    weights: str | None = None,
    head_weights: str | None = None,
    runtime: Runtime | None = None,
    judge_code: Judge = "plain",
    explained: bool = False,
    signer: Signer | None = None,
    signed: Manifest | None = None,
    trust_plan: bool = False,
    record: bool = True,
    progress: Progress = silent,
) -> Validated:
    """Validates the bundle in `folder` on this machine, with its own reference, or with PyTorch on the user's `images`.

    Runs its engines if this machine can run them, else its graph: on a GPU if the bundle is for one, without engines,
    and one is here. `runtime` chooses the engines or, by a CPU's runtime, the graph on the CPU. Every byte is checked
    first, against the bundle's own manifest or the verified manifest `signed`. `images` and `explained` need torch and
    the weights the bundle was built from: `weights`, or their source in the manifest. A bundle that passed is signed
    by `signer`; the result of its engines is recorded, in a signed bundle only with a `signer`. A plan that holds code
    is run only if it is in `signed`, or with `trust_plan`. record: whether the result may be written into the manifest.

    Raises ValidationFailed for a damaged bundle, MissingRequirement for a `runtime` that cannot run here; a failed
    verdict is in the result.
    """
    trusted = trust_plan or signed is not None
    with bundle.checked(folder, signed=signed, progress=progress) as before:
        validated = _judged(
            folder, before, images, (weights, head_weights), runtime, trusted, judge_code, explained, progress
        )
    passed = validated.report.passed
    records = validated.manifest != before
    if passed and signer is not None:
        bundle.rewrite(folder, before=before, after=validated.manifest, sign=signer.signature)
    elif records:
        not_recorded = (
            _record(folder, before, validated.manifest) if record else "Not recorded: the bundle is in an object store."
        )
        return replace(validated, recorded=not not_recorded, not_recorded=not_recorded)
    return replace(validated, recorded=records)


def _judged(
    folder: Path,
    manifest: Manifest,
    images: Path | None,
    given: tuple[str | None, str | None],
    runtime: Runtime | None,
    trusted: bool,
    judge_code: Judge,
    explained: bool,
    progress: Progress,
) -> Validated:
    """The verdict; its manifest records the engines' result here. given: weights of the model and of its head."""
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    if images is None and manifest.verdict == "unjudged":
        raise UsageError(
            f"{folder} was exported without a reference, so it cannot be validated.",
            next_step="dinoexport build makes a validated bundle.",
        )
    opened = _open(folder, manifest, model, runtime, trusted=trusted)
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    cases: Iterable[Case]
    if images is None:
        reference = reference_file.read(folder / bundle.REFERENCE)
        validated = _by_reference(manifest, opened, reference, progress)
        if not explained:
            return validated
        checkpoint = evaluate.same_weights(
            model, recipe, manifest, given[0], progress, head_weights=given[1], folder=folder
        )
        cases, limits = [expectation.case for expectation in reference.expectations], reference.limits
        report = evaluate.with_ranges(validated.report, model, graphs, cases, progress=progress)
        validated = replace(validated, report=report)
    else:
        skipped: list[str] = []
        cases = user_files.readable(model, images, skipped, progress)
        checkpoint = evaluate.same_weights(
            model, recipe, manifest, given[0], progress, head_weights=given[1], folder=folder
        )
        limits = _limits_of(folder, manifest, recipe)
        aggregate = _judge_own(opened, model, checkpoint, cases, graphs, manifest, limits, judge_code, progress)
        validated = Validated(
            manifest=manifest,
            report=aggregate.report,
            skipped=tuple(skipped),
            aggregate=aggregate,
            not_run=opened.not_run,
        )
        if not explained:
            return validated
        cases = user_files.usable(model, images, [], silent)
    way = runners.way_of(manifest, runtime if runtime in CPU_RUNTIMES else None)
    growth = evaluate.growth_of(
        validated.report,
        cases,
        model,
        graphs,
        checkpoint,
        limits,
        way=way,
        precision=manifest.precision,
        progress=progress,
    )
    return replace(validated, growth=growth, way=way)


def _by_reference(manifest: Manifest, opened: _Opened, reference: Reference, progress: Progress) -> Validated:
    """The verdict with the bundle's reference; engines that pass are recorded as executed on this machine."""
    report = evaluate.judged(opened.candidate, reference, opened.name, progress=progress)
    report = evaluate.with_determinism(report, reference, opened.candidate, opened.one_thread)
    if opened.device and report.passed:
        manifest = manifest.changed(engines=evaluate.executed(manifest.engines, opened.device, report))
    return Validated(manifest=manifest, report=report, not_run=opened.not_run)


def _record(folder: Path, before: Manifest, after: Manifest) -> str:
    """Records this machine's result in the bundle; returns the reason if that is not possible."""
    if os.path.lexists(folder / bundle.SIGNATURE):
        return "Not recorded, because the bundle is signed: validate it with --sign KEY to record it and sign again."
    try:
        bundle.rewrite(folder, before=before, after=after)
    except MissingRequirement:
        return f"Not recorded: {folder} cannot be written."
    return ""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The part of a bundle that is run. device: the engines' GPU; empty for the graph, with the reason in not_run.

    one_thread: opens the graph with one thread, if it has more.
    """

    candidate: Candidate
    name: str
    device: str = ""
    not_run: str = ""
    one_thread: Callable[[], Candidate] | None = None


def _open(folder: Path, manifest: Manifest, model: Runnable, runtime: Runtime | None, *, trusted: bool) -> _Opened:
    has = {engine.runtime for engine in manifest.engines} | set(CPU_RUNTIMES)
    if runtime is not None and runtime not in has:
        raise UsageError(f"{folder} holds nothing for {runtime}.", next_step=f"It has: {', '.join(sorted(has))}.")
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    not_run, sample = "", model.workloads[0].inputs
    if runners.is_for_gpu(manifest) and runtime not in CPU_RUNTIMES:
        try:
            there = runners.open_on_gpu(model, folder, manifest, trusted=trusted, named_by=sample)
            device = there.device if manifest.engines else ""
            return _Opened(candidate=there.candidate, name=there.name, device=device)
        except MissingRequirement as missing:
            if runtime is not None:
                raise
            not_run = missing.message
    way = runners.way_of(manifest, runtime)
    opened = cpu.open_graphs(graphs, way)
    name = runners.candidate_name(manifest.precision, way, cpu.arithmetic(model, opened, sample))
    return _Opened(
        candidate=runners.driven(model, opened),
        name=name,
        not_run=not_run,
        one_thread=runners.with_one_thread(model, graphs, way),
    )


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
) -> Aggregate:
    """The verdict on a user's own cases, each by itself and all together; see `user_files`."""
    require("export", "torch")

    def ask(asked: Sequence[Case]) -> Reference:
        return evaluate.compute_reference(
            model,
            checkpoint,
            asked,
            limits,
            precision=manifest.precision,
            judge_code=judge_code,
            kinds=evaluate.kinds_of(model.graphs),
            progress=progress,
        )

    def judge_them(candidate: Candidate, reference: Reference) -> judge.Report:
        report = evaluate.judged(candidate, reference, opened.name, progress=progress)
        return evaluate.with_ranges(report, model, graphs, [e.case for e in reference.expectations], progress=progress)

    return user_files.judge_own(
        model.uses,
        cases,
        opened.candidate,
        limits,
        ask=ask,
        exact=lambda inputs: evaluate.exact(model, checkpoint, inputs, judge_code, progress),
        judged=judge_them,
        names=(opened.name, evaluate.reference_name(judge_code)),
        identity=(hashlib.sha256(manifest.to_bytes()).hexdigest(), checkpoint.identity, family.code_of(model)),
        at_once=_IMAGES_AT_ONCE,
        progress=progress,
    )


def _limits_of(folder: Path, manifest: Manifest, recipe: Recipe) -> Limits:
    if manifest.verdict == "unjudged":
        validation, _ = load_validation(recipe.judged_by, beside=None)
        return evaluate.limits_for(validation, manifest.precision)
    return reference_file.read(folder / bundle.REFERENCE).limits

"""Compute reference outputs with PyTorch, and evaluate a candidate against them.

Nothing here builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dinoexport.bundle import EngineFacts, Manifest
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import Limits, Validation
from dinoexport.config.recipe import Recipe
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed, require
from dinoexport.family import CaseSource, Model, Oracle, Runnable, WeightLayout
from dinoexport.runtime import runners
from dinoexport.spec import (
    SYNTHETIC,
    Array,
    Arrays,
    Candidate,
    Case,
    Expectation,
    Graph,
    OutputKind,
    Precision,
    Progress,
    Runtime,
    Way,
    silent,
)
from dinoexport.validation import determinism, error_analysis, judge
from dinoexport.validation.answers import as_vectors, comparable
from dinoexport.validation.error_analysis import Growth
from dinoexport.validation.metrics import centred, distance, divergence
from dinoexport.weights.checkpoint import Checkpoint, open_checkpoint

Judge = Literal["plain", "hub"]
# Suffix of the name under which a reference gives each label's lead over the second best: `labels/lead`.
LEAD = "/lead"


def cases_of(model: CaseSource, validation: Validation, folder: Path) -> tuple[Case, ...]:
    """All cases of a validation; files they name lie in `folder`."""
    return tuple(model.case(table, folder) for table in validation.cases)


def limits_for(validation: Validation, precision: Precision) -> Limits:
    """The limits of a precision; a UsageError if the validation has none, because a verdict needs limits."""
    if precision not in validation.limits:
        raise UsageError(
            f"The validation has no limits for {precision}.", next_step=f"Add [limits.{precision}] with reasons."
        )
    return validation.limits[precision]


def compute_reference(
    model: Oracle,
    checkpoint: Checkpoint,
    cases: Sequence[Case],
    limits: Limits,
    *,
    precision: Precision,
    judge_code: Judge,
    kinds: judge.Kinds = MappingProxyType({}),
    progress: Progress = silent,
) -> Reference:
    """PyTorch's fp32 outputs for `cases`; if the limits need it, also the error of PyTorch's own `precision`.

    kinds: see `kinds_of`.
    """
    require("export", "torch")
    asked = [case for case in cases if not case.expect_refusal]
    inputs = [case.inputs for case in asked]
    answers = exact(model, checkpoint, inputs, judge_code, progress)
    own_errors: list[Mapping[str, float]] = [{} for _ in asked]
    seen: list[Arrays] = [{} for _ in asked]
    if limits.times_own_error_max is not None:
        lossy = model.reference(checkpoint.read, inputs, precision=precision, progress=progress)
        own_errors = [_own_error(*three, kinds) for three in zip(asked, lossy, answers, strict=True)]
        lossy = [{name: array for name, array in ours.items() if "/" not in name} for ours in lossy]
        seen = [_halved(ours) if case.shown else {} for case, ours in zip(asked, lossy, strict=True)]
    return Reference(
        kinds=kinds,
        name=reference_name(judge_code),
        limits=limits,
        expectations=tuple(
            Expectation(
                case=case,
                outputs={name: array for name, array in outputs.items() if "/" not in name},
                own_error=own,
                own_outputs=half,
                leads={name.removesuffix(LEAD): array for name, array in outputs.items() if name.endswith(LEAD)},
            )
            for case, outputs, own, half in zip(asked, answers, own_errors, seen, strict=True)
        ),
        refusals=tuple(case for case in cases if case.expect_refusal),
    )


def _halved(answers: Arrays) -> dict[str, Array]:
    """The outputs as float16, half the size; values out of its range become Inf."""
    import numpy as np

    with np.errstate(over="ignore"):
        # Labels are whole numbers, and fp16 holds those up to 2048 only.
        return {name: array.astype(np.float16) if array.dtype.kind == "f" else array for name, array in answers.items()}


def reference_name(judge_code: Judge) -> str:
    """Whose code computed the reference outputs, as text."""
    import torch

    formulation = "the authors' own code" if judge_code == "hub" else "plain upstream formulation"
    return f"PyTorch fp32, {formulation} (torch {torch.__version__})"


def exact(
    model: Oracle, checkpoint: Checkpoint, inputs: Sequence[Arrays], judge_code: Judge, progress: Progress
) -> list[dict[str, Array]]:
    """PyTorch's fp32 outputs for `inputs`."""
    if judge_code == "hub":
        return model.upstream(checkpoint.read, inputs, progress=progress)
    return model.reference(checkpoint.read, inputs, precision=Precision.FP32, progress=progress)


def kinds_of(graphs: Sequence[Graph]) -> dict[str, tuple[OutputKind, str]]:
    """The kind of the numbers of each output that is not a vector."""
    outputs = (tensor for graph in graphs for tensor in graph.outputs)
    return {tensor.name: (tensor.kind, tensor.decided_by) for tensor in outputs if tensor.kind != "vectors"}


def _own_error(case: Case, ours: Arrays, exact: Arrays, kinds: judge.Kinds) -> dict[str, float]:
    """Relative L2 per output, and the divergence of distributions.

    An output in which PyTorch's own precision overflows is left out, because it says nothing about a candidate.
    """
    errors: dict[str, float] = {}
    for name in exact.keys() - case.choices.keys():
        kind = kinds.get(name, ("vectors", ""))[0]
        if kind in ("labels", "probabilities") or name.endswith(LEAD):
            continue
        if name in case.distributions:
            lossy, wanted = comparable(case, name, ours, exact)
            errors[name] = distance(centred(lossy), centred(wanted)).relative_l2
            errors[judge.own_kl(name)] = divergence(lossy, wanted).kl_mean
        else:
            errors[name] = distance(as_vectors(kind, ours[name]), as_vectors(kind, exact[name])).relative_l2
    return {name: error for name, error in sorted(errors.items()) if isfinite(error)}


@dataclass(frozen=True, kw_only=True)
class EngineVerdict:
    """The result for a bundle's engines on this machine's GPU: `report`, or why they were `not_run`."""

    facts: tuple[EngineFacts, ...]
    report: judge.Report | None = None
    not_run: str = ""


NO_ENGINE = EngineVerdict(facts=())


def judge_engines(
    model: Runnable,
    engines: Mapping[Path, EngineFacts],
    graphs: Mapping[Path, Graph],
    reference: Reference,
    *,
    watch: Callable[[Candidate], Candidate] = lambda candidate: candidate,
    progress: Progress = silent,
) -> EngineVerdict:
    """Evaluates engines that were just built, on this machine's GPU; if that is not possible, returns the reason.

    watch: wraps the candidate, for a caller that needs its outputs too.
    """
    facts = tuple(engines.values())
    try:
        opened = runners.open_engines(model, engines, graphs, trusted=True)  # they were built here
    except MissingRequirement as missing:
        return EngineVerdict(facts=facts, not_run=missing.message)
    report = judged(watch(opened.candidate), reference, opened.name, progress=progress)
    report = with_determinism(report, reference, opened.candidate)
    return EngineVerdict(facts=executed(facts, opened.device, report), report=report)


def executed(facts: tuple[EngineFacts, ...], device: str, report: judge.Report) -> tuple[EngineFacts, ...]:
    """The facts with the verdict; only an engine that passed is recorded as executed."""
    found: dict[str, Any] = {"report": report.to_json()}
    if report.passed:
        found["executed"] = f"on {device} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    ran = runners.engines_here(facts)  # the others are for other cards, and keep what was found there
    return tuple(f.changed(**found) if f in ran else f for f in facts)


def judged(candidate: Candidate, reference: Reference, name: str, *, progress: Progress = silent) -> judge.Report:
    """The report on `candidate`, called `name`, for every case of the reference."""
    return judge.judge(
        candidate,
        reference.expectations,
        reference.refusals,
        reference.limits,
        candidate_name=name,
        reference_name=reference.name,
        kinds=reference.kinds,
        progress=progress,
    )


def with_determinism(
    report: judge.Report,
    reference: Reference,
    candidate: Candidate,
    one_thread: Callable[[], Candidate] | None = None,
) -> judge.Report:
    """The report with the repeatability of `candidate`.

    one_thread: opens it with one thread.
    """
    cases = [expectation.case for expectation in reference.expectations]
    return replace(report, determinism=determinism.measure(candidate, cases, one_thread))


def with_ranges(
    report: judge.Report,
    model: Runnable,
    graphs: Mapping[Path, Graph],
    cases: Sequence[Case],
    *,
    progress: Progress = silent,
) -> judge.Report:
    """The report with a row for each case that states whether any fp16 value inside `graphs` overflows."""
    rows = error_analysis.range_rows(
        model, graphs, [case for case in cases if not case.expect_refusal], progress=progress
    )
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
    """How the error grows inside `graphs`, on the most informative of `cases` in `report`.

    None if the family has no probes, no error was measured, or a runtime other than ONNX Runtime ran the graphs: only
    ONNX Runtime shows inner values.
    """
    told = error_analysis.telling_case(report)
    if told is None or not model.probes or way.runtime is not Runtime.ONNXRUNTIME:
        return None
    require("export", "torch", "onnx")
    case = next(case for case in cases if case.name == told)
    inside = error_analysis.values_inside(model, graphs, case.inputs)
    names = tuple(name for probes in model.probes.values() for name in probes if name in inside)
    if not names:
        return None

    def ask(wanted: Precision) -> Arrays:
        return model.reference(checkpoint.read, [case.inputs], precision=wanted, progress=progress, inside=True)[0]

    own = ask(precision) if limits.times_own_error_max is not None else None
    return error_analysis.growth(case.name, names, inside, ask(Precision.FP32), own, limits)


def same_weights(
    model: WeightLayout,
    recipe: Recipe,
    manifest: Manifest,
    weights: str | None,
    progress: Progress,
    *,
    head_weights: str | None = None,
    folder: Path | None = None,
) -> Checkpoint:
    """The weights that the bundle was built from; other weights would make a correct bundle look wrong.

    folder: the bundle's, which may hold its head's own file.
    """
    made_from, head = manifest.checkpoint, manifest.head
    published = any(file.sha256 == made_from.sha256 or file.url == made_from.source for file in recipe.weights)
    source = weights or (None if published else made_from.source)
    local = source is not None and not source.startswith(SYNTHETIC)
    prefix = made_from.prefix if local else None
    head_source = head_weights
    if head is not None and head.sha256 is not None and head_weights is None:
        of_recipe = recipe.heads.get(head.kind)
        inside = str(folder / head.file) if folder is not None and head.file else head.source
        head_source = None if of_recipe is not None and of_recipe.url == head.source else inside
    checkpoint = open_checkpoint(model, recipe, source, prefix=prefix, head_source=head_source, progress=progress)
    if head is not None and checkpoint.head is not None and checkpoint.head.sha256 != head.sha256:
        raise ValidationFailed(
            f"{checkpoint.head.source} is not the head that the bundle was built from: {head.source}, "
            f"SHA-256 {head.sha256}.",
            next_step="Give that file as --head-weights PATH.",
        )
    if checkpoint.sha256 != made_from.sha256:
        raise ValidationFailed(
            f"{checkpoint.source} is not what the bundle was built from: {made_from.source}, "
            f"SHA-256 {made_from.sha256}.",
            next_step="Give those weights as --weights PATH.",
        )
    return checkpoint

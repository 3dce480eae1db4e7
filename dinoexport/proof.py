"""From cases to a verdict: PyTorch's answers, a candidate opened from a bundle, and the judge between them.

Nothing here builds. Judging a bundle by the reference it carries needs neither torch nor the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Literal

from dinoexport import bundle, explain, family, judge
from dinoexport.bundle import Manifest, Reference
from dinoexport.checkpoint import Checkpoint, open_checkpoint
from dinoexport.errors import UsageError, ValidationFailed, require
from dinoexport.explain import Growth
from dinoexport.family import Model
from dinoexport.metrics import distance
from dinoexport.recipe import Limits, Recipe, Validation, load_validation, parse
from dinoexport.runtime import ort
from dinoexport.spec import Array, Arrays, Case, Expectation, Graph, Precision, Progress, Runner, silent

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


def open_candidate(model: Model, graphs: Mapping[Path, Graph]) -> judge.Candidate:
    """The exported graphs in ONNX Runtime, as the function from a case's inputs to its outputs."""
    runners: dict[str, Runner] = {graph.name: ort.open_graph(path, graph) for path, graph in graphs.items()}

    def answer(inputs: Arrays) -> dict[str, Array]:
        return model.drive(runners, inputs)

    return answer


def candidate_name(precision: Precision) -> str:
    """What the verdict is about, in words."""
    return f"ONNX Runtime {ort.version()} on the CPU, {precision}"


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A bundle's verdict. skipped: a line for each of the user's files that could not be used. growth: if asked for."""

    manifest: Manifest
    report: judge.Report
    skipped: tuple[str, ...] = ()
    growth: Growth | None = None


def validate(
    folder: Path,
    *,
    images: Path | None = None,
    weights: str | None = None,
    judge_code: Judge = "plain",
    explained: bool = False,
    progress: Progress = silent,
) -> Validated:
    """Judges the bundle in `folder` on this machine by the reference it carries, or by PyTorch on the user's `images`.

    Every byte is checked first. `images` and `explained` need torch and the weights the bundle was made from:
    `weights`, or where the manifest says they came from. Raises ValidationFailed for a damaged bundle; a failed verdict
    is in the result.
    """
    manifest = bundle.verify(folder, progress=progress)
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    if images is None and manifest.verdict == "unjudged":
        raise UsageError(
            f"{folder} was exported without a reference, so there is nothing to judge it by.",
            next_step="dinoexport build makes a judged bundle.",
        )
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    candidate = open_candidate(model, graphs)
    name = candidate_name(manifest.precision)
    if images is None:
        reference = bundle.read_reference(folder / bundle.REFERENCE)
        limits = reference.limits
        cases: Iterable[Case] = [expectation.case for expectation in reference.expectations]
        report = judged(candidate, reference, name, progress=progress)
        if not explained:
            return Validated(manifest=manifest, report=report)
        checkpoint = _same_weights(model, recipe, manifest, weights, progress)
        report = with_ranges(report, model, graphs, [*cases], progress=progress)
        skipped: list[str] = []
    else:
        chunks, skipped = _chunks(model, images, progress)
        checkpoint = _same_weights(model, recipe, manifest, weights, progress)
        limits = _limits_of(folder, manifest, recipe)
        reports = []
        for chunk in chunks:
            reference = ask_pytorch(
                model, checkpoint, chunk, limits, precision=manifest.precision, judge_code=judge_code, progress=progress
            )
            report = judged(candidate, reference, name, progress=progress)
            reports.append(with_ranges(report, model, graphs, chunk, progress=progress))
        report = replace(reports[0], rows=tuple(row for part in reports for row in part.rows))
        cases = _usable(model, images, [], silent)
    growth = None
    if explained:
        growth = growth_of(
            report, cases, model, graphs, checkpoint, limits, precision=manifest.precision, progress=progress
        )
    return Validated(manifest=manifest, report=report, skipped=tuple(skipped), growth=growth)


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
    precision: Precision,
    progress: Progress = silent,
) -> Growth | None:
    """How the error grows inside `graphs` on the one of `cases` that says most in `report`.

    None when the family has no probes, or nothing was measured that could be followed.
    """
    told = explain.telling_case(report)
    if told is None or not model.probes:
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


def _usable(model: Model, images: Path, skipped: list[str], progress: Progress) -> Iterator[Case]:
    for found in model.cases_from(images, progress=progress):
        if isinstance(found, str):
            skipped.append(found)
        else:
            yield found


def _chunks(model: Model, images: Path, progress: Progress) -> tuple[Iterator[tuple[Case, ...]], list[str]]:
    """The user's cases, a few at a time, and a list that fills with a line for each file that cannot be used.

    Raises UsageError when there is no folder, or when not one file of it can be used.
    """
    if not images.is_dir():
        raise UsageError(f"There is no folder {images}.", next_step="Give a folder of images as --images.")
    skipped: list[str] = []
    cases = _usable(model, images, skipped, progress)
    first = next(cases, None)
    if first is None:
        listed = "".join(f"\n  {line}" for line in skipped)
        raise UsageError(f"{images} holds no image that can be read.{listed}", next_step="Give another folder.")
    rest = chain((first,), cases)
    return iter(lambda: tuple(islice(rest, _IMAGES_AT_ONCE)), ()), skipped


def _same_weights(
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

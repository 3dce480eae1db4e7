"""`--precision auto`: the smallest set of parts that must stay in fp32 for an fp16 graph to stay within its limits.

The family defines the parts; this module only knows their names. The search is QuickXplain (Junker 2004, AAAI), which
finds a preferred minimal conflict: each part in the set is necessary, returning any one to fp16 breaks a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dinoexport import family
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.recipe import Recipe
from dinoexport.errors import ValidationFailed
from dinoexport.family import Model
from dinoexport.graph.onnx_writer import Traces, export
from dinoexport.graph.traces import of as trace_of
from dinoexport.runtime import runners
from dinoexport.spec import Progress, silent
from dinoexport.validation import error_analysis, evaluate
from dinoexport.validation.judge import Report
from dinoexport.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination that was tried: the parts in fp32, whether it passed, and if not, what failed."""

    fp32: tuple[str, ...]
    passed: bool
    failed_by: str = ""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """The result. fp32: the parts to keep in fp32; None if even all of them are not enough."""

    fp32: tuple[str, ...] | None
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return asdict(self)


def smallest(parts: Sequence[str], holds: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """A subset of `parts` that holds the limits and in which each part is necessary; earlier parts are preferred.

    `parts` together must hold, the empty set must not, and more parts must never be worse. Tests about k log(n / k)
    subsets to find k of n parts.
    """

    def needed(given: tuple[str, ...], just_given: bool, among: tuple[str, ...]) -> tuple[str, ...]:
        if just_given and holds(given):
            return ()
        if len(among) == 1:
            return among
        first, second = among[: len(among) // 2], among[len(among) // 2 :]
        of_second = needed((*given, *first), True, second)
        of_first = needed((*given, *of_second), bool(of_second), first)
        return (*of_first, *of_second)

    found = needed((), False, tuple(parts))
    return tuple(part for part in parts if part in found)


def promoted(recipe: Recipe, model: Model, parts: Sequence[str]) -> tuple[Recipe, Model]:
    """The recipe and its model with `parts` in fp32."""
    changed = recipe.changed(graph=dict(model.promoted(parts)))
    return changed, family.find(recipe.family).model(changed)


def search(
    recipe: Recipe,
    model: Model,
    checkpoint: Checkpoint,
    reference: Reference,
    folder: Path,
    *,
    progress: Progress = silent,
) -> MixedPrecision:
    """Tries combinations, the fastest first, until the smallest set of fp32 parts is found.

    The first combination runs every case, the others only the cases that it failed: the build then validates the found
    combination on all cases again. Graphs are written to `folder` and removed.
    """
    trials: dict[tuple[str, ...], Trial] = {}
    traces: Traces = {}
    failed: list[str] = []

    def holds(parts: tuple[str, ...]) -> bool:
        ordered = tuple(part for part in model.promotable if part in parts)
        if ordered not in trials:
            asked = [e for e in reference.expectations if e.case.name in failed] or reference.expectations
            _, form = promoted(recipe, model, ordered)
            problems = _problems(form, checkpoint, replace(reference, expectations=tuple(asked)), folder, traces)
            failed.extend(problems if not failed else ())
            trials[ordered] = Trial(fp32=ordered, passed=not problems, failed_by=next(iter(problems.values()), ""))
            progress("trying combinations of precisions", len(trials), 0)
        return trials[ordered].passed

    found: tuple[str, ...] | None = ()
    if not holds(()):
        found = smallest(model.promotable, holds) if model.promotable and holds(model.promotable) else None
    return MixedPrecision(fp32=found, trials=tuple(trials.values()))


def _problems(
    form: Model, checkpoint: Checkpoint, reference: Reference, folder: Path, traces: Traces
) -> dict[str, str]:
    """The failures of each case of `reference` with this combination, by the case's name; empty if all pass."""
    with TemporaryDirectory(dir=folder) as place:
        try:
            for graph in form.graphs:
                export(
                    graph, form.calls(graph, checkpoint.read), Path(place), metadata={}, traces=traces, trace=trace_of
                )
        except ValidationFailed as error:  # a weight the precision cannot hold
            return {expectation.case.name: error.message for expectation in reference.expectations}
        graphs = {Path(place) / f"{graph.name}.onnx": graph for graph in form.graphs}
        report = evaluate.judged(runners.open_candidate(form, graphs), replace(reference, refusals=()), "a form")
        cases = [expectation.case for expectation in reference.expectations]
        report = evaluate.with_ranges(report, form, graphs, cases)
    by_case = {
        row.case: replace(report, rows=tuple(r for r in report.rows if r.case == row.case)) for row in report.rows
    }
    return {case: _problem(alone) for case, alone in by_case.items() if not alone.passed}


def _problem(report: Report) -> str:
    if causes := error_analysis.causes(report, None):
        return causes[0]
    row = report.failures[0]
    missed = next((f"{b.figure} {b.value:.2g}, limit {b.limit:.2g}" for b in row.bounds if not b.holds), row.problem)
    return f"{row.case}/{row.output}: {missed}"

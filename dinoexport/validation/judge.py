"""Compare a candidate's outputs with the reference outputs, and each figure with its limit.

Imports nothing that builds.

A candidate passes if every output of every case is within every limit, every input that must be refused is refused, and
there is at least one figure. NaN is never within a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from dinoexport.config.recipe import Limit, Limits
from dinoexport.errors import DinoexportError, InputRefused, OutsideProfile
from dinoexport.spec import Array, Arrays, Candidate, Case, Expectation, Progress, silent
from dinoexport.validation.determinism import Determinism
from dinoexport.validation.metrics import (
    Distance,
    Divergence,
    centred,
    distance,
    divergence,
    neighbour_agreement,
)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One limit as it was applied. holds: whether `value` is within it; false for NaN."""

    figure: str
    value: float
    limit: float
    reason: str
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One output of one case. `problem` replaces the figures when nothing could be measured."""

    case: str
    why: str
    output: str
    shape: tuple[int, ...]
    distance: Distance | None
    bounds: tuple[Bound, ...]
    problem: str = ""
    divergence: Divergence | None = None

    @property
    def passed(self) -> bool:
        """Whether every limit holds and nothing is wrong."""
        return not self.problem and bool(self.bounds) and all(bound.holds for bound in self.bounds)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rows of one candidate. `reference` and `candidate` describe what was compared.

    not_covered: cases outside an engine's profiles, which were not run. determinism: repeatability of the candidate,
    where it was measured; not part of the verdict.
    """

    candidate: str
    reference: str
    rows: tuple[Row, ...]
    not_covered: tuple[str, ...] = ()
    determinism: Determinism | None = None

    @property
    def passed(self) -> bool:
        """Whether every row passed; an empty report fails, because it proves nothing."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that did not pass."""
        return tuple(row for row in self.rows if not row.passed)

    def to_json(self) -> dict[str, object]:
        """Every figure, ready for json.dumps; NaN and Inf, which JSON does not have, become null."""
        rows = [{**without_nan(asdict(row)), "passed": row.passed} for row in self.rows]
        return {
            "passed": self.passed,
            "candidate": self.candidate,
            "reference": self.reference,
            "rows": rows,
            "not_covered": list(self.not_covered),
            **({"determinism": without_nan(asdict(self.determinism))} if self.determinism else {}),
        }


def judge(
    candidate: Candidate,
    expectations: Sequence[Expectation],
    refusals: Sequence[Case],
    limits: Limits,
    *,
    candidate_name: str,
    reference_name: str,
    progress: Progress = silent,
) -> Report:
    """Runs every case and compares every output with the reference output."""
    rows: list[Row] = []
    not_covered: list[str] = []
    total = len(expectations) + len(refusals)
    for done, expectation in enumerate(expectations, start=1):
        try:
            rows += _judge_case(candidate, expectation, limits)
        except OutsideProfile:
            not_covered.append(expectation.case.name)
        progress(f"judging {candidate_name}", done, total)
    for done, case in enumerate(refusals, start=len(expectations) + 1):
        rows.append(_judge_refusal(candidate, case))
        progress(f"judging {candidate_name}", done, total)
    return Report(candidate=candidate_name, reference=reference_name, rows=tuple(rows), not_covered=tuple(not_covered))


def _judge_case(candidate: Candidate, expectation: Expectation, limits: Limits) -> list[Row]:
    answers: dict[str, Array] = {}
    failure = "the candidate does not have this output"
    try:
        answers = candidate(expectation.case.inputs)
    except OutsideProfile:
        raise
    except DinoexportError as error:
        failure = error.message
    rows = []
    # Without a row, a case without reference outputs would be missing from the verdict.
    names = sorted(expectation.outputs.keys() | answers.keys()) if expectation.outputs else [""]
    for name in names:
        expected, answer = expectation.outputs.get(name), answers.get(name)
        figures = _Figures()
        problem = ""
        if not name:
            problem = "the reference has no outputs for this case"
        elif expected is None:
            problem = "an output that the reference does not have"
        elif answer is None:
            problem = failure
        elif answer.dtype != expected.dtype:
            problem = f"dtype {answer.dtype} where the reference has {expected.dtype}"
        else:
            try:
                figures = _measured(name, answers, expectation, limits)
            except ValueError as error:
                problem = str(error)
        rows.append(
            Row(
                case=expectation.case.name,
                why=expectation.case.why,
                output=name,
                shape=() if expected is None else expected.shape,
                distance=figures.distance,
                bounds=figures.bounds,
                problem=problem,
                divergence=figures.divergence,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class _Figures:
    distance: Distance | None = None
    divergence: Divergence | None = None
    bounds: tuple[Bound, ...] = ()


def _measured(name: str, answers: Arrays, expectation: Expectation, limits: Limits) -> _Figures:
    """Output `name` held against the limits as what it is: vectors, distributions or choices. Raises ValueError."""
    case, own = expectation.case, expectation.own_error
    answer, expected = answers[name], expectation.outputs[name]
    if name in case.choices:
        return _Figures(bounds=_first_difference(answer, expected, expectation.outputs[case.choices[name]], limits))
    if name in case.distributions:
        ours, theirs = comparable(case, name, answers, expectation.outputs)
        apart, diverges = distance(centred(ours), centred(theirs)), divergence(ours, theirs)
        bounds = _bounds(apart, limits, own.get(name)) + _divergence(diverges, limits, own.get(own_kl(name)))
        return _Figures(distance=apart, divergence=diverges, bounds=bounds)
    apart = distance(answer, expected)
    bounds = _bounds(apart, limits, own.get(name))
    if case.neighbours and limits.neighbour_agreement_min:
        bounds += _agreement(answer, expected, limits.neighbour_agreement_min)
    return _Figures(distance=apart, bounds=bounds)


def comparable(case: Case, output: str, answers: Arrays, expected: Arrays) -> tuple[Array, Array]:
    """The distributions `output` of both sides as far as they follow the same choices, (N, V) each.

    Those after the first choice that differs are answers to different questions. Raises ValueError where shapes differ.
    """
    import numpy as np

    ours, theirs = answers[output], expected[output]
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {ours.shape} where the reference has {theirs.shape}")
    chosen_by = next((choice for choice, logits in case.choices.items() if logits == output), None)
    if chosen_by is None or chosen_by not in answers or answers[chosen_by].shape != expected[chosen_by].shape:
        return ours, theirs
    differs_BN = answers[chosen_by] != expected[chosen_by]
    before_BN = np.cumsum(differs_BN, axis=1) - differs_BN
    return ours[before_BN == 0], theirs[before_BN == 0]


def own_kl(output: str) -> str:
    """What `Expectation.own_error` calls the mean divergence of PyTorch's own precision, beside its relative error."""
    return f"{output}/kl"


def _at_most(figure: str, value: float, limit: float, reason: str) -> Bound:
    return Bound(figure=figure, value=value, limit=limit, reason=reason, holds=value <= limit)


def _at_least(figure: str, value: float, limit: float, reason: str) -> Bound:
    return Bound(figure=figure, value=value, limit=limit, reason=reason, holds=value >= limit)


def _bounds(measured: Distance, limits: Limits, own_error: float | None) -> tuple[Bound, ...]:
    bounds = [
        _at_most("relative_l2", measured.relative_l2, limits.relative_l2_max.value, limits.relative_l2_max.reason),
        _at_most("worst_l2", measured.worst_l2, limits.worst_l2_max.value, limits.worst_l2_max.reason),
    ]
    cosines = {
        "cosine_mean": (measured.cosine_mean, limits.cosine_mean_min),
        "cosine_p01": (measured.cosine_p01, limits.cosine_p01_min),
        "cosine_worst": (measured.cosine_worst, limits.cosine_worst_min),
    }
    bounds += [_at_least(figure, value, at.value, at.reason) for figure, (value, at) in cosines.items() if at]
    times = limits.times_own_error_max
    if times is not None and own_error is not None:
        bounds.append(_at_most("relative_l2", measured.relative_l2, times.value * own_error, times.reason))
    return tuple(bounds)


def _divergence(measured: Divergence, limits: Limits, own_kl_mean: float | None) -> tuple[Bound, ...]:
    largest = {
        "kl_mean": (measured.kl_mean, limits.kl_mean_max),
        "kl_worst": (measured.kl_worst, limits.kl_worst_max),
        "top1_gap": (measured.top1_gap, limits.top1_gap_max),
    }
    bounds = [_at_most(figure, value, at.value, at.reason) for figure, (value, at) in largest.items() if at]
    if (least := limits.top1_kept_min) is not None:
        bounds.append(_at_least("top1_kept", measured.top1_kept, least.value, least.reason))
    times = limits.times_own_error_max
    if times is not None and own_kl_mean is not None:
        # Twice the error is four times the divergence, which grows with its square.
        bounds.append(_at_most("kl_mean", measured.kl_mean, times.value**2 * own_kl_mean, times.reason))
    return tuple(bounds)


def _first_difference(answer: Array, expected: Array, logits_BNV: Array, limits: Limits) -> tuple[Bound, ...]:
    """How sure the reference was where the candidate first chose otherwise; 0 where both chose the same all along."""
    import numpy as np

    if answer.shape != expected.shape:
        raise ValueError(f"shape {answer.shape} where the reference has {expected.shape}")
    gap = 0.0
    for ours, theirs, logits_NV in zip(answer, expected, logits_BNV, strict=True):
        if (ours != theirs).any():
            first = int(np.argmax(ours != theirs))
            gap = max(gap, float(logits_NV[first].max() - logits_NV[first][ours[first]]))
    limit = limits.top1_gap_max
    if limit is None:
        raise ValueError("the limits have no top1_gap_max to hold a first difference against")
    return (_at_most("top1_gap", gap, limit.value, limit.reason),)


def _agreement(answer: Array, expected: Array, limit: Limit) -> tuple[Bound, ...]:
    value = neighbour_agreement(answer, expected)
    if value is None:
        return ()
    return (
        Bound(
            figure="neighbour_agreement",
            value=value,
            limit=limit.value,
            reason=limit.reason,
            holds=value >= limit.value,
        ),
    )


def _judge_refusal(candidate: Candidate, case: Case) -> Row:
    """The candidate must refuse these inputs; 1 means refused. Another error is not a refusal."""
    refused, problem = 0.0, ""
    try:
        candidate(case.inputs)
    except InputRefused:
        refused = 1.0
    except DinoexportError as error:
        problem = error.message
    bound = Bound(figure="refused", value=refused, limit=1.0, reason=case.why, holds=refused == 1.0)
    return Row(
        case=case.name, why=case.why, output="(refusal)", shape=(), distance=None, bounds=(bound,), problem=problem
    )


def without_nan(value: Any) -> Any:
    """`value` with null for every NaN and Inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value

"""Compare a candidate's outputs with the reference outputs, and each figure with its limit.

Imports nothing that builds.

A candidate passes if every output of every case is within every limit, every input that must be refused is refused, and
there is at least one figure. NaN is never within a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any

from dinoexport.config.limits import Limit, Limits
from dinoexport.errors import DinoexportError, InputRefused, OutsideProfile
from dinoexport.spec import Array, Arrays, Candidate, Case, Expectation, OutputKind, Progress, silent
from dinoexport.validation import answers as comparison
from dinoexport.validation.answers import Bound, at_least, at_most, of_vectors
from dinoexport.validation.determinism import Determinism
from dinoexport.validation.metrics import Distance, Divergence, centred, distance, divergence, neighbour_agreement

# Output name -> the kind of its numbers, and for labels the output that holds their scores.
Kinds = Mapping[str, tuple[OutputKind, str]]
__all__ = ["Bound", "Kinds", "Report", "Row", "judge", "without_nan"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One output of one case. `problem` replaces the bounds when nothing could be measured.

    figures: other known measures of the difference, without a limit.
    """

    case: str
    why: str
    output: str
    shape: tuple[int, ...]
    distance: Distance | None
    bounds: tuple[Bound, ...]
    problem: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
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
    kinds: Kinds = MappingProxyType({}),
    progress: Progress = silent,
) -> Report:
    """Runs every case and compares every output with the reference output.

    kinds: the kind of an output's numbers; outputs without an entry are vectors.
    """
    rows: list[Row] = []
    not_covered: list[str] = []
    total = len(expectations) + len(refusals)
    for done, expectation in enumerate(expectations, start=1):
        try:
            rows += _judge_case(candidate, expectation, limits, kinds)
        except OutsideProfile:
            not_covered.append(expectation.case.name)
        progress(f"judging {candidate_name}", done, total)
    for done, case in enumerate(refusals, start=len(expectations) + 1):
        rows.append(_judge_refusal(candidate, case))
        progress(f"judging {candidate_name}", done, total)
    return Report(candidate=candidate_name, reference=reference_name, rows=tuple(rows), not_covered=tuple(not_covered))


def _judge_case(candidate: Candidate, expectation: Expectation, limits: Limits, kinds: Kinds) -> list[Row]:
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
                figures = _measured(name, answers, expectation, limits, kinds)
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
                figures=figures.known,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class _Figures:
    distance: Distance | None = None
    divergence: Divergence | None = None
    bounds: tuple[Bound, ...] = ()
    known: Mapping[str, float] = field(default_factory=dict)


def _measured(name: str, answers: Arrays, expectation: Expectation, limits: Limits, kinds: Kinds) -> _Figures:
    """Output `name` compared with the limits according to its kind. Raises ValueError."""
    case, own = expectation.case, expectation.own_error
    answer, expected = answers[name], expectation.outputs[name]
    if name in case.choices:
        return _Figures(bounds=_first_difference(answer, expected, expectation.outputs[case.choices[name]], limits))
    if name in case.distributions:
        ours, theirs = comparison.comparable(case, name, answers, expectation.outputs)
        apart, diverges = distance(centred(ours), centred(theirs)), divergence(ours, theirs)
        bounds = of_vectors(apart, limits, own.get(name)) + _divergence(diverges, limits, own.get(own_kl(name)))
        return _Figures(distance=apart, divergence=diverges, bounds=bounds)
    kind, decided_by = kinds.get(name, ("vectors", ""))
    if kind == "labels":
        ours_by, theirs_by = answers.get(decided_by), expectation.outputs.get(decided_by)
        if ours_by is None or theirs_by is None or name not in expectation.leads:
            raise ValueError(f"labels cannot be compared without the scores {decided_by!r}")
        error = distance(ours_by, theirs_by).max_abs
        compared = comparison.compare_labels(answer, expected, expectation.leads[name], error, limits)
    else:
        compared = comparison.compare(kind, answer, expected, limits, own.get(name))
    bounds = compared.bounds
    if kind == "vectors" and case.neighbours and limits.neighbour_agreement_min:
        bounds += _agreement(answer, expected, limits.neighbour_agreement_min)
    return _Figures(distance=compared.distance, bounds=bounds, known=compared.figures)


def own_kl(output: str) -> str:
    """The key in `Expectation.own_error` of the mean divergence of PyTorch's own precision."""
    return f"{output}/kl"


def _divergence(measured: Divergence, limits: Limits, own_kl_mean: float | None) -> tuple[Bound, ...]:
    largest = {
        "kl_mean": (measured.kl_mean, limits.kl_mean_max),
        "kl_worst": (measured.kl_worst, limits.kl_worst_max),
        "top1_gap": (measured.top1_gap, limits.top1_gap_max),
    }
    bounds = [at_most(figure, value, at) for figure, (value, at) in largest.items() if at]
    if (least := limits.top1_kept_min) is not None:
        bounds.append(at_least("top1_kept", measured.top1_kept, least))
    times = limits.times_own_error_max
    if times is not None and own_kl_mean is not None:
        # Divergence grows with the square of the error, so twice the error is four times the divergence.
        bounds.append(
            at_most("kl_mean", measured.kl_mean, Limit(value=times.value**2 * own_kl_mean, reason=times.reason))
        )
    return tuple(bounds)


def _first_difference(answer: Array, expected: Array, logits_BNV: Array, limits: Limits) -> tuple[Bound, ...]:
    """The reference's lead at the first choice where the candidate differs; 0 if all choices are the same."""
    if answer.shape != expected.shape:
        raise ValueError(f"shape {answer.shape} where the reference has {expected.shape}")
    gap = comparison.changed_choice_gap(answer, expected, logits_BNV) or 0.0
    limit = limits.top1_gap_max
    if limit is None:
        raise ValueError("the limits have no top1_gap_max to compare a first difference with")
    return (at_most("top1_gap", gap, limit),)


def _agreement(answer: Array, expected: Array, limit: Limit) -> tuple[Bound, ...]:
    value = neighbour_agreement(answer, expected)
    return () if value is None else (at_least("neighbour_agreement", value, limit),)


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

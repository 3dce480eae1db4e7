"""The verdict: everything that is wrong with a candidate fails, however little of it there is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.config.limits import Limit, Limits, load_validation
from dinoexport.errors import BuildError, InputRefused
from dinoexport.spec import Array, Arrays, Case, Expectation, Precision
from dinoexport.validation.judge import Report, judge

SHIPPED = load_validation("dinov2", beside=None)[0].limits
REASON = "a number for a test, chosen by hand"
FIGURES = {"relative_l2", "worst_l2", "cosine_mean", "cosine_p01", "cosine_worst"}


def limits(
    *,
    relative_l2: float = 1e9,
    worst_l2: float = 1e9,
    mean: float = -1.0,
    p01: float = -1.0,
    worst: float = -1.0,
    times_own: float | None = None,
) -> Limits:
    """Limits that hold for almost anything, but for what is given."""

    def limit(value: float) -> Limit:
        return Limit(value=value, reason=REASON)

    return Limits(
        relative_l2_max=limit(relative_l2),
        worst_l2_max=limit(worst_l2),
        cosine_mean_min=limit(mean),
        cosine_p01_min=limit(p01),
        cosine_worst_min=limit(worst),
        times_own_error_max=None if times_own is None else limit(times_own),
    )


def expectation(name: str = "one", **outputs: Array) -> Expectation:
    case = Case(name=name, why="a question of the tests", inputs={"x": np.zeros(3, np.float32)})
    return Expectation(case=case, outputs=outputs)


def tokens(batch: int = 2, count: int = 3000, width: int = 16) -> Array:
    return np.random.RandomState(3).standard_normal((batch, count, width)).astype(np.float32)


def verdict(answer: Arrays, expected: Expectation, held_to: Limits | None = None) -> Report:
    return judge(
        lambda inputs: dict(answer), [expected], [], held_to or limits(), candidate_name="ours", reference_name="theirs"
    )


def missed(report: Report) -> set[str]:
    """The figures of the limits that do not hold."""
    return {bound.figure for row in report.rows for bound in row.bounds if not bound.holds}


@pytest.mark.parametrize("precision", list(SHIPPED))
def test_equal_answers_pass(precision: Precision) -> None:
    right = tokens()
    report = verdict({"t": right.copy()}, expectation(t=right), SHIPPED[precision])
    assert report.passed
    assert not report.failures
    (row,) = report.rows
    assert (row.case, row.output, row.shape, row.problem) == ("one", "t", (2, 3000, 16), "")
    assert {bound.figure for bound in row.bounds} == FIGURES


def one_token_wrong(right: Array) -> Array:
    wrong = right.copy()
    wrong[1, 1234] = -wrong[1, 1234]
    return wrong


def one_token_of_another_place(right: Array) -> Array:
    wrong = right.copy()
    wrong[0, 2999] = wrong[0, 0]
    return wrong


def one_token_missing(right: Array) -> Array:
    wrong = right.copy()
    wrong[1, 7] = 0
    return wrong


def two_tokens_swapped(right: Array) -> Array:
    wrong = right.copy()
    wrong[0, [100, 101]] = wrong[0, [101, 100]]
    return wrong


def batch_permuted(right: Array) -> Array:
    return right[::-1].copy()


def rows_for_columns(right: Array) -> Array:
    batch, count, width = right.shape
    return right.reshape(batch, 50, count // 50, width).swapaxes(1, 2).reshape(right.shape)


def shifted_by_one(right: Array) -> Array:
    return np.roll(right, 1, axis=1)


@pytest.mark.parametrize("precision", list(SHIPPED))
@pytest.mark.parametrize(
    "spoil",
    [
        one_token_wrong,
        one_token_of_another_place,
        one_token_missing,
        two_tokens_swapped,
        batch_permuted,
        rows_for_columns,
        shifted_by_one,
    ],
)
def test_the_shipped_limits_notice(spoil: Callable[[Array], Array], precision: Precision) -> None:
    right = tokens()
    report = verdict({"t": spoil(right)}, expectation(t=right), SHIPPED[precision])
    assert not report.passed
    assert missed(report)


@pytest.mark.parametrize("precision", list(SHIPPED))
def test_a_little_past_the_shipped_limit_is_noticed(precision: Precision) -> None:
    """Every token too long, and every token moved aside, by half as much again as the limit allows."""
    right, past = tokens(), np.float32(1.5 * SHIPPED[precision].relative_l2_max.value)
    for wrong in (right * (1 + past), right + past):
        assert "relative_l2" in missed(verdict({"t": wrong}, expectation(t=right), SHIPPED[precision]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_fails(bad: float) -> None:
    right = tokens()
    wrong = right.copy()
    wrong[0, 5, 5] = bad
    for ours, theirs in ((wrong, right), (right, wrong), (wrong, wrong)):
        report = verdict({"t": ours}, expectation(t=theirs), limits())
        assert not report.passed
        assert missed(report) == FIGURES


def test_neighbours_count_where_they_mean_something() -> None:
    """Noise within every other limit moves neighbours; only a case of real data with a limit for it is held to that."""
    rng = np.random.RandomState(1)
    right = rng.standard_normal((2, 100, 4)).astype(np.float32)
    wrong = (right + 0.3 * rng.standard_normal(right.shape)).astype(np.float32)
    real = Case(name="photographs", why="real data", inputs={"x": np.zeros(3, np.float32)}, neighbours=True)
    asked = Expectation(case=real, outputs={"t": right})
    strict = limits().model_copy(update={"neighbour_agreement_min": Limit(value=0.9, reason=REASON)})
    assert verdict({"t": wrong}, asked, limits()).passed
    assert verdict({"t": wrong}, expectation(t=right), strict).passed
    assert missed(verdict({"t": wrong}, asked, strict)) == {"neighbour_agreement"}
    assert verdict({"t": right}, asked, strict).passed


def test_an_empty_report_proves_nothing() -> None:
    report = judge(lambda inputs: {}, [], [], limits(), candidate_name="ours", reference_name="theirs")
    assert report.rows == ()
    assert not report.passed


@pytest.mark.parametrize("answer", [{}, {"t": tokens()}])
def test_a_case_without_an_answer_does_not_vanish(answer: Arrays) -> None:
    """Beside a case that passes, one that the reference holds nothing for must still fail."""
    right = tokens()
    answers = iter([{"t": right}, answer])
    report = judge(
        lambda inputs: dict(next(answers)),
        [expectation("good", t=right), expectation("empty")],
        [],
        limits(),
        candidate_name="ours",
        reference_name="theirs",
    )
    assert not report.passed
    assert [row.case for row in report.failures] == ["empty"]


def test_missing_and_extra_outputs_fail() -> None:
    right = tokens()
    report = verdict({"t": right}, expectation(t=right, u=right))
    assert not report.passed
    assert [(row.output, row.problem) for row in report.failures] == [("u", "the candidate does not have this output")]
    report = verdict({"t": right, "v": right}, expectation(t=right))
    assert not report.passed
    assert [(row.output, row.problem) for row in report.failures] == [
        ("v", "an output that the reference does not have")
    ]
    assert not verdict({}, expectation(t=right)).passed


@pytest.mark.parametrize(
    "answer",
    [
        tokens()[:1],
        tokens()[:, :-1],
        tokens().reshape(2, 16, 3000),
        tokens().reshape(1, *tokens().shape),
        tokens().astype(np.float16),
        tokens().astype(np.float64),
        tokens().astype(object),
        np.zeros((2, 0, 16), np.float32),
        np.float32(1),
    ],
    ids=lambda answer: f"{answer.dtype}{list(answer.shape)}",
)
def test_the_wrong_shape_or_type_fails(answer: Any) -> None:
    report = verdict({"t": answer}, expectation(t=tokens()))
    assert not report.passed
    (row,) = report.rows
    assert "where the reference has" in row.problem
    assert row.distance is None


def test_an_empty_reference_proves_nothing() -> None:
    nothing = np.zeros((1, 0, 16), np.float32)
    report = verdict({"t": nothing}, expectation(t=nothing))
    assert not report.passed
    assert "nothing to compare" in report.rows[0].problem


@pytest.mark.parametrize("error", [BuildError("it broke"), InputRefused("it broke")])
def test_a_candidate_that_raises_fails_every_output(error: Exception) -> None:
    right = tokens()

    def candidate(inputs: Arrays) -> dict[str, Array]:
        raise error

    report = judge(
        candidate, [expectation(t=right, u=right)], [], limits(), candidate_name="ours", reference_name="theirs"
    )
    assert not report.passed
    assert [(row.output, row.problem) for row in report.failures] == [("t", "it broke"), ("u", "it broke")]


def test_one_failing_case_among_many_fails_all() -> None:
    right = tokens()
    expectations = [expectation(f"case_{i}", t=right) for i in range(5)]
    answers = iter([right, right, one_token_wrong(right), right, right])
    report = judge(
        lambda inputs: {"t": next(answers)},
        expectations,
        [],
        SHIPPED[Precision.FP16],
        candidate_name="ours",
        reference_name="theirs",
    )
    assert not report.passed
    assert [row.case for row in report.failures] == ["case_2"]


def refusal(outcome: Exception | None) -> Report:
    def candidate(inputs: Arrays) -> dict[str, Array]:
        if outcome is not None:
            raise outcome
        return {"t": tokens()}

    case = Case(name="odd", why="a size nobody promised", inputs={"x": np.zeros(1, np.float32)}, expect_refusal=True)
    return judge(candidate, [], [case], limits(), candidate_name="ours", reference_name="theirs")


def test_what_must_be_refused_fails_when_it_is_accepted() -> None:
    assert refusal(InputRefused("no")).passed
    assert not refusal(None).passed


def test_breaking_is_no_refusal() -> None:
    report = refusal(BuildError("the runtime crashed"))
    assert not report.passed
    assert report.rows[0].problem == "the runtime crashed"


def turned(cosines: list[float], lengths: float = 1.0) -> tuple[Array, Array]:
    """Unit vectors turned to these cosines, and what they were turned from."""
    candidate = np.array([[c, math.sqrt(1 - c * c)] for c in cosines])
    return (candidate * lengths).astype(np.float32), np.array([[1.0, 0.0]] * len(cosines), np.float32)


@pytest.mark.parametrize(
    ("figure", "cosines", "length", "held_to"),
    [
        # All vectors too long: no direction changes.
        ("relative_l2", [1.0] * 1000, 1.5, limits(relative_l2=0.4, mean=0.999, p01=0.999, worst=0.999)),
        # All vectors too long again, held to the worst one alone.
        ("worst_l2", [1.0] * 1000, 1.5, limits(relative_l2=0.6, worst_l2=0.4, mean=0.999, p01=0.999, worst=0.999)),
        # All vectors turned a little: none is bad by itself.
        ("cosine_mean", [0.95] * 1000, 1.0, limits(relative_l2=0.5, mean=0.96, p01=0.9, worst=0.9)),
        # Three in a hundred turned: too few for the mean, none beyond the worst that is allowed.
        ("cosine_p01", [0.5] * 30 + [1.0] * 970, 1.0, limits(relative_l2=0.5, mean=0.9, p01=0.6, worst=0.4)),
        # One in a thousand turned by a right angle.
        ("cosine_worst", [0.0] + [1.0] * 999, 1.0, limits(relative_l2=0.5, mean=0.99, p01=0.9, worst=0.1)),
    ],
)
def test_each_limit_can_fail_alone(figure: str, cosines: list[float], length: float, held_to: Limits) -> None:
    candidate, reference = turned(cosines, length)
    report = verdict({"t": candidate}, expectation(t=reference), held_to)
    assert not report.passed
    assert missed(report) == {figure}
    assert verdict({"t": candidate}, expectation(t=reference), limits()).passed


def test_pytorchs_own_error_is_a_limit_of_its_own() -> None:
    right = tokens()
    answer = {"t": right * np.float32(1.003), "u": right}
    held_to = limits(relative_l2=0.01, times_own=2.0)

    def report(own: dict[str, float]) -> Report:
        asked = expectation(t=right, u=right)
        return verdict(answer, Expectation(case=asked.case, outputs=asked.outputs, own_error=own), held_to)

    assert report({"t": 0.002, "u": 0.002}).passed
    failed = report({"t": 0.001, "u": 0.002})
    assert [row.output for row in failed.failures] == ["t"]
    (bound,) = (bound for bound in failed.failures[0].bounds if not bound.holds)
    assert (bound.figure, bound.limit, bound.reason) == ("relative_l2", 0.002, REASON)
    assert bound.value == pytest.approx(0.003, rel=1e-4)
    assert report({}).passed  # where PyTorch overflows it says nothing
    assert not report({"t": math.nan}).passed


def test_a_limit_is_met_by_equality() -> None:
    candidate, reference = turned([1.0], 1.5)
    assert verdict({"t": candidate}, expectation(t=reference), limits(relative_l2=0.5)).passed
    assert not verdict({"t": candidate}, expectation(t=reference), limits(relative_l2=0.4999)).passed


def test_progress_counts_every_case() -> None:
    right = tokens(count=2)
    told: list[tuple[int, int]] = []

    def candidate(inputs: Arrays) -> dict[str, Array]:
        if inputs["x"].size == 1:
            raise InputRefused("no")
        return {"t": right}

    case = Case(name="odd", why="a size nobody promised", inputs={"x": np.zeros(1, np.float32)}, expect_refusal=True)
    report = judge(
        candidate,
        [expectation("a", t=right), expectation("b", t=right)],
        [case],
        limits(),
        candidate_name="ours",
        reference_name="theirs",
        progress=lambda doing, done, total: told.append((done, total)),
    )
    assert report.passed
    assert told == [(1, 3), (2, 3), (3, 3)]


numbers = st.floats(width=32) | st.sampled_from([0.0, math.nan, math.inf, -math.inf])


@given(st.lists(numbers, min_size=4, max_size=4), st.lists(numbers, min_size=4, max_size=4), st.floats() | st.none())
def test_a_report_is_json_whatever_was_measured(candidate: Any, reference: Any, own: float | None) -> None:
    ours, theirs = (np.array(values, np.float32).reshape(2, 2) for values in (candidate, reference))
    asked = expectation(t=theirs)
    asked = Expectation(case=asked.case, outputs=asked.outputs, own_error={} if own is None else {"t": own})
    report = verdict({"t": ours}, asked, limits(times_own=2.0))
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["passed"] == report.passed
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        assert not report.passed


def test_the_report_in_json_has_every_figure() -> None:
    right = tokens(count=2)
    content: Any = verdict({"t": right}, expectation(t=right, u=right)).to_json()
    assert (content["candidate"], content["reference"], content["passed"]) == ("ours", "theirs", False)
    good, bad = content["rows"]
    assert good["passed"]
    assert good["distance"]["relative_l2"] == 0.0
    assert {bound["reason"] for bound in good["bounds"]} == {REASON}
    assert (bad["passed"], bad["distance"], bad["problem"]) == (False, None, "the candidate does not have this output")


def test_one_token_that_is_only_too_long_fails() -> None:
    """Its cosine is 1 and the whole is off by 5e-3 only: fp16's limit on the worst vector is what sees it."""
    right = tokens()
    wrong = right.copy()
    wrong[1, 7] *= np.float32(1.2)
    report = verdict({"t": wrong}, expectation(t=right), SHIPPED[Precision.FP16])
    assert missed(report) == {"worst_l2"}

"""The same question asked otherwise: every difference that is there is found, and none that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import BuildError, OutsideProfile
from dinoexport.spec import Array, Arrays, Case
from dinoexport.validation import judge
from dinoexport.validation.determinism import Determinism, chosen, measure

Answer = Callable[[Arrays], dict[str, Array]]


def case(name: str, *shape: int, refused: bool = False, **more: Array) -> Case:
    noise = np.random.RandomState(len(name)).standard_normal(shape).astype(np.float32)
    return Case(name=name, why="a test", inputs={"x": noise, **more}, expect_refusal=refused)


CASES = (case("single", 1, 9), case("pair", 2, 8), case("crowd", 16, 2), case("refused", 64, 64, refused=True))


def doubled(inputs: Arrays) -> dict[str, Array]:
    return {"out": 2 * inputs["x"], "sum": inputs["x"].sum(axis=1)}


def found(candidate: Answer, one_thread: Answer | None = None, cases: tuple[Case, ...] = CASES) -> Determinism:
    measured = measure(candidate, cases, None if one_thread is None else lambda: one_thread)
    assert measured is not None
    return measured


def test_a_steady_candidate_is_equal_to_the_last_bit() -> None:
    assert found(doubled, doubled) == Determinism(cases=("crowd", "pair"), again=0, alone=0, one_thread=0)
    assert set(found(doubled).lines.values()) == {"bit-identical"} and found(doubled).one_thread is None


def test_one_that_forgets_is_found() -> None:
    calls = []

    def drifting(inputs: Arrays) -> dict[str, Array]:
        calls.append(inputs)
        return {"out": inputs["x"] * (1 + 1e-3 * len(calls))}

    assert found(drifting).again == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("last_only", [False, True])
def test_an_item_that_depends_on_its_neighbours_is_found(last_only: bool) -> None:
    def leaking(inputs: Arrays) -> dict[str, Array]:
        x = inputs["x"].copy()
        x[-1 if last_only else slice(None)] += 1e-2 * (len(x) - 1) * x[-1 if last_only else slice(None)]
        return {"out": x, "steady": inputs["x"]}

    measured = found(leaking)
    assert measured.again == 0 and measured.alone == pytest.approx(0.15 / 1.15, rel=0.01)
    assert "1.3e-01 apart" in measured.lines["alone and in a batch"]


def test_what_follows_another_choice_is_not_compared() -> None:
    logits = np.array([[[0, 3, 2.9], [0, 0, 5]], [[9, 0, 0], [9, 0, 0]]], np.float32)
    asked = Case(
        name="greedy",
        why="a test",
        inputs={"x": np.arange(2)},
        distributions=("rollout_logits",),
        choices={"rollout": "rollout_logits"},
    )

    def rounding(inputs: Arrays) -> dict[str, Array]:
        found = logits[inputs["x"]]
        if len(inputs["x"]) == 1:  # alone, the near tie of the first sequence is decided the other way
            found = np.where(inputs["x"][:, None, None] == 0, [[[0, 3, 3.01], [7, 0, -5]]], found).astype(np.float32)
        return {"rollout": found.argmax(axis=2), "rollout_logits": found, "label": inputs["x"]}

    measured = found(rounding, cases=(asked,))
    assert measured.again == 0 and 0.01 < (measured.alone or 0) < 0.05, "the second choice is after another first"
    assert measured.changed_choice_gap == pytest.approx(0.1, rel=1e-3)
    assert measured.lines["choices that differed"] == "logits at most 0.1 apart"
    renamed = lambda inputs: rounding(inputs) | {"label": inputs["x"] + (len(inputs["x"]) == 1)}  # noqa: E731
    assert found(renamed, cases=(asked,)).alone == 1, "of integers, the share that differs"


def test_threads_that_matter_are_found() -> None:
    measured = found(doubled, lambda inputs: {n: a * np.float32(1.5) for n, a in doubled(inputs).items()})
    assert measured.one_thread == pytest.approx(0.5) and measured.alone == 0


def test_what_is_not_finite_is_no_equality() -> None:
    broken = lambda inputs: {"out": np.full_like(inputs["x"], np.nan)}  # noqa: E731
    measured = found(broken)
    assert np.isnan(measured.again) and "not finite" in measured.lines["same inputs again"]
    one_of_two = lambda inputs: {"fine": inputs["x"], "broken": np.full_like(inputs["x"], np.nan)}  # noqa: E731
    assert np.isnan(found(one_of_two).again), "what is fine does not hide what is not"
    told = judge.Report(candidate="c", reference="r", rows=(), determinism=measured).to_json()["determinism"]
    assert json.loads(json.dumps(told, allow_nan=False))["again"] is None
    shrinking = lambda inputs: {"out": inputs["x"][:, : len(inputs["x"])]}  # noqa: E731
    assert np.isnan(found(shrinking).alone or 0)


def test_which_cases_are_asked() -> None:
    assert [c.name for c in chosen(CASES)] == ["crowd", "pair"]
    assert [c.name for c in chosen((*CASES, case("four", 4, 8)))] == ["crowd", "pair"], "fewer items are cheaper"
    assert [c.name for c in chosen((case("only", 3, 3), case("single", 1, 9)))] == ["only"]
    mixed = case("mixed", 4, 2, scale=np.ones(3, np.float32))
    assert [c.name for c in chosen((mixed, case("single", 1, 2)))] == ["single"], "no common first dimension, no batch"
    assert found(doubled, cases=(case("single", 1, 2),)).alone is None


@pytest.mark.parametrize("error", [OutsideProfile("too large"), BuildError("broke")])
def test_what_cannot_be_asked_is_left_out(error: Exception) -> None:
    def choosy(inputs: Arrays) -> dict[str, Array]:
        if len(inputs["x"]) not in (1, 2):
            raise error
        return doubled(inputs)

    assert found(choosy).cases == ("pair",)

    def never(inputs: Arrays) -> dict[str, Any]:
        raise error

    assert measure(never, CASES, None) is None and measure(doubled, (), None) is None


def test_outputs_without_the_batch_are_not_compared_item_by_item() -> None:
    """A table with a first dimension of its own has no part for an item."""

    def with_more(inputs: Arrays) -> dict[str, Array]:
        return {"out": inputs["x"], "table": inputs["x"].sum(axis=0)}

    assert found(with_more).alone == 0 and found(with_more).cases == ("crowd", "pair")

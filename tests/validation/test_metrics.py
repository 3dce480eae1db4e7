"""Distances against values worked out by hand, and against the same formulas in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dinoexport.validation.metrics import Distance, distance, neighbour_agreement, vector_cosines, vector_errors
from tests.properties import examples


def test_figures_worked_out_by_hand() -> None:
    reference = np.array([[[3, 4], [0, 5]]], np.float32)
    candidate = np.array([[[3, 4], [5, 0]]], np.float32)
    # The first vector is equal, the second turned by a right angle: the difference is (0, 0), (5, -5).
    assert distance(candidate, reference) == Distance(
        relative_l2=1.0,  # sqrt(50) / sqrt(50)
        worst_l2=pytest.approx(2**0.5),  # sqrt(50) / 5
        cosine_mean=0.5,
        cosine_p01=pytest.approx(0.01),  # a hundredth of the way from 0 to 1
        cosine_worst=0.0,
        max_abs=5.0,
        finite=True,
    )


def test_equal_arrays_have_no_distance() -> None:
    array = np.random.RandomState(0).standard_normal((2, 7, 5)).astype(np.float32)
    found = distance(array.copy(), array)
    assert (found.relative_l2, found.max_abs, found.finite) == (0.0, 0.0, True)
    assert found.cosine_worst == pytest.approx(1, abs=1e-15)


def test_the_opposite_direction() -> None:
    found = distance(np.array([[-1.0, -2.0]]), np.array([[1.0, 2.0]]))
    assert (found.relative_l2, found.cosine_mean, found.cosine_worst) == (2.0, pytest.approx(-1), pytest.approx(-1))


def test_a_zero_vector_has_no_direction() -> None:
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert distance(zero, zero).cosine_worst == 1.0
    assert distance(zero, zero).relative_l2 == 0.0
    assert distance(one, zero).cosine_worst == 0.0
    assert distance(one, zero).relative_l2 == math.inf
    assert distance(zero, one).cosine_worst == 0.0
    assert distance(zero, one).relative_l2 == 1.0


def test_half_precision_is_measured_in_double() -> None:
    """In fp16 the squares of these values are infinite."""
    reference = np.full((1, 4), 60000, np.float16)
    found = distance(reference, reference)
    assert (found.relative_l2, found.cosine_worst) == (0.0, pytest.approx(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["candidate", "reference", "both"])
def test_what_is_not_finite_has_no_figures(bad: float, side: str) -> None:
    clean = np.random.RandomState(0).standard_normal((2, 50, 4)).astype(np.float32)
    broken = clean.copy()
    broken[1, 17, 3] = bad
    found = distance(clean if side == "reference" else broken, clean if side == "candidate" else broken)
    assert not found.finite
    figures = (
        found.relative_l2,
        found.worst_l2,
        found.cosine_mean,
        found.cosine_p01,
        found.cosine_worst,
        found.max_abs,
    )
    assert all(math.isnan(figure) for figure in figures)


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [((2, 3), (3, 2)), ((6,), (2, 3)), ((1, 2, 3), (2, 3)), ((0, 3), (0, 3)), ((2, 0), (2, 0)), ((), ())],
)
def test_what_cannot_be_compared_is_an_error(candidate: tuple[int, ...], reference: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape|nothing to compare"):
        distance(np.ones(candidate), np.ones(reference))


def vectors(*, largest: float = 2.0**10) -> st.SearchStrategy[tuple[Any, Any]]:
    """Two float32 arrays (N, D) of the same shape."""
    numbers = st.floats(-largest, largest, width=32)
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=5)
    return shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=numbers)] * 2))


@examples(200)
@given(vectors())
def test_figures_agree_with_the_formulas_in_plain_python(pair: tuple[Any, Any]) -> None:
    candidate, reference = pair
    found = distance(candidate, reference)
    rows = [(list(map(float, c)), list(map(float, r))) for c, r in zip(candidate, reference, strict=True)]
    squares = math.fsum((a - b) ** 2 for c, r in rows for a, b in zip(c, r, strict=True))
    scale = math.fsum(b**2 for _, r in rows for b in r)
    if scale:
        assert found.relative_l2 == pytest.approx(math.sqrt(squares / scale), rel=1e-9)
    cosines = []
    for c, r in rows:
        norms = math.hypot(*c) * math.hypot(*r)
        product = math.fsum(a * b for a, b in zip(c, r, strict=True))
        cosines.append(product / norms if norms else float(not any(c) and not any(r)))
    cosines.sort()
    assert found.cosine_mean == pytest.approx(math.fsum(cosines) / len(cosines), abs=1e-9)
    assert found.cosine_worst == pytest.approx(cosines[0], abs=1e-9)
    # A hundredth of the way along the sorted values, between the two nearest.
    place = 0.01 * (len(cosines) - 1)
    next_one = cosines[min(1, len(cosines) - 1)]
    assert found.cosine_p01 == pytest.approx(cosines[0] + place * (next_one - cosines[0]), abs=1e-9)
    assert found.max_abs == max(abs(a - b) for c, r in rows for a, b in zip(c, r, strict=True))


@given(vectors(), st.integers(-20, 20), st.integers(-20, 20))
def test_cosine_knows_no_scale_and_relative_l2_no_common_one(pair: tuple[Any, Any], one: int, two: int) -> None:
    candidate, reference = (array.astype(np.float64) for array in pair)
    found = distance(candidate, reference)
    scaled = distance(candidate * 2.0**one, reference * 2.0**two)
    for figure in ("cosine_mean", "cosine_p01", "cosine_worst"):
        assert getattr(scaled, figure) == pytest.approx(getattr(found, figure), abs=1e-12)
    aggregate = distance(candidate * 2.0**one, reference * 2.0**one)
    assert aggregate.relative_l2 == pytest.approx(found.relative_l2, rel=1e-12)


@examples(200)
@given(vectors(largest=2.0**127), st.booleans())
def test_the_distance_is_zero_exactly_for_equal_arrays(pair: tuple[Any, Any], same: bool) -> None:
    candidate, reference = pair
    if same:
        candidate = reference.copy()
    found = distance(candidate, reference)
    equal = bool((candidate == reference).all())
    assert (found.relative_l2 == 0) == equal
    assert (found.max_abs == 0) == equal


def _agreement_one_by_one(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The same by the definition: every vector against every vector of the other items, in float64."""

    def nearest(vectors: np.ndarray) -> list[tuple[int, int]]:
        found = []
        for b, item in enumerate(vectors.astype(np.float64)):
            for vector in item:
                cosines = {
                    (c, j): other @ vector / np.linalg.norm(other) / np.linalg.norm(vector)
                    for c, others in enumerate(vectors.astype(np.float64))
                    for j, other in enumerate(others)
                    if c != b
                }
                found.append(max(cosines, key=lambda at: cosines[at]))
        return found

    pairs = list(zip(nearest(ours), nearest(theirs), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 3.0])
def test_neighbour_agreement_is_its_definition(noise: float) -> None:
    rng = np.random.RandomState(5)
    theirs = rng.standard_normal((3, 30, 8)).astype(np.float32)
    ours = (theirs + noise * rng.standard_normal(theirs.shape)).astype(np.float32)
    found = neighbour_agreement(ours, theirs)
    assert found == pytest.approx(_agreement_one_by_one(ours, theirs))
    assert (found == 1.0) if noise == 0 else (found is not None and found < 1)


def test_neighbours_of_one_item_are_its_other_vectors() -> None:
    angles = np.linspace(0, 1, 80) ** 2
    theirs = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[np.newaxis].astype(np.float32)
    assert neighbour_agreement(theirs, theirs) == 1.0
    assert neighbour_agreement(theirs[:, ::-1], theirs) == pytest.approx(0, abs=0.05)


def test_too_few_vectors_say_nothing() -> None:
    few = np.random.RandomState(0).standard_normal((4, 384)).astype(np.float32)
    assert neighbour_agreement(few, few) is None


def test_each_vector_by_hand() -> None:
    """Nothing over nothing is no difference; anything over nothing is infinitely far, and orthogonal to it."""
    reference = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    candidate = np.array([[3.0, 4.5], [0.0, 0.0], [1.0, 0.0], [np.nan, 0.0]])
    errors, cosines = vector_errors(candidate, reference), vector_cosines(candidate, reference)
    assert errors[:3].tolist() == [0.1, 0.0, np.inf] and np.isnan(errors[3])
    assert cosines[1:3].tolist() == [1.0, 0.0] and np.isnan(cosines[3])
    assert cosines[0] == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))


def test_sixty_four_vectors_are_enough_for_neighbours() -> None:
    vectors = np.random.RandomState(1).standard_normal((64, 8)).astype(np.float32)
    assert neighbour_agreement(vectors, vectors) == 1.0 and neighbour_agreement(vectors[:63], vectors[:63]) is None


def test_neighbours_in_a_batch_of_two_are_in_the_other_item() -> None:
    rng = np.random.RandomState(6)
    theirs = rng.standard_normal((2, 40, 8))
    ours = theirs + 0.3 * rng.standard_normal(theirs.shape)
    found = neighbour_agreement(ours, theirs)
    assert found == pytest.approx(_agreement_one_by_one(ours, theirs)) and 0 < found < 1

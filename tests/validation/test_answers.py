"""Depths, labels and probabilities: what is held against a candidate, and what its own error explains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dinoexport.config.limits import Limit, Limits
from dinoexport.spec import Case
from dinoexport.validation import answers
from dinoexport.validation.answers import Compared

REASON = "a number for a test, chosen by hand"
ANY = Limit(value=1e9, reason=REASON)


def limits(**values: float) -> Limits:
    """Limits that hold for anything, but for what is given."""
    given = {name: Limit(value=value, reason=REASON) for name, value in values.items()}
    return Limits(**({"relative_l2_max": ANY, "worst_l2_max": ANY} | given))


def missed(compared: Compared) -> set[str]:
    return {bound.figure for bound in compared.bounds if not bound.holds}


def depths(**changed: float) -> Any:
    """Two depth maps between 1 and 3 with a sky of zeros. near, far: a factor on one pixel in fifty. sky: its value."""
    depth = np.random.RandomState(0).uniform(1, 3, (2, 40, 50)).astype(np.float32)
    depth[:, :10] = changed.get("sky", 0.0)
    depth[:, -1, ::2] *= changed.get("near", 1.0)
    return depth


@pytest.mark.parametrize(
    ("changed", "share"),
    [({}, 1.0), ({"near": 1.24}, 1.0), ({"near": 1.3}, 1 - 25 / 2000), ({"near": 0.7}, 1 - 25 / 2000)],
)
def test_depths_within_a_quarter(changed: dict[str, float], share: float) -> None:
    held_to = limits(relative_l2_max=1e-6, depth_within_min=0.99)
    compared = answers.compare("depth", depths(**changed), depths(), held_to, None)
    assert compared.figures["within_1.25"] == pytest.approx(share)
    assert ("within_1.25" in missed(compared)) == (share < 0.99)


def test_a_sky_may_be_off_by_the_limit_and_no_more() -> None:
    """Relative depth is zero in the sky, and rounding there is no wrong depth; twice the limit on the error is."""
    rms = float(np.sqrt(np.mean(depths().astype(np.float64) ** 2)))
    held_to = limits(relative_l2_max=0.02, depth_within_min=0.99)
    for times, share in ((0.9, 1.0), (2.0, 0.75)):
        compared = answers.compare("depth", depths(sky=times * 0.02 * rms), depths(), held_to, None)
        assert compared.figures["within_1.25"] == share
    assert answers.share_within(np.zeros(4), np.zeros(4), 0.01) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_depth_that_is_not_finite_fails(bad: float) -> None:
    answer = depths()
    answer[0, 20, 20] = bad
    assert "within_1.25" in missed(answers.compare("depth", answer, depths(), limits(depth_within_min=0.1), None))


def labelled(lead: float, changed: int) -> tuple[Any, Any, Any]:
    """(answer, expected, lead) of 2000 pixels; `changed` of them have another label and this lead, the rest 9."""
    expected = np.random.RandomState(1).randint(0, 21, (2, 20, 50)).astype(np.int32)
    answer, leads = expected.copy(), np.full(expected.shape, 9.0, np.float32)
    answer.reshape(-1)[:changed] = (answer.reshape(-1)[:changed] + 1) % 21
    leads.reshape(-1)[:changed] = lead
    return answer, expected, leads


@pytest.mark.parametrize(
    ("lead", "changed", "figures"),
    [
        (0.3, 1, {"decided_agreement"}),  # both scores may change by 0.1, so a lead of 0.3 is clear
        (0.2, 1, set()),
        (0.2, 300, {"label_agreement"}),
        (0.3, 300, {"decided_agreement", "label_agreement"}),
    ],
)
def test_a_clear_lead_decides(lead: float, changed: int, figures: set[str]) -> None:
    compared = answers.compare_labels(*labelled(lead, changed), 0.1, limits(label_agreement_min=0.9))
    assert missed(compared) == figures
    assert compared.figures["label_agreement"] == pytest.approx(1 - changed / 2000)
    assert compared.figures["decided"] == pytest.approx(1.0 if lead > 0.2 else 1 - changed / 2000)


def test_an_unknown_error_decides_nothing() -> None:
    assert "decided_agreement" in missed(answers.compare_labels(*labelled(9, 0), float("nan"), limits()))
    with pytest.raises(ValueError, match="shape"):
        answers.compare_labels(np.zeros((1, 2)), np.zeros((1, 3)), np.zeros((1, 3)), 0.1, limits())
    with pytest.raises(ValueError, match="no label"):
        answers.compare_labels(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros((0, 2)), 0.1, limits())


def test_mean_iou_is_scikit_learns() -> None:
    from sklearn.metrics import jaccard_score

    answer, expected, _ = labelled(0, 400)
    expected[expected == 3] = 4  # a class that only the answer has does not count
    theirs = jaccard_score(expected.ravel(), answer.ravel(), average="macro", labels=np.unique(expected))
    assert answers.mean_iou(answer, expected) == pytest.approx(theirs)


def test_a_probability_that_moved_fails_alone() -> None:
    expected = np.full((2, 5), 0.2, np.float32)
    answer = expected + np.float32(0.03) * np.array([1, -1, 0, 0, 0], np.float32)
    for limit, figures in ((0.031, set()), (0.029, {"largest_difference"})):
        compared = answers.compare("probabilities", answer, expected, limits(probability_difference_max=limit), None)
        assert missed(compared) == figures and len(compared.bounds) == 1


def test_both_shapes_of_labels_are_compared() -> None:
    """Shapes that NumPy would broadcast are refused too."""
    one, three = np.zeros((1, 1)), np.zeros((1, 3))
    with pytest.raises(ValueError, match=r"^shape \(1, 1\) where the reference has \(1, 3\)$"):
        answers.compare_labels(one, three, three, 0.1, limits())
    with pytest.raises(ValueError, match=r"^shape "):
        answers.compare_labels(three, three, one, 0.1, limits())


@pytest.mark.parametrize(
    ("axes", "figures"), [(1, ["decided_agreement"]), (2, ["decided_agreement", "label_agreement"])]
)
def test_labels_of_pixels_have_a_limit_on_their_share(axes: int, figures: list[str]) -> None:
    """A whole image has one label, so few that one of them is a large share. Where none is decided, none is wrong."""
    labels = np.arange(6).reshape((6,) if axes == 1 else (2, 3))
    compared = answers.compare_labels(labels, labels, np.zeros(labels.shape), 0.1, limits(label_agreement_min=0.9))
    assert [(bound.figure, bound.value, bound.limit) for bound in compared.bounds] == [
        (figure, 1.0, limit) for figure, limit in zip(figures, (1.0, 0.9), strict=False)
    ]
    assert compared.figures == {"decided": 0.0, "label_agreement": 1.0, "mean_iou": 1.0}


@pytest.mark.parametrize(("ours", "share"), [(4.999, 1.0), (5.0, 0.0), (3.201, 1.0), (3.2, 0.0)])
def test_a_factor_of_a_quarter_is_too_much(ours: float, share: float) -> None:
    assert answers.share_within(np.array([ours]), np.array([4.0]), 0.0) == share


def test_the_allowance_for_depths_is_a_share_of_their_root_mean_square() -> None:
    """Depths of 0 and 8 have sqrt(32): an error of a tenth of it is a factor of 1.25 where the depth is zero."""
    theirs, allowed = np.array([0.0, 8.0]), 0.1 * 32**0.5
    assert answers.share_within(np.array([0.999 * allowed, 8.0]), theirs, 0.1) == 1.0
    assert answers.share_within(np.array([1.001 * allowed, 8.0]), theirs, 0.1) == 0.5


@pytest.mark.parametrize(("kind", "shape"), [("depth", (2, 15)), ("maps", (2, 5, 3)), ("vectors", (2, 3, 5))])
def test_what_is_a_vector(kind: Any, shape: tuple[int, ...]) -> None:
    array = np.arange(30).reshape(2, 3, 5)
    vectors = answers.as_vectors(kind, array)
    assert vectors.shape == shape and vectors[0].sum() == array[0].sum()
    assert answers.as_vectors("depth", np.zeros((0, 3))).shape == (0, 3)


LOGITS = np.arange(24.0).reshape(2, 4, 3)
CHOICES = np.array([[5, 6, 7, 8], [1, 2, 3, 4]])
GREEDY = Case(name="greedy", why="a test", inputs={}, choices={"tokens": "logits"})


@pytest.mark.parametrize(
    ("case", "choices", "kept"),
    [
        (GREEDY, CHOICES, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),
        # The distribution that made the first other choice is compared, those after it are not.
        (GREEDY, np.array([[5, 0, 7, 0], [1, 2, 3, 0]]), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]),
        (GREEDY, np.array([[0, 6, 7, 8], [1, 2, 0, 4]]), [(0, 0), (1, 0), (1, 1), (1, 2)]),
        (GREEDY, np.zeros((2, 3), np.int64), None),  # another number of choices, which has a row of its own
        (GREEDY, None, None),
        (Case(name="forced", why="a test", inputs={}), np.zeros((2, 4), np.int64), None),
        (Case(name="other", why="a test", inputs={}, choices={"tokens": "others"}), np.zeros((2, 4)), None),
    ],
)
def test_distributions_are_comparable_up_to_the_first_other_choice(
    case: Case, choices: Any, kept: list[tuple[int, int]] | None
) -> None:
    given = {"logits": LOGITS + 1, **({} if choices is None else {"tokens": choices})}
    ours, theirs = answers.comparable(case, "logits", given, {"logits": LOGITS, "tokens": CHOICES})
    if kept is None:
        assert np.array_equal(theirs, LOGITS) and np.array_equal(ours, LOGITS + 1)
    else:
        assert theirs.tolist() == [LOGITS[at].tolist() for at in kept] and np.array_equal(ours, theirs + 1)


def test_the_gap_of_the_first_other_choice() -> None:
    """Each sequence counts with its first difference only, and the widest of these counts."""
    logits = np.array([[[9.0, 8.5], [4.0, 7.0], [0.0, 9.0]], [[1.0, 0.0], [2.0, 1.75], [5.0, 0.0]]])
    right = np.array([[0, 1, 1], [0, 0, 0]])
    for ours, gap in (
        (right, None),
        (np.array([[0, 0, 0], [0, 0, 0]]), 3.0),
        (np.array([[0, 1, 1], [0, 1, 1]]), 0.25),
        (np.array([[1, 0, 0], [0, 1, 1]]), 0.5),
        (np.array([[0, 1, 0], [1, 1, 1]]), 9.0),
    ):
        assert answers.changed_choice_gap(ours, right, logits) == gap
    with pytest.raises(ValueError, match="zip"):
        answers.changed_choice_gap(right[:1], right, logits)

"""Compare two outputs according to the kind of their numbers: vectors, probabilities, depths or labels.

Labels are integers, so they have no error of their own. If the reference's best score exceeds its second best by more
than the error of the scores explains, the pixel's label must be the reference's. Other pixels may have another label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dinoexport.config.limits import Limit, Limits
from dinoexport.spec import Array, Arrays, Case, OutputKind
from dinoexport.validation.metrics import Distance, distance

_WITHIN = 1.25  # the ratio that published depth results count by (Eigen et al. 2014, arXiv:1406.2283: delta < 1.25)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One limit as it was applied. holds: whether `value` is on the right side; false for NaN."""

    figure: str
    value: float
    limit: float
    reason: str
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One output compared with the reference's. figures: usual measures of the difference, without a limit."""

    distance: Distance | None
    bounds: tuple[Bound, ...]
    figures: Mapping[str, float] = field(default_factory=dict)


def at_most(figure: str, value: float, limit: Limit) -> Bound:
    """The bound of a figure with an upper limit; NaN does not hold it."""
    return Bound(figure=figure, value=value, limit=limit.value, reason=limit.reason, holds=value <= limit.value)


def at_least(figure: str, value: float, limit: Limit) -> Bound:
    """The bound of a figure with a lower limit; NaN does not hold it."""
    return Bound(figure=figure, value=value, limit=limit.value, reason=limit.reason, holds=value >= limit.value)


def compare(kind: OutputKind, answer: Array, expected: Array, limits: Limits, own_error: float | None) -> Compared:
    """Compares real values; for labels see `compare_labels`. own_error: PyTorch's relative L2 in this precision.

    Raises ValueError if the shapes differ or there is nothing to compare.
    """
    measured = distance(as_vectors(kind, answer), as_vectors(kind, expected))
    if kind == "probabilities" and limits.probability_difference_max is not None:
        bound = at_most("largest_difference", measured.max_abs, limits.probability_difference_max)
        return Compared(distance=measured, bounds=(bound,))
    bounds = of_vectors(measured, limits, own_error)
    if kind != "depth":
        return Compared(distance=measured, bounds=bounds)
    within = share_within(answer, expected, limits.relative_l2_max.value) if measured.finite else float("nan")
    if limits.depth_within_min is not None:
        bounds += (at_least("within_1.25", within, limits.depth_within_min),)
    return Compared(distance=measured, bounds=bounds, figures={"within_1.25": within})


def compare_labels(answer: Array, expected: Array, lead: Array, error: float, limits: Limits) -> Compared:
    """Compares labels. lead: each label's best score minus its second best. error: the scores' largest error.

    Both scores may change by `error`, so only a lead of more than twice that decides. Raises ValueError if the shapes
    differ.
    """
    if answer.shape != expected.shape or lead.shape != expected.shape:
        raise ValueError(f"shape {answer.shape} where the reference has {expected.shape}")
    if expected.size == 0:
        raise ValueError("nothing to compare: the reference holds no label")
    decided = lead > 2 * error
    same = answer == expected
    # If no label is decided, none is wrong; the scores have their own row.
    agreement = float(same[decided].mean()) if decided.any() else 1.0
    every = Limit(value=1.0, reason="where the best score leads by more than the error, another label is a defect")
    bounds = [at_least("decided_agreement", agreement if error == error else float("nan"), every)]
    share = float(same.mean())
    if limits.label_agreement_min is not None and expected.ndim > 1:
        bounds.append(at_least("label_agreement", share, limits.label_agreement_min))
    figures = {"decided": float(decided.mean()), "label_agreement": share, "mean_iou": mean_iou(answer, expected)}
    return Compared(distance=None, bounds=tuple(bounds), figures=figures)


def comparable(case: Case, output: str, answers: Arrays, expected: Arrays) -> tuple[Array, Array]:
    """The distributions `output` of both sides, (N, V) each, up to the first choice that differs.

    Later distributions follow different choices, so they cannot be compared. Raises ValueError if shapes differ.
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


def changed_choice_gap(answer_BN: Array, expected_BN: Array, logits_BNV: Array) -> float | None:
    """The widest gap at a sequence's first different choice; None if all choices are the same.

    A gap is the difference between the reference's best logit and its logit of the answer's choice.
    """
    import numpy as np

    gaps = []
    for ours, theirs, logits_NV in zip(answer_BN, expected_BN, logits_BNV, strict=True):
        if (ours != theirs).any():
            first = int(np.argmax(ours != theirs))
            gaps.append(float(logits_NV[first].max() - logits_NV[first][ours[first]]))
    return max(gaps, default=None)


def as_vectors(kind: OutputKind, array: Array) -> Array:
    """Vectors (..., D): for maps (B, D, h, w) the channels of each position, for depths the whole image."""
    import numpy as np

    if kind == "maps":
        return np.moveaxis(array, 1, -1)
    return array.reshape(array.shape[0], -1) if kind == "depth" and array.size else array


def share_within(answer: Array, expected: Array, error: float) -> float:
    """The share of depths within a factor of 1.25 of the reference's.

    error: the relative L2 that is allowed. A depth of zero, such as the sky in relative depth, may be that far off too:
    the same amount is added to both sides of the ratio, so that an error of that size at zero is a factor of 1.25.
    """
    import numpy as np

    theirs = expected.astype(np.float64)
    allowed = error * max(float(np.sqrt(np.mean(theirs**2))), float(np.finfo(np.float32).tiny))
    floor = allowed / (_WITHIN - 1)
    ours, theirs = answer.astype(np.float64) + floor, theirs + floor
    return float(((ours < _WITHIN * theirs) & (theirs < _WITHIN * ours)).mean())


def mean_iou(answer: Array, expected: Array) -> float:
    """The mean, over the classes the reference has, of intersection over union."""
    import numpy as np

    shares = []
    for label in np.unique(expected):
        ours, theirs = answer == label, expected == label
        shares.append((ours & theirs).sum() / (ours | theirs).sum())
    return float(np.mean(shares))


def of_vectors(measured: Distance, limits: Limits, own_error: float | None) -> tuple[Bound, ...]:
    """The bounds of vectors. own_error: PyTorch's relative L2 in the candidate's precision."""
    bounds = [
        at_most("relative_l2", measured.relative_l2, limits.relative_l2_max),
        at_most("worst_l2", measured.worst_l2, limits.worst_l2_max),
    ]
    cosines = {
        "cosine_mean": (measured.cosine_mean, limits.cosine_mean_min),
        "cosine_p01": (measured.cosine_p01, limits.cosine_p01_min),
        "cosine_worst": (measured.cosine_worst, limits.cosine_worst_min),
    }
    bounds += [at_least(figure, value, limit) for figure, (value, limit) in cosines.items() if limit]
    times = limits.times_own_error_max
    if times is not None and own_error is not None:
        bounds.append(
            at_most("relative_l2", measured.relative_l2, Limit(value=times.value * own_error, reason=times.reason))
        )
    return tuple(bounds)

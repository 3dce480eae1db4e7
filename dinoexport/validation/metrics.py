"""Distances between two arrays of vectors, in float64 NumPy. The last axis is the vector."""

from __future__ import annotations

from dataclasses import dataclass

from dinoexport.spec import Array


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The difference between a candidate and the reference.

    relative_l2: ||candidate - reference|| / ||reference|| over all values. worst_l2: the same for the worst single
    vector; it detects a vector of the wrong length, which no cosine does. cosine_*: over vectors. max_abs: in the unit
    of the values. NaN or Inf on either side makes every figure NaN and `finite` false.
    """

    relative_l2: float
    worst_l2: float
    cosine_mean: float
    cosine_p01: float
    cosine_worst: float
    max_abs: float
    finite: bool


def distance(candidate: Array, reference: Array) -> Distance:
    """The difference between `candidate` and `reference`, both (..., D) of the same shape.

    Raises ValueError when the shapes differ or the reference holds no vector.
    """
    import numpy as np

    if candidate.shape != reference.shape:
        raise ValueError(f"shape {candidate.shape} where the reference has {reference.shape}")
    if reference.ndim == 0 or reference.size == 0:
        raise ValueError("nothing to compare: the reference holds no vector")
    ours = candidate.reshape(-1, candidate.shape[-1]).astype(np.float64)
    theirs = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        nan = float("nan")
        return Distance(
            relative_l2=nan,
            worst_l2=nan,
            cosine_mean=nan,
            cosine_p01=nan,
            cosine_worst=nan,
            max_abs=nan,
            finite=False,
        )
    difference = ours - theirs
    cosines = vector_cosines(ours, theirs)
    return Distance(
        relative_l2=_ratio(float(np.linalg.norm(difference)), float(np.linalg.norm(theirs))),
        worst_l2=float(vector_errors(ours, theirs).max()),
        cosine_mean=float(cosines.mean()),
        cosine_p01=float(np.percentile(cosines, 1)),
        cosine_worst=float(cosines.min()),
        max_abs=float(np.abs(difference).max()),
        finite=True,
    )


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The distance of distributions over V entries from the reference's; natural logarithms.

    kl_*: Kullback-Leibler divergence of the candidate from the reference, the mean and the worst distribution's.
    top1_kept: the share whose most likely entry is the same. top1_gap: over the others, the largest difference between
    the reference's best logit and its logit of the candidate's choice; 0 if all are the same. Rounding only changes
    near ties, damage also changes wide ones.
    """

    kl_mean: float
    kl_worst: float
    top1_kept: float
    top1_gap: float


# Distributions that are compared at a time: their float64 copies take most of the memory.
_ROWS = 64


def divergence(candidate: Array, reference: Array) -> Divergence:
    """The divergence of `candidate` from `reference`, both unnormalised log probabilities (..., V) of the same shape.

    NaN or Inf on either side makes every figure NaN.
    """
    import numpy as np

    size = reference.shape[-1]
    ours, theirs = candidate.reshape(-1, size), reference.reshape(-1, size)
    kl, kept, gaps = [], [], []
    for at in range(0, len(theirs), _ROWS):
        q, p = (_log_probabilities(rows[at : at + _ROWS]) for rows in (ours, theirs))
        with np.errstate(invalid="ignore"):
            kl.append((np.exp(p) * (p - q)).sum(axis=1))
        chosen = q.argmax(axis=1)
        kept.append(chosen == p.argmax(axis=1))
        gaps.append(p.max(axis=1) - np.take_along_axis(p, chosen[:, None], axis=1)[:, 0])
    every_kl, every_gap = np.concatenate(kl), np.concatenate(gaps)
    if not np.isfinite(every_kl).all():
        nan = float("nan")
        return Divergence(kl_mean=nan, kl_worst=nan, top1_kept=nan, top1_gap=nan)
    return Divergence(
        kl_mean=float(every_kl.mean()),
        kl_worst=float(every_kl.max()),
        top1_kept=float(np.concatenate(kept).mean()),
        top1_gap=float(every_gap.max()),
    )


def centred(logits: Array) -> Array:
    """Logits (..., V) in float64 without the offset common to a distribution, which has no meaning."""
    import numpy as np

    wide = logits.astype(np.float64)
    middle: Array = wide - wide.mean(axis=-1, keepdims=True)
    return middle


def _log_probabilities(logits: Array) -> Array:
    import numpy as np

    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        logs: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


# Too few to distinguish agreement from chance: tokens of a whole input come one per case.
_ENOUGH_VECTORS = 64


def neighbour_agreement(candidate: Array, reference: Array) -> float | None:
    """The share of vectors whose nearest other vector, by cosine, is the same one in both; None if they are few.

    Both (B, ..., D). This is what a retrieval over these vectors would notice. With several items in a batch, the
    neighbours of a vector are searched in the other items only, not among the vectors beside it.
    """
    import numpy as np

    ours, theirs = (array.reshape(-1, array.shape[-1]) for array in (candidate, reference))
    if len(theirs) < _ENOUGH_VECTORS:
        return None
    item = (
        np.arange(len(theirs)) * reference.shape[0] // len(theirs) if reference.shape[0] > 1 else np.arange(len(theirs))
    )
    return float((_nearest(ours, item) == _nearest(theirs, item)).mean())


def _nearest(vectors: Array, item: Array) -> Array:
    """The index of each vector's nearest vector among those of other items."""
    import numpy as np

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    cosines = np.where(item[:, None] == item[None, :], -2.0, unit @ unit.T)
    nearest: Array = cosines.argmax(axis=1)
    return nearest


def vector_errors(candidate: Array, reference: Array) -> Array:
    """The relative L2 error of each vector of two arrays (..., D), flat, float64; NaN and Inf stay what they are."""
    import numpy as np

    ours = candidate.reshape(-1, candidate.shape[-1]).astype(np.float64)
    theirs = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    with np.errstate(invalid="ignore"):
        errors, lengths = np.linalg.norm(ours - theirs, axis=1), np.linalg.norm(theirs, axis=1)
        far: Array = np.where(errors > 0, np.inf, errors)  # for a zero vector: zero divided by zero is no difference
        np.divide(errors, lengths, out=far, where=lengths > 0)
    return far


def vector_cosines(candidate: Array, reference: Array) -> Array:
    """The cosine of each vector of two arrays (..., D), flat, float64.

    A zero vector has no direction: it is equal to another zero vector, and orthogonal to anything else.
    """
    import numpy as np

    ours = candidate.reshape(-1, candidate.shape[-1]).astype(np.float64)
    theirs = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines: Array = np.asarray(~ours.any(axis=1) & ~theirs.any(axis=1), np.float64)
        np.divide((ours * theirs).sum(axis=1), norms, out=cosines, where=~(norms <= 0))
    return cosines


def _ratio(difference: float, scale: float) -> float:
    """The quotient; zero divided by zero is zero, no difference."""
    if scale > 0:
        return difference / scale
    return 0.0 if difference == 0 else float("inf")

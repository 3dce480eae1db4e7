"""The divergence of distributions: by hand, in plain Python, and for what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dinoexport.validation import metrics


def test_two_distributions_by_hand() -> None:
    """P = (1/2, 1/4, 1/4); once Q = P, once Q = (1/4, 1/2, 1/4). An offset of all logits has no meaning."""
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    reference = np.stack([p, p + 7]).astype(np.float64)
    found = metrics.divergence(np.stack([p - 3, q + 1]), reference)
    assert found.kl_worst == pytest.approx(0.25 * math.log(2)) and found.kl_mean == pytest.approx(found.kl_worst / 2)
    assert found.top1_kept == 0.5 and found.top1_gap == pytest.approx(math.log(2))
    same = metrics.divergence(reference, reference)
    assert (same.kl_mean, same.kl_worst, same.top1_kept, same.top1_gap) == (0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("shape", [(1, 5), (64, 5), (65, 5), (3, 43, 7), (200, 2)])
def test_as_in_plain_python(shape: tuple[int, ...]) -> None:
    """However many distributions there are, of any number of axes."""
    random = np.random.default_rng(len(shape))
    reference = (3 * random.standard_normal(shape)).astype(np.float32)
    candidate = (reference + random.standard_normal(shape)).astype(np.float32)
    kl, kept, gaps = [], [], []
    for ours, theirs in zip(candidate.reshape(-1, shape[-1]), reference.reshape(-1, shape[-1]), strict=True):
        q, p = ([math.exp(x) for x in map(float, row)] for row in (ours, theirs))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        chosen = q.index(max(q))
        kept.append(chosen == p.index(max(p)))
        gaps.append(math.log(max(p)) - math.log(p[chosen]))
    found = metrics.divergence(candidate, reference)
    assert found.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-6) and found.kl_worst == pytest.approx(max(kl))
    assert found.top1_kept == pytest.approx(sum(kept) / len(kept)) and found.top1_gap == pytest.approx(max(gaps))


@pytest.mark.parametrize("side", ["candidate", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_figures(bad: float, side: str) -> None:
    arrays = {"candidate": np.zeros((70, 3)), "reference": np.zeros((70, 3))}
    arrays[side][66, 1] = bad
    found = metrics.divergence(**arrays)
    assert all(math.isnan(x) for x in (found.kl_mean, found.kl_worst, found.top1_kept, found.top1_gap))


def test_large_logits_do_not_overflow() -> None:
    found = metrics.divergence(np.array([[1e4, 0.0]]), np.array([[1e4, 1.0]]))
    assert found.kl_mean == 0.0 and found.top1_kept == 1.0


def test_centred_logits_have_no_common_offset() -> None:
    logits = np.array([[[1.0, 2.0, 6.0]], [[-4.0, 0.0, 1.0]]], np.float16)
    assert metrics.centred(logits).tolist() == [[[-2.0, -1.0, 3.0]], [[-3.0, 1.0, 2.0]]]
    assert metrics.centred(logits).dtype == np.float64

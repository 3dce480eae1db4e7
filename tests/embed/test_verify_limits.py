"""What embeddings are held to when they are stored as float16."""

from __future__ import annotations

import pytest

from dinoexport.config.limits import Limit, Limits
from dinoexport.embed import verify

ROUNDING = 2.0**-11


def limits(error: float, cosine: float) -> Limits:
    def limit(value: float) -> Limit:
        return Limit(value=value, reason="chosen for this test")

    return Limits(
        relative_l2_max=limit(error), worst_l2_max=limit(2 * error), cosine_mean_min=limit(cosine),
        cosine_p01_min=limit(cosine), cosine_worst_min=limit(cosine), times_own_error_max=limit(3),
    )  # fmt: skip


def values(held_to: Limits) -> dict[str, float]:
    return {name: limit["value"] for name, limit in held_to.model_dump(exclude_none=True).items()}


def test_float32_is_held_to_the_bundles_limits() -> None:
    strict = limits(1e-5, 1 - 1e-9)
    assert verify._widened(strict, "float32") is strict


def test_no_limit_of_float16_is_below_its_rounding() -> None:
    """An error of e in a vector's length turns it by at most e: the cosine is then at least 1 - e**2 / 2."""
    widened = verify._widened(limits(1e-5, 1 - 1e-9), "float16")
    floor = pytest.approx(1 - ROUNDING**2, abs=1e-12)
    assert values(widened) == {
        "relative_l2_max": ROUNDING, "worst_l2_max": ROUNDING, "cosine_mean_min": floor, "cosine_p01_min": floor,
        "cosine_worst_min": floor, "times_own_error_max": 3,
    }  # fmt: skip
    assert "float16" in widened.relative_l2_max.reason


def test_wider_limits_stay() -> None:
    wide = limits(0.01, 0.99)
    assert values(verify._widened(wide, "float16")) == values(wide)


def test_a_limit_that_is_not_there_is_not_made() -> None:
    """A user's own validation file need not limit cosines."""
    without = Limits(
        relative_l2_max=Limit(value=1e-5, reason="chosen for this test"),
        worst_l2_max=Limit(value=0.1, reason="chosen for this test"),
    )
    assert values(verify._widened(without, "float16")) == {"relative_l2_max": ROUNDING, "worst_l2_max": 0.1}

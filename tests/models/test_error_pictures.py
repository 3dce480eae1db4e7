"""Pictures of errors: the largest one is bright, however small it is, and what is not finite is as bright."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.models.dinov2 import pictures
from dinoexport.models.dinov2.heads import pictures as of_heads
from dinoexport.spec import Array

DARK, BRIGHT = (tuple(int(x) for x in pictures.viridis(np.array([end]))[0]) for end in (0.0, 1.0))
SCALES = [1e-9, 1e-3, 1.0, 1e6]


def pixels(picture: Any) -> Array:
    return np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB"))


@pytest.mark.parametrize("largest", SCALES)
def test_errors_of_patches(largest: float) -> None:
    errors = np.array([[0.0, largest], [np.nan, 0.5 * largest]])
    shown = pictures._heat(errors, largest, "ours")
    drawn = pixels(shown)
    assert tuple(drawn[0, 0]) == DARK and tuple(drawn[0, 1]) == tuple(drawn[1, 0]) == BRIGHT
    assert tuple(drawn[1, 1]) == tuple(pictures.viridis(np.array([0.5]))[0])
    assert shown.caption == f"of ours: dark 0, bright {largest:.1e}, worst {largest:.1e}; 1 patches are not finite"
    other = pictures._heat(np.array([[0.0, 0.25 * largest]]), largest, "ours")
    assert f"worst {0.25 * largest:.1e}" in other.caption and "finite" not in other.caption


def test_no_error_at_all_is_dark() -> None:
    assert {tuple(colour) for colour in pixels(pictures._heat(np.zeros((2, 2)), 0.0, "ours")).reshape(-1, 3)} == {DARK}


@pytest.mark.parametrize("largest", SCALES)
def test_differences_of_depths(largest: float) -> None:
    """All candidates on one scale."""
    reference = np.linspace(1, 2, 6).reshape(2, 3)
    first, second = reference.copy(), reference.copy()
    first[0, 1] += largest
    second[1, 2] += largest / 4
    second[0, 0] = np.nan
    row = of_heads._depths(reference, {"first": first, "second": second}, " m")
    assert [picture.title for picture in row] == ["PyTorch", "first", "Difference", "second", "Difference"]
    drawn, other = pixels(row[2]), pixels(row[4])
    assert tuple(drawn[0, 1]) == BRIGHT and tuple(drawn[1, 2]) == DARK
    quarter = pictures.viridis(np.array([0.25]))[0].astype(int)
    assert np.abs(other[1, 2].astype(int) - quarter).max() <= 2 and tuple(other[0, 0]) == BRIGHT
    assert row[2].caption == f"of first: dark 0, bright {largest:.1e} m, worst {largest:.1e} m"
    assert f"worst {largest / 4:.1e} m" in row[4].caption


def test_a_single_pixel_is_not_lost_in_a_smaller_picture() -> None:
    large = np.zeros((1000, 700))
    large[777, 333] = 1.0
    shown = of_heads._most_of_each_block(large)
    assert max(shown.shape) <= of_heads._SIDE_MAX and shown.sum() == 1.0
    small = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(of_heads._most_of_each_block(small), small)

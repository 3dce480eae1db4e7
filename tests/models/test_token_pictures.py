"""Pictures of patch tokens in the report: three principal components as colours, errors, and the photograph."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import pictures
from dinoexport.spec import Array, Picture

PLAIN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
VIRIDIS = [
    [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
    [170, 220, 50], [253, 231, 37],
]  # fmt: skip


def drawn(picture: Picture) -> Array:
    return np.asarray(Image.open(BytesIO(picture.data)))


def test_viridis() -> None:
    """Nine colours, in a straight line between two of them; values outside 0..1 get the ends'."""
    assert pictures.viridis(np.arange(9) / 8).tolist() == VIRIDIS
    assert pictures.viridis(np.array([-3.0, 1 / 32, 1.25, 40.0])).tolist() == [
        VIRIDIS[0], [69, 12, 94], VIRIDIS[-1], VIRIDIS[-1],
    ]  # fmt: skip


def axes(scale: float) -> Array:
    """(303, 4) tokens of mean zero on three axes, which are their principal components: 2, 0 and 3, in this order."""
    tokens = np.zeros((303, 4), np.float32)
    steps = np.arange(-50, 51)
    for row, (channel, size) in enumerate([(2, 4.0), (0, 2.0), (3, 1.0)]):
        tokens[101 * row : 101 * (row + 1), channel] = scale * size * steps
    return tokens


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_three_components_are_red_green_and_blue(scale: float) -> None:
    """Each from the first percentile of its values to the 99th: of 303 values with -50..50 on an axis, -46.98 to 46.98.

    The larger side of an axis is bright whatever sign the decomposition gives it, and nothing is not bright.
    """
    tokens = axes(scale)
    steps = np.zeros((303, 3))
    for i in range(3):
        steps[101 * i : 101 * (i + 1), i] = np.arange(-50, 51)
    expected = np.clip(np.rint(255 * (steps + 46.98) / 93.96), 0, 255).reshape(3, 101, 3)
    odd = tokens.copy()
    odd[7] = np.nan
    ((_, theirs, ours, _),) = pictures.of_case(
        np.zeros((1, 3, 7, 203), np.float32), tokens[None], {"ours": odd[None]}, patch=2, preprocessing=PLAIN
    )
    found = drawn(theirs).astype(int)
    # At zero the value is 127.5 but for rounding.
    assert np.abs(found - expected).max() <= 1 and (found != expected)[steps.reshape(3, 101, 3) != 0].mean() < 0.01
    assert drawn(ours)[0, 7].tolist() == [0, 0, 0]
    other = np.delete(np.arange(303), 7)
    assert np.array_equal(drawn(ours).reshape(-1, 3)[other], drawn(theirs).reshape(-1, 3)[other])
    assert (theirs.title, theirs.caption) == ("PyTorch", "three principal components as colours")
    assert (ours.title, ours.caption) == ("ours", "the same components")


def test_components_across_the_channels() -> None:
    """Along (0.6, -0.8) and (0.8, 0.6): bright is the side to which its larger entry is positive."""
    steps = np.arange(-50, 51)
    tokens = np.zeros((202, 4), np.float32)
    tokens[:101, :2] = steps[:, None] * np.array([0.6, -0.8])
    tokens[101:, :2] = steps[:, None] * np.array([0.4, 0.3])
    ((_, theirs),) = pictures.of_case(
        np.zeros((1, 3, 2, 101), np.float32), tokens[None], {}, patch=1, preprocessing=PLAIN
    )
    none = np.zeros(101)
    red, green = np.stack([-steps, none]), np.stack([none, steps])
    expected = np.clip(np.rint(255 * (np.stack([red, green], axis=-1) + 47.99) / 95.98), 0, 255)
    assert np.abs(drawn(theirs)[..., :2].astype(int) - expected).max() <= 1


def test_equal_tokens_have_one_colour() -> None:
    tokens = np.ones((1, 4, 5), np.float32)
    ((_, theirs),) = pictures.of_case(np.zeros((1, 3, 4, 4), np.float32), tokens, {}, patch=2, preprocessing=PLAIN)
    assert drawn(theirs).shape == (2, 2, 3) and len(np.unique(drawn(theirs).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("value", [0.75, 0.25, 2.0, -1.0, np.nan])
def test_the_photograph(value: float) -> None:
    """A JPEG of quality 85 at most as large as asked, its sides as the model sees them in words."""
    bytes_ = {0.75: 191, 0.25: 64, 2.0: 255}.get(value, 0)
    shown = pictures.photograph(np.full((3, 20, 30), value, np.float32), PLAIN, side_max=15)
    stored = BytesIO()
    Image.new("RGB", (15, 10), (bytes_,) * 3).save(stored, "JPEG", quality=85)
    assert shown == Picture(
        title="Photograph", caption="20 x 30 pixels, as the model sees it", data=stored.getvalue(),
        media_type="image/jpeg",
    )  # fmt: skip


@pytest.mark.parametrize(("width", "shown"), [(448, 448), (449, 448)])
def test_a_photograph_is_at_most_448_pixels_wide(width: int, shown: int) -> None:
    picture = pictures.photograph(np.zeros((3, 20, width), np.float32), PLAIN)
    assert Image.open(BytesIO(picture.data)).width == shown

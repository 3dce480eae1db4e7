"""Photographs are prepared as upstream's evaluation does: resized, cropped, normalised."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dinoexport.images import Preprocessing
from tests.pictures import noise


@pytest.mark.parametrize(
    ("size", "resized", "left", "top"),
    [
        # torchvision: Resize(256) makes the longer side int(256 * long / short); CenterCrop(224) begins at
        # int(round((side - 224) / 2.0)), and Python rounds a half to the even side.
        ((640, 427), (383, 256), 80, 16),  # 383.70; 79.5 -> 80
        ((427, 640), (256, 383), 16, 80),
        ((300, 225), (341, 256), 58, 16),  # 341.33; 58.5 -> 58
        ((451, 300), (384, 256), 80, 16),  # 384.85
        ((600, 400), (384, 256), 80, 16),
        ((257, 256), (257, 256), 16, 16),  # 16.5 -> 16
        ((259, 256), (259, 256), 18, 16),  # 17.5 -> 18
        ((256, 256), (256, 256), 16, 16),
        ((224, 224), (256, 256), 16, 16),
        ((100, 400), (256, 1024), 16, 400),
        ((3, 2), (384, 256), 80, 16),
        ((1, 1), (256, 256), 16, 16),
    ],
)
def test_evaluation_resizes_and_crops_as_torchvision(
    size: tuple[int, int], resized: tuple[int, int], left: int, top: int
) -> None:
    picture = noise(*size)
    expected = picture.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    found = Preprocessing().prepared(picture)
    assert (found.shape, found.dtype) == ((224, 224, 3), np.uint8)
    assert np.array_equal(found, np.asarray(expected))


def test_other_sizes_of_the_same_rule() -> None:
    picture = noise(640, 427)
    expected = picture.resize((776, 518), Image.Resampling.BICUBIC).crop((0, 0, 776, 518))
    # int(518 * 640 / 427) = 776; (776 - 518) / 2 = 129
    assert np.array_equal(
        Preprocessing(resize=518, crop=518).prepared(picture), np.asarray(expected)[:, 129 : 129 + 518]
    )


def test_normalisation_is_imagenets() -> None:
    pictures = np.random.RandomState(0).randint(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pictures[0, 0, 0], pictures[1, 4, 6] = (0, 0, 0), (255, 255, 255)
    found = Preprocessing().normalised(pictures)
    assert (found.shape, found.dtype) == ((2, 3, 5, 7), np.float32)
    for channel, (mean, deviation) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (pictures[..., channel] / 255.0 - mean) / deviation
        assert np.abs(found[:, channel] - expected).max() < 1e-6
    # Black and white, worked out by hand.
    assert found[0, :, 0, 0] == pytest.approx([-2.117904, -2.035714, -1.804444], abs=1e-5)
    assert found[1, :, 4, 6] == pytest.approx([2.248908, 2.428571, 2.640000], abs=1e-5)


@pytest.mark.parametrize("size", [(180, 60), (60, 180)])
def test_covering_keeps_the_middle(size: tuple[int, int]) -> None:
    picture = noise(*size)
    left, top = (size[0] - 60) // 2, (size[1] - 60) // 2
    expected = np.asarray(picture)[top : top + 60, left : left + 60]
    assert np.array_equal(Preprocessing().covering(picture, (60, 60)), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_normalised_pixels_are_shown_in_colour(channels: int) -> None:
    picture = np.random.RandomState(0).randint(0, 256, (1, 5, 7, channels), dtype=np.uint8)
    preprocessing = Preprocessing(mean=(0.4,) * channels, std=(0.2,) * channels)
    shown = preprocessing.shown(preprocessing.normalised(picture)[0])
    expected = np.repeat(picture[0], 3, axis=-1) if channels == 1 else picture[0, ..., :3]
    assert shown.shape == (5, 7, 3)
    np.testing.assert_allclose(shown, expected / 255, atol=1e-6)

"""What image features are used for: those that are compared, the mirrored image, and small pictures."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dinoexport.images import Preprocessing
from dinoexport.models.dinov2.uses import ImageUses

USES = ImageUses(preprocessing=Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))


def test_features_of_the_first_image() -> None:
    tokens = np.array([[[1, 5], [2, 6], [6, 10]], [[0, 0], [9, 9], [9, 9]]], np.float32)
    found = USES.features({"class_token": np.array([[3, 4], [7, 8]], np.float16), "patch_tokens": tokens})
    assert {name: (array.tolist(), array.dtype) for name, array in found.items()} == {
        "class_token": ([3, 4], np.float32), "mean_patch_token": ([3, 7], np.float32),
    }  # fmt: skip


def test_the_image_mirrored_left_to_right() -> None:
    image = np.arange(6).reshape(1, 1, 2, 3)
    assert USES.second_view({"pixels": image})["pixels"].tolist() == [[[[2, 1, 0], [5, 4, 3]]]]
    found = USES.second_view({"images": image.transpose(0, 2, 3, 1)})["images"]
    assert found[0, :, :, 0].tolist() == [[2, 1, 0], [5, 4, 3]] and found.flags.c_contiguous


def test_patches_that_match_by_cosine() -> None:
    """Whatever their lengths; a patch of zeros matches the first one."""
    tokens = np.array([[[1, 0], [0, 2], [3, 3], [0, 0]]], np.float32)
    others = np.array([[[5, 4], [0, 1], [9, 1], [-9, 0]]], np.float32)
    assert USES.matches({"patch_tokens": tokens}, {"patch_tokens": others}).tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("name", ["pixels", "images"])
def test_a_small_picture(name: str) -> None:
    """At most 128 pixels a side, in the colours of the image."""
    grey = np.full((1, 300, 200, 3), 51, np.uint8)
    array = grey if name == "images" else (grey / np.float32(255)).transpose(0, 3, 1, 2)
    shown = USES.thumbnail({name: array})
    found = Image.open(BytesIO(shown.data))
    assert found.size == (85, 128) and np.asarray(found).tolist() == [[[51, 51, 51]] * 85] * 128
    assert shown.caption == "300 x 200 pixels, as the model sees it"

"""Sizes that photographs are served at, and how their files become arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dinoexport import images
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import serving
from dinoexport.spec import Dim
from tests.conftest import DATA

IMAGES = DATA.parent.parent / "validate" / "images"
SIDE = Dim(name="height", min=14, opt=518, max=1022, step=14)


def test_sizes_follow_the_histogram() -> None:
    """Two clusters of real sizes give two sizes, each legal and in its cluster."""
    real = [(480 + i % 5, 640 + i % 7) for i in range(200)] + [(1080 + i % 5, 1920) for i in range(50)]
    sizes = serving.sizes_for(real, SIDE, SIDE)
    assert len(sizes) <= serving.SIZES_MAX
    assert all(h % 14 == 0 and w % 14 == 0 and 14 <= h <= 1022 and 14 <= w <= 1022 for h, w in sizes)
    assert serving.nearest((480, 640), sizes) == (476, 630) or serving.nearest((480, 640), sizes) == (476, 644)
    wide = serving.nearest((1080, 1920), sizes)
    assert wide[1] == 1022 and abs(wide[1] / wide[0] - 1920 / 1080) < 0.1


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=30))
def test_sizes_are_always_legal(real: list[tuple[int, int]]) -> None:
    sizes = serving.sizes_for(real, SIDE, SIDE)
    assert 1 <= len(sizes) <= serving.SIZES_MAX
    assert all(h % 14 == 0 and w % 14 == 0 and 14 <= h <= 1022 and 14 <= w <= 1022 for h, w in sizes)
    for size in real:
        costs = {each: serving._factor(size, each) for each in sizes}
        assert costs[serving.nearest(size, sizes)] == min(costs.values())


def test_covering_neither_stretches_nor_pads() -> None:
    from PIL import Image

    picture = Image.new("RGB", (300, 200), (10, 20, 30))
    assert (Preprocessing().covering(picture, (140, 280)) == (10, 20, 30)).all()
    halves = Image.fromarray(np.repeat([[[0, 0, 0]], [[200, 200, 200]]], [1, 1], axis=0).astype(np.uint8)).resize(
        (40, 80), 0
    )
    covered = Preprocessing().covering(
        halves, (28, 28)
    )  # the middle of a tall image: its two halves meet in the centre
    assert covered.shape == (28, 28, 3) and (covered[:10] < 20).all() and (covered[-10:] > 180).all()


def test_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    from PIL import Image

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
        loaded = images.load(tmp_path / "turned.jpg")
        assert images.size_of(tmp_path / "turned.jpg") == (loaded.height, loaded.width)


def test_bytes_are_decoded_as_files_are() -> None:
    for path in IMAGES.glob("*.*g"):
        assert np.array_equal(np.asarray(images.decode(path.read_bytes(), named="it")), np.asarray(images.load(path)))

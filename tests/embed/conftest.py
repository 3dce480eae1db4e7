"""A tiny bundle and a folder of images, made once for all tests of `embed`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# 60 images, of which every tenth is broken: garbage, cut short, empty.
COUNT, BROKEN = 60, 6


def picture(seed: int, *, size: tuple[int, int] = (96, 80), form: str = "JPEG") -> bytes:
    """A smooth picture that no other seed gives, encoded."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(out, form)
    return out.getvalue()


def fill(folder: Path, count: int = COUNT, *, first: int = 0) -> None:
    """`count` images in three folders below `folder`, of three sizes."""
    for i in range(first, first + count):
        place = folder / f"d{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        content = picture(i, size=((96, 80), (64, 128), (300, 200))[i % 3])
        if i % 10 == 7:
            content = (b"garbage" * 20, content[: len(content) // 2], b"")[i // 10 % 3]
        (place / f"{i:03d}.jpg").write_bytes(content)


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Path) -> Path:
    """A bundle whose cases are small."""
    return tiny_bundle


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `fill` fills."""
    folder = tmp_path_factory.mktemp("photos")
    fill(folder)
    return folder

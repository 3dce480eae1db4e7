"""Photographs of every kind are read as RGB, upright; what is none is refused in one sentence."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinoexport import images
from dinoexport.config import resources
from dinoexport.errors import UsageError
from dinoexport.images import ImageError, Preprocessing, load
from dinoexport.spec import Array
from tests.pictures import ORIENTATION, noise, png_header, refused, saved, smooth
from tests.properties import examples

PHOTOGRAPHS = {
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}


# What is shipped


def test_every_shipped_photograph_is_the_recorded_one_and_has_a_licence() -> None:
    folder = resources.folder("validate") / "images"
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix != ".md"
    }
    assert found == PHOTOGRAPHS
    table = [line for line in (folder / "LICENCES.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(line.split("`")[1] for line in table) == sorted(PHOTOGRAPHS)
    for line in table:
        assert any(licence in line for licence in ("CC0", "public domain", "CC BY 2.0"))


@pytest.mark.parametrize("name", sorted(PHOTOGRAPHS))
def test_every_shipped_photograph_is_decoded(name: str) -> None:
    image = load(resources.folder("validate") / "images" / name)
    assert image.mode == "RGB"
    assert np.asarray(image).std() > 20


# Kinds of files


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_lossless_files_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    picture = noise(33, 21)
    path = saved(tmp_path / f"x{suffix}", picture, **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(np.asarray(load(path)), np.asarray(picture))


def test_one_pixel(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", Image.new("RGB", (1, 1), (10, 20, 30)))
    prepared = Preprocessing().prepared(load(path))
    assert prepared.shape == (224, 224, 3)
    assert (prepared == (10, 20, 30)).all()


def test_cmyk(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", smooth().convert("CMYK"), quality=100, subsampling=0)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    difference = np.asarray(load(path)).astype(int) - np.asarray(smooth())
    assert np.abs(difference).mean() < 2


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 256, 257, 514, 32896, 65534, 65535]], np.uint16)
    expected = [0, 1, 1, 2, 128, 255, 255]  # round(v / 257): 65535 = 255 * 257
    for name in ("x.png", "x.tif"):
        loaded = load(saved(tmp_path / name, Image.fromarray(values)))
        assert loaded.mode == "RGB"
        assert np.asarray(loaded)[0].tolist() == [[v] * 3 for v in expected]


def test_turned_grey_of_16_bits(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 257 * 20
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    path = saved(tmp_path / "x.png", Image.fromarray(values), exif=exif)
    assert np.asarray(load(path))[..., 0].tolist() == (np.arange(12).reshape(3, 4)[::-1, ::-1] * 20).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_of_32_bits_is_refused(tmp_path: Path, dtype: type) -> None:
    """Is 1.0 white, or 255, or the largest value there is? A guess would be a wrong picture."""
    path = saved(tmp_path / "x.tif", Image.fromarray(np.ones((4, 4), dtype)))
    assert "no standard range" in refused(path)


def test_transparency_is_dropped(tmp_path: Path) -> None:
    picture = noise(20, 10)
    see_through = picture.copy()
    see_through.putalpha(Image.linear_gradient("L").resize(picture.size))
    path = saved(tmp_path / "x.png", see_through)
    assert np.array_equal(np.asarray(load(path)), np.asarray(picture))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palettes(tmp_path: Path, transparency: int | bytes | None) -> None:
    picture = noise(16, 16).quantize(256)
    options = {} if transparency is None else {"transparency": transparency}
    path = saved(tmp_path / "x.png", picture, **options)
    assert np.array_equal(np.asarray(load(path)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture = noise(9, 7).convert(mode)
    loaded = np.asarray(load(saved(tmp_path / "x.png", picture)))
    assert loaded.shape == (7, 9, 3)
    assert np.array_equal(loaded[..., 0], np.asarray(picture.convert("L")))
    assert (loaded[..., 0] == loaded[..., 2]).all()


def transposed(picture: Array) -> Array:
    return picture.transpose(1, 0, 2)


# EXIF 2.3, tag 274: which side of the upright picture the stored first row and first column are.
STORED_FROM_UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda p: p,  # row 0 top, column 0 left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: transposed,  # left, top
    6: lambda p: transposed(p[:, ::-1]),  # right, top
    7: lambda p: transposed(p[::-1, ::-1]),  # right, bottom
    8: lambda p: transposed(p[::-1]),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED_FROM_UPRIGHT)
def test_all_orientations_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for name, picture, tolerance in (("x.jpg", smooth(), 3), ("x.png", noise(24, 16), 0)):
        upright = np.asarray(picture)
        stored = Image.fromarray(np.ascontiguousarray(STORED_FROM_UPRIGHT[orientation](upright)))
        options = {"quality": 100, "subsampling": 0} if name == "x.jpg" else {}
        loaded = np.asarray(load(saved(tmp_path / name, stored, exif=exif, **options)))
        assert loaded.shape == upright.shape
        assert np.abs(loaded.astype(int) - upright).max() <= tolerance


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_the_first_frame_of_several_is_used(tmp_path: Path, suffix: str) -> None:
    first, second = noise(20, 20, seed=1), noise(20, 20, seed=2)
    options = {"lossless": True} if suffix == ".webp" else {}
    path = saved(tmp_path / f"x{suffix}", first, save_all=True, append_images=[second], **options)
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == 2
    assert np.array_equal(np.asarray(load(path)), np.asarray(first))


# What is refused


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.touch()
    assert "not a readable image" in refused(path)


def test_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_text("This is a photograph of a cat.")
    assert "not a readable image" in refused(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"x{suffix}", noise(100, 80))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "not a readable image" in refused(path)


def test_a_format_nobody_promised_is_refused(tmp_path: Path) -> None:
    """Every decoder is a way in; Pillow has about forty."""
    path = tmp_path / "x.png"
    noise(4, 4).save(path, format="PPM")
    assert "not a readable image" in refused(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    for name in ("nowhere.png", "missing.png"):
        assert "no such file" in refused(tmp_path / name).lower()
    for name in ("folder.png", "pipe.png"):
        assert "not a regular file" in refused(tmp_path / name)
    assert "circle.png" in refused(tmp_path / "circle.png")
    (tmp_path / "link.png").symlink_to(saved(tmp_path / "real.png", noise(5, 5)))
    assert load(tmp_path / "link.png").size == (5, 5)


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (60_000, 60_000), (1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_header(*size))

    def decoded(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    message = refused(path)
    assert "Mpx" in message or "decompression bomb" in message


def test_the_largest_image_is_still_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    assert load(saved(tmp_path / "x.png", noise(30, 20))).size == (30, 20)
    refused(saved(tmp_path / "x.png", noise(31, 20)))


def test_a_thin_image_is_refused_before_it_is_resized() -> None:
    """1x1000 would become 256x256000: 200 MB out of a kilobyte."""
    for size in ((1, 1000), (1000, 1), (3, 10**7)):
        with pytest.raises(UsageError, match="too long and thin"):
            Preprocessing().prepared(Image.new("L", size))


SEEDS: list[bytes] = []

for _format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
    _buffer = io.BytesIO()
    _exif = Image.Exif()
    _exif[ORIENTATION] = 6
    noise(24, 18).save(_buffer, _format, **({} if _format == "BMP" else {"exif": _exif}))
    SEEDS.append(_buffer.getvalue())


@examples(300)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    at_front=st.booleans(),
    kept=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_file_is_an_image_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    seed: bytes,
    changes: list[tuple[float, int]],
    at_front: bool,
    kept: float,
) -> None:
    content = bytearray(seed)
    for place, value in changes:
        content[int(place * (min(100, len(content)) if at_front else len(content)))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.img"
    path.write_bytes(content[: round(kept * len(content))])
    try:
        assert load(path).mode == "RGB"
    except ImageError as error:
        assert "damaged.img" in error.message

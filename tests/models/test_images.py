"""Photographs: prepared as upstream's evaluation does, and refused in one sentence when they are none."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinoexport import images
from dinoexport.config import resources
from dinoexport.config.recipe import parse
from dinoexport.errors import UsageError
from dinoexport.images import ImageError, Preprocessing, load
from dinoexport.models.dinov2 import cases, serving
from dinoexport.models.dinov2.cases import CaseTable, from_folder, read_case
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Array, silent
from tests.image_inputs import taken
from tests.properties import examples

PHOTOGRAPHS = {
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
ORIENTATION = 0x0112


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture without two equal parts, RGB."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int = 64, height: int = 48) -> Image.Image:
    """A picture JPEG keeps nearly as it is: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3, y * 4, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        load(path)
    assert str(path) in caught.value.message
    assert caught.value.next_step
    assert isinstance(caught.value, UsageError)
    return caught.value.message


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


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds a handful of bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


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


# Preparation


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


# Cases


def case_folder(tmp_path: Path, **pictures: Image.Image) -> Path:
    (tmp_path / "images").mkdir()
    for name, picture in pictures.items():
        saved(tmp_path / "images" / f"{name}.png", picture)
    return tmp_path


def test_photographs_make_a_batch_in_their_order(tmp_path: Path) -> None:
    folder = case_folder(tmp_path, a=noise(300, 225, seed=1), b=noise(225, 300, seed=2))
    table = {"name": "both", "why": "two of the tests' pictures", "photographs": ["b.png", "a.png"]}
    case = read_case(table, folder, taken(as_bytes=True, strict=False))
    assert case.inputs["images"].shape == (2, 224, 224, 3)
    for place, name in enumerate(("b", "a")):
        expected = Preprocessing().prepared(load(folder / "images" / f"{name}.png"))
        assert np.array_equal(case.inputs["images"][place], expected)
    pixels = read_case(table, folder, taken(as_bytes=False, strict=False)).inputs["pixels"]
    assert np.array_equal(pixels, Preprocessing().normalised(case.inputs["images"]))


def test_a_photograph_of_its_own_size(tmp_path: Path) -> None:
    picture = noise(45, 31)
    folder = case_folder(tmp_path, a=picture, tiny=noise(40, 13))
    table = {"name": "own", "why": "one of the tests' pictures", "photographs": ["a.png"], "prepare": "own_size"}
    assert np.array_equal(
        read_case(table, folder, taken(as_bytes=True, strict=False)).inputs["images"][0], np.asarray(picture)
    )
    strict = read_case(table, folder, taken(as_bytes=True, strict=True)).inputs["images"][0]
    assert np.array_equal(strict, np.asarray(picture)[:28, :42])
    with pytest.raises(ImageError, match=r"tiny\.png: smaller than one patch"):
        read_case(table | {"photographs": ["tiny.png"]}, folder, taken(as_bytes=True, strict=False))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_noise_cases(strict: bool, as_bytes: bool, tmp_path: Path) -> None:
    table = {"name": "odd", "why": "noise of the tests", "batch": 3, "height": 28, "width": 43}
    case = read_case(table, tmp_path, taken(as_bytes=as_bytes, strict=strict))
    (array,) = case.inputs.values()
    assert (array.shape, array.dtype) == (((3, 28, 43, 3), np.uint8) if as_bytes else ((3, 3, 28, 43), np.float32))
    assert case.expect_refusal == strict
    assert not read_case(table | {"width": 42}, tmp_path, taken(as_bytes=as_bytes, strict=strict)).expect_refusal
    again = next(iter(read_case(table, tmp_path, taken(as_bytes=as_bytes, strict=strict)).inputs.values()))
    assert np.array_equal(array, again)
    other = next(
        iter(read_case(table | {"seed": 1}, tmp_path, taken(as_bytes=as_bytes, strict=strict)).inputs.values())
    )
    assert not np.array_equal(array, other)
    assert not np.array_equal(array[0], array[1])


@pytest.mark.parametrize("name", ["../secret.png", "/etc/x.png", "a/b.png", "..", ".", "", "a/"])
def test_a_photograph_is_a_name_not_a_path(name: str, tmp_path: Path) -> None:
    case_folder(tmp_path)
    table = {"name": "one", "why": "a picture of the tests", "photographs": [name]}
    with pytest.raises(UsageError, match="not paths"):
        read_case(table, tmp_path, taken(as_bytes=True, strict=False))


@pytest.mark.parametrize(
    ("table", "because"),
    [
        ({}, "give height and width, or photographs"),
        ({"height": 28}, "give height and width, or photographs"),
        ({"height": 28, "width": 0}, "'width"),
        ({"height": 28, "width": 28, "batch": 0}, "'batch'"),
        ({"height": 28, "width": 28, "prepare": "own_size"}, "give height and width, or photographs"),
        ({"photographs": ["a.png"], "height": 28, "width": 28}, "height, width: only for noise"),
        ({"photographs": ["a.png"], "height": 28}, "height: only for noise"),
        ({"photographs": ["a.png"], "batch": 2}, "batch: only for noise"),
        ({"photographs": ["a.png"], "prepare": "evaluations"}, "Did you mean 'evaluation'"),
        ({"photographs": ["a.png", "b.png"], "prepare": "own_size"}, "one per case"),
        ({"photograph": ["a.png"]}, "Did you mean 'photographs'"),
    ],
)
def test_a_case_that_says_too_much_or_too_little_is_refused(table: dict[str, Any], because: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(CaseTable, {"name": "one", "why": "a case of the tests", **table}, where="case one")
    assert because in caught.value.message


def test_a_folder_gives_sorted_cases_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "b" / "c.png").mkdir(parents=True)  # a folder with an image's name
    saved(tmp_path / "z.png", noise(20, 20, seed=1))
    saved(tmp_path / "b" / "y.JPG", noise(30, 20, seed=2), format="JPEG")
    saved(tmp_path / "b" / "c.png" / "x.webp", noise(20, 30, seed=3), lossless=True)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "b" / "broken.jpg").write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    saved(tmp_path / "moving.gif", noise(5, 5))
    saved(tmp_path / "thin.png", noise(1, 1200))
    (tmp_path / "zz.txt").write_text("notes")
    (tmp_path / ".DS_Store").write_text("hidden")
    told: list[tuple[int, int]] = []
    everything = list(
        from_folder(tmp_path, taken(as_bytes=True), progress=lambda doing, done, total: told.append((done, total)))
    )
    found = [case for case in everything if not isinstance(case, str)]
    skipped = [line for line in everything if isinstance(line, str)]
    assert [case.name for case in found] == ["b/c.png/x.webp", "b/y.JPG", "z.png"]
    assert [line.split(": ")[0] for line in skipped] == [
        str(tmp_path / name) for name in ("b/broken.jpg", "broken.jpg", "gone.png", "moving.gif", "thin.png", "zz.txt")
    ]
    assert told == [(i, 9) for i in range(1, 10)]
    picture = Preprocessing().prepared(load(tmp_path / "z.png"))
    assert np.array_equal(found[2].inputs["images"], picture[np.newaxis])
    as_pixels = [
        case for case in from_folder(tmp_path, taken(as_bytes=False), progress=silent) if not isinstance(case, str)
    ]
    assert np.array_equal(as_pixels[2].inputs["pixels"], Preprocessing().normalised(picture[np.newaxis]))


def test_an_empty_folder_gives_nothing(tmp_path: Path) -> None:
    assert list(from_folder(tmp_path, taken(as_bytes=True), progress=silent)) == []


def test_images_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """However many there are, the first is there before the second is opened."""
    for i in range(3):
        saved(tmp_path / f"{i}.png", noise(20, 20, seed=i))
    reading = from_folder(tmp_path, taken(as_bytes=True), progress=silent)
    next(reading)
    (tmp_path / "1.png").write_bytes(b"gone meanwhile")
    assert isinstance(next(reading), str) and not isinstance(next(reading), str)


def test_the_crop_keeps_the_top_left() -> None:
    pictures = np.random.RandomState(0).randint(0, 256, (2, 29, 55, 3), dtype=np.uint8)
    assert np.array_equal(cases.cropped(pictures), pictures[:, :28, :42])
    assert np.array_equal(cases.cropped(pictures[:, :28, :42]), pictures[:, :28, :42])


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


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"x", "broken.png": b"x"}])
def test_samples_without_one_readable_image_are_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (graph,) = pipeline.build_request("vits14").model.graphs
    with pytest.raises(UsageError, match="holds no image") as caught:
        serving.front_ends(graph, taken(as_bytes=False), tmp_path, progress=silent)
    assert "--samples" in caught.value.next_step

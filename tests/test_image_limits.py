"""What an image may be: its size, its preparation, and the forms in which it is given."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dinoexport import images
from dinoexport.errors import InputRefused, UsageError
from dinoexport.images import ImageError, Preprocessing
from tests.pictures import ORIENTATION, chunk, noise, png_header, refused, saved


def png(image: Image.Image, **options: Any) -> bytes:
    stored = io.BytesIO()
    image.save(stored, options.pop("form", "PNG"), **options)
    return stored.getvalue()


XMP = chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>')


# Sizes


@pytest.mark.parametrize(
    ("chosen", "most"),
    [(None, 64_000_000), ("1", 1), ("999999999999", 999_999_999_999), ("0", None), ("1000000000000", None),
     ("-1", None), ("1e6", None), ("", None), (" 1", None), ("\N{ARABIC-INDIC DIGIT THREE}", None)],
)  # fmt: skip
def test_the_environment_sets_the_largest_image(
    chosen: str | None, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen is not None:
        monkeypatch.setenv("DINOEXPORT_MAX_PIXELS", chosen)
    if most is not None:
        assert images.max_pixels() == most
        return
    with pytest.raises(UsageError) as told:
        images.max_pixels()
    assert told.value.message == f"$DINOEXPORT_MAX_PIXELS is {chosen!r}, not a number of pixels."


def test_64_million_pixels_are_an_image(tmp_path: Path) -> None:
    """One more column of pixels is refused by its size; here all pixels are missing too, which comes later."""
    (tmp_path / "x.png").write_bytes(png_header(8000, 8000))
    assert "truncated" in refused(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(png_header(8001, 8000))
    limit = "64 Mpx ($DINOEXPORT_MAX_PIXELS sets another limit)"
    assert refused(tmp_path / "x.png") == f"{tmp_path / 'x.png'}: 8001x8000 is more than {limit}."


def test_256_mebibytes_are_a_file(tmp_path: Path) -> None:
    """Sparse files: nothing of them is read."""
    for size, words in (
        (1 << 28, ": not a readable image"),
        ((1 << 28) + 1, r"png: (?!not a readable).*268,?435,?45[67]"),
    ):
        with (tmp_path / "x.png").open("wb") as file:
            file.truncate(size)
        with pytest.raises(ImageError, match=words):
            images.size_of(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("orientation", "turned"), [(None, False), (1, False), (2, False), (3, False), (4, False), (5, True), (6, True),
                                (7, True), (8, True), (9, False)],
)  # fmt: skip
def test_the_size_is_that_of_the_upright_picture(orientation: int | None, turned: bool) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    encoded = png(noise(24, 16), exif=exif)
    assert images.size_of(encoded, named="x") == ((24, 16) if turned else (16, 24))
    decoded = images.decode(encoded, named="x")
    assert (decoded.height, decoded.width) == images.size_of(encoded, named="x")


def test_the_size_of_a_png_needs_no_pixels(tmp_path: Path) -> None:
    """Here nearly all of them are missing. A comment after them, as ImageMagick writes it, says nothing of them."""
    cut = png_header(30, 20)
    comment = chunk(b"tEXt", b"date:create\0" + b"2" * 40)
    (tmp_path / "x.png").write_bytes(cut)
    assert images.size_of(cut, named="x") == images.size_of(tmp_path / "x.png") == (20, 30)
    assert images.size_of(cut[:-12] + comment + cut[-12:]) == (20, 30)
    assert images.size_of(cut[:33] + XMP + cut[33:]) == (30, 20)
    assert "truncated" in refused(tmp_path / "x.png")


@pytest.mark.parametrize("first", [True, False], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize(
    "said",
    [
        lambda exif: chunk(b"eXIf", exif),
        lambda exif: chunk(b"tEXt", b"Raw profile type exif\0\nexif\n   %d\n" % len(exif) + exif.hex().encode()),
        lambda _: XMP,
    ],
    ids=["EXIF", "EXIF in a text", "XMP"],
)
def test_a_png_may_say_its_orientation_after_the_pixels(said: Any, first: bool) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    plain = png(noise(24, 16))
    place = plain.index(b"IDAT") - 4 if first else len(plain) - 12
    encoded = plain[:place] + said(exif.tobytes().removeprefix(b"Exif\0\0")) + plain[place:]
    decoded = images.decode(encoded, named="x")
    assert images.size_of(encoded, named="x") == (decoded.height, decoded.width) == (24, 16)


def test_what_has_no_size_is_named_as_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"text")
    words = "not a readable image (none of JPEG, PNG, WEBP, BMP, TIFF)."
    for given, named, shown in ((tmp_path / "x.png", "", str(tmp_path / "x.png")), (b"text", "image 3", "image 3")):
        with pytest.raises(ImageError) as told:
            images.size_of(given, named=named)
        assert told.value.message == f"{shown}: {words}"


# Preparation


def test_the_defaults_are_upstreams() -> None:
    assert Preprocessing().model_dump() == {
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "resize": 256, "crop": 224,
        "interpolation": "bicubic",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"resize": 1, "crop": 1}, ""), ({"resize": (1, 1), "crop": (1, 1)}, ""), ({"mean": (0.5,), "std": (0.5,)}, ""),
        ({"resize": (8000, 8000), "crop": (6400, 10_000)}, ""),
        ({"resize": 0}, "at least one pixel"), ({"crop": 0}, "at least one"), ({"resize": (5, 0)}, "at least one"),
        ({"crop": (0, 5)}, "at least one pixel"), ({"resize": (8000, 8001)}, "64,000,000 pixels at most"),
        ({"crop": 8001}, "64,000,000 pixels at most"), ({"mean": (), "std": ()}, "at least 1 item"),
        ({"mean": (0.5,)}, "mean has 1 channels, std has 3"), ({"std": (1.0, 1.0, 0.0)}, "std greater than 0"),
        ({"mean": (float("inf"), 0.0, 0.0)}, "finite numbers"), ({"std": (1.0, 1.0, -1.0)}, "std greater than 0"),
    ],
)  # fmt: skip
def test_what_can_be_prepared(given: dict[str, Any], words: str) -> None:
    if not words:
        Preprocessing(**given)
    else:
        with pytest.raises(ValidationError, match=words):
            Preprocessing(**given)


@pytest.mark.parametrize(
    ("size", "resized"), [((40, 20), (20, 10)), ((20, 40), (10, 20)), ((20, 20), (10, 10)), ((21, 20), (10, 10))]
)
def test_the_shorter_side_is_resized(size: tuple[int, int], resized: tuple[int, int]) -> None:
    """(width, height) of both."""
    picture = noise(*size)
    expected = picture.resize(resized, Image.Resampling.NEAREST)
    left, top = (resized[0] - 10) // 2, (resized[1] - 10) // 2
    found = Preprocessing(resize=10, crop=10, interpolation="nearest").prepared(picture)
    assert np.array_equal(found, np.asarray(expected.crop((left, top, left + 10, top + 10))))


@pytest.mark.parametrize(
    ("size", "covered", "scaled"),
    [((90, 60), (30, 30), (45, 30)), ((60, 90), (30, 20), (20, 30)), ((7, 5), (10, 10), (14, 10)),
     ((100, 3), (6, 50), (200, 6)), ((33, 100), (10, 5), (5, 15))],
)  # fmt: skip
def test_covering_scales_until_both_sides_fit(
    size: tuple[int, int], covered: tuple[int, int], scaled: tuple[int, int]
) -> None:
    """size, scaled: (width, height); covered: (height, width)."""
    picture, (height, width) = noise(*size), covered
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    expected = picture.resize(scaled, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    assert np.array_equal(Preprocessing(interpolation="bilinear").covering(picture, covered), np.asarray(expected))


def test_the_largest_that_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOEXPORT_MAX_PIXELS", "800")
    prepares = Preprocessing(resize=20, crop=4)
    assert prepares.prepared(Image.new("RGB", (40, 20))).shape == (4, 4, 3)
    with pytest.raises(UsageError, match="of 41x20 is too long and thin"):
        prepares.prepared(Image.new("RGB", (41, 20)))


def test_two_channels_are_shown_as_the_first() -> None:
    pixels = np.array([[[0.1, 0.2]], [[0.8, 0.9]]])
    shown = Preprocessing(mean=(0.0, 0.0), std=(1.0, 1.0)).shown(pixels)
    assert shown.tolist() == [[[0.1, 0.1, 0.1], [0.2, 0.2, 0.2]]]


def test_a_tall_picture_of_16_bits_is_scaled_everywhere() -> None:
    """It is done some rows at a time; white is 255, not more."""
    values = np.arange(600 * 2, dtype=np.uint16).reshape(600, 2) * 54
    values[-1] = 65535
    found = np.asarray(images.decode(png(Image.fromarray(values)), named="x"))[..., 0]
    assert np.array_equal(found, np.round(values / 257).astype(np.uint8)) and found[-1].tolist() == [255, 255]


# What is given


def spoken(given: bytes) -> str:
    with pytest.raises(ImageError) as told:
        images.decode(given, named="image 3")
    return told.value.message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("prefix", [b"", b"data:image/png;base64,", b" \n"])
def test_base64_is_recognised(form: str, prefix: bytes) -> None:
    raw = png(noise(24, 18), form=form)
    for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw), base64.encodebytes(raw)):
        assert spoken(prefix + encoded) == "image 3: it is base64; send the bytes of the image file."


def test_the_first_64_bytes_show_base64() -> None:
    for encoded in (base64.b64encode(png(noise(24, 18)))[:64] + b"!" * 9, b"/9j/"):
        assert spoken(encoded) == "image 3: it is base64; send the bytes of the image file."


@pytest.mark.parametrize(
    "given",
    [b"", b"A photograph", base64.b64encode(b"text that is none" * 9), b"!" + base64.b64encode(png(noise(9, 9))),
     b"data:text/plain;base64," + base64.b64encode(png(noise(9, 9))), b"AAA", b"A===", b"GIF89a" * 20],
)  # fmt: skip
def test_what_is_neither_an_image_nor_base64(given: bytes) -> None:
    assert spoken(given) == "image 3: not a readable image (none of JPEG, PNG, WEBP, BMP, TIFF)."


def modes() -> dict[str, Image.Image]:
    picture = noise(6, 5)
    wide = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000)
    named = {mode: picture.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")}
    return named | {"I;16": wide}


@pytest.mark.parametrize("mode", list(modes()))
def test_an_open_image_is_encoded_without_loss(mode: str) -> None:
    """What a PNG cannot hold is converted first."""
    image = modes()[mode]
    exif = image.getexif()
    exif[ORIENTATION] = 3
    encoded = images.encoded(image)
    found = np.asarray(images.decode(encoded, named="x"))
    upright = images._eight_bit(image, "PNG").convert("RGB")
    assert np.array_equal(found, np.asarray(upright)[::-1, ::-1])
    with Image.open(io.BytesIO(encoded)) as stored:
        kept = mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        assert stored.format == "PNG" and stored.mode in ((mode, "I") if kept else ("RGB",))


def test_an_open_image_is_encoded_without_compression() -> None:
    """It is decoded at once."""
    assert len(images.encoded(Image.new("RGB", (100, 100)))) > 3 * 100 * 100


@pytest.mark.parametrize("has", ["save", "mode"])
def test_what_only_saves_or_has_a_mode_is_no_image(has: str) -> None:
    with pytest.raises(InputRefused) as told:
        images.encoded(SimpleNamespace(**{has: "RGB"}))
    assert told.value.message == "A SimpleNamespace is not an image."


def test_files_and_bytes_are_given_as_they_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", noise(5, 4))
    assert images.encoded(path) == images.encoded(str(path)) == images.encoded(path.read_bytes()) == path.read_bytes()
    for wrong, words in (
        (tmp_path / "none.png", "none.png"), (7, "A int is not an image."), (None, "A NoneType is not an image."),
        (noise(4, 4).convert("F"), "An image in 32-bit grey has no standard range."),
        (noise(4, 4).convert("I"), "An image in 32-bit grey has no standard range."),
    ):  # fmt: skip
        with pytest.raises(InputRefused) as told:
            images.encoded(wrong)
        assert words in told.value.message

"""Decode photographs safely, and resize, crop and normalise them as a recipe says.

Pictures are uint8 RGB, (height, width, 3); normalised images are float32, (batch, channels, height, width).
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import isfinite, prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self

from pydantic import Field, model_validator

from dinoexport.config.recipe import Frozen
from dinoexport.errors import InputRefused, UsageError
from dinoexport.spec import Array
from dinoexport.system import untrusted
from dinoexport.system.untrusted import Unreadable

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# A decoded image of 64 Mpx is 192 MB; a larger one is refused before it is decoded, and no resize gives a larger one.
MAX_PIXELS = 64_000_000
MAX_PIXELS_VARIABLE = "DINOEXPORT_MAX_PIXELS"
# A file of that many pixels, in any form but an uncompressed one of 16 bits: what is larger is not opened.
MAX_BYTES = 1 << 28
_ROWS_AT_ONCE = 256
# ImageNet's mean and deviation per RGB channel, on pixels in 0..1 (upstream dinov2/data/transforms.py).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# EXIF's tag and the four of its eight values that exchange height and width.
_ORIENTATION, _QUARTER_TURNS = 0x0112, frozenset({5, 6, 7, 8})


def max_pixels() -> int:
    """The largest number of pixels of an image: MAX_PIXELS, or the environment's; raises UsageError if not a number."""
    chosen = os.environ.get(MAX_PIXELS_VARIABLE)
    if chosen is None:
        return MAX_PIXELS
    if not re.fullmatch(r"[1-9]\d{0,11}", chosen, re.ASCII):
        raise UsageError(
            f"${MAX_PIXELS_VARIABLE} is {chosen!r}, not a number of pixels.", next_step="Set it to 64000000."
        )
    return int(chosen)


Side = int
Pair = tuple[int, int]  # (height, width) in pixels


class Preprocessing(Frozen):
    """The `[preprocess]` table: the preparation that a model expects. Default: upstream's evaluation on ImageNet."""

    mean: tuple[float, ...] = Field(
        default=IMAGENET_MEAN,
        min_length=1,
        description="Per channel, on pixels in 0..1. Weights do not show it.",
    )
    std: tuple[float, ...] = Field(
        default=IMAGENET_STD, min_length=1, description="Deviation per channel, on pixels in 0..1; see mean."
    )
    resize: Side | Pair = Field(
        default=256,
        description="Pixels of the shorter side before the crop; or [height, width], whatever the image's aspect.",
    )
    crop: Side | Pair = Field(default=224, description="Side of the centre crop in pixels, or [height, width].")
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] = Field(
        default="bicubic", description="How an image is resized."
    )

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}")
        if not all(isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError("mean and std need finite numbers, std greater than 0")
        if min(*_pair(self.resize), *self.crop_size) < 1:
            raise ValueError("resize and crop need at least one pixel a side")
        if max(prod(_pair(self.resize)), prod(self.crop_size)) > MAX_PIXELS:
            raise ValueError(f"resize and crop may have {MAX_PIXELS:,} pixels at most")
        return self

    @property
    def crop_size(self) -> Pair:
        """(height, width) of what `prepared` gives."""
        return _pair(self.crop)

    def prepared(self, image: Image.Image) -> Array:
        """The image resized and centre-cropped, (height, width, 3), with torchvision's rounding."""
        import numpy as np

        resized = _resized(image, self._resized_size(image), self.interpolation)
        height, width = self.crop_size
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        return np.asarray(resized.crop((left, top, left + width, top + height)))

    def _resized_size(self, image: Image.Image) -> Pair:
        if not isinstance(self.resize, int):
            return self.resize
        shorter, longer = sorted(image.size)
        scaled = int(self.resize * longer / shorter)
        return (scaled, self.resize) if image.width <= image.height else (self.resize, scaled)

    def covering(self, image: Image.Image, size: Pair) -> Array:
        """The image scaled until it covers `size`, then centre-cropped: nothing is stretched or padded."""
        import numpy as np

        height, width = size
        scale = max(height / image.height, width / image.width)
        scaled = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
        resized = _resized(image, scaled, self.interpolation)
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        return np.asarray(resized.crop((left, top, left + width, top + height)))

    def normalised(self, pictures_BHWC: Array) -> Array:
        """uint8 (B, H, W, C) to float32 (B, C, H, W), as torchvision's ToTensor and Normalize."""
        import numpy as np

        scaled = pictures_BHWC.astype(np.float32) / np.float32(255)
        values = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))

    def shown(self, pixels_CHW: Array) -> Array:
        """Normalised pixels back as colours in 0..1, (H, W, 3): the first three channels, or the only one as grey."""
        import numpy as np

        colours = pixels_CHW.transpose(1, 2, 0) * np.array(self.std) + np.array(self.mean)
        rgb: Array = colours[..., :3] if colours.shape[-1] >= 3 else np.repeat(colours[..., :1], 3, axis=-1)
        return rgb


def _pair(side: Side | Pair) -> Pair:
    return (side, side) if isinstance(side, int) else side


def _resized(image: Image.Image, size: Pair, interpolation: str) -> Image.Image:
    from PIL import Image

    height, width = size
    if height * width > max_pixels():
        raise UsageError(
            f"An image of {image.width}x{image.height} is too long and thin to resize.", next_step="Leave it out."
        )
    return image.resize((width, height), Image.Resampling[interpolation.upper()])


class ImageError(UsageError):
    """A file, or data, that is not a usable image. named: its name for the user."""

    def __init__(self, named: Path | str, problem: str) -> None:
        super().__init__(f"{named}: {problem}.", next_step="Replace the file, or leave it out.")


def load(path: Path) -> Image.Image:
    """The image in `path` as 8-bit RGB, rotated by its EXIF orientation; an ImageError if it is not an image."""
    with _opened(path, named=path) as image:
        return _upright(image)


def decode(encoded: bytes, *, named: str) -> Image.Image:
    """The same for an encoded image in bytes; an error calls it `named`."""
    with _opened(io.BytesIO(encoded), named=named) as image:
        return _upright(image)


def size_of(source: Path | bytes, *, named: str = "") -> tuple[int, int]:
    """(height, width) of an image, in a file or encoded, as `load` would give it, from its header alone."""
    opened = source if isinstance(source, Path) else io.BytesIO(source)
    with _opened(opened, named=named or str(source)) as image:
        turned = _exif(image).get(_ORIENTATION) in _QUARTER_TURNS
        return (image.width, image.height) if turned else (image.height, image.width)


def _exif(image: Image.Image) -> Image.Exif:
    """The EXIF of an image that is not decoded; the pixels of a PNG are decoded only if EXIF comes after them."""
    from PIL import Image

    if image.format != "PNG":
        return image.getexif()
    if _says_more_after_pixels(image.fp):  # type: ignore[attr-defined]
        image.load()
    return Image.Image.getexif(image)  # a PNG's own decodes the pixels whenever there is no EXIF before them


def _says_more_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF, or a text from which Pillow takes an orientation, after its pixels."""
    before = file.tell()
    file.seek(8)
    found = pixels = False
    while not found and len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        start = file.read(min(length, 32))
        pixels = pixels or kind == b"IDAT"
        found = pixels and (kind == b"eXIf" or start.startswith((b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")))
        file.seek(length - len(start) + 4, os.SEEK_CUR)
    file.seek(before)
    return found


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, buffered; an ImageError for one that is absent, no regular file, or too large."""
    try:
        with untrusted.opened(path, max_bytes=MAX_BYTES) as file:
            raw: Any = file  # an unbuffered file is a raw stream
            buffered = io.BufferedReader(raw)
            try:
                yield buffered
            finally:
                buffered.detach()
    except Unreadable as error:
        raise ImageError(path, "no such file" if error.absent else error.problem) from None


@contextmanager
def _opened(source: Path | io.BytesIO, *, named: Path | str) -> Iterator[Image.Image]:
    """The image at `source`, not decoded yet; whatever is wrong with it, now or later, is an ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with ExitStack() as stack, warnings.catch_warnings():
            opened: BinaryIO = io.BytesIO() if isinstance(source, Path) else source
            if isinstance(source, Path):
                opened = stack.enter_context(_file(source))
            # Pillow warns about harmless defects and about large images, which are refused below.
            warnings.simplefilter("ignore")
            with Image.open(opened, formats=FORMATS) as image:
                if image.width * image.height > max_pixels():
                    limit = f"{max_pixels() / 1e6:g} Mpx (${MAX_PIXELS_VARIABLE} sets another limit)"
                    raise ImageError(named, f"{image.width}x{image.height} is more than {limit}")
                yield image
    except UnidentifiedImageError:
        if isinstance(source, io.BytesIO) and _is_base64(source.getvalue()):
            raise ImageError(named, "it is base64; send the bytes of the image file") from None
        raise ImageError(named, f"not a readable image (none of {', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports damaged files with all of these.
        raise ImageError(named, f"not a readable image ({error})") from None


def _is_base64(encoded: bytes) -> bool:
    """Whether these bytes are an image in base64, as JSON requests often send it."""
    from base64 import b64decode

    start = encoded[:64].strip()
    if not re.fullmatch(rb"(data:image/[a-z.+-]+;base64,)?[A-Za-z0-9+/=_-]+", start):
        return False
    letters = start.rpartition(b",")[2]
    try:
        raw = b64decode(letters[: len(letters) // 4 * 4], altchars=b"-_" if set(b"-_") & set(letters) else None)
    except ValueError:
        return False
    return raw.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"II*\x00", b"MM\x00*"))


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return _eight_bit(ImageOps.exif_transpose(image), image.format).convert("RGB")


def _eight_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """16-bit grey scaled to 8 bits: Pillow's own conversion clips it at 255."""
    import numpy as np
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    # Older Pillows open 16-bit PNG as "I", which elsewhere is 32-bit.
    if image.mode in ("I", "F") and file_format != "PNG":
        raise ValueError("32-bit grey has no standard range")
    wide = np.asarray(image)
    narrow = np.empty(wide.shape, np.uint8)
    for top in range(0, len(wide), _ROWS_AT_ONCE):  # 63 Mpx in float64 at once, twice, would be 1 GB
        narrow[top : top + _ROWS_AT_ONCE] = (wide[top : top + _ROWS_AT_ONCE] / 257).round()
    return Image.fromarray(narrow)


# Pillow's modes that a PNG holds without loss, besides 16-bit grey.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})


def encoded(item: Any) -> bytes:
    """The bytes of an image file."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str | PathLike):
        try:
            return untrusted.read_bytes(Path(item), max_bytes=MAX_BYTES)
        except Unreadable as error:
            raise InputRefused(error.message, next_step=error.next_step) from None
    if hasattr(item, "save") and hasattr(item, "mode"):
        stored = io.BytesIO()
        if item.mode in ("I", "F"):
            raise InputRefused("An image in 32-bit grey has no standard range.", next_step="Scale it to 8 or 16 bits.")
        kept = item if item.mode in _PNG_MODES or item.mode.startswith("I;16") else item.convert("RGB")
        kept.save(stored, "PNG", compress_level=0, exif=item.getexif())
        return stored.getvalue()
    raise InputRefused(
        f"A {type(item).__name__} is not an image.", next_step="Give paths, encoded bytes, Pillow images or arrays."
    )

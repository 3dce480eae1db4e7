"""Decode photographs safely, and prepare them like the models' authors: resized and cropped with Pillow.

Arrays are uint8 RGB, (height, width, 3).
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dinoexport.errors import UsageError
from dinoexport.spec import Array

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# A decoded image of 64 Mpx is 192 MB; what is larger is refused before it is decoded, or resized to that.
MAX_PIXELS = 64_000_000
MAX_PIXELS_VARIABLE = "DINOEXPORT_MAX_PIXELS"
_ROWS_AT_ONCE = 256
# EXIF's tag and the four of its eight values that exchange height and width.
_ORIENTATION, _QUARTER_TURNS = 0x0112, frozenset({5, 6, 7, 8})


def max_pixels() -> int:
    """How many pixels an image may have: MAX_PIXELS, or what the environment says; a UsageError for no number."""
    chosen = os.environ.get(MAX_PIXELS_VARIABLE)
    if chosen is None:
        return MAX_PIXELS
    if not re.fullmatch(r"[1-9]\d{0,11}", chosen, re.ASCII):
        raise UsageError(
            f"${MAX_PIXELS_VARIABLE} is {chosen!r}, no number of pixels.", next_step="Set it to 64000000, say."
        )
    return int(chosen)


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
        turned = image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(source: Path | io.BytesIO, *, named: Path | str) -> Iterator[Image.Image]:
    """The image at `source`, not decoded yet; whatever is wrong with it, now or later, is an ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(source, Path) and not source.is_file():  # opening a pipe would wait for ever
            raise ImageError(named, "no such file")
        with warnings.catch_warnings():
            # Pillow warns of harmless oddities, and of large images, which are refused below.
            warnings.simplefilter("ignore")
            with Image.open(source, formats=FORMATS) as image:
                if image.width * image.height > max_pixels():
                    limit = f"{max_pixels() / 1e6:g} Mpx (${MAX_PIXELS_VARIABLE} sets another limit)"
                    raise ImageError(named, f"{image.width}x{image.height} is more than {limit}")
                yield image
    except UnidentifiedImageError:
        if isinstance(source, io.BytesIO) and _is_base64(source.getvalue()):
            raise ImageError(named, "it is base64, and images are taken as the bytes of a file") from None
        raise ImageError(named, f"not a readable image (none of {', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports damaged files with all of these.
        raise ImageError(named, f"not a readable image ({error})") from None


def _is_base64(encoded: bytes) -> bool:
    """Whether these are the letters of an image's bytes: what a JSON request is often made of."""
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
        raise ValueError("32-bit grey has no agreed range")
    wide = np.asarray(image)
    narrow = np.empty(wide.shape, np.uint8)
    for top in range(0, len(wide), _ROWS_AT_ONCE):  # 63 Mpx in float64 at once, twice, would be 1 GB
        rows = wide[top : top + _ROWS_AT_ONCE].astype(np.float64)
        narrow[top : top + _ROWS_AT_ONCE] = np.clip(rows / 257, 0, 255).round()
    return Image.fromarray(narrow)


def for_evaluation(image: Image.Image, *, resize: int = 256, crop: int = 224) -> Array:
    """Shorter side to `resize`, bicubic, then the central `crop` x `crop`.

    As dinov2/data/transforms.py make_classification_eval_transform, with torchvision's rounding.
    """
    import numpy as np
    from PIL import Image

    shorter, longer = sorted(image.size)
    scaled = int(resize * longer / shorter)
    if resize * scaled > max_pixels():
        raise UsageError(
            f"An image of {image.width}x{image.height} is too long and thin to resize.", next_step="Leave it out."
        )
    size = (resize, scaled) if image.width <= image.height else (scaled, resize)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - crop) / 2) for side in size)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))

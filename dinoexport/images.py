"""Decode photographs safely, and prepare them like the models' authors: resized and cropped with Pillow.

Arrays are uint8 RGB, (height, width, 3).
"""

from __future__ import annotations

import io
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
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# A decoded image of 64 Mpx is 192 MB; what is larger is refused before it is decoded, or resized to that.
MAX_PIXELS = 64_000_000
# EXIF's tag and the four of its eight values that exchange height and width.
_ORIENTATION, _QUARTER_TURNS = 0x0112, frozenset({5, 6, 7, 8})


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
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(named, f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} Mpx")
                yield image
    except UnidentifiedImageError:
        raise ImageError(named, f"not a readable image (none of {', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports damaged files with all of these.
        raise ImageError(named, f"not a readable image ({error})") from None


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
    values = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.clip(values / 257, 0, 255).round().astype(np.uint8))


def for_evaluation(image: Image.Image, *, resize: int = 256, crop: int = 224) -> Array:
    """Shorter side to `resize`, bicubic, then the central `crop` x `crop`.

    As dinov2/data/transforms.py make_classification_eval_transform, with torchvision's rounding.
    """
    import numpy as np
    from PIL import Image

    shorter, longer = sorted(image.size)
    scaled = int(resize * longer / shorter)
    if resize * scaled > MAX_PIXELS:
        raise UsageError(
            f"An image of {image.width}x{image.height} is too long and thin to resize.", next_step="Leave it out."
        )
    size = (resize, scaled) if image.width <= image.height else (scaled, resize)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - crop) / 2) for side in size)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))

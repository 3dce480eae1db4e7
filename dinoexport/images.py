"""Photographs as the models' authors prepare them: decoded safely, resized and cropped with Pillow.

Arrays are uint8 RGB, (height, width, 3).
"""

from __future__ import annotations

import warnings
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


class ImageError(UsageError):
    """A file that is no usable image."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}.", next_step="Replace the file, or leave it out.")


def load(path: Path) -> Image.Image:
    """The image in `path` as 8-bit RGB, turned upright by its EXIF orientation; an ImageError when it is none."""
    from PIL import Image, ImageOps

    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ImageError(path, "no such file")
        with warnings.catch_warnings():
            # Pillow warns of harmless oddities, and of large images, which are refused below.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(path, f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} Mpx")
                upright = ImageOps.exif_transpose(image)
                return _eight_bit(upright, image.format).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports damaged files with all of these.
        raise ImageError(path, f"not a readable image ({error})") from None


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

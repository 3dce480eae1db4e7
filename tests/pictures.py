"""Pictures for tests of reading them, and the error that a file that is none ends in."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.errors import UsageError
from dinoexport.images import ImageError, load

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


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds a handful of bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )

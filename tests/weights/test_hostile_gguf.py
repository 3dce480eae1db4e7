"""GGUF headers that claim what the file does not hold: refused at once, where the package's reader would never end."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from dinoexport.errors import WeightsError
from dinoexport.weights import gguf_file

START = b"GGUF" + struct.pack("<I", 3)
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "raw",
    [
        START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 4, 1 << 40),
        START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 8, 1 << 40),
        START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 20) + struct.pack("<IQ", 9, 1 << 30) * 9,
        START + struct.pack("<QQ", 0, 1 << 60),
        START + struct.pack("<QQ", 1 << 60, 0),
        START + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 1 << 30),
        START + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I9QIQ", 9, *[1] * 9, 0, 0),
        START + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 62),
        START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<I", 99),
    ],
)
def test_a_header_that_does_not_end_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(raw + bytes(64))
    started = time.monotonic()
    for read in (gguf_file.open_gguf, gguf_file.metadata):
        with pytest.raises(WeightsError):
            read(path)
    assert time.monotonic() - started < 20

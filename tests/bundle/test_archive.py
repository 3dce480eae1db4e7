"""An .npz from outside is never larger in memory than on the disk, and never unpickled."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dinoexport.bundle import archive
from dinoexport.errors import DinoexportError

DTYPES = npst.integer_dtypes() | npst.floating_dtypes() | npst.boolean_dtypes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(npst.arrays(DTYPES, npst.array_shapes(min_dims=0, min_side=0)), st.booleans())
def test_what_numpy_saves_comes_back(tmp_path: Path, array: Any, fortran: bool) -> None:
    array = np.asfortranarray(array) if fortran else array
    np.savez(tmp_path / "a.npz", one=array, **{"1/in/x": array[..., :0] if array.ndim else array})
    found = archive.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(found["one"], array)
    assert found["one"].dtype == array.dtype and set(found) == {"one", "1/in/x"}


def npy(header: str, data: bytes = b"") -> bytes:
    raw = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data


def zipped(content: bytes, *, compressed: bool = False, twice: bool = False) -> bytes:
    out = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as stored,
    ):
        for _ in range(1 + twice):
            stored.writestr("a.npy", content)
    return out.getvalue()


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }\n"
HOSTILE = {
    "4 GB in 4 MB": zipped(npy(PLAIN % (1 << 30), bytes(1 << 24)), compressed=True),
    "a shape beyond its data": zipped(npy(PLAIN % (1 << 40))),
    "a negative shape": zipped(npy(PLAIN % -4)),
    "objects": zipped(npy(PLAIN.replace("<f4", "|O") % 1, b"cos\nsystem\n")),
    "a header that runs": zipped(npy("__import__('os').abort()\n")),
    "a header nested without end": zipped(npy("(" * 5000 + "\n")),
    "an entry twice": zipped(npy(PLAIN % 0), twice=True),
    "no zip": b"PK\x03\x04",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_refused_takes_no_memory(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.npz").write_bytes(HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(Exception) as caught:
        archive.read(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    assert not isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(DinoexportError, match="not a regular file"):
        archive.read(tmp_path / "a.npz")

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
from numpy.lib import format as npyformat

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


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_versions_of_a_header(version: tuple[int, int], tmp_path: Path) -> None:
    out = io.BytesIO()
    npyformat.write_array(out, np.array([[1, 2], [3, 4]], np.int16, order="F"), version)
    (tmp_path / "a.npz").write_bytes(zipped(out.getvalue()))
    assert archive.read(tmp_path / "a.npz")["a"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (npy(PLAIN % 0).replace(b"NUMPY\1", b"NUMPY\3"), "a.npy has an unknown version"),
        (npy(PLAIN.replace("'<f4'", "[('x', '<f4')]") % 1, bytes(4)), "a.npy does not hold plain numbers"),
        (npy(PLAIN.replace("<f4", "|O") % 0), "a.npy does not hold plain numbers"),
        (npy(PLAIN % 1, bytes(5)), "a.npy declares 4 bytes and has another number"),
        (npy(PLAIN % 2, bytes(4)), "a.npy declares 8 bytes and has another number"),
    ],
)
def test_entries_that_are_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(zipped(content))
    with pytest.raises(ValueError, match=problem):
        archive.read(tmp_path / "a.npz")


def test_the_most_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_ENTRIES_MAX", 3)
    for count in (3, 4):
        np.savez(tmp_path / "a.npz", **{f"a{i}": np.zeros(1) for i in range(count)})
        if count == 3:
            assert len(archive.read(tmp_path / "a.npz")) == 3
        else:
            with pytest.raises(ValueError, match="too many entries"):
                archive.read(tmp_path / "a.npz")


def test_the_longest_header_and_the_largest_archive(tmp_path: Path) -> None:
    """16 KiB: one of a plain array has 128 bytes. And 4 GiB, of which nothing is read."""
    header = PLAIN % 2
    for length, taken in ((1 << 14, True), ((1 << 14) + 1, False)):
        padded = header[:-1].ljust(length - 1) + "\n"
        (tmp_path / "a.npz").write_bytes(zipped(npy(padded, bytes(8))))
        if taken:
            assert archive.read(tmp_path / "a.npz")["a"].tolist() == [0, 0]
        else:
            with pytest.raises(ValueError, match="Header info length"):
                archive.read(tmp_path / "a.npz")
    for size, problem in ((1 << 32, "not a zip file"), ((1 << 32) + 1, "no such file has more than 4,294,967,296")):
        os.truncate(tmp_path / "a.npz", 0)
        os.truncate(tmp_path / "a.npz", size)
        with pytest.raises((zipfile.BadZipFile, DinoexportError), match=problem):
            archive.read(tmp_path / "a.npz")

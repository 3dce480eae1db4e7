"""Every reader has a budget before it reads: sizes that a file declares are refused before memory is taken for them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import archive
from dinoexport.config import recipe
from dinoexport.errors import DinoexportError
from dinoexport.serving import address
from dinoexport.text import tokenizer
from dinoexport.weights import formats

HUGE = 1 << 40
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a manifest": (f"b/{bundle.MANIFEST}", lambda path: bundle.read_manifest(path.parent)),
    "a recipe": ("r.toml", lambda path: recipe.load(str(path))),
    "an .npz": ("reference.npz", archive.read),
    "headers": ("headers", lambda path: address.parse("http://host", headers=path)),
    "a tokenizer": (tokenizer.JSON, tokenizer.load),
    "weights": ("w.safetensors", formats.shapes_of),
    "a pickle": ("w.pth", formats.shapes_of),
    "a GGUF": ("w.gguf", formats.shapes_of),
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_a_terabyte_is_refused_before_it_is_read(kind: str, tmp_path: Path) -> None:
    """The file takes no room on the disk; reading it would take hours, or all memory."""
    name, reads = READERS[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(HUGE)
    with pytest.raises(DinoexportError) as caught:
        reads(path)
    assert caught.value.message and caught.value.next_step


def npz(path: Path, **how: object) -> Path:
    np.savez(path, **{name: np.zeros(4, np.float32) for name in "ab"})
    with zipfile.ZipFile(path) as stored:
        entries = {entry: stored.read(entry) for entry in stored.namelist()}
    with zipfile.ZipFile(path, "w", **how) as made:  # type: ignore[arg-type]
        for name, content in entries.items():
            made.writestr(name, content)
    return path


def test_an_npz_that_grows_when_it_is_read_is_refused(tmp_path: Path) -> None:
    assert sorted(archive.read(npz(tmp_path / "right.npz"))) == ["a", "b"]
    with pytest.raises(ValueError, match="compressed"):
        archive.read(npz(tmp_path / "compressed.npz", compression=zipfile.ZIP_DEFLATED))
    declares = tmp_path / "declares.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(declares, "w") as made:
        made.writestr("a.npy", header.getvalue() + bytes(16))
    with pytest.raises(ValueError, match="declares 4398046511104 bytes"):
        archive.read(declares)

"""Every reader has a budget before it reads: sizes that a file declares are refused before memory is taken for them."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import archive
from dinoexport.config import recipe
from dinoexport.errors import DinoexportError, UsageError
from dinoexport.pipeline.fit import examples
from dinoexport.serving import address
from dinoexport.system import store
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


def test_a_photograph_of_16_bit_grey_takes_little_memory(tmp_path: Path) -> None:
    """63 megapixels, 126 MB as they are stored; a copy of them in 32-bit floats alone takes twice that."""
    from PIL import Image

    path = tmp_path / "large.png"
    Image.new("I;16", (7900, 7974), 4000).save(path, compress_level=1)
    code = (
        "import sys, resource, pathlib; from dinoexport import images; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; image = images.load(pathlib.Path(sys.argv[1])); "
        "print(image.mode, image.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    mode, *size, grown_kb = ran.stdout.replace("(", "").replace(")", "").replace(",", "").split()
    assert (mode, size) == ("RGB", ["7900", "7974"])
    assert int(grown_kb) < 700_000, "three bytes for each pixel of the result, and strips of what they are made from"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A class folder's name becomes a label in the bundle, an image's name a part of its hash."""

    class Source:
        def __init__(self, name: str) -> None:
            self.name = name

        def cases_from(self, folder: Path, **_: object) -> list[object]:
            return [type("Case", (), {"name": self.name, "label": self.name.partition("/")[0]})]

    for label in "ab":
        (tmp_path / label).mkdir()
    for name in ("caf\udce9/1.png", "a/1\udce9.png"):
        with pytest.raises(UsageError, match="is not UTF-8"):
            examples.read(Source(name), tmp_path, seed=0)  # type: ignore[arg-type]


def test_a_place_on_disk_opens_only_regular_files(tmp_path: Path) -> None:
    """Somebody else may write to the folder of a long run."""
    import os

    place = store.LocalPlace(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "secret").symlink_to("/etc/passwd")
    for name in ("pipe", "device", "secret"):
        with pytest.raises(UsageError, match="not a regular file"):
            place.read(name)
    with pytest.raises(FileNotFoundError):
        place.read("absent")

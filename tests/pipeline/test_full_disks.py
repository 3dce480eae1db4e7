"""Places that cannot be written to, and disks that fill: one sentence, and nothing half made."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.errors import MissingRequirement
from dinoexport.pipeline.workspace import key_of
from tests.pipeline.made_bundles import Maker, build, everything_below


@pytest.mark.parametrize("parts", [("file", "out"), ("file", "deep", "out")])
def test_a_place_below_a_file_gives_one_sentence(place: Path, parts: tuple[str, ...]) -> None:
    (place / "file").write_text("mine")
    with pytest.raises(MissingRequirement, match="cannot be written") as caught:
        build(place.joinpath(*parts), Maker())
    assert str(place.joinpath(*parts)) in caught.value.message
    assert "Choose a place" in caught.value.next_step
    assert (place / "file").read_text() == "mine"


def test_a_folder_without_permission_gives_one_sentence(place: Path) -> None:
    place.chmod(0o500)
    if os.access(place, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        with pytest.raises(MissingRequirement, match="cannot be written"):
            build(place / "out", Maker())
        with pytest.raises(MissingRequirement, match="cannot be written"):
            build(place / "deep" / "out", Maker())
    finally:
        place.chmod(0o700)


@pytest.mark.parametrize("call", ["mkdir", "is_dir"])
def test_a_refusal_of_the_system_gives_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The same for root: the system's answer is simulated."""
    out = place / "out"
    build(out, Maker())
    real = getattr(Path, call)

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if place in (path, *path.parents):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, call, denied)
    with pytest.raises(MissingRequirement, match="cannot be written: Permission denied"):
        build(out, Maker(), key=key_of(weights="b"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_nothing_half_made(place: Path, number: int) -> None:
    def full(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(MissingRequirement, match="No room left") as caught:
        build(place / "out", full)
    assert "Free some space" in caught.value.next_step
    assert everything_below(place) == []


def test_a_disk_that_fills_while_publishing_keeps_the_old_bundle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "out"
    build(out, Maker(content=b"old"))
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == bundle.MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(MissingRequirement):
            build(out, Maker(content=b"new"), key=key_of(weights="b"))
    assert not list(place.rglob("*.partial"))
    bundle.verify(out)
    assert (out / "model.onnx").read_bytes() == b"old"
    assert build(out, Maker(content=b"new"), key=key_of(weights="b")).reused


def test_a_limit_on_file_sizes_is_a_full_disk(place: Path) -> None:
    """The system's own refusal, not a simulated one: no file of this process may grow past 64 kB."""
    code = (
        "import sys; from pathlib import Path; from dinoexport.pipeline.workspace import workspace\n"
        "from dinoexport.errors import MissingRequirement\n"
        "make = lambda folder: (folder / 'model.onnx').write_bytes(bytes(1 << 20))\n"
        "try:\n"
        "    with workspace(Path(sys.argv[1]), force=False, progress=lambda *_: None) as work:\n"
        "        work.stage('export', 'a' * 64, make)\n"
        "except MissingRequirement as error: print(error.message, '|', error.next_step)\n"
    )
    result = subprocess.run(
        [sys.executable, "-B", "-c", code, str(place / "out")],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert "No room left while writing" in result.stdout
    assert everything_below(place) == []


def test_a_disk_without_links_gets_copies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    out, make = place / "out", Maker()
    build(out, make)
    assert build(out, make).reused
    bundle.verify(out)


def test_no_cache_is_needed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the home folder is often nobody's to write to."""
    (place / "file").write_text("")
    monkeypatch.setenv("DINOEXPORT_CACHE", str(place / "file" / "cache"))
    build(place / "out", Maker())
    assert everything_below(place) == ["file", "out", "out/manifest.json", "out/model.onnx"]

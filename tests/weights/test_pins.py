"""A file whose hash nobody recorded: that of its first download is kept, and holds for every later one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dinoexport.config.recipe import WeightFile
from dinoexport.errors import WeightsError
from dinoexport.spec import silent
from dinoexport.weights import download, pins

URL = "https://dl.example/weights.pth"


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were asked; each download has content of its own."""
    asked: list[str] = []

    def fetch(file: WeightFile, *, progress: object) -> Path:
        asked.append(file.url)
        path = tmp_path / f"download {len(asked)}"
        path.write_bytes(b"weights %d" % len(asked))
        return path

    monkeypatch.setattr(download, "fetch_unknown", fetch)
    return asked


def test_a_recorded_hash_is_used(fetched: list[str]) -> None:
    file = WeightFile(url=URL, sha256="0" * 64)
    assert pins.with_hash(file, progress=silent) is file and not fetched


def test_the_first_downloads_hash_is_kept(fetched: list[str], tmp_path: Path) -> None:
    """The file lies where a download of that hash lies, and nothing is left half written."""
    first = pins.with_hash(WeightFile(url=URL), progress=silent)
    assert first.sha256 == hashlib.sha256(b"weights 1").hexdigest()
    assert download.cached_path(first).read_bytes() == b"weights 1" and not (tmp_path / "download 1").exists()
    assert pins.with_hash(WeightFile(url=URL), progress=silent) == first and fetched == [URL]
    pin = pins._pin(WeightFile(url=URL))
    assert pin.read_text() == f"{first.sha256}  {URL}\n" and list(pin.parent.iterdir()) == [pin]
    other = pins.with_hash(WeightFile(url=f"{URL}2"), progress=silent)
    assert other.sha256 == hashlib.sha256(b"weights 2").hexdigest()


@pytest.mark.parametrize("content", ["", "0" * 64, f"{'0' * 63}  {URL}", f" {'0' * 64}  {URL}", "G" * 64 + "  "])
def test_a_pin_that_holds_no_hash(content: str, fetched: list[str]) -> None:
    pin = pins._pin(WeightFile(url=URL))
    pin.parent.mkdir(parents=True)
    pin.write_text(content)
    with pytest.raises(WeightsError, match="holds no SHA-256"):
        pins.with_hash(WeightFile(url=URL), progress=silent)
    assert not fetched


def test_folders_may_be_there_before(fetched: list[str]) -> None:
    digest = hashlib.sha256(b"weights 1").hexdigest()
    for path in (download.cached_path(WeightFile(url=URL, sha256=digest)), pins._pin(WeightFile(url=URL))):
        path.parent.mkdir(parents=True)
    assert pins.with_hash(WeightFile(url=URL), progress=silent).sha256 == digest and fetched == [URL]

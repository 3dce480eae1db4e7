"""`make gallery` as a reader runs it: the chosen head alone, the page and its pictures in a folder of their own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoexport import images
from scripts import gallery
from tests.conftest import DATA

DOCS = Path(__file__).parent.parent / "docs"


def made(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["gallery", *words])
    gallery.main()


def test_one_head_of_a_photograph_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "own.png")
    out = tmp_path / "gallery"
    before = (DOCS / "gallery.md").read_bytes()
    made(
        monkeypatch, "--variant", str(DATA / "tiny_heads.toml"), "--head", "nyu_linear", "--weights", "synthetic:0",
        "--image", str(tmp_path / "own.png"), "--out", str(out),
    )  # fmt: skip
    page = (out / "gallery.md").read_text()
    assert [row.split("`")[1] for row in page.splitlines() if row.startswith("| `")] == ["nyu_linear"]
    shown = re.findall(r"\]\(([^)]+\.png)\)", page)
    assert shown == ["images/gallery_photograph.png", "images/gallery_nyu_linear.png"]
    assert [images.size_of(out / name) for name in shown] == [(60, 90)] * 2
    assert "Synthetic weights know nothing" in page and (DOCS / "gallery.md").read_bytes() == before
    assert (out / re.findall(r"\]\(([^)]+heads\.md)\)", page)[0]).resolve() == DOCS / "heads.md"


def test_what_cannot_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no such file"):
        made(monkeypatch, "--image", str(tmp_path / "absent.png"), "--out", str(tmp_path / "gallery"))
    with pytest.raises(SystemExit, match="no nyu_linear head was trained"):
        made(monkeypatch, "--variant", "vits14_reg", "--head", "nyu_linear", "--out", str(tmp_path / "gallery"))
    assert not (tmp_path / "gallery" / "gallery.md").exists()

"""The tokenizer of a bundle: where it is read, by whom it is needed, and what it is checked against."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.pipeline.stages import text


class Tokenizers:
    """A family's tokenizer in a weight file, and what is asked of it."""

    def __init__(self, patch: pytest.MonkeyPatch, content: dict[str, bytes]) -> None:
        self.content = content
        self.read: list[Path] = []
        self.required: list[tuple[str, ...]] = []
        self.checked: list[tuple[bytes, int]] = []
        patch.setattr(text.text_model, "vocabulary_of", lambda graph: {"first": 256, "second": 1}[graph])
        patch.setattr(text, "require", lambda *names: self.required.append(names))
        patch.setattr(text.tokenizer, "load", lambda path: path.read_bytes())
        patch.setattr(text.tokenizer, "check_vocabulary", lambda loaded, rows: self.checked.append((loaded, rows)))
        patch.setattr(text.download, "fetch", lambda source, *, progress: Path("fetched") / source)

    def tokenizer(self, path: Path) -> dict[str, bytes]:
        self.read.append(path)
        return self.content

    def request(self, weights: str | None, published: tuple[str, ...] = ("one", "two"), *, has: bool = True) -> Any:
        model = SimpleNamespace(text=self if has else None, graphs=("first", "second"))
        return SimpleNamespace(model=model, weights=weights, recipe=SimpleNamespace(weights=published))


@pytest.mark.parametrize(
    ("weights", "published", "has", "read"),
    [
        ("my.gguf", (), True, ["my.gguf"]), ("my.gguf", ("one",), True, ["my.gguf"]),
        (None, ("one", "two"), True, ["fetched/one"]), (None, (), True, []),
        ("my.gguf", ("one",), False, []), ("synthetic:0", ("one",), True, []), ("synthetic:0", (), True, []),
    ],
)  # fmt: skip
def test_where_a_tokenizer_is_read(
    weights: str | None, published: Any, has: bool, read: list[str], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the given weights, else the first published file; synthetic weights have none."""
    found = Tokenizers(monkeypatch, {"tokenizer.json": b"{}"})
    made = text.text_stage(work, found.request(weights, published, has=has))
    assert list(map(str, found.read)) == read and set(made) == ({"text"} if read else set())
    if read:
        assert {path.name: path.read_bytes() for path in made["text"].folder.iterdir()} == found.content
        assert found.checked == [(b"{}", 256)] and found.required == [("text", "tokenizers", "sentencepiece")]


def test_weights_without_a_tokenizer_need_no_package(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tokenizers(monkeypatch, {})
    assert text.text_stage(work, found.request("my.gguf")) == {} and not work.asked
    text.check_tokenizer(found.request("my.gguf"))
    assert found.required == found.checked == []


def test_a_tokenizer_is_checked_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tokenizers(monkeypatch, {"tokenizer.json": b"1", "special.json": b"2"})
    text.check_tokenizer(found.request(None))
    assert not found.read and not found.checked
    text.check_tokenizer(found.request("my.gguf"))
    assert found.read == [Path("my.gguf")] and found.checked == [(b"1", 256), (b"2", 256)]

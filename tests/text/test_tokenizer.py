"""Both kinds of tokenizer file, of a few pieces: what they encode, and whose tokens are which model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dinoexport.errors import InputRefused, UsageError
from dinoexport.models.llama.gguf_tokenizer import _byte_level, _varint, sentencepiece_model
from dinoexport.text import prompts, tokenizer
from dinoexport.text.prompts import Prompt, Text
from tests.text import tiny

# Unknown, two control tokens, the space, words and letters; the last is the piece before each continued text.
PIECES = ("<unk>", "<s>", "</s>", "▁", "▁a", "▁ab", "a", "b", "☺")
KINDS = (2, 3, 3, 1, 1, 1, 1, 1, 1)
UNKNOWN, BEGIN, END, SPACE, SPACE_A, SPACE_AB, A, B, ANCHOR = range(9)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    """A SentencePiece model, which must have a piece for each byte."""
    path, every = (
        tmp_path_factory.mktemp("pieces") / "tokenizer.model",
        [*PIECES, *(f"<0x{i:02X}>" for i in range(256))],
    )
    path.write_bytes(sentencepiece_model(every, [-float(i) for i in range(265)], [*KINDS, *[6] * 256], {}))
    return tokenizer.load(path)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    """The same pieces in a tokenizer.json, which puts a space before a text, and `<s>` by its own template."""
    special = [
        {"id": i, "content": PIECES[i], "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i in range(3)
    ]
    content = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False, "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(PIECES)}, "merges": [["▁", "a"], ["▁a", "b"]],
        },
    }  # fmt: skip
    path = tmp_path_factory.mktemp("spaced") / "tokenizer.json"
    path.write_text(json.dumps(content))
    return tokenizer.load(path)


def test_a_sentencepiece_model(pieces: tokenizer.Tokenizer) -> None:
    assert (pieces.size, pieces.controls, pieces.anchor) == (265, {UNKNOWN, BEGIN, END}, (SPACE, ANCHOR))
    assert pieces.encode("ab a") == [SPACE_AB, SPACE_A]
    assert pieces.encode_continuing("ab a") == [A, B, SPACE_A]
    assert pieces.encode("</s>")[-1] != END
    assert [pieces.piece_id(piece) for piece in (*PIECES, "none")] == [*range(9), None]
    assert pieces.piece(SPACE_AB) == "▁ab" and pieces.decode([BEGIN, SPACE_AB, SPACE_A, END]) == "ab a"


def test_a_json_file_that_puts_a_space_before_a_text(spaced: tokenizer.Tokenizer) -> None:
    """Neither the template's `<s>` nor what a text spells becomes a control token."""
    assert (spaced.size, spaced.controls, spaced.anchor) == (9, {UNKNOWN, BEGIN, END}, (SPACE, ANCHOR))
    assert spaced.encode("ab a") == [SPACE_AB, SPACE_A]
    assert spaced.encode_continuing("ab a") == [A, B, SPACE_A]
    assert not {BEGIN, END} & {*spaced.encode("</s>a"), *spaced.encode("a<s>")}
    assert [spaced.piece_id(piece) for piece in (*PIECES, "none")] == [*range(9), None]
    assert spaced.piece(SPACE_AB) == "▁ab" and spaced.decode([BEGIN, A, SPACE_A, END]) == "a a"


def test_a_json_file_that_does_not(tmp_path: Path) -> None:
    words = tokenizer.load(tiny.tokenizer_json(tmp_path))
    assert (words.size, words.controls, words.anchor) == (260, set(range(256, 260)), ())
    assert words.encode("a b") == words.encode_continuing("a b") and words.decode(words.encode("a b")) == "a b"
    assert max(words.encode("<|im_end|></s>")) < 256


def test_the_lowest_control_token_that_a_text_spells_is_named(pieces: tokenizer.Tokenizer) -> None:
    """Named controls are those the prompts know beside the file's own; one that the file lacks is none."""
    prompt = Prompt(parts=(Text("ab a"),), ends=(), continuing=False, controls=("▁ab", "none", "▁a"))
    with pytest.raises(InputRefused) as caught:
        prompts.ids_of(pieces, prompt)
    assert caught.value.message == "The text spells the control token a."
    assert prompts.ids_of(pieces, prompt, checked=False) == [SPACE_AB, SPACE_A]


class Sized:
    def __init__(self, size: int) -> None:
        self.size = size


@pytest.mark.parametrize(
    ("size", "rows", "belongs"),
    [
        (100, 100, True),
        (100, 128, True),
        (65, 128, True),
        (64, 128, False),  # whole rows of padding would be too many
        (127, 128, True),
        (128, 127, False),
        (129, 128, False),
        (100, 127, False),
        (100, 192, False),
        (1, 64, True),
    ],
)
def test_rows_are_padded_to_the_next_64(size: int, rows: int, belongs: bool) -> None:
    words: Any = Sized(size)
    if belongs:
        tokenizer.check_vocabulary(words, rows)
        return
    with pytest.raises(UsageError, match=f"The tokenizer has {size} ids, the model {rows}: they do not belong"):
        tokenizer.check_vocabulary(words, rows)


def test_a_long_reason_is_cut() -> None:
    error = tokenizer._unreadable(Path("t.json"), ValueError(" a\n b " + "x" * 300))
    assert error.message == f"t.json cannot be read as a tokenizer: a b {'x' * 196}."


BYTES: Mapping[str, Any] = {
    "tokens": ["a", "b", "1", "2", "Ġ", "ab", "12", "Ġa", "<end>", "abĠ"],
    "merges": ["a b", "ab Ġ", "1 2", "Ġ a"],
    "token_type": [1] * 8 + [3, 1],
}


@pytest.mark.parametrize(("words", "digits"), [("gpt-2", ["12"]), ("default", ["12"]), ("smollm", ["1", "2"])])
def test_a_byte_level_tokenizer_of_a_gguf_file(words: str, digits: list[str], tmp_path: Path) -> None:
    """No space before a text, words begin at spaces, and digits are split one by one where the file's rule says so."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(_byte_level(BYTES | {"pre": words}))
    made = tokenizer.load(path)
    assert [made.piece(i) for i in made.encode("ab a12")] == ["ab", "Ġa", *digits]
    assert made.controls == {8} and made.decode([5, 7, 8]) == "ab a" and made.anchor == ()
    assert 8 not in made.encode("<end>")


def test_a_gguf_file_that_marks_no_control_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for kinds in ([], [1, 1]):
        path.write_bytes(_byte_level(BYTES | {"token_type": kinds}))
        assert tokenizer.load(path).controls == set()


def test_a_vocabulary_without_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    words = tokenizer.load(path)
    assert (words.size, words.controls, words.anchor) == (0, set(), ())


def test_an_unknown_rule_to_split_words() -> None:
    with pytest.raises(UsageError, match="splits words as 'qwen2', which is not known here"):
        _byte_level(BYTES | {"pre": "qwen2"})


@pytest.mark.parametrize(
    ("number", "raw"),
    [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), (-1, "ff" * 9 + "01"), (2**63, "80" * 9 + "01")],
)
def test_numbers_of_any_length(number: int, raw: str) -> None:
    """Seven bits a byte, the lowest first, as https://protobuf.dev/programming-guides/encoding/ has them."""
    assert _varint(number).hex() == raw

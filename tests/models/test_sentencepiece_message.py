"""The tokenizer of a GGUF file as SentencePiece's message: every field that is written, read back by its number."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from dinoexport.bundle import onnx_file
from dinoexport.models.llama.gguf_tokenizer import sentencepiece_model

# Numbers of fields in sentencepiece_model.proto.
IDS = {"unknown_token_id": 40, "bos_token_id": 41, "eos_token_id": 42, "padding_token_id": 43}
DEFAULTS = {40: 0, 41: 1, 42: 2, 43: -1}


def fields(raw: Any) -> dict[int, list[Any]]:
    return onnx_file._grouped(memoryview(raw))


def only(raw: Any) -> dict[int, Any]:
    """The fields of a message in which each is there once."""
    found = fields(raw)
    assert all(len(values) == 1 for values in found.values())
    return {number: values[0] for number, values in found.items()}


@pytest.mark.parametrize("named", [{}, *({name: 300 + number} for name, number in IDS.items()), {"eos_token_id": 0}])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_every_field(named: dict[str, int], prefix: bool | None) -> None:
    pieces, scores, kinds = ["<unk>", "▁a" * 70, ""], [0.0, -1.5, 3], [2, 1, 6]
    facts = named | ({} if prefix is None else {"add_space_prefix": prefix})
    made = fields(sentencepiece_model(pieces, scores, kinds, facts))
    assert made.keys() == {1, 2, 3}
    for raw, piece, score, kind in zip(made[1], pieces, scores, kinds, strict=True):
        entry = only(raw)
        assert bytes(entry[1]).decode() == piece and entry[3] == kind and entry.keys() == {1, 2, 3}
        assert struct.unpack("<f", entry[2]) == (score,)
    trainer = {number: onnx_file._signed(value) for number, value in only(made[2][0]).items()}
    wanted = DEFAULTS | {IDS[name]: value for name, value in named.items()}
    assert trainer == {3: 2, 4: len(pieces), 35: 1} | wanted
    normaliser = only(made[3][0])
    assert bytes(normaliser.pop(1)) == b"identity" and normaliser == {3: int(prefix is not False), 4: 0, 5: 1}


def test_lists_of_unequal_lengths_are_refused() -> None:
    for pieces, scores, kinds in ((["a"], [], [1]), (["a"], [0.0], []), ([], [0.0], [1])):
        with pytest.raises(ValueError, match="argument"):
            sentencepiece_model(pieces, scores, kinds, {})

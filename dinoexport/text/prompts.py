"""Prompts as data: parts that are encoded separately, and control tokens between them by name.

A family defines the parts of a prompt. No prompt is ever built as one string, so a user's text cannot become a control
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dinoexport.errors import InputRefused, UsageError
from dinoexport.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation. role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Control:
    """A control token, by its piece in the vocabulary."""

    piece: str


@dataclass(frozen=True)
class Text:
    """A separate text: a tokenizer that puts a space before a text does so here."""

    text: str


@dataclass(frozen=True)
class Continuing:
    """A text that directly continues the part before it."""

    text: str


Part = Control | Text | Continuing


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model reads before it generates text.

    ends: pieces that end the answer. continuing: the answer goes on directly after the prompt's text, so that its
    leading space stays. controls: pieces that a user's text may not become, in addition to those that the tokenizer's
    file marks.
    """

    parts: tuple[Part, ...]
    ends: tuple[str, ...]
    continuing: bool
    controls: tuple[str, ...] = ()


class Prompts(Protocol):
    """The prompts one model understands. Each raises UsageError where the model does not understand that kind."""

    def completion(self, text: str) -> Prompt:
        """A text to continue."""

    def infill(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> Prompt:
        """A prompt for the text between two others."""

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """A prompt for the next answer of a conversation; raises InputRefused for one that the model cannot take."""


def ids_of(tokenizer: Tokenizer, prompt: Prompt, *, checked: bool = True) -> list[int]:
    """The prompt's ids. checked: raise InputRefused for a user's text that holds the id of a control token."""
    named = [tokenizer.piece_id(piece) for piece in prompt.controls]
    controls = tokenizer.controls.union(token_id for token_id in named if token_id is not None)
    ids: list[int] = []
    for part in prompt.parts:
        if isinstance(part, Control):
            ids.append(control_id(tokenizer, part.piece))
            continue
        encode = tokenizer.encode if isinstance(part, Text) else tokenizer.encode_continuing
        found = encode(part.text)
        if checked and (caught := sorted(controls.intersection(found))):
            raise InputRefused(
                f"The text spells the control token {tokenizer.piece(caught[0]).lstrip('▁')}.",
                next_step="Change its spelling, for example with a space in it.",
            )
        ids += found
    return ids


def end_ids(tokenizer: Tokenizer, prompt: Prompt) -> frozenset[int]:
    """The ids that end the answer."""
    return frozenset(control_id(tokenizer, piece) for piece in prompt.ends)


def control_id(tokenizer: Tokenizer, piece: str) -> int:
    """The id of a control token the prompt needs; UsageError where the vocabulary has none."""
    found = tokenizer.piece_id(piece)
    if found is None:
        raise UsageError(
            f"The tokenizer has no {piece.lstrip('▁')}, so the model does not know this kind of prompt.",
            next_step="Use a variant that was trained for it, or another kind of prompt.",
        )
    return found

"""Parse a request for text, the same for all interfaces: plain values in; a task, or one clear error, out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinoexport.errors import InputRefused
from dinoexport.text import generation
from dinoexport.text import prompts as prompt_parts
from dinoexport.text.decoder import TextDecoder
from dinoexport.text.generation import Task
from dinoexport.text.prompts import Message, Prompt, Prompts
from dinoexport.text.sampling import Sampling
from dinoexport.text.tokenizer import Tokenizer

MESSAGES_MAX = 1000
_CHOICES = ("max_tokens", "temperature", "top_p", "seed", "stop")


@dataclass(frozen=True, kw_only=True)
class OpenTextModel:
    """An open text model: its tokenizer, its decoder, the prompts it knows."""

    tokenizer: Tokenizer
    decoder: TextDecoder
    prompts: Prompts

    def task(self, request: TextRequest) -> Task:
        """The request checked against this model. Raises UsageError for what it cannot answer."""
        if request.prompt_ids is not None:
            # Ids do not say what ends the answer, so it is the same as for a completion.
            ends = self.prompts.completion("")
            return generation.task_of_ids(
                self.decoder,
                request.prompt_ids,
                prompt_parts.end_ids(self.tokenizer, ends),
                request.sampling,
                continuing=True,
            )
        return generation.task_of(self.tokenizer, self.decoder, request.asked(self.prompts), request.sampling)


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One request: a prompt to continue, a prompt and a suffix for infilling, messages, or a prompt's ids."""

    prompt: str | None = None
    suffix: str | None = None
    suffix_first: bool = False
    messages: tuple[Message, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    sampling: Sampling

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.prompt, self.messages, self.prompt_ids)]
        if sum(given) != 1 or (self.suffix is not None and self.prompt is None):
            raise InputRefused(
                "A request has a prompt, or messages, or prompt_ids, and a suffix only with a prompt.",
                next_step="Give one of them.",
            )

    def asked(self, prompts: Prompts) -> Prompt:
        """The prompt it asks of a model that knows `prompts`."""
        if self.messages is not None:
            asked = prompts.chat(self.messages)
            if not self.messages[-1].content.strip():  # the format's own words around it are not a prompt
                raise InputRefused("The prompt is empty: the last message has no text.", next_step="Give some text.")
            return asked
        assert self.prompt is not None, "one of three is given"
        if self.suffix is not None:
            return prompts.infill(self.prompt, self.suffix, suffix_first=self.suffix_first)
        return prompts.completion(self.prompt)


def parse(values: Mapping[str, Any]) -> TextRequest:
    """The request in plain values as in JSON; absent and None are the same. Raises InputRefused for wrong values."""
    if unknown := sorted(set(values) - set(_KINDS)):
        raise InputRefused(f"{unknown[0]} is unknown.", next_step=f"Known: {', '.join(_KINDS)}.")
    given = {key: value for key, value in values.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for key, value in given.items():
        right, words = _KINDS[key]
        if not right(value):
            raise InputRefused(f"{key} is not {words}.", next_step=f"Give {words}.")
    choices = {key: given.pop(key) for key in _CHOICES if key in given}
    choices |= {"stop": tuple(choices["stop"])} if "stop" in choices else {}
    given |= {"prompt_ids": tuple(given["prompt_ids"])} if "prompt_ids" in given else {}
    given |= {"messages": messages_of(given["messages"])} if "messages" in given else {}
    return TextRequest(**given, sampling=Sampling(**choices))


def messages_of(content: Any) -> tuple[Message, ...]:
    """The turns of a conversation: a list of {"role": ..., "content": ...}, or that as JSON."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            content = None
    if not _is_list(content) or not 1 <= len(content) <= MESSAGES_MAX:
        raise InputRefused(
            f"messages are not a list of 1 to {MESSAGES_MAX} turns.",
            next_step='Write them as [{"role": "user", "content": "..."}].',
        )
    turns = []
    for turn in content:
        if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
            raise InputRefused(
                "A message has a role and a content, and nothing else.",
                next_step='Write {"role": "user", "content": "..."}.',
            )
        if not (_is_text(turn["role"]) and _is_text(turn["content"])):
            raise InputRefused("A message's role and content are texts.", next_step="Give strings.")
        turns.append(Message(role=turn["role"], content=turn["content"]))
    return tuple(turns)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_text(value: Any) -> bool:
    """Half a character of UTF-16, which JSON can hold, is not a text: nothing can encode it."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# The requirement of each value, as a test and in words.
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_text, "a text"),
    "suffix": (_is_text, "a text"),
    "suffix_first": (lambda value: isinstance(value, bool), "true or false"),
    "messages": (lambda value: _is_list(value) or _is_text(value), "a list of messages, or that as JSON"),
    "prompt_ids": (lambda value: _is_list(value) and all(map(_is_whole, value)), "a list of whole numbers"),
    "max_tokens": (_is_whole, "a whole number"),
    "temperature": (_is_number, "a number"),
    "top_p": (_is_number, "a number"),
    "seed": (_is_whole, "a whole number"),
    "stop": (lambda value: _is_list(value) and all(map(_is_text, value)), "a text or a list of texts"),
}

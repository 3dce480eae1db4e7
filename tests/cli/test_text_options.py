"""What `generate` makes of its options and of stdin, and what it says of an answer's end."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.cli import text
from dinoexport.errors import UsageError
from dinoexport.text.generation import Written


def asked(prompt: str | None = None, infill: tuple[str, str] | None = None, **options: Any) -> dict[str, Any]:
    return text._asked(prompt, infill, **{"suffix_first": False, "chat": False, "system": None} | options)


@pytest.mark.parametrize(
    ("options", "request_of"),
    [
        ({"prompt": "a"}, {"prompt": "a"}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"infill": ("a", "b")}, {"prompt": "a", "suffix": "b", "suffix_first": False}),
        ({"infill": ("a", "b"), "suffix_first": True}, {"prompt": "a", "suffix": "b", "suffix_first": True}),
        ({"prompt": "a", "chat": True}, {"messages": [{"role": "user", "content": "a"}]}),
        (
            {"prompt": "a", "chat": True, "system": "s"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        ),
    ],
)
def test_options_as_a_request(options: dict[str, Any], request_of: dict[str, Any]) -> None:
    assert asked(**options) == request_of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Give a prompt, or --infill"),
        ({"prompt": "a", "infill": ("a", "b")}, "Give a prompt, or --infill"),
        ({"infill": ("a", "b"), "chat": True}, "Give a prompt, or --infill"),
        ({"prompt": "a", "system": "s"}, "--system has no effect"),
        ({"prompt": "a", "suffix_first": True}, "--suffix-first has no effect"),
        ({"prompt": "a", "chat": True, "suffix_first": True}, "--suffix-first has no effect"),
    ],
)
def test_options_that_do_not_belong_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        asked(**options)


def stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))


def test_the_prompt_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "é\n".encode())
    assert asked("-") == {"prompt": "é\n"}
    stdin(monkeypatch, b"x" * text._PROMPT_MAX_BYTES)
    assert len(asked("-")["prompt"]) == text._PROMPT_MAX_BYTES
    stdin(monkeypatch, b"x" * (text._PROMPT_MAX_BYTES + 1))
    with pytest.raises(UsageError, match="more than"):
        asked("-")
    stdin(monkeypatch, b"ab\xff")
    with pytest.raises(UsageError, match="at byte 2"):
        asked("-")
    monkeypatch.setattr(sys, "stdin", None)
    assert asked("-") == {"prompt": ""}


def written(**changes: Any) -> Written:
    facts = {
        "text": "ab", "reason": "stop", "prompt_tokens": 5, "ids": (7, 8, 9), "first_s": 0.51234, "seconds": 4.51238,
    }  # fmt: skip
    return Written(**facts | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "5 tokens read, 3 written, the first after 0.51 s, 0.5 tokens/s; the model or a stop text"),
        ({"ids": (7,), "reason": "length"}, "5 tokens read, 1 written, the first after 0.51 s; the limit of tokens"),
        ({"seconds": 0.51234}, "5 tokens read, 3 written, the first after 0.51 s; the model or a stop text"),
        ({"ids": ()}, "5 tokens read, 0 written, the first after 0.51 s; the model or a stop text"),
    ],
)
def test_the_end_of_an_answer(changes: dict[str, Any], said: str, capsys: Any) -> None:
    """The first token is not part of the speed: it waits for the prompt."""
    text._show_end(written(**changes), False)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("\n", f"{said}\n")


def test_the_end_of_an_answer_in_json(capsys: Any) -> None:
    text._show_end(written(), True)
    assert json.loads(capsys.readouterr().out) == {
        "text": "ab", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 3, "token_ids": [7, 8, 9],
        "first_token_s": 0.5123, "seconds": 4.5124,
    }  # fmt: skip

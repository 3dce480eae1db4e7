"""Requests in plain values, as JSON has them: what is taken, and the one error that each wrong value gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dinoexport.errors import InputRefused
from dinoexport.models.llama.prompts import LlamaPrompts
from dinoexport.text import requests, tokenizer
from dinoexport.text.prompts import Message
from dinoexport.text.requests import OpenTextModel, TextRequest
from dinoexport.text.sampling import Sampling
from tests.text import tiny

TURN = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("values", "request_"),
    [
        ({"prompt": "a\nb"}, TextRequest(prompt="a\nb", sampling=Sampling())),
        ({"prompt": "é🙂", "suffix": ""}, TextRequest(prompt="é🙂", suffix="", sampling=Sampling())),
        ({"prompt": "\ud7ff\ue000"}, TextRequest(prompt="\ud7ff\ue000", sampling=Sampling())),
        (
            {"prompt": "a", "suffix": "b", "suffix_first": True, "messages": None},
            TextRequest(prompt="a", suffix="b", suffix_first=True, sampling=Sampling()),
        ),
        ({"prompt_ids": [0, 3]}, TextRequest(prompt_ids=(0, 3), sampling=Sampling())),
        ({"messages": [TURN]}, TextRequest(messages=(Message(**TURN),), sampling=Sampling())),
        ({"messages": json.dumps([TURN])}, TextRequest(messages=(Message(**TURN),), sampling=Sampling())),
        (
            {"prompt": "a", "max_tokens": 3, "temperature": 1, "top_p": 0.5, "seed": 7, "stop": ["x", "é"]},
            TextRequest(
                prompt="a",
                sampling=Sampling(max_tokens=3, temperature=1, top_p=0.5, seed=7, stop=("x", "é")),
            ),
        ),
        ({"prompt": "a", "stop": "x"}, TextRequest(prompt="a", sampling=Sampling(stop=("x",)))),
        ({"prompt": "a", "temperature": None}, TextRequest(prompt="a", sampling=Sampling())),
    ],
)  # fmt: skip
def test_what_is_taken(values: dict[str, Any], request_: TextRequest) -> None:
    found = requests.parse(values)
    assert found == request_ and found.suffix_first is (values.get("suffix_first") is True)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"promt": "a", "zeal": 1}, "promt is unknown."),
        ({"prompt": 5}, "prompt is not a text."),
        ({"prompt": b"a"}, "prompt is not a text."),
        ({"prompt": "a\ud800"}, "prompt is not a text."),
        ({"prompt": "\udfffa"}, "prompt is not a text."),
        ({"prompt": "a", "suffix_first": 1}, "suffix_first is not true or false."),
        ({"messages": 5}, "messages is not a list of messages, or that as JSON."),
        ({"messages": b"[]"}, "messages is not a list of messages, or that as JSON."),
        ({"messages": "[nothing"}, "messages are not a list of 1 to 1000 turns."),
        ({"messages": '"user"'}, "messages are not a list of 1 to 1000 turns."),
        ({"messages": []}, "messages are not a list of 1 to 1000 turns."),
        ({"messages": [TURN] * 1001}, "messages are not a list of 1 to 1000 turns."),
        ({"messages": [["role", "content"]]}, "A message has a role and a content, and nothing else."),
        ({"messages": [TURN | {"name": "x"}]}, "A message has a role and a content, and nothing else."),
        ({"messages": [{"role": "user"}]}, "A message has a role and a content, and nothing else."),
        ({"messages": [{"role": "user", "content": 5}]}, "A message's role and content are texts."),
        ({"messages": [{"role": None, "content": "a"}]}, "A message's role and content are texts."),
        ({"prompt_ids": "12"}, "prompt_ids is not a list of whole numbers."),
        ({"prompt_ids": ""}, "prompt_ids is not a list of whole numbers."),
        ({"prompt_ids": 5}, "prompt_ids is not a list of whole numbers."),
        ({"prompt_ids": [1, 2.0]}, "prompt_ids is not a list of whole numbers."),
        ({"prompt_ids": [True]}, "prompt_ids is not a list of whole numbers."),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens is not a whole number."),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is not a whole number."),
        ({"prompt": "a", "seed": "1"}, "seed is not a whole number."),
        ({"prompt": "a", "temperature": False}, "temperature is not a number."),
        ({"prompt": "a", "top_p": "1"}, "top_p is not a number."),
        ({"prompt": "a", "stop": 5}, "stop is not a text or a list of texts."),
        ({"prompt": "a", "stop": ["x", 5]}, "stop is not a text or a list of texts."),
        ({}, "A request has a prompt, or messages, or prompt_ids, and a suffix only with a prompt."),
        ({"prompt": "a", "prompt_ids": [1]}, "A request has a prompt, or messages, or prompt_ids, and a suffix only"),
        ({"messages": [TURN], "suffix": "b"}, "A request has a prompt, or messages, or prompt_ids, and a suffix only"),
        ({"prompt_ids": [1], "suffix": "b"}, "A request has a prompt, or messages, or prompt_ids, and a suffix only"),
    ],
)
def test_what_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputRefused) as caught:
        requests.parse(values)
    assert caught.value.message.startswith(problem) and caught.value.next_step


def test_a_thousand_turns_are_taken() -> None:
    assert len(requests.messages_of([TURN] * 1000)) == 1000


def test_ids_continue_a_text(tmp_path: Path) -> None:
    """As a completion's: the answer's leading space stays, and the same tokens end it."""
    words = tokenizer.load(tiny.tokenizer_json(tmp_path))
    model = OpenTextModel(tokenizer=words, decoder=tiny.decoder(), prompts=LlamaPrompts(bos="<s>", eos="</s>"))
    by_ids, by_text = (model.task(requests.parse(values)) for values in ({"prompt_ids": [256, 64]}, {"prompt": "a"}))
    assert by_ids == by_text and by_ids.continuing and by_ids.end_ids == {257}


def test_a_conversation_whose_last_turn_is_empty() -> None:
    prompts = LlamaPrompts(chat_format="instruct")
    turns = [TURN, {"role": "assistant", "content": "hi"}, {"role": "user", "content": " \n"}]
    with pytest.raises(InputRefused, match="the last message has no text"):
        requests.parse({"messages": turns}).asked(prompts)
    assert requests.parse({"messages": turns[:1]}).asked(prompts) == prompts.chat((Message(**TURN),))

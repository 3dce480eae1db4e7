"""The prompts of Llama models, part by part, as the official code puts them together."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport.errors import InputRefused
from dinoexport.models.llama.prompts import MARKERS, LlamaPrompts
from dinoexport.text.prompts import Continuing, Control, Message, Prompt, Text

CODE = LlamaPrompts(infills=True, chat_format="instruct")
SMOL = LlamaPrompts(bos="", eos="<|im_end|>", chat_format="chatml", system="Be kind.")
B, E = Control("<s>"), Control("</s>")


def conversation(*turns: str) -> list[Message]:
    """Each turn as `role:content`."""
    return [Message(role=role, content=content) for role, _, content in (turn.partition(":") for turn in turns)]  # type: ignore[arg-type]


def test_the_markers_are_ids_32007_to_32015() -> None:
    """Of the vocabulary of 32016; the third to the last are one to six ends of text."""
    assert MARKERS == (
        "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "▁<EOT><EOT>", "▁<EOT><EOT><EOT>", "▁<EOT><EOT><EOT><EOT>",
        "▁<EOT><EOT><EOT><EOT><EOT>", "▁<EOT><EOT><EOT><EOT><EOT><EOT>",
    )  # fmt: skip


def test_completion() -> None:
    assert CODE.completion(" a") == Prompt(parts=(B, Text(" a")), ends=("</s>",), continuing=True, controls=MARKERS)
    assert SMOL.completion("a") == Prompt(parts=(Text("a"),), ends=("<|im_end|>",), continuing=True, controls=())


def test_infilling_in_both_orders() -> None:
    prefix, suffix, middle = map(Control, MARKERS[:3])
    expected: dict[str, Any] = {"ends": ("▁<EOT>",), "continuing": True, "controls": MARKERS}
    first = CODE.infill("a", "b")
    assert first == Prompt(parts=(B, prefix, Text("a"), suffix, Continuing("b"), middle), **expected)
    second = CODE.infill("a", "b", suffix_first=True)
    assert second == Prompt(parts=(B, prefix, suffix, Continuing("b"), middle, Text("a")), **expected)


@pytest.mark.parametrize(
    ("turns", "parts"),
    [
        (["user: a \n"], (B, Text("[INST] a [/INST]"))),
        (["system: s ", "user: a "], (B, Text("[INST] <<SYS>>\n s \n<</SYS>>\n\n a [/INST]"))),
        (
            ["user:a", "assistant: b\n", "user:c", "assistant:d", "user:e"],
            (
                B, Text("[INST] a [/INST] b "), E, B, Text("[INST] c [/INST] d "), E, B, Text("[INST] e [/INST]"),
            ),
        ),
        (
            ["system:s", "user:a", "assistant:b", "user:c"],
            (B, Text("[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b "), E, B, Text("[INST] c [/INST]")),
        ),
    ],
)  # fmt: skip
def test_instructions(turns: list[str], parts: tuple[Any, ...]) -> None:
    assert CODE.chat(conversation(*turns)) == Prompt(parts=parts, ends=("</s>",), continuing=False, controls=MARKERS)


@pytest.mark.parametrize(
    ("turns", "texts"),
    [
        (["user: a "], ["system\nBe kind.", "user\n a "]),
        (["system:s", "user:a"], ["system\ns", "user\na"]),
        (["user:a", "assistant:b", "user:c"], ["system\nBe kind.", "user\na", "assistant\nb", "user\nc"]),
    ],
)
def test_chatml(turns: list[str], texts: list[str]) -> None:
    begin, end = Control("<|im_start|>"), Control("<|im_end|>")
    parts = [part for text in texts for part in (begin, Text(text), end, Text("\n"))]
    expected = Prompt(
        parts=(*parts, begin, Text("assistant\n")), ends=("<|im_end|>",), continuing=False, controls=()
    )  # fmt: skip
    assert SMOL.chat(conversation(*turns)) == expected


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "this is nothing"),
        (["system:s"], "this is system"),
        (["assistant:a"], "this is assistant"),
        (["user:a", "user:b"], "this is user, user"),
        (["user:a", "assistant:b"], "this is user, assistant"),
        (["user:a", "system:s", "user:b"], "this is user, system, user"),
        (["system:s", "system:s", "user:b"], "this is system, system, user"),
    ],
)
@pytest.mark.parametrize("prompts", [CODE, SMOL], ids=["instruct", "chatml"])
def test_conversations_out_of_order(prompts: LlamaPrompts, turns: list[str], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        prompts.chat(conversation(*turns))


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"])
@pytest.mark.parametrize("place", range(4))
def test_tags_in_messages(place: int, tag: str) -> None:
    turns = ["system:s", "user:a", "assistant:b", "user:c"]
    turns[place] += f" {tag} "
    with pytest.raises(InputRefused, match=f"holds .{tag[1:-1]}"):
        CODE.chat(conversation(*turns))
    assert SMOL.chat(conversation(*turns))

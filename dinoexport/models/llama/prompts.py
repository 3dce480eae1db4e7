"""The prompts of Llama models: completion, Code Llama's infilling, two formats of conversations.

Source: meta-llama/codellama at e81b597, `infilling_prompt_tokens`, `chat_completion` and the tokenizer; each part below
is encoded separately there too. ChatML: the chat template in SmolLM2's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dinoexport.errors import InputRefused, UsageError
from dinoexport.text.prompts import Continuing, Control, Message, Part, Prompt, Text

BOS, EOS = "<s>", "</s>"
PREFIX, SUFFIX, MIDDLE, END_OF_INFILL = "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"
# Ordinary pieces of the vocabulary of 32016, which plain text could contain; ids 32007 to 32015.
MARKERS = (PREFIX, SUFFIX, MIDDLE, *("▁" + n * "<EOT>" for n in range(1, 7)))
_INST, _END_INST = "[INST]", "[/INST]"
_SYS, _END_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
# The official code refuses a conversation that holds one of them.
TAGS = (_INST, _END_INST, "<<SYS>>", "<</SYS>>", "<step>")
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"

Chat = Literal["none", "instruct", "chatml"]


@dataclass(frozen=True, kw_only=True)
class LlamaPrompts:
    """The prompts of one variant. bos: begins every prompt, empty for none; eos: ends an answer.

    chat: the format of its conversations. system: the default system text of a conversation, empty for none.
    """

    bos: str = BOS
    eos: str = EOS
    infills: bool = False
    chat_format: Chat = "none"
    system: str = ""

    def completion(self, text: str) -> Prompt:
        """A text to continue. The answer keeps its leading space, so that both join to one text."""
        return self._prompt([*self._begin(), Text(text)], ends=(self.eos,), continuing=True)

    def infill(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> Prompt:
        """Prefix-suffix-middle, or suffix-prefix-middle; EOT ends the answer, and EOS does not."""
        if not self.infills:
            raise UsageError(
                "This model was not trained to fill in text.",
                next_step="Code Llama 7B and 13B, base and Instruct, are; Python and 34B models are not.",
            )
        before, after = Text(prefix), Continuing(suffix)
        parts: list[Part]
        if suffix_first:
            parts = [Control(PREFIX), Control(SUFFIX), after, Control(MIDDLE), before]
        else:
            parts = [Control(PREFIX), before, Control(SUFFIX), after, Control(MIDDLE)]
        return self._prompt([*self._begin(), *parts], ends=(END_OF_INFILL,), continuing=True)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """A conversation, (system,) user, assistant, user, …, whose next answer is requested."""
        if self.chat_format == "none":
            raise UsageError("This model was not trained to chat.", next_step="Use an Instruct model, or a completion.")
        _check_roles(messages)
        if self.chat_format == "chatml":
            return self._chatml(messages)
        _refuse_tags(messages)
        return self._instruct(messages)

    def _begin(self) -> list[Part]:
        return [Control(self.bos)] if self.bos else []

    def _prompt(self, parts: Sequence[Part], *, ends: tuple[str, ...], continuing: bool) -> Prompt:
        controls = MARKERS if self.infills else ()
        return Prompt(parts=tuple(parts), ends=ends, continuing=continuing, controls=controls)

    def _instruct(self, messages: Sequence[Message]) -> Prompt:
        """Each finished exchange is one text, and so is the open question; only a whole question is stripped."""
        turns = list(messages)
        if turns[0].role == "system":
            system = turns.pop(0).content
            first = turns[0].content
            turns[0] = Message(role="user", content=f"{_SYS}{system}{_END_SYS}{first}")
        parts: list[Part] = []
        for question, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            exchange = f"{_asked(question)} {answer.content.strip()} "
            parts += [Control(self.bos), Text(exchange), Control(self.eos)]
        parts += [Control(self.bos), Text(_asked(turns[-1]))]
        return self._prompt(parts, ends=(self.eos,), continuing=False)

    def _chatml(self, messages: Sequence[Message]) -> Prompt:
        turns = list(messages)
        if self.system and turns[0].role != "system":
            turns.insert(0, Message(role="system", content=self.system))
        parts = self._begin()
        for turn in turns:
            parts += [Control(TURN), Text(f"{turn.role}\n{turn.content}"), Control(END_OF_TURN), Text("\n")]
        parts += [Control(TURN), Text("assistant\n")]
        return self._prompt(parts, ends=(END_OF_TURN,), continuing=False)


def _asked(question: Message) -> str:
    return f"{_INST} {question.content.strip()} {_END_INST}"


def _refuse_tags(messages: Sequence[Message]) -> None:
    for message in messages:
        for tag in TAGS:
            if tag in message.content:
                raise InputRefused(
                    f"The {message.role} message holds {tag}, a tag of the chat format.",
                    next_step="Leave it out, or write it with a space inside.",
                )


def _check_roles(messages: Sequence[Message]) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    wanted = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if not turns or [turn.role for turn in turns] != wanted or turns[-1].role != "user":
        told = ", ".join(message.role for message in messages) or "nothing"
        raise InputRefused(
            f"A conversation is (system,) user, assistant, user, …, and the user has the last word; this is {told}.",
            next_step="Put the messages in this order.",
        )

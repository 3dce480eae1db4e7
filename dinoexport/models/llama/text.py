"""Text of a Llama-type model: its prompts, and the tokenizer beside its weights.

A GGUF file holds the tokenizer as metadata, which is converted to the file that its authors would have published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from dinoexport.config.recipe import Frozen
from dinoexport.family import Rollout
from dinoexport.models.llama import gguf_tokenizer
from dinoexport.models.llama.prompts import BOS, EOS, Chat, LlamaPrompts
from dinoexport.spec import Arrays
from dinoexport.system import untrusted
from dinoexport.text import tokenizer


class TextTable(Frozen):
    """The table `[model.text]`."""

    bos: str = Field(default=BOS, description="The piece a prompt begins with; empty for none.")
    eos: str = Field(default=EOS, description="The piece that ends a completion.")
    infill: bool = Field(default=False, description="Whether it was trained to fill in text, as Code Llama was.")
    chat: Chat = Field(default="none", description="The format of its conversations: Llama 2's, or ChatML.")
    system: str = Field(default="", description="The default system text of a conversation in ChatML.")


@dataclass(frozen=True, kw_only=True)
class LlamaText:
    """Implements `dinoexport.family.TextRole`."""

    table: TextTable

    @property
    def prompts(self) -> LlamaPrompts:
        """By the recipe."""
        table = self.table
        return LlamaPrompts(
            bos=table.bos, eos=table.eos, infills=table.infill, chat_format=table.chat, system=table.system
        )

    def tokenizer(self, weights: Path) -> Mapping[str, bytes]:
        """tokenizer.model or tokenizer.json in the folder or beside the file; for a GGUF file, the one it holds."""
        if weights.suffix == ".gguf":
            return gguf_tokenizer.read(weights)
        found = tokenizer.find(weights if weights.is_dir() else weights.parent)
        return {} if found is None else {found.name: untrusted.read_bytes(found, max_bytes=tokenizer.MAX_BYTES)}

    def rollout(self, inputs: Arrays) -> Rollout | None:
        """See `cases`: a case with steps."""
        if "steps" not in inputs or not int(inputs["steps"].flat[0]):
            return None
        rows = tuple(tuple(int(i) for i in row if i >= 0) for row in inputs["tokens"])
        return Rollout(prompts=rows, tokens="rollout", logits="rollout_logits")

"""Validation cases of a decoder: prompts, how the decoder reads them, and how many of its outputs are compared.

A case's inputs all begin with an axis for sequences: `tokens` (B, T) int64, -1 after the end of shorter prompts;
`keep` (B,), the number of last tokens whose logits are compared; `chunk` (B,), tokens of the padded batch per call;
`steps` (B,), tokens chosen greedily afterwards; `first_position` (B,), the position of the first token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dinoexport.config.recipe import Frozen, parse
from dinoexport.errors import UsageError
from dinoexport.models.llama import synthetic
from dinoexport.models.llama.config import Architecture
from dinoexport.spec import Array, Arrays, Case, Workload
from dinoexport.system import untrusted
from dinoexport.system.untrusted import Unreadable

SEED = 7
# The longest context of any recipe, and more sequences than a case compares; a file of cases is data from outside.
_TOKENS_MAX, _ROWS_MAX, _FILE_MAX_BYTES = 1 << 20, 256, 1 << 24


class CaseTable(Frozen):
    """One `[[cases]]` table."""

    name: str
    why: str
    prompts: tuple[Annotated[int, Field(ge=0, le=_TOKENS_MAX)], ...] = Field(
        default=(), max_length=_ROWS_MAX, description="Lengths of prompts with random token ids, all different."
    )
    tokens: tuple[tuple[int, ...], ...] = Field(default=(), description="The token ids of the prompts.")
    file: str = Field(default="", description="A JSON file of such lists beside the validation.")
    keep: int = Field(default=1, ge=1, le=_TOKENS_MAX, description="Last positions whose logits are compared.")
    chunk: int = Field(default=0, ge=0, le=_TOKENS_MAX, description="Tokens per call; 0 reads the prompt at once.")
    steps: int = Field(default=0, ge=0, le=_TOKENS_MAX, description="Tokens chosen greedily after the prompt.")
    first_position: int = Field(
        default=0,
        ge=-(1 << 40),
        le=1 << 40,
        description="The position of the first token, without what is before; below 0 it is counted back from the "
        "context's end.",
    )
    fit: bool = Field(default=False, description="Shorten prompts, and begin earlier, where the context is smaller.")
    refused: bool = False


def read_case(table: Mapping[str, Any], folder: Path, arch: Architecture) -> Case:
    """The case that `table` describes; raises UsageError if it does not fit the model."""
    wanted = parse(CaseTable, table, where=f"case {table.get('name', '?')}")
    lengths, first = wanted.prompts, wanted.first_position
    if first < 0:
        first = max(0, arch.context + first)
    keep = wanted.keep
    if wanted.fit:
        lengths = tuple(min(n, arch.context - wanted.steps) for n in lengths)
        first = min(first, arch.context - wanted.steps - max(lengths))
        keep = min((keep, *lengths))
    rows = [*_from_file(wanted, folder), *map(list, wanted.tokens)]
    rows += [synthetic.prompt(arch.vocabulary, n, SEED, row).tolist() for row, n in enumerate(lengths)]
    tokens = batch_of(rows)
    shortest = min(map(len, rows), default=0)
    if not wanted.refused and shortest < keep:
        raise UsageError(
            f"case {wanted.name}: the shortest prompt has {shortest} tokens, keep is {keep}.",
            next_step="Set keep to at most that.",
        )
    return Case(
        name=wanted.name,
        why=wanted.why,
        inputs=inputs_of(
            tokens,
            keep=keep,
            chunk=wanted.chunk,
            steps=wanted.steps,
            first_position=first,
        ),
        expect_refusal=wanted.refused,
        distributions=("logits", "rollout_logits") if wanted.steps else ("logits",),
        choices={"rollout": "rollout_logits"} if wanted.steps else {},
    )


def _from_file(wanted: CaseTable, folder: Path) -> list[list[int]]:
    if not wanted.file:
        return []
    path = folder / Path(wanted.file).name
    try:
        rows = json.loads(untrusted.read_bytes(path, max_bytes=_FILE_MAX_BYTES))
        if not all(isinstance(i, int) and 0 <= i < 1 << 31 for row in rows for i in row):
            raise TypeError("not lists of whole numbers")
    except Unreadable as error:
        raise UsageError(f"case {wanted.name}: {error.message}", next_step=error.next_step) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"case {wanted.name}: {path} cannot be read ({error}).", next_step="Give a JSON list of lists of token ids."
        ) from None
    return [list(row) for row in rows]


def batch_of(rows: list[list[int]]) -> Array:
    """Prompts as one array (B, T), int64, -1 after the end of shorter ones."""
    import numpy as np

    tokens = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return tokens


def inputs_of(
    tokens_BT: Array, *, keep: int = 1, chunk: int = 0, steps: int = 0, first_position: int = 0
) -> dict[str, Array]:
    """A case's inputs."""
    import numpy as np

    batch = len(tokens_BT)
    settings = {"keep": keep, "chunk": chunk, "steps": steps, "first_position": first_position}
    return {"tokens": tokens_BT} | {name: np.full(batch, value, np.int64) for name, value in settings.items()}


def setting(inputs: Arrays, name: str) -> int:
    """A case's setting, which all its sequences share."""
    return int(inputs[name][0])


def workloads(arch: Architecture) -> tuple[Workload, ...]:
    """Two workloads: a prompt that is read and continued, as for a user; and reading alone."""
    length = min(128, arch.context // 2)
    prompt = synthetic.prompt(arch.vocabulary, length, SEED)[None]
    steps = min(16, arch.context - length)
    return (
        Workload(
            name=f"{steps} tokens after {length}", inputs=inputs_of(prompt, steps=steps), items=steps, unit="tokens"
        ),
        Workload(name=f"prompt of {length}", inputs=inputs_of(prompt), items=length, unit="tokens"),
    )

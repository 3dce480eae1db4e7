"""Runs a case through a decoder's graph: prompts in chunks, then tokens chosen greedily."""

from __future__ import annotations

from collections.abc import Mapping

from dinoexport.errors import InputRefused
from dinoexport.models.llama.cases import setting
from dinoexport.models.llama.config import Architecture
from dinoexport.runtime import decoding
from dinoexport.runtime.decoding import LOGITS
from dinoexport.spec import Array, Arrays, Graph, Runner


def drive(runners: Mapping[str, Runner], graph: Graph, arch: Architecture, inputs: Arrays) -> dict[str, Array]:
    """Reads the prompts in chunks, padded on the left, and continues greedily for the requested number of steps."""
    import numpy as np

    check(arch, inputs)
    tokens, keep, steps = inputs["tokens"], setting(inputs, "keep"), setting(inputs, "steps")
    lengths = (tokens >= 0).sum(axis=1)
    ids, mask = decoding.padded([row[:n] for row, n in zip(tokens, lengths, strict=True)])
    batch, width = ids.shape
    first = setting(inputs, "first_position")
    decoder = decoding.begin(runners[graph.name], graph)
    chunk = setting(inputs, "chunk") or width
    kept: list[Array] = []
    inside: dict[str, list[Array]] = {}
    for start in range(0, width, chunk):
        end = min(start + chunk, width)
        rows = end - max(start, width - keep)
        logits = decoder.rows(ids[:, start:end], mask[:, :end], keep=max(rows, 1), first_position=first)
        if rows > 0:
            kept.append(logits)
        for name, array in decoder.inside.items():
            inside.setdefault(name, []).append(array * mask[:, start:end, None].astype(array.dtype))
    logits = np.concatenate(kept, axis=1)
    answers = {LOGITS: logits} | {name: np.concatenate(parts, axis=1) for name, parts in inside.items()}
    if not steps:
        return answers
    seen, chosen = [logits[:, -1]], [logits[:, -1].argmax(axis=1)]
    for _ in range(steps - 1):
        mask = np.concatenate((mask, np.ones((batch, 1), np.int64)), axis=1)
        seen.append(decoder.rows(chosen[-1][:, None], mask, first_position=first)[:, 0])
        chosen.append(seen[-1].argmax(axis=1))
    return answers | {"rollout": np.stack(chosen, axis=1), "rollout_logits": np.stack(seen, axis=1)}


def check(arch: Architecture, inputs: Arrays) -> None:
    """Raises InputRefused for an empty prompt, ids outside the vocabulary, and more tokens than the context has."""
    tokens = inputs["tokens"]
    lengths = (tokens >= 0).sum(axis=1)
    if tokens.size == 0 or lengths.min() == 0:
        raise InputRefused("A prompt is empty.", next_step="Give at least one token.")
    if tokens.max() >= arch.vocabulary:
        raise InputRefused(
            f"Token id {tokens.max()} is outside the vocabulary of {arch.vocabulary}.",
            next_step="Use the tokenizer that belongs to the model.",
        )
    needed = int(lengths.max()) + setting(inputs, "steps") + setting(inputs, "first_position")
    if needed > arch.context:
        raise InputRefused(
            f"{needed} tokens are more than the context of {arch.context}.",
            next_step="Shorten the prompt or ask for fewer tokens.",
        )

"""PyTorch's outputs for cases: the plain formulation runs every prompt alone, and again for each new token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from dinoexport.errors import UsageError
from dinoexport.family import Read
from dinoexport.models.llama import driving, reference
from dinoexport.models.llama.cases import setting
from dinoexport.models.llama.config import Architecture
from dinoexport.runtime.decoding import LOGITS
from dinoexport.spec import Array, Arrays, Precision, Progress

# A model of at most so many weights is kept in memory between calls: half a gigabyte in fp32.
_KEPT_NUMBERS_MAX = 1 << 28


def of(
    arch: Architecture,
    read: Read,
    inputs: Sequence[Arrays],
    *,
    precision: Precision,
    progress: Progress,
    inside: bool,
) -> list[dict[str, Array]]:
    """The outputs `drive` gives, by their names. inside: the residual stream of each prompt too, padded on the left."""
    import numpy as np

    prompts = [_prompts(arch, arrays) for arrays in inputs]
    streams: list[dict[str, list[Array]]] = [{} for _ in inputs]
    places = [(j, row) for j, rows in enumerate(prompts) for row in range(len(rows))]

    def keep_stream(at: int, blocks_done: int, stream: torch.Tensor) -> None:
        name = "embedded" if not blocks_done else f"layers.{blocks_done - 1}_stream"
        streams[places[at][0]].setdefault(name, []).append(stream.float().numpy())

    load = _loader(arch, read, _dtype(precision))

    def ask(cases: Sequence[int], keep: Sequence[int], *, watch: bool) -> list[list[Array]]:
        """Logits (keep, V) of each prompt of each of `cases`."""
        rows = [(j, prompt) for j in cases for prompt in prompts[j]]
        answers = reference.logits_of(
            arch,
            load,
            [torch.from_numpy(prompt) for _, prompt in rows],
            first_positions=[setting(inputs[j], "first_position") for j, _ in rows],
            keep=[n for j, n in zip(cases, keep, strict=True) for _ in prompts[j]],
            block_done=lambda done: progress(f"PyTorch {precision}", done, arch.layers),
            keep_stream=keep_stream if watch else None,
        )
        found = iter(answers)
        return [[next(found).numpy() for _ in prompts[j]] for j in cases]

    every = range(len(inputs))
    kept = ask(every, [setting(arrays, "keep") for arrays in inputs], watch=inside)
    results: list[dict[str, Array]] = [{LOGITS: np.stack(rows)} for rows in kept]
    for j, named in enumerate(streams):
        width = max(map(len, prompts[j]))
        for name, rows in named.items():
            results[j][name] = np.stack([np.pad(row, ((width - len(row), 0), (0, 0))) for row in rows])
    seen = [[results[j][LOGITS][:, -1]] for j in every]
    for step in range(1, max((setting(arrays, "steps") for arrays in inputs), default=0)):
        going = [j for j in every if step < setting(inputs[j], "steps")]
        for j in going:
            chosen = seen[j][-1].argmax(axis=1)
            prompts[j] = [np.append(prompt, token) for prompt, token in zip(prompts[j], chosen, strict=True)]
        for j, rows in zip(going, ask(going, [1] * len(going), watch=False), strict=True):
            seen[j].append(np.stack(rows)[:, -1])
    for j in every:
        if setting(inputs[j], "steps"):
            logits = np.stack(seen[j], axis=1)
            results[j] |= {"rollout": logits.argmax(axis=2), "rollout_logits": logits}
    return results


def _prompts(arch: Architecture, arrays: Arrays) -> list[Array]:
    """The ids of each sequence of a case."""
    driving.check(arch, arrays)
    return [row[row >= 0] for row in arrays["tokens"]]


def _loader(arch: Architecture, read: Read, dtype: torch.dtype) -> Callable[[str], torch.Tensor]:
    """A function that loads a tensor in `dtype`; the tensors of a small model all stay in memory."""
    import numpy as np

    loaded: dict[str, torch.Tensor] = {}
    small = sum(math.prod(shape) for shape in arch.tensors.values()) <= _KEPT_NUMBERS_MAX

    def load(name: str) -> torch.Tensor:
        if name in loaded:
            return loaded[name]
        tensor = torch.from_numpy(np.ascontiguousarray(read(name))).to(dtype)
        if small:
            loaded[name] = tensor
        return tensor

    return load


def _dtype(precision: Precision) -> torch.dtype:
    """PyTorch's dtype; it has none for weights of fewer bits."""
    dtypes = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
    if precision not in dtypes:
        raise UsageError(
            f"PyTorch has no {precision} of its own to compare with.",
            next_step=f"Leave times_own_error_max out of [limits.{precision}].",
        )
    return dtypes[precision]

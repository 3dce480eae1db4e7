"""The plain published formulation of Llama 2 and Code Llama in PyTorch: the reference.

Written from the architecture as Meta publishes it (Touvron et al. 2023, arXiv:2307.09288; Rozière et al. 2023,
arXiv:2308.12950), with Meta's tensor names and Meta's order of rotated pairs: neighbours (0, 1), (2, 3), ... as complex
numbers. It has no cache, no padding and no mask of its own: each prompt runs alone and whole, so this code cannot
repeat a mistake in a graph's cache, padding or chunks. It shares no code with `graph.py`.

Blocks are the outer loop and prompts the inner one: a block's weights are read once and dropped, so that a model in
fp32 needs the memory of one block and of the prompts' activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoexport.models.llama.config import Architecture

Load = Callable[[str], Tensor]
# The number of queries for which attention is computed at a time: their scores take most of a long prompt's memory.
_QUERIES = 1024


@torch.inference_mode()
def logits_of(
    arch: Architecture,
    load: Load,
    prompts_T: Sequence[Tensor],
    *,
    first_positions: Sequence[int],
    keep: Sequence[int],
    block_done: Callable[[int], None],
    keep_stream: Callable[[int, int, Tensor], None] | None = None,
) -> list[Tensor]:
    """Logits (keep, V), float32, at the last `keep` tokens of each prompt.

    load: tensor name -> weights in the dtype to compute in. first_positions: the position of each prompt's first token.
    keep_stream: gets (prompt's index, blocks done, the residual stream (T, D)), from the embedding's on.
    """
    table = load("tok_embeddings.weight")
    streams = [F.embedding(prompt, table) for prompt in prompts_T]
    if not arch.tied:
        del table
    rotations = [rotation(arch, first, len(prompt)) for first, prompt in zip(first_positions, prompts_T, strict=True)]
    for j, stream in enumerate(streams):
        if keep_stream is not None:
            keep_stream(j, 0, stream)
    for i in range(arch.layers):
        prefix = f"layers.{i}."
        weights = {name.removeprefix(prefix): load(name) for name in arch.tensors if name.startswith(prefix)}
        for j in range(len(streams)):
            streams[j] = _block(arch, weights, streams[j], rotations[j])
            if keep_stream is not None:
                keep_stream(j, i + 1, streams[j])
        block_done(i + 1)
    norm_weight, output = load("norm.weight"), load(arch.output_name)
    return [
        F.linear(_norm(stream[len(stream) - rows :], norm_weight, arch.norm_eps), output).float()
        for stream, rows in zip(streams, keep, strict=True)
    ]


def rotation(arch: Architecture, first: int, length: int) -> Tensor:
    """Unit complex numbers (T, K/2) that rotate each pair at positions `first`, ...

    Frequencies and angles are rounded to float32, as in the published code. At large positions the rounding matters,
    and a more exact table gives other logits than those the model was trained and published with.
    """
    exponents = torch.arange(0, arch.head_dim, 2).float() / arch.head_dim
    frequencies = 1.0 / (arch.rope_theta**exponents)
    angles = torch.outer(torch.arange(first, first + length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _rotated(heads_THK: Tensor, rotation_TP: Tensor) -> Tensor:
    pairs = torch.view_as_complex(heads_THK.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation_TP.unsqueeze(1)).flatten(-2).type_as(heads_THK)


def _norm(stream_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMS norm in float32, cast back, and only then multiplied by the weight."""
    wide = stream_TD.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.type_as(stream_TD) * weight_D


def _block(arch: Architecture, weights: dict[str, Tensor], stream_TD: Tensor, rotation_TP: Tensor) -> Tensor:
    """Computes x + attention(norm(x)), then x + feed_forward(norm(x))."""
    x = _norm(stream_TD, weights["attention_norm.weight"], arch.norm_eps)
    q, k, v = (F.linear(x, weights[f"attention.{name}.weight"]) for name in ("wq", "wk", "wv"))
    q_THK = _rotated(q.unflatten(-1, (arch.heads, -1)), rotation_TP)
    k_TGK = _rotated(k.unflatten(-1, (arch.kv_heads, -1)), rotation_TP)
    repeats = arch.heads // arch.kv_heads
    keys_HTK, values_HTK = (
        heads.repeat_interleave(repeats, dim=1).transpose(0, 1)
        for heads in (k_TGK, v.unflatten(-1, (arch.kv_heads, -1)))
    )
    mixed = torch.cat([_attended(part, keys_HTK, values_HTK, at) for at, part in _parts(q_THK.transpose(0, 1))], dim=1)
    stream_TD = stream_TD + F.linear(mixed.transpose(0, 1).flatten(1), weights["attention.wo.weight"])

    x = _norm(stream_TD, weights["ffn_norm.weight"], arch.norm_eps)
    gated = F.silu(F.linear(x, weights["feed_forward.w1.weight"])) * F.linear(x, weights["feed_forward.w3.weight"])
    return stream_TD + F.linear(gated, weights["feed_forward.w2.weight"])


def _parts(q_HTK: Tensor) -> list[tuple[int, Tensor]]:
    return [(at, q_HTK[:, at : at + _QUERIES]) for at in range(0, q_HTK.shape[1], _QUERIES)]


def _attended(q_HQK: Tensor, k_HTK: Tensor, v_HTK: Tensor, first: int) -> Tensor:
    """Attention of each query over the tokens up to its own; the first query is token `first`."""
    seen = first + q_HQK.shape[1]
    scores = q_HQK @ k_HTK[:, :seen].transpose(1, 2) / q_HQK.shape[-1] ** 0.5
    future = torch.full(scores.shape[1:], float("-inf"), dtype=scores.dtype).triu(1 + first)
    mixed: Tensor = (scores + future).float().softmax(dim=-1).type_as(q_HQK) @ v_HTK[:, :seen]
    return mixed

"""Convert Llama-type checkpoints from Meta's, Hugging Face's and GGUF's layouts to Meta's.

Hugging Face rotates the halves of a head, Meta its neighbours, so the rows of q_proj and k_proj have another order
there. `rope.freqs` and `inv_freq` are rotary frequencies, rounded as the file is: they are computed from `rope_theta`,
and ignored here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from dinoexport.family import Read, Shapes
from dinoexport.models.llama.config import Architecture
from dinoexport.spec import Array

Value = TypeVar("Value")
# Hugging Face's and GGUF's names of a block's tensors, by Meta's names.
_HF = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_GGUF = {
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}
_HF_OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_OUTER = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
# A block's tensors, by Meta's names.
PARTS = tuple(name.removesuffix(".weight") for name in _HF)
# The axis along which Meta's files split a tensor; norms are whole in each file.
_SPLIT = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}
_PUBLISHED = re.compile(r"(layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])|tok_embeddings|output)\.weight")
_FREQUENCIES = re.compile(r"rope\.freqs|rope_freqs\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def adapt(arch: Architecture, found: Shapes, read: Read) -> tuple[Shapes, Read]:
    """The checkpoint under Meta's names and in Meta's order of rows; unrecognised tensors keep their names."""
    theirs = {name: source for name in _wanted(arch) if (source := _source(name, found)) is not None}
    # Some files of tied models hold the table twice; the model has no tensor for the copy.
    copies = {_HF_OUTER["output.weight"]} if arch.tied else set()
    used = set(theirs.values()) | copies
    left = {name: name for name in found if name not in used and not _FREQUENCIES.fullmatch(name)}
    names = theirs | left
    rotated = {
        name: heads
        for name in theirs
        for part, heads in (("attention.wq.weight", arch.heads), ("attention.wk.weight", arch.kv_heads))
        if name.endswith(part) and names[name].startswith("model.")
    }

    def read_as_published(name: str) -> Array:
        values = read(names[name])
        return values if name not in rotated else neighbours(values, rotated[name])

    return {name: found[source] for name, source in names.items()}, read_as_published


def split_axis(name: str) -> int | None:
    """The axis along which the parts of Meta's tensor are joined; None for any other name."""
    return _SPLIT[name.split(".")[-2]] if _PUBLISHED.fullmatch(name) else None


def by_published_names(found: Mapping[str, Value]) -> dict[str, Value]:
    """What is known of recognised tensors, such as their shapes, under Meta's names."""
    theirs = {name: ours for table in (_HF_OUTER, _GGUF_OUTER) for ours, name in table.items()}
    inner = {name: ours for table in (_HF, _GGUF) for ours, name in table.items()}
    named: dict[str, Value] = {}
    for name, value in found.items():
        block = re.fullmatch(r"(?:model\.layers|blk|layers)\.(\d+)\.(.*)", name)
        if block:
            part = inner.get(block[2], block[2])
            if part in _HF:
                named[f"layers.{block[1]}.{part}"] = value
        elif theirs.get(name, name) in _HF_OUTER:
            named[theirs.get(name, name)] = value
    return named


def _wanted(arch: Architecture) -> tuple[str, ...]:
    return tuple(arch.tensors)


def _source(name: str, found: Shapes) -> str | None:
    """The file's name of Meta's tensor `name`."""
    block = re.match(r"layers\.(\d+)\.(.*)", name)
    if block:
        candidates = (name, f"model.layers.{block[1]}.{_HF[block[2]]}", f"blk.{block[1]}.{_GGUF[block[2]]}")
    else:
        candidates = (name, _HF_OUTER[name], _GGUF_OUTER[name])
    return next((candidate for candidate in candidates if candidate in found), None)


def neighbours(rows_OI: Array, heads: int) -> Array:
    """Rows of halves (0, K/2), (1, K/2 + 1), ... of each head as Meta's neighbours (0, 1), (2, 3), ..."""
    import numpy as np

    shape = (heads, 2, rows_OI.shape[0] // heads // 2, *rows_OI.shape[1:])
    return np.ascontiguousarray(rows_OI.reshape(shape).swapaxes(1, 2)).reshape(rows_OI.shape)


def halves(rows_OI: Array, heads: int) -> Array:
    """The reverse of `neighbours`: the order for the graph's rotation."""
    import numpy as np

    shape = (heads, rows_OI.shape[0] // heads // 2, 2, *rows_OI.shape[1:])
    return np.ascontiguousarray(rows_OI.reshape(shape).swapaxes(1, 2)).reshape(rows_OI.shape)

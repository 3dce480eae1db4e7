"""Llama checkpoints in every layout they are published in, written by tests from the synthetic weights.

Written from the published descriptions of the formats and apart from `models/llama/layouts.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoexport.models.llama import synthetic
from dinoexport.models.llama.config import Architecture

# Along which axis Meta splits a tensor over its files; what is absent is whole in each.
META_AXES = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


def weights(arch: Architecture, seed: int) -> dict[str, Any]:
    """Meta's name -> values, float32."""
    return {name: synthetic.tensor(name, shape, seed) for name, shape in arch.tensors.items()}


def write_meta(folder: Path, arch: Architecture, seed: int, shards: int = 1) -> Path:
    """consolidated.NN.pth and params.json; `rope.freqs` holds another base, which inference must not use."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        tensors = {}
        for name, values in weights(arch, seed).items():
            axis = META_AXES.get(name.split(".")[-2])
            part = values if axis is None else np.split(values, shards, axis)[shard]
            tensors[name] = torch.from_numpy(np.ascontiguousarray(part)).bfloat16()
        tensors["rope.freqs"] = torch.linspace(1, 0, arch.head_dim // 2).bfloat16()
        torch.save(tensors, folder / f"consolidated.{shard:02d}.pth")
    params = {
        "dim": arch.dim,
        "n_layers": arch.layers,
        "n_heads": arch.heads,
        "n_kv_heads": arch.kv_heads,
        "multiple_of": arch.hidden_dim,
        "ffn_dim_multiplier": arch.hidden_dim / int(8 * arch.dim / 3),
        "norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def hf_config(arch: Architecture) -> dict[str, Any]:
    """config.json as published with transformers 4."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": arch.dim,
        "intermediate_size": arch.hidden_dim,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "vocab_size": arch.vocabulary,
        "max_position_embeddings": arch.context,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": arch.tied,
        "torch_dtype": "bfloat16",
    }


def hf_names(arch: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """Hugging Face's names and order of rows, as its conversion script of Llama weights makes them."""

    def permuted(values: Any, heads: int) -> Any:
        rows, columns = values.shape
        return values.reshape(heads, rows // heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)

    found = weights(arch, seed)
    out = {"model.embed_tokens.weight": found["tok_embeddings.weight"], "model.norm.weight": found["norm.weight"]}
    if not arch.tied:
        out["lm_head.weight"] = found["output.weight"]
    for i in range(arch.layers):
        old, new = f"layers.{i}.", f"model.layers.{i}."
        out[f"{new}self_attn.q_proj.weight"] = permuted(found[f"{old}attention.wq.weight"], arch.heads)
        out[f"{new}self_attn.k_proj.weight"] = permuted(found[f"{old}attention.wk.weight"], arch.kv_heads)
        out[f"{new}self_attn.v_proj.weight"] = found[f"{old}attention.wv.weight"]
        out[f"{new}self_attn.o_proj.weight"] = found[f"{old}attention.wo.weight"]
        out[f"{new}mlp.gate_proj.weight"] = found[f"{old}feed_forward.w1.weight"]
        out[f"{new}mlp.down_proj.weight"] = found[f"{old}feed_forward.w2.weight"]
        out[f"{new}mlp.up_proj.weight"] = found[f"{old}feed_forward.w3.weight"]
        out[f"{new}input_layernorm.weight"] = found[f"{old}attention_norm.weight"]
        out[f"{new}post_attention_layernorm.weight"] = found[f"{old}ffn_norm.weight"]
    return {name: torch.from_numpy(np.ascontiguousarray(values)).bfloat16() for name, values in out.items()}


def write_hf(folder: Path, arch: Architecture, seed: int, shards: int = 1) -> Path:
    """Sharded safetensors with an index, and config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_names(arch, seed)
    names, where = list(tensors), {}
    for shard in range(shards):
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hf_config(arch)))
    return folder


def write_gguf(
    path: Path, arch: Architecture, seed: int, kind: str, *, output_kind: str = "", more: dict[str, Any] | None = None
) -> Path:
    """One file as llama.cpp has it, by its own writer: Meta's order of rows, tensors of one type, norms in float32.

    output_kind: the type of the output matrix, where that is another. more: further tensors, by their names there.
    """
    import gguf

    names = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    inner = {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "w1": "ffn_gate", "w2": "ffn_down"}
    inner |= {"w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(arch.dim)
    writer.add_block_count(arch.layers)
    writer.add_feed_forward_length(arch.hidden_dim)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_context_length(arch.context)
    writer.add_vocab_size(arch.vocabulary)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    for name, values in weights(arch, seed).items():
        parts = name.split(".")
        theirs = f"blk.{parts[1]}.{inner[parts[-2]]}" if parts[0] == "layers" else names[parts[0]]
        wanted = output_kind if output_kind and parts[0] == "output" else kind
        stored = gguf.GGMLQuantizationType[wanted if values.ndim > 1 else "F32"]
        writer.add_tensor(f"{theirs}.weight", gguf.quants.quantize(values, stored), raw_dtype=stored)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

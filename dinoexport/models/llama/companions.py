"""Files beside the graph by which Hugging Face's tools load it: optimum's `ORTModelForCausalLM` and kin."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dinoexport.models.llama.config import Architecture


def files(arch: Architecture) -> Mapping[str, bytes]:
    """config.json as transformers writes it for this architecture."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": arch.dim,
        "intermediate_size": arch.hidden_dim,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "vocab_size": arch.vocabulary,
        "max_position_embeddings": arch.context,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tied,
        "use_cache": True,
    }
    return {"config.json": (json.dumps(config, indent=1) + "\n").encode()}

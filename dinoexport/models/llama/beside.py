"""Read the files beside a Llama-type model's weights: config.json, params.json, a GGUF file's metadata.

A setting that would change the mathematics and is not supported here raises a UsageError that names it; it is never
ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinoexport.errors import UsageError
from dinoexport.family import Fact
from dinoexport.weights import gguf_file
from dinoexport.weights.config_file import Config, read_json

_NUMBERS = (int, float)
# Their key -> the recipe's, and the kinds its value may be of.
Keys = dict[str, tuple[str, type | tuple[type, ...]]]
_HF: Keys = {
    "hidden_size": ("model.dim", int),
    "intermediate_size": ("model.hidden_dim", int),
    "num_hidden_layers": ("model.layers", int),
    "num_attention_heads": ("model.heads", int),
    "num_key_value_heads": ("model.kv_heads", int),
    "vocab_size": ("model.vocabulary", int),
    "max_position_embeddings": ("model.context", int),
    "rms_norm_eps": ("model.norm_eps", _NUMBERS),
    "rope_theta": ("model.rope_theta", _NUMBERS),
    "tie_word_embeddings": ("model.tied", bool),
}
_META: Keys = {
    "dim": ("model.dim", int),
    "n_layers": ("model.layers", int),
    "n_heads": ("model.heads", int),
    "n_kv_heads": ("model.kv_heads", int),
    "norm_eps": ("model.norm_eps", _NUMBERS),
    "rope_theta": ("model.rope_theta", _NUMBERS),
}
# The rest of params.json: the feed-forward's width is made of two; what a run allocated says nothing of the model.
_META_OTHERS = frozenset(
    {"multiple_of", "ffn_dim_multiplier", "vocab_size", "max_batch_size", "max_seq_len", "use_scaled_rope"}
)
_GGUF: Keys = {
    "embedding_length": ("model.dim", int),
    "feed_forward_length": ("model.hidden_dim", int),
    "block_count": ("model.layers", int),
    "attention.head_count": ("model.heads", int),
    "attention.head_count_kv": ("model.kv_heads", int),
    "vocab_size": ("model.vocabulary", int),
    "context_length": ("model.context", int),
    "attention.layer_norm_rms_epsilon": ("model.norm_eps", _NUMBERS),
    "rope.freq_base": ("model.rope_theta", _NUMBERS),
}
# What a file that is silent stands for: Hugging Face's and Meta's code, by the name of the file.
SILENT = {
    "config.json": {"norm_eps": 1e-6, "rope_theta": 1e4, "context": 2048},
    "params.json": {"norm_eps": 1e-5, "rope_theta": 1e4, "context": 2048},
}


def facts(weights: Path) -> tuple[Fact, ...]:
    """All facts about the model in the files beside `weights`, a file or a folder."""
    if gguf_file.is_gguf(weights):
        return _checked(_gguf(weights))
    folder = weights if weights.is_dir() else weights.parent
    found: list[Fact] = []
    config, params = read_json(folder / "config.json"), read_json(folder / "params.json")
    if config is not None and "model_type" in config.content:
        found += _hugging_face(config)
    if params is not None and "n_layers" in params.content:
        found += _meta(params)
    return _checked(found)


def other_type(weights: Path) -> str:
    """The kind of model that the files name, if it is another family's; empty if it may be this family's."""
    if gguf_file.is_gguf(weights):
        kind = gguf_file.metadata(weights).get("general.architecture")
    else:
        config = read_json((weights if weights.is_dir() else weights.parent) / "config.json")
        kind = None if config is None else config.get("model_type", str)
    return "" if kind in (None, "llama") else str(kind)


def _hugging_face(config: Config) -> list[Fact]:
    found = config.facts(_HF)
    ropes = config.table("rope_parameters")
    theta = ropes.get("rope_theta", _NUMBERS)
    if theta is not None:
        found.append(Fact(key="model.rope_theta", value=theta, source=config.source("rope_parameters.rope_theta")))
    for name in ("rope_parameters", "rope_scaling"):
        table = config.table(name)
        for key in ("rope_type", "type"):
            kind = table.get(key, str)
            if kind not in (None, "default"):
                raise _not_built(config, f"{name}.{key}", kind, "positions that are scaled")
    activation = config.get("hidden_act", str)
    if activation not in (None, "silu"):
        raise _not_built(config, "hidden_act", activation, "another activation than silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key, bool):
            raise _not_built(config, key, True, "biases")
    dim, heads, size = (config.get(key, int) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if size is not None and dim and heads and size * heads != dim:
        raise _not_built(config, "head_dim", size, f"heads that do not divide {dim} among them")
    if heads is not None and config.get("num_key_value_heads", int) is None:
        found.append(Fact(key="model.kv_heads", value=heads, source=config.source("num_attention_heads")))
    return found


def _meta(params: Config) -> list[Fact]:
    known = sorted({*_META, *_META_OTHERS})
    if unknown := [key for key in params.content if key not in known]:
        raise UsageError(
            f"{params.path}: {unknown[0]} is not known here, and may change what the model computes.",
            next_step=f"Known keys are {', '.join(known)}.",
        )
    if params.get("use_scaled_rope", bool):
        raise _not_built(params, "use_scaled_rope", True, "positions that are scaled")
    found = params.facts(_META)
    heads = params.get("n_heads", int)
    if heads is not None and params.get("n_kv_heads", int) is None:
        found.append(Fact(key="model.kv_heads", value=heads, source=params.source("n_heads")))
    dim, multiple = params.get("dim", int), params.get("multiple_of", int)
    if dim is not None and multiple is not None:
        if multiple < 1:
            raise params.senseless("multiple_of")
        hidden = _feed_forward(dim, multiple, params.get("ffn_dim_multiplier", _NUMBERS))
        found.append(Fact(key="model.hidden_dim", value=hidden, source=params.source("multiple_of")))
    rows = params.get("vocab_size", int)
    if rows not in (None, -1):  # -1: the tokenizer's, which is the embedding's
        found.append(Fact(key="model.vocabulary", value=rows, source=params.source("vocab_size")))
    return found


def _feed_forward(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Its width: two thirds of four times the model's, times the multiplier, cut each time, and rounded up."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def _gguf(path: Path) -> list[Fact]:
    content = gguf_file.metadata(path)
    if (kind := content.get("general.architecture")) != "llama":
        raise UsageError(
            f"{path} holds a model of the kind {kind!r}, not llama.", next_step="Give a file of a Llama model."
        )
    own = Config(path, {key.removeprefix("llama."): _plain(value) for key, value in content.items()})
    scaling = own.get("rope.scaling.type", str)
    if scaling not in (None, "none"):
        raise _not_built(own, "rope.scaling.type", scaling, "positions that are scaled")
    dim, heads, turned = (
        own.get(key, int) for key in ("embedding_length", "attention.head_count", "rope.dimension_count")
    )
    if turned is not None and dim and heads and turned * heads != dim:
        raise _not_built(own, "rope.dimension_count", turned, "heads of which only a part is rotated")
    return own.facts(_GGUF)


def _plain(value: Any) -> Any:
    """The shortest number that is the same in the file's own width: 1e-5, not 9.99999974e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def _not_built(config: Config, key: str, value: Any, what: str) -> UsageError:
    return UsageError(
        f"{config.source(key)} is {value!r}: {what} are not built by this family.",
        next_step="Give a model of the Llama 2 architecture.",
    )


def _checked(found: list[Fact]) -> tuple[Fact, ...]:
    """Raises UsageError for a number that no model has, such as a vocabulary of -1."""
    import numpy as np

    for fact in found:
        if isinstance(fact.value, bool):
            continue
        if not np.isfinite(fact.value) or fact.value <= 0:
            raise UsageError(
                f"{fact.source} is {fact.value}, which makes no sense.", next_step="Fix the file, or move it away."
            )
    return tuple(found)

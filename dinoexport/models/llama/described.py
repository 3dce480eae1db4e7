"""Derive facts, and if needed a recipe, from Llama-type weights and files beside them; list what neither shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.family import Description, Fact, Shapes
from dinoexport.models.llama import beside, layouts, prompts
from dinoexport.models.llama.config import OUTPUT, PARTS, PRODUCTS, Architecture
from dinoexport.models.llama.text import TextTable
from dinoexport.text import tokenizer
from dinoexport.weights import gguf_file
from dinoexport.weights.config_file import name_of, read_json

_TENSORS = "the weights"
_FOUR_BITS = ("Q4_0", "Q4_1")
# Long enough for what a person waits for; a recipe of one's own may say more.
_LENGTH_MAX, _PAST_LIKELY = 2048, 1024
# Meta's params.json says no context. A base is in it since Code Llama, which was trained on so many tokens.
_CODE_LLAMA_BASE, _CODE_LLAMA_CONTEXT = 1e6, 16384


def described(recipe: Recipe, weights: Path, found: Shapes) -> Description:
    """Facts of the weights and of the files beside them, for `recipe`."""
    if kind := beside.other_type(weights):
        raise UsageError(
            f"{recipe.name} is a Llama-type model, and the weights at {weights} are of the kind {kind!r}.",
            next_step="Name the variant that belongs to the weights.",
        )
    arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
    if "rope_freqs.weight" in found:
        raise UsageError(
            f"{weights} scales its positions (rope_freqs.weight), which this family does not build.",
            next_step="Give a model of the Llama 2 architecture.",
        )
    said = [
        fact
        for fact in beside.facts(weights)
        if not (fact.key == "model.context" and fact.value in arch.published_contexts)
    ]
    seen = _seen(layouts.by_published_names(found))
    facts = [
        Fact(key=f"model.{key}", value=value, source=_TENSORS)
        for key, value in seen.items()
        # Where the recipe is about another model the loader says whose the file is, tensor by tensor.
        if key == "vocabulary" and seen.get("dim") == arch.dim
    ]
    return Description(facts=(*said, *facts))


def recipe_from(weights: Path, found: Shapes) -> Recipe | None:
    """A recipe for the weights at `weights`; None if they hold no Llama-type model."""
    seen = _seen(layouts.by_published_names(found))
    if not {"dim", "layers", "hidden_dim", "vocabulary"} <= seen.keys() or beside.other_type(weights):
        return None
    said = {fact.key.removeprefix("model."): fact for fact in reversed(beside.facts(weights))}
    model = {key: fact.value for key, fact in said.items()}
    if "heads" not in model:
        raise UsageError(
            f"The weights at {weights} do not show how many heads they have.",
            next_step="Put their config.json or params.json beside them, or write a recipe.",
        )
    _check_whole(weights, seen, model)
    for key in ("dim", "layers", "hidden_dim", "vocabulary", "tied"):
        model.setdefault(key, seen[key])
    model.setdefault("kv_heads", seen["kv_dim"] * model["heads"] // model["dim"])
    model = _silent(weights, model) | model
    model["text"] = text_table(weights)
    context = model["context"]
    table = {
        "name": name_of(weights),
        "family": "llama",
        "validation": "llama",
        "licence": "yours",
        "quantised": "weights",
        "model": {key: model[key] for key in Architecture.model_fields if model.get(key) not in (None, {})},
        "graph": _graph_table(weights, tied=model["tied"]),
        "profile": {
            "batch": {"min": 1, "opt": 1, "max": 4},
            "length": {"min": 1, "opt": 1, "max": min(_LENGTH_MAX, context)},
            "past": {"min": 0, "opt": min(_PAST_LIKELY, context // 2), "max": context - 1},
        },
    }
    return parse(Recipe, table, where=f"the recipe for {weights}")


def _silent(weights: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that the code which wrote the files uses for keys that they lack."""
    folder = weights if weights.is_dir() else weights.parent
    values = beside.SILENT["config.json" if (folder / "config.json").is_file() else "params.json"]
    if said.get("rope_theta") == _CODE_LLAMA_BASE:
        return values | {"context": _CODE_LLAMA_CONTEXT}
    return values


def _graph_table(weights: Path, *, tied: bool) -> dict[str, Any]:
    """The table `[graph]`: an int4 graph keeps a GGUF's weights of four bits, and stores those of more in eight."""
    if not gguf_file.is_gguf(weights):
        return {}
    products = {part: product for product, part in PARTS.items()}
    wider, kept = set(), False
    for name, kind in layouts.by_published_names(gguf_file.types(weights)).items():
        *_, part = re.split(r"layers\.\d+\.", name.removesuffix(".weight"))
        product = OUTPUT if part == ("tok_embeddings" if tied else "output") else products.get(part)
        if product is None:
            continue
        if kind in _FOUR_BITS:
            kept = True
        else:
            wider.add(product)
    return {"int8": sorted(wider, key=PRODUCTS.index)} if kept else {}


def assumed(recipe: Recipe) -> tuple[Fact, ...]:
    """Values that weights do not show and files may leave out."""
    arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
    why = "what its authors' code takes where a file is silent"
    return tuple(
        Fact(key=f"model.{key}", value=getattr(arch, key), source=why) for key in ("norm_eps", "rope_theta", "context")
    )


def _check_whole(weights: Path, seen: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuses tensors from several files that do not add up to the model's width: a file is missing."""
    dim = said.get("dim", seen["dim"])
    if seen["query_numbers"] != dim * dim:
        raise UsageError(
            f"The weights at {weights} hold {seen['query_numbers']:,} numbers of attention.wq where a width of {dim} "
            f"has {dim * dim:,}: a file is missing, or heads are not {dim} wide together.",
            next_step="Give all files of the checkpoint.",
        )


def _seen(shapes: Shapes) -> dict[str, Any]:
    """What tensors under their published names show of `[model]`."""
    seen: dict[str, Any] = {}
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))]
    norm = shapes.get("norm.weight", ())
    needed = ("tok_embeddings.weight", *(f"layers.0.{part}.weight" for part in layouts.PARTS))
    if len(norm) != 1 or not norm[0] or not blocks or any(name not in shapes for name in needed):
        return seen
    dim = norm[0]

    def rows(name: str) -> int:
        return math.prod(shapes[name]) // dim

    return {
        "dim": dim,
        "layers": 1 + max(blocks),
        "kv_dim": rows("layers.0.attention.wk.weight"),
        "query_numbers": math.prod(shapes["layers.0.attention.wq.weight"]),
        "hidden_dim": rows("layers.0.feed_forward.w1.weight"),
        "vocabulary": rows("tok_embeddings.weight"),
        "tied": "output.weight" not in shapes,
    }


def text_table(weights: Path) -> dict[str, Any]:
    """The table `[model.text]` by the tokenizer and its configuration; only what is not as by default."""
    if gguf_file.is_gguf(weights):
        hints = _gguf_hints(weights)
    else:
        hints = _folder_hints(weights if weights.is_dir() else weights.parent)
    template = str(hints.pop("template", ""))
    if prompts.TURN in template:
        hints |= {"chat": "chatml", "eos": prompts.END_OF_TURN}
    elif prompts.TAGS[0] in template:
        hints["chat"] = "instruct"
    plain = TextTable().model_dump()
    return {key: value for key, value in hints.items() if value is not None and value != plain[key]}


def _gguf_hints(path: Path) -> dict[str, Any]:
    content = gguf_file.metadata(path)
    pieces = content.get("tokenizer.ggml.tokens", [])

    def piece(key: str) -> str | None:
        at = content.get(f"tokenizer.ggml.{key}_token_id")
        return pieces[at] if isinstance(at, int) and 0 <= at < len(pieces) else None

    bos = piece("bos") if content.get("tokenizer.ggml.add_bos_token", True) else ""
    return {
        "bos": bos,
        "eos": piece("eos"),
        "infill": all(marker in pieces for marker in prompts.MARKERS[:4]) if pieces else None,
        "template": content.get("tokenizer.chat_template", ""),
    }


def _folder_hints(folder: Path) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    config = read_json(folder / "tokenizer_config.json")
    if config is not None:
        for ours in ("bos", "eos"):
            word = config.content.get(f"{ours}_token")
            word = word.get("content") if isinstance(word, dict) else word
            hints[ours] = word if isinstance(word, str) else None
        if config.get("add_bos_token", bool) is False:
            hints["bos"] = ""
        template = config.content.get("chat_template")
        hints["template"] = template if isinstance(template, str) else ""
    path = tokenizer.find(folder)
    if path is not None:
        found = tokenizer.load(path)
        hints["infill"] = all(found.piece_id(marker) is not None for marker in prompts.MARKERS[:4])
    return hints

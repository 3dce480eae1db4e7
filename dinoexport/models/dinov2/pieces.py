"""The graph as calls of traced pieces: stem, each block, and a head for each block that is an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dinoexport.family import Call, Example, Piece, Read
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import fold
from dinoexport.models.dinov2.config import Architecture, GraphChoices, dtype_name
from dinoexport.models.dinov2.signature import token_outputs
from dinoexport.spec import Graph, Precision

_TRACED = "dinoexport.models.dinov2.graph"


def calls(
    graph: Graph,
    arch: Architecture,
    choices: GraphChoices,
    preprocessing: Preprocessing,
    *,
    precision: Precision,
    read: Read,
) -> Iterator[Call]:
    """The graph's calls, first to last."""
    body = dtype_name(precision)
    residual = "float16" if body == "float16" and choices.residual == "fp16" else "float32"
    fp32 = choices.fp32_parts(arch.depth) if body == "float16" else frozenset()
    norms = "float32" if "norms" in fp32 else residual
    scores = "float32" if "softmax" in fp32 else body
    form = f"{body} with residual {residual}, norms {norms}, scores {scores}"
    folded = fold.Folded(arch=arch, read=read)

    def over_tokens(name: str, module: str, arguments: Mapping[str, Any]) -> Piece:
        return Piece(
            name=f"{name}, {form}",
            code=f"{_TRACED}:{module}",
            arguments=arguments,
            example_inputs={"tokens": Example(dtype=residual, shape=(2, 5, arch.embed_dim))},
            dynamic={"tokens": {0: "batch", 1: "tokens"}},
        )

    facts, exactly = _block_facts(arch), dict.fromkeys(("body", "norms", "scores"), "float32")
    block = over_tokens("block", "Block", {**facts, "body": body, "norms": norms, "scores": scores})
    exact = over_tokens("fp32_block", "Block", {**facts, **exactly})
    final = {"dim": arch.embed_dim, "prefix_count": 1 + arch.register_count, "epsilon": arch.layer_norm_eps}
    last_head = over_tokens("head", "Head", {**final, "with_registers": True})
    chosen_head = over_tokens("chosen_head", "Head", {**final, "with_registers": False})
    yield Call(
        piece=_stem(graph, arch, choices, preprocessing, name=f"stem, {form}", residual=residual),
        scope="stem",
        inputs=(graph.inputs[0].name,),
        outputs=("stem_tokens",),
        weights=folded.stem(),
    )
    value = "stem_tokens"
    for i in range(arch.depth):
        yield Call(
            piece=exact if f"blocks.{i}" in fp32 else block,
            scope=f"blocks.{i}",
            inputs=(value,),
            outputs=(f"blocks.{i}_tokens",),
            weights=folded.block(i),
        )
        value = f"blocks.{i}_tokens"
        for head_block, prefix in token_outputs(arch, choices):
            if head_block == i:
                yield Call(
                    piece=chosen_head if prefix else last_head,
                    scope=f"{prefix}norm",
                    inputs=(value,),
                    outputs=tuple(t.name for t in graph.outputs if _belongs(t.name, prefix)),
                    weights=folded.head(),
                )


def _stem(
    graph: Graph,
    arch: Architecture,
    choices: GraphChoices,
    preprocessing: Preprocessing,
    *,
    name: str,
    residual: str,
) -> Piece:
    image, patch, channels = graph.inputs[0], arch.patch_size, arch.in_chans
    height, width = 17 * patch, 19 * patch  # neither native nor square, so that tracing specialises on nothing
    normalising: dict[str, Any] = {}
    if choices.input == "images":
        example = Example(dtype="uint8", shape=(2, height, width, channels))
        normalising = {"mean": preprocessing.mean, "std": preprocessing.std}
    else:
        example = Example(dtype="float32", shape=(2, channels, height, width))
    return Piece(
        name=name,
        code=f"{_TRACED}:Stem",
        arguments=arch.stem_facts | {"residual": residual, **normalising},
        example_inputs={image.name: example},
        dynamic={image.name: {axis: dim for axis, dim in enumerate(image.shape) if isinstance(dim, str)}},
        least_sizes={"height": patch, "width": patch},
    )


def _block_facts(arch: Architecture) -> dict[str, Any]:
    return {
        "dim": arch.embed_dim,
        "num_heads": arch.num_heads,
        "hidden": arch.hidden_dim,
        "swiglu": arch.feed_forward == "swiglu",
        "activation": arch.activation,
        "epsilon": arch.layer_norm_eps,
        "qkv_bias": arch.qkv_bias,
    }


def _belongs(output: str, prefix: str) -> bool:
    return output.startswith(prefix) if prefix else not output.startswith("block_")

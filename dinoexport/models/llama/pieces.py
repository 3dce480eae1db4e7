"""A decoder's graph as calls of traced pieces: stem, each block, head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dinoexport.family import Call, Example, Piece
from dinoexport.models.llama.config import OUTPUT, PARTS, Architecture
from dinoexport.models.llama.graph_weights import GraphWeights
from dinoexport.runtime.decoding import ATTENTION_MASK, FIRST_POSITION, INPUT_IDS, LOGITS, LOGITS_TO_KEEP
from dinoexport.spec import Precision

# RMSNormalization, RotaryEmbedding and Attention are operators since this opset.
_OPSET = 23
_TRACED = "dinoexport.models.llama.graph"
DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}
# Sizes that the pieces are traced with.
_BATCH, _PAST, _LENGTH = 2, 5, 3
_BY_TOKEN = {0: "batch", 1: "length"}


def calls(weights: GraphWeights) -> Iterator[Call]:
    """The graph's calls, first to last."""
    arch, body = weights.arch, DTYPES[weights.body]
    residual = body if weights.choices.residual == "fp16" else "float32"
    stem = _stem(arch, body, residual)
    block = _with_offsets(_block(arch, body, residual), weights, tuple(PARTS))
    head = _with_offsets(_head(arch, body, residual), weights, (OUTPUT,))
    shared = ("cosines", "sines", "mask")
    value = "embedded"
    yield Call(
        piece=stem,
        scope="stem",
        inputs=(INPUT_IDS, ATTENTION_MASK, FIRST_POSITION),
        outputs=(value, *shared),
        weights=weights.stem(),
    )
    for i in range(arch.layers):
        pasts = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
        presents = (f"present.{i}.key", f"present.{i}.value")
        yield Call(
            piece=block,
            scope=f"layers.{i}",
            inputs=(value, *shared, *pasts),
            outputs=(f"layers.{i}_stream", *presents),
            weights=weights.block(i),
        )
        value = f"layers.{i}_stream"
    yield Call(piece=head, scope="head", inputs=(value, LOGITS_TO_KEEP), outputs=(LOGITS,), weights=weights.head())


def _stem(arch: Architecture, body: str, residual: str) -> Piece:
    return Piece(
        name=f"stem, {_form(body, residual)}",
        code=f"{_TRACED}:Stem",
        arguments={
            "vocabulary": arch.vocabulary,
            "dim": arch.dim,
            "head_dim": arch.head_dim,
            "rope_theta": arch.rope_theta,
            "body": body,
            "residual": residual,
        },
        example_inputs={
            INPUT_IDS: Example(dtype="int64", shape=(_BATCH, _LENGTH)),
            ATTENTION_MASK: Example(dtype="int64", shape=(_BATCH, _PAST + _LENGTH)),
            FIRST_POSITION: Example(dtype="int64", shape=(1,)),
        },
        dynamic={INPUT_IDS: _BY_TOKEN, ATTENTION_MASK: {0: "batch", 1: "total"}},
        opset=_OPSET,
    )


def _block(arch: Architecture, body: str, residual: str) -> Piece:
    pairs = Example(dtype="float32", shape=(_BATCH, _LENGTH, arch.head_dim // 2))
    cache = Example(dtype=body, shape=(_BATCH, arch.kv_heads, _PAST, arch.head_dim))
    return Piece(
        name=f"block, {_form(body, residual)}",
        code=f"{_TRACED}:Block",
        arguments={
            "dim": arch.dim,
            "kv_dim": arch.kv_dim,
            "head_dim": arch.head_dim,
            "hidden_dim": arch.hidden_dim,
            "norm_eps": arch.norm_eps,
            "body": body,
        },
        example_inputs={
            "stream": _stream(arch, residual),
            "cosines": pairs,
            "sines": pairs,
            "mask": Example(dtype="bool", shape=(_BATCH, 1, _LENGTH, _PAST + _LENGTH)),
            "past_key": cache,
            "past_value": cache,
        },
        dynamic={
            "stream": _BY_TOKEN,
            "cosines": _BY_TOKEN,
            "sines": _BY_TOKEN,
            "mask": {0: "batch", 2: "length", 3: "total"},
            "past_key": {0: "batch", 2: "past"},
            "past_value": {0: "batch", 2: "past"},
        },
        opset=_OPSET,
    )


def _head(arch: Architecture, body: str, residual: str) -> Piece:
    return Piece(
        name=f"head, {_form(body, residual)}",
        code=f"{_TRACED}:Head",
        arguments={
            "dim": arch.dim,
            "vocabulary": arch.vocabulary,
            "norm_eps": arch.norm_eps,
            "body": body,
        },
        example_inputs={
            "stream": _stream(arch, residual),
            LOGITS_TO_KEEP: Example(dtype="int64", shape=(1,)),
        },
        dynamic={"stream": _BY_TOKEN},
        opset=_OPSET,
    )


def _with_offsets(piece: Piece, weights: GraphWeights, products: tuple[str, ...]) -> Piece:
    """The piece, for those of its products whose weights have offsets."""
    offsets = weights.offsets(*products)
    if not offsets:
        return piece
    block = weights.choices.block
    return replace(
        piece,
        name=f"{piece.name}, offsets of {block} rows in {' '.join(offsets)}",
        arguments={**piece.arguments, "offsets": offsets, "block": block},
    )


def _stream(arch: Architecture, residual: str) -> Example:
    return Example(dtype=residual, shape=(_BATCH, _LENGTH, arch.dim))


def _form(body: str, residual: str) -> str:
    return f"{body} with residual {residual}"

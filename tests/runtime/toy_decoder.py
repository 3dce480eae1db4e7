"""A decoder small enough to compute by hand, for each runtime's way to keep its cache.

The cache of a token holds the token's id. The logits of a token are the sum of all ids up to it that the mask counts,
its place in the sequence, and the position of the first token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dinoexport.spec import Dim, Graph, Tensor

HEADS, WIDTH = 2, 8
GRAPH = Graph(
    name="model",
    inputs=(
        Tensor(name="input_ids", dtype="int64", shape=("batch", "length"), meaning="tokens"),
        Tensor(name="attention_mask", dtype="int64", shape=("batch", "total"), meaning="which of all tokens count"),
        Tensor(name="logits_to_keep", dtype="int64", shape=(1,), meaning="rows", default=0),
        Tensor(name="first_position", dtype="int64", shape=(1,), meaning="position", default=0),
        Tensor(name="past_k", dtype="float32", shape=("batch", HEADS, "past", WIDTH), meaning="the cache"),
        Tensor(name="past_v", dtype="float32", shape=("batch", HEADS, "past", WIDTH), meaning="the cache"),
    ),
    outputs=(
        Tensor(name="logits", dtype="float32", shape=("batch", "kept", 3), meaning="scores"),
        Tensor(name="present_k", dtype="float32", shape=("batch", HEADS, "total", WIDTH), meaning="the cache"),
        Tensor(name="present_v", dtype="float32", shape=("batch", HEADS, "total", WIDTH), meaning="the cache"),
    ),
    dims=(
        Dim(name="batch", min=1, opt=1, max=9),
        Dim(name="length", min=1, opt=1, max=300),
        Dim(name="past", min=0, opt=1, max=300),
        Dim(name="total", min=1, opt=1, max=600, sum_of=("past", "length")),
    ),
    carried={"past_k": "present_k", "past_v": "present_v"},
)


def ids(*rows: tuple[int, ...]) -> Any:
    """Tokens of a batch, or a mask."""
    return np.array(rows, np.int64)


def ones(batch: int, total: int) -> Any:
    """A mask that counts all tokens."""
    return np.ones((batch, total), np.int64)


def entries(input_ids: Any, factor: int) -> Any:
    """What the cache holds of new tokens (B, T): (B, heads, T, width)."""
    shape = (len(input_ids), HEADS, input_ids.shape[1], WIDTH)
    return np.broadcast_to(factor * input_ids[:, None, :, None], shape).astype(np.float32)


def logits(cache: Any, mask: Any, new: int, keep: int, first_position: int) -> Any:
    """Those of the last `keep` of `new` tokens, 0 for all, by the keys (B, heads, total, width) of all tokens."""
    total = cache.shape[2]
    sums = np.cumsum(cache[:, 0, :, 0] * mask, axis=1)
    places = np.broadcast_to(np.arange(total), sums.shape)
    found = np.stack([sums, places, np.full(sums.shape, first_position)], axis=2)[:, total - new :]
    return found[:, -keep:].astype(np.float32)


def run(arrays: Any) -> Any:
    """The graph as a runner whose cache is an input and an output."""
    new = arrays["input_ids"]
    keys = np.concatenate([arrays["past_k"], entries(new, 1)], axis=2)
    values = np.concatenate([arrays["past_v"], entries(new, 10)], axis=2)
    keep, first = (int(arrays[name][0]) if name in arrays else 0 for name in ("logits_to_keep", "first_position"))
    found = logits(keys, arrays["attention_mask"], new.shape[1], keep, first)
    return {"logits": found, "present_k": keys, "present_v": values}

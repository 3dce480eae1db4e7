"""A decoder whose cache is passed as arrays, on a made-up graph: what it gives the graph, keeps, and refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dinoexport.errors import InputRefused
from dinoexport.runtime import Opened, check_inputs, decoding
from dinoexport.spec import Dim, Graph, Tensor

GRAPH = Graph(
    name="model",
    inputs=(
        Tensor(name="input_ids", dtype="int64", shape=("batch", "length"), meaning="tokens"),
        Tensor(name="attention_mask", dtype="int64", shape=("batch", "total"), meaning="which of all tokens count"),
        Tensor(name="logits_to_keep", dtype="int64", shape=(1,), meaning="rows", default=1),
        Tensor(name="first_position", dtype="int64", shape=(1,), meaning="position", default=0),
        Tensor(name="past", dtype="float32", shape=("batch", 2, "past", 3), meaning="the cache"),
    ),
    outputs=(Tensor(name="logits", dtype="float32", shape=("batch", "kept", 5), meaning="scores"),),
    dims=(Dim(name="batch", min=1, opt=1, max=9), Dim(name="length", min=1, opt=1, max=9)),
    carried={"past": "present"},
)


class Calls:
    """A graph that lengthens its cache and gives one inner value besides."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, arrays: Any) -> Any:
        self.seen.append(dict(arrays))
        batch, new = arrays["input_ids"].shape
        more = np.full((batch, 2, new, 3), len(self.seen), np.float32)
        logits = np.arange(batch * 10, dtype=np.float32).reshape(batch, 2, 5)
        return {"logits": logits, "present": np.concatenate([arrays["past"], more], axis=2), "inner": more}


def ids(*rows: tuple[int, ...]) -> Any:
    return np.array(rows, np.int64)


def test_a_step_gives_the_last_row_and_keeps_the_cache() -> None:
    calls = Calls()
    decoder = decoding.begin(calls, GRAPH)
    assert isinstance(decoder, decoding.ArrayDecoder)
    assert decoder.step(ids((1, 2, 3)), ids((1, 1, 1))).tolist() == [[5, 6, 7, 8, 9]]
    assert decoder.past_tokens == 3 and list(decoder.inside) == ["inner"]
    decoder.rows(ids((4,)), ids((1, 1, 1, 1)), keep=2, first_position=7)
    first, second = calls.seen
    assert first["past"].shape == (1, 2, 0, 3) and second["past"].shape == (1, 2, 3, 3)
    assert [(call["logits_to_keep"].tolist(), call["first_position"].tolist()) for call in calls.seen] == [
        ([1], [0]), ([2], [7])
    ]  # fmt: skip
    assert decoder.carried()["past"][0, 0, :, 0].tolist() == [1, 1, 1, 2]
    decoder.reset()
    assert decoder.past_tokens == 0 and decoder.carried() == {}
    decoder.step(ids((1,), (2,)), ids((1,), (1,)))
    assert calls.seen[2]["past"].shape == (2, 2, 0, 3)


def test_rows_are_those_of_the_last_token_from_the_first_position() -> None:
    calls = Calls()
    decoding.ArrayDecoder(calls, GRAPH).rows(ids((1,)), ids((1,)))
    assert (calls.seen[0]["logits_to_keep"].tolist(), calls.seen[0]["first_position"].tolist()) == ([1], [0])
    given = decoding.inputs_of(ids((1,)), ids((1,)))
    assert (given["logits_to_keep"].tolist(), given["first_position"].tolist()) == ([0], [0])


def test_a_mask_covers_all_tokens_so_far_of_as_many_sequences() -> None:
    decoder = decoding.ArrayDecoder(Calls(), GRAPH)
    decoder.step(ids((1, 2, 3)), ids((1, 1, 1)))
    with pytest.raises(InputRefused) as caught:
        decoder.step(ids((4, 5)), ids((1, 1, 1, 1)))
    assert caught.value.message == "attention_mask covers 4 tokens; the cache and input_ids have 5."
    with pytest.raises(InputRefused) as caught:
        decoder.step(ids((4,), (4,)), ids((1, 1, 1, 1), (1, 1, 1, 1)))
    assert caught.value.message == "The cache holds 1 sequences, not 2."


def test_a_runtime_that_keeps_state_itself_begins_its_own_decoder() -> None:
    own: Any = object()
    calls = Calls()
    assert decoding.begin(Opened(run=calls, arithmetic=lambda _: {}, begin=lambda: own), GRAPH) is own
    without = decoding.begin(Opened(run=calls, arithmetic=lambda _: {}), GRAPH)
    assert isinstance(without, decoding.ArrayDecoder)


def test_prompts_are_padded_on_the_left() -> None:
    padded, mask = decoding.padded([np.array([7]), np.array([1, 2, 3])])
    assert padded.tolist() == [[0, 0, 7], [1, 2, 3]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    padded, _ = decoding.padded([np.array([7]), np.array([1, 2])], 9)
    assert padded.tolist() == [[9, 7], [1, 2]] and padded.dtype == mask.dtype == np.int64


def test_only_what_a_caller_computed_is_looked_through_for_nan() -> None:
    """A cache comes from the graph itself, and integers have no NaN."""
    graph = Graph(
        name="model",
        inputs=(
            Tensor(name="x", dtype="float32", shape=("n",), meaning="values"),
            Tensor(name="ids", dtype="int64", shape=("n",), meaning="tokens"),
            Tensor(name="past", dtype="float32", shape=("n",), meaning="the cache"),
        ),
        outputs=(),
        dims=(),
        carried={"past": "present"},
    )
    for wrong in (np.nan, np.inf):
        fine, spoilt = np.zeros(2, np.float32), np.array([0, wrong], np.float32)
        check_inputs(graph, {"x": fine, "ids": np.zeros(2, np.int64), "past": spoilt})
        with pytest.raises(InputRefused, match=r"^x holds NaN or Inf\."):
            check_inputs(graph, {"x": spoilt, "ids": np.zeros(2, np.int64), "past": fine})

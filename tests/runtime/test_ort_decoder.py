"""How a decoder uses a session of ONNX Runtime, by one that is computed here: buffers, lengths, and calls of one token.

What ONNX Runtime itself does with the same calls, tests/models/test_llama.py shows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import BuildError, InputRefused
from dinoexport.runtime import decoding, telemetry
from dinoexport.runtime.ort_decoder import OrtDecoder
from tests.runtime import toy_decoder
from tests.runtime.toy_decoder import GRAPH, entries, ids, ones

CACHE = {"past_k": ("present_k", 1), "past_v": ("present_v", 10)}


class Binding:
    """An IOBinding: names -> the caller's own memory."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.bound: list[str] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value
        self.bound.append(name)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.outputs[name] = value


class Session:
    """A session that writes new tokens into the cache where it is, as GroupQueryAttention does."""

    def __init__(self) -> None:
        self.bindings: list[Binding] = []
        self.calls: list[tuple[Any, ...]] = []

    def io_binding(self) -> Binding:
        self.bindings.append(Binding())
        return self.bindings[-1]

    def run_with_iobinding(self, binding: Binding) -> None:
        given = binding.inputs
        new, mask, last, total = (
            given[name] for name in ("input_ids", "attention_mask", "seqlens_k", "total_sequence_length")
        )
        assert last.dtype == total.dtype == np.int32 and total.shape == (1,)
        assert last.tolist() == [total[0] - 1] * len(new) and mask.shape == (len(new), total[0])
        keep, first = given["logits_to_keep"], given["first_position"]
        self.calls.append((new.tolist(), int(total[0]) - 1, keep.tolist(), first.tolist()))
        if 13 in new:
            raise RuntimeError("no such token")
        past = total[0] - new.shape[1]
        assert past and not mask[:, 0].any(), "no call is taken for a prompt: the first entry is unseen"
        assert len(new) == 1 or new.shape[1] == 1, "several tokens added to several pasts"
        for name, (present, factor) in CACHE.items():
            assert binding.outputs[present] is given[name], "the cache stays where it is"
            assert not given[name][:, :, 0].any()
            given[name][:, :, past : total[0]] = entries(new, factor)
        if "cos_cache" in given:
            rows, more = given["cos_cache"][:, 0], given["sin_cache"][:, 0]
            assert not first[0] and len(rows) == given["past_k"].shape[2] and (more == rows + 0.5).all()
            assert (np.diff(rows) == 1).all()
            first = rows[:1]
        seen = given["past_k"][:, :, 1 : total[0]]
        found = toy_decoder.logits(seen, mask[:, 1:], new.shape[1], int(keep[0]), int(first[0]))
        binding.outputs["logits"][...] = found


class Tables:
    """A session that computes tables of rotations: here positions, and halves after them."""

    def __init__(self) -> None:
        self.asked = 0

    def run(self, names: None, given: dict[str, Any]) -> list[Any]:
        (positions_N1,) = given.values()
        self.asked += 1
        assert list(given) == ["positions"] and positions_N1.dtype == np.float32
        return [positions_N1 + np.zeros(3, np.float32), positions_N1 + np.full(3, 0.5, np.float32)]


@pytest.fixture(autouse=True)
def _values(monkeypatch: pytest.MonkeyPatch) -> None:
    values = SimpleNamespace(ortvalue_from_numpy=lambda array: array)
    monkeypatch.setattr(telemetry, "onnxruntime", lambda: SimpleNamespace(OrtValue=values))


def decoders(tables: Tables | None = None) -> tuple[OrtDecoder, decoding.ArrayDecoder, Session]:
    """The decoder, one that is given its cache with every call, and the session."""
    session = Session()
    return OrtDecoder(session, GRAPH, tables), decoding.ArrayDecoder(toy_decoder.run, GRAPH), session


def test_each_call_adds_to_the_cache() -> None:
    ours, plain, session = decoders()
    for decoder in (ours, plain):
        assert decoder.past_tokens == 0 and decoder.carried() == {}
        prompt = decoder.rows(ids((1, 2, 3), (4, 5, 6)), ids((0, 1, 1), (1, 1, 1)), keep=2, first_position=7)
        assert prompt.tolist() == [[[2, 1, 7], [5, 2, 7]], [[9, 1, 7], [15, 2, 7]]]
        after = decoder.step(ids((7,), (8,)), ids((0, 1, 1, 1), (1, 1, 1, 1)))
        assert after.tolist() == [[12, 3, 0], [23, 3, 0]] and after.dtype == np.float32
        assert decoder.past_tokens == 4
        cache = decoder.carried()
        assert list(cache) == ["past_k", "past_v"]
        assert cache["past_k"][:, 1, :, 2].tolist() == [[1, 2, 3, 7], [4, 5, 6, 8]]
        assert cache["past_v"][:, 0, :, 0].tolist() == [[10, 20, 30, 70], [40, 50, 60, 80]]
    assert session.calls == [
        ([[1, 2, 3]], 3, [2], [7]), ([[4, 5, 6]], 3, [2], [7]),
        ([[7], [8]], 4, [1], [0]),
    ]  # fmt: skip


def test_tables_of_rotations_begin_with_the_first_position() -> None:
    """Those of each sequence of a prompt too; the graph counts from there, and larger buffers get larger tables."""
    tables = Tables()
    ours, plain, session = decoders(tables)
    for decoder in (ours, plain):
        decoder.rows(ids((1, 2), (3, 4)), ids((0, 1), (1, 1)), first_position=20000)
        found = decoder.rows(ids((5,), (6,)), ids((0, 1, 1), (1, 1, 1)), first_position=20000)
        assert found.tolist() == [[[7, 2, 20000]], [[13, 2, 20000]]]
        moved = decoder.rows(ids((5,), (6,)), ids((0, 1, 1, 1), (1, 1, 1, 1)), first_position=7)
        assert moved.tolist() == [[[12, 3, 7]], [[19, 3, 7]]]
        more = decoder.rows(np.ones((2, 256), np.int64), ones(2, 260), first_position=7)
        assert more.tolist() == [[[269, 259, 7]], [[275, 259, 7]]]
    assert [binding.inputs["past_k"].shape for binding in session.bindings] == [
        (2, 2, 259, 8), (1, 2, 259, 8), (1, 2, 259, 8), (2, 2, 259, 8), (2, 2, 517, 8), (1, 2, 517, 8), (1, 2, 517, 8)
    ]  # fmt: skip
    assert [call[3] for call in session.calls] == [[0]] * len(session.calls)


def test_a_caller_s_arrays_are_not_written() -> None:
    ours, _, _ = decoders()
    first, mask = ids((3,)), ones(1, 1)
    ours.step(first, mask)
    ours.step(ids((4,)), ones(1, 2))
    assert (first.tolist(), mask.tolist()) == ([[3]], [[1]])


def test_several_tokens_of_several_sequences_are_added_one_sequence_at_a_time() -> None:
    ours, plain, session = decoders()
    for decoder in (ours, plain):
        decoder.rows(ids((1,), (2,)), ones(2, 1), keep=0, first_position=3)
        more = decoder.rows(ids((3, 4, 5), (6, 7, 8)), ones(2, 4), keep=2, first_position=3)
        assert more.tolist() == [[[8, 2, 3], [13, 3, 3]], [[15, 2, 3], [23, 3, 3]]]
        every = decoder.rows(ids((1, 1), (2, 2)), ones(2, 6), keep=0)
        assert every.tolist() == [[[14, 4, 0], [15, 5, 0]], [[25, 4, 0], [27, 5, 0]]]
    assert session.calls == [
        ([[1], [2]], 1, [0], [3]),
        ([[3, 4, 5]], 4, [2], [3]), ([[6, 7, 8]], 4, [2], [3]),
        ([[1, 1]], 6, [0], [0]), ([[2, 2]], 6, [0], [0]),
    ]  # fmt: skip


def test_several_tokens_of_one_sequence_are_one_call() -> None:
    ours, _, session = decoders()
    ours.step(ids((1,)), ones(1, 1))
    assert ours.rows(ids((2, 3)), ones(1, 3)).tolist() == [[[6, 2, 0]]]
    assert [call[:2] for call in session.calls] == [([[1]], 1), ([[2, 3]], 3)]


def test_buffers_stay_until_they_are_full() -> None:
    """One token leaves room for 256 more; then all moves to larger ones."""
    ours, _, session = decoders()
    ours.step(ids((1,)), ones(1, 1))
    ours.step(np.ones((1, 256), np.int64), ones(1, 257))
    (binding,) = session.bindings
    assert binding.inputs["past_k"].shape == (1, 2, 258, 8)
    ours.step(ids((5,)), ones(1, 258))
    assert [made.inputs["past_k"].shape[2] for made in session.bindings] == [258, 515]
    assert ours.carried()["past_v"][0, 1, :, 1].tolist() == [10] * 257 + [50]


def test_an_input_of_the_same_size_keeps_its_memory() -> None:
    """Only the mask, which grows with every token, is bound again."""
    ours, _, session = decoders()
    for total, token in enumerate((3, 4, 5), 1):
        ours.step(ids((token,)), ones(1, total))
    (binding,) = session.bindings
    assert binding.bound == [
        "past_k", "past_v", "input_ids", "attention_mask", "logits_to_keep", "first_position", "seqlens_k",
        "total_sequence_length", "attention_mask", "attention_mask",
    ]  # fmt: skip


def test_sequences_are_forgotten_reordered_and_taken_up() -> None:
    ours, plain, _ = decoders()
    for decoder in (ours, plain):
        decoder.rows(ids((1, 2), (3, 4), (5, 6)), ones(3, 2))
        decoder.reorder((2, 0))
        assert decoder.past_tokens == 2
        assert decoder.step(ids((7,), (8,)), ones(2, 3)).tolist() == [[18, 2, 0], [11, 2, 0]]
        kept = {name: array.copy() for name, array in decoder.carried().items()}
        decoder.reset()
        assert decoder.past_tokens == 0 and decoder.carried() == {}
        assert decoder.step(ids((9,)), ones(1, 1)).tolist() == [[9, 0, 0]]
        decoder.resume(kept)
        assert decoder.past_tokens == 3
        assert decoder.step(ids((1,), (1,)), ones(2, 4)).tolist() == [[19, 3, 0], [12, 3, 0]]
    ours.resume({})
    assert ours.past_tokens == 0 and ours.carried() == {}


def test_a_whole_call_has_the_cache_as_input_and_output() -> None:
    ours, _, session = decoders()
    given = {
        "input_ids": ids((3, 4)), "attention_mask": ones(1, 3),
        "past_k": entries(ids((2,)), 1), "past_v": entries(ids((2,)), 10),
    }  # fmt: skip
    answers = ours.whole(given)
    assert list(answers) == ["logits", "present_k", "present_v"]
    assert answers["logits"].tolist() == [[[5, 1, 0], [9, 2, 0]]], "all rows where their number is left out"
    assert answers["present_v"][0, 1, :, 2].tolist() == [20, 30, 40]
    one = ours.whole(given | {"logits_to_keep": ids((1,))[0], "first_position": ids((4,))[0]})
    assert one["logits"].tolist() == [[[9, 2, 4]]]
    assert [call[2:] for call in session.calls] == [([0], [0]), ([1], [4])]
    with pytest.raises(InputRefused, match="batch 10 is outside"):
        ours.whole(given | {"input_ids": np.ones((10, 2), np.int64)})


def test_what_does_not_fit_or_fails_is_one_error() -> None:
    ours, _, _ = decoders()
    ours.step(ids((1,), (2,)), ones(2, 1))
    with pytest.raises(InputRefused, match=r"^The cache holds 2 sequences, not 1\.$"):
        ours.step(ids((1,)), ones(1, 2))
    with pytest.raises(InputRefused, match=r"covers 3 tokens; the cache and input_ids have 2\.$"):
        ours.step(ids((1,), (1,)), ones(2, 3))
    with pytest.raises(BuildError, match=r"^ONNX Runtime failed on \{'input_ids': \(2, 1\), .*\}: no such token$"):
        ours.step(ids((13,), (1,)), ones(2, 2))

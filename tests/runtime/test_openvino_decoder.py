"""How OpenVINO keeps a decoder's cache: variables in a graph written here, and calls of a request computed here.

No graph is compiled here; tests/models/test_llama.py compares the answers of real decoders.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import BuildError, InputRefused
from dinoexport.runtime import decoding, openvino_decoder, telemetry
from dinoexport.runtime.openvino_decoder import OpenVinoDecoder
from tests.runtime import toy_decoder
from tests.runtime.toy_decoder import GRAPH, entries, ids, ones

openvino = telemetry.openvino()
ops = openvino.opset13


@pytest.fixture
def _openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick tests load no runtime to run a model; here it only holds graphs."""
    monkeypatch.setattr(telemetry, "openvino", lambda: openvino)


def named(node: Any, name: str) -> Any:
    node.set_friendly_name(name)
    node.output(0).get_tensor().set_names({name})
    return node


def read_model() -> Any:
    """A decoder as the front end gives it: inputs with a default are constants, and heads are repeated by Tile.

    Five products of attention: two with the same mask, one with another and a scale, one without, one with numbers.
    """
    tokens, mask = (named(ops.parameter([-1, -1], np.int64), name) for name in ("input_ids", "attention_mask"))
    past_k, past_v = (named(ops.parameter([-1, 2, -1, 3], np.float32), name) for name in ("past_k", "past_v"))
    keep, first = (ops.constant(np.zeros(1, np.int64), name=name) for name in ("logits_to_keep", "first_position"))
    by_head = ops.convert(ops.unsqueeze(tokens, [1, 3]), "f32")
    new = named(ops.multiply(by_head, ops.constant(np.ones((1, 2, 1, 3), np.float32))), "new")
    keys, values = (named(ops.concat([p, new], 2), n) for p, n in ((past_k, "present_k"), (past_v, "present_v")))
    seen, other = (
        named(ops.greater(ops.unsqueeze(mask, [1, 2]), ops.constant(np.int64(least))), name)
        for least, name in ((0, "seen"), (1, "other"))
    )
    numbers = named(ops.convert(seen, "f32"), "numbers")
    attention = ops.scaled_dot_product_attention
    scale = ops.constant(np.float32(0.5))
    attended = [
        attention(new, keys, values, seen),
        attention(keys, keys, values, seen),
        attention(new, keys, values, other, scale),
        attention(new, keys, values),
        attention(new, keys, values, numbers),
    ]
    wide = ops.tile(ops.unsqueeze(keys, 2), ops.constant(np.array([1, 1, 2, 1, 1], np.int32)))
    long = ops.tile(keys, ops.constant(np.array([1, 1, 2, 1], np.int32)))
    logits = named(ops.convert(ops.add(keep, first), "f32"), "logits")
    results = [ops.result(value) for value in (logits, keys, values, *attended, wide, long)]
    return openvino.Model(results, [tokens, mask, past_k, past_v], "made")


def shown(value: Any, known: tuple[str, ...] = ("new", "seen", "other", "numbers", "present_k", "present_v")) -> str:
    """What computes a value, as an expression of inputs, constants and what is `known`."""
    node = value.get_node()
    kind, name = node.get_type_name(), node.get_friendly_name()
    if kind == "Parameter" or name in known:
        return str(name)
    if kind == "Constant":
        return np.array2string(node.data, separator=", ", formatter={"float_kind": "{:g}".format})
    return f"{kind}({', '.join(shown(node.input_value(i), known) for i in range(node.get_input_size()))})"


@pytest.mark.usefixtures("_openvino")
def test_the_cache_becomes_variables_that_are_empty_at_first() -> None:
    model = read_model()
    openvino_decoder.make_stateful(model, GRAPH)
    assert [(i.get_any_name(), str(i.get_partial_shape()), i.get_element_type().to_string()) for i in model.inputs] == [
        ("input_ids", "[?,?]", "i64"),
        ("attention_mask", "[?,?]", "i64"),
        ("logits_to_keep", "[1]", "i64"),
        ("first_position", "[1]", "i64"),
        ("beam_idx", "[?]", "i32"),
    ]
    empty = "ReadValue(Broadcast(0, Concat(Gather(ShapeOf(input_ids), [0], 0), [2, 0, 3])))"
    written = {
        node.get_attributes()["variable_id"]: node for node in model.get_ops() if node.get_type_name() == "Assign"
    }
    assert sorted(written) == ["past_kpresent_k", "past_vpresent_v"]
    for name, node in written.items():
        assert node.input_value(0).get_node().get_friendly_name() == name[-9:]
        assert shown(node.input_value(0), ("new",)) == f"Concat(Gather({empty}, beam_idx, 0), new)"
    bias, wide_bias = (f"Select({mask}, 0, -3e+38)" for mask in ("seen", "other"))
    results = sorted(model.get_results(), key=lambda node: int(node.get_name().split("_")[-1]))
    assert [shown(node.input_value(0)) for node in results] == [
        "Convert(Add(logits_to_keep, first_position))",
        f"ScaledDotProductAttention(new, present_k, present_v, {bias})",
        f"ScaledDotProductAttention(present_k, present_k, present_v, {bias})",
        f"ScaledDotProductAttention(new, present_k, present_v, {wide_bias}, 0.5)",
        "ScaledDotProductAttention(new, present_k, present_v)",
        "ScaledDotProductAttention(new, present_k, present_v, numbers)",
        "Broadcast(Unsqueeze(present_k, 2), Convert([1, 1, 2, 1, 1]))",
        "Tile(present_k, [1, 1, 2, 1])",
    ]
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("Select") == 2, "one for each mask"
    wide = results[-2].input_value(0).get_node()
    assert wide.get_attributes()["mode"] == "bidirectional"


class State:
    """A variable: what it holds, in the runtime's own type."""

    def __init__(self, name: str) -> None:
        self.name, self._data = name, np.zeros((0, toy_decoder.HEADS, 0, toy_decoder.WIDTH), np.float16)

    @property
    def state(self) -> Any:
        kind = SimpleNamespace(get_type_name=lambda: str(self._data.dtype))
        return SimpleNamespace(data=self._data, get_element_type=lambda: kind)

    @state.setter
    def state(self, tensor: Any) -> None:
        self._data = tensor.data.astype(np.float16)

    def hold(self, array: Any) -> None:
        self._data = array.astype(np.float16)


class Request:
    """An infer request of a stateful model; names: of its variables."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.states = [State(name) for name in names]
        self.calls: list[tuple[Any, ...]] = []
        self._answer: Any = None

    def query_state(self) -> list[State]:
        return self.states

    def reset_state(self) -> None:
        for state in self.states:
            state.hold(state.state.data[:0, :, :0])

    def infer(self, given: dict[str, Any], *, share_inputs: bool) -> None:
        assert share_inputs, "inputs are read where they are"
        new, rows, keep, first = (given[name] for name in ("input_ids", "beam_idx", "logits_to_keep", "first_position"))
        assert rows.dtype == np.int32 and sorted(given) == [
            "attention_mask", "beam_idx", "first_position", "input_ids", "logits_to_keep"
        ]  # fmt: skip
        self.calls.append((new.tolist(), rows.tolist(), keep.tolist(), first.tolist()))
        if 13 in new:
            raise RuntimeError("no such token")
        for state, factor in zip(self.states, (1, 10), strict=True):
            past = state.state.data
            past = past[rows] if past.size else np.zeros((len(new), *past.shape[1:]))
            state.hold(np.concatenate([past, entries(new, factor)], axis=2))
        keys = self.states[0].state.data.astype(np.float32)
        self._answer = toy_decoder.logits(keys, given["attention_mask"], new.shape[1], int(keep[0]), int(first[0]))

    def get_tensor(self, name: str) -> Any:
        assert name == "logits"
        return SimpleNamespace(data=self._answer)


def decoders(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str] = ("past_kpresent_k", "past_vpresent_v")
) -> tuple[OpenVinoDecoder, decoding.ArrayDecoder, Request]:
    """The decoder, one that is given its cache with every call, and the request."""
    monkeypatch.setattr(
        telemetry, "openvino", lambda: SimpleNamespace(Tensor=lambda array: SimpleNamespace(data=array))
    )
    request = Request(names)
    compiled = SimpleNamespace(create_infer_request=lambda: request)
    return OpenVinoDecoder(compiled, GRAPH), decoding.ArrayDecoder(toy_decoder.run, GRAPH), request


@pytest.mark.parametrize(
    "names", [("past_kpresent_k", "past_vpresent_v"), ("past_k", "past_v"), ("present_k", "present_v")]
)
def test_each_call_adds_to_the_state(monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]) -> None:
    ours, plain, request = decoders(monkeypatch, names)
    for decoder in (ours, plain):
        assert decoder.past_tokens == 0
        prompt = decoder.rows(ids((1, 2, 3), (4, 5, 6)), ids((0, 1, 1), (1, 1, 1)), keep=2, first_position=7)
        assert prompt.tolist() == [[[2, 1, 7], [5, 2, 7]], [[9, 1, 7], [15, 2, 7]]]
        more = decoder.rows(ids((7, 8), (8, 9)), ids((0, 1, 1, 1, 1), (1, 1, 1, 1, 1)))
        assert more.tolist() == [[[20, 4, 0]], [[32, 4, 0]]] and decoder.past_tokens == 5
        cache = decoder.carried()
        assert {name: array.dtype for name, array in cache.items()} == dict.fromkeys(("past_k", "past_v"), np.float32)
        assert cache["past_k"][:, 1, :, 2].tolist() == [[1, 2, 3, 7, 8], [4, 5, 6, 8, 9]]
        assert cache["past_v"][:, 0, :, 0].tolist() == [[10, 20, 30, 70, 80], [40, 50, 60, 80, 90]]
    assert request.calls == [
        ([[1, 2, 3], [4, 5, 6]], [0, 1], [2], [7]),
        ([[7, 8], [8, 9]], [0, 1], [1], [0]),
    ]  # fmt: skip


def test_sequences_are_chosen_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice reordered is one choice, and what is read in between is already in the new order."""
    ours, plain, request = decoders(monkeypatch)
    for decoder in (ours, plain):
        decoder.rows(ids((1, 2), (3, 4), (5, 6)), ones(3, 2))
        decoder.reorder((2, 0, 0))
        decoder.reorder((1, 0))
        assert decoder.carried()["past_k"][:, 0, :, 0].tolist() == [[1, 2], [5, 6]]
        with pytest.raises(InputRefused, match=r"^The cache holds 2 sequences, not 3\.$"):
            decoder.step(ids((1,), (1,), (1,)), ones(3, 3))
        assert decoder.step(ids((7,), (8,)), ones(2, 3)).tolist() == [[10, 2, 0], [19, 2, 0]]
        assert decoder.step(ids((1,), (1,)), ones(2, 4)).tolist() == [[11, 3, 0], [20, 3, 0]]
    assert [call[1] for call in request.calls] == [[0, 1, 2], [0, 2], [0, 1]]


def test_sequences_are_forgotten_and_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain, _ = decoders(monkeypatch)
    for decoder in (ours, plain):
        decoder.step(ids((1, 2)), ones(1, 2))
        kept = {name: array.copy() for name, array in decoder.carried().items()}
        decoder.reorder((0, 0))
        decoder.reset()
        assert decoder.past_tokens == 0
        assert decoder.step(ids((9,), (8,)), ones(2, 1)).tolist() == [[9, 0, 0], [8, 0, 0]]
        decoder.resume(kept)
        assert decoder.past_tokens == 2
        with pytest.raises(InputRefused, match=r"^The cache holds 1 sequences, not 2\.$"):
            decoder.step(ids((1,), (1,)), ones(2, 3))
        assert decoder.step(ids((4,)), ones(1, 3)).tolist() == [[7, 2, 0]]
        decoder.reset()
        decoder.reorder((0,))
        assert decoder.step(ids((1,)), ones(1, 1)).tolist() == [[1, 0, 0]]


def test_an_order_of_nothing_binds_no_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain, _ = decoders(monkeypatch)
    for decoder in (ours, plain):
        decoder.reorder((0, 1))
        assert decoder.step(ids((1,), (2,)), ones(2, 1)).tolist() == [[1, 0, 0], [2, 0, 0]]


def test_a_whole_call_has_the_state_as_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, request = decoders(monkeypatch)
    ours.step(ids((9,)), ones(1, 1))
    given = {
        "input_ids": ids((3, 4)), "attention_mask": ones(1, 3),
        "past_k": entries(ids((2,)), 1), "past_v": entries(ids((2,)), 10),
    }  # fmt: skip
    answers = ours.call(given)
    assert list(answers) == ["logits", "present_k", "present_v"]
    assert answers["logits"].tolist() == [[[5, 1, 0], [9, 2, 0]]], "all rows where their number is left out"
    assert answers["present_v"][0, 1, :, 2].tolist() == [20, 30, 40] and answers["present_v"].dtype == np.float32
    one = ours.call(given | {"logits_to_keep": ids((1,))[0], "first_position": ids((4,))[0]})
    assert one["logits"].tolist() == [[[9, 2, 4]]]
    none = {name: array[:, :, :0] for name, array in given.items() if name.startswith("past")}
    first = ours.call(given | none | {"attention_mask": ones(1, 2)})
    assert first["present_k"][0, 0, :, 0].tolist() == [3, 4]
    assert [call[2:] for call in request.calls[1:]] == [([0], [0]), ([1], [4]), ([0], [0])]
    with pytest.raises(InputRefused, match="batch 10 is outside"):
        ours.call(given | {"input_ids": np.ones((10, 2), np.int64)})


def test_an_answer_is_the_callers_own_and_a_failure_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, request = decoders(monkeypatch)
    answer = ours.rows(ids((1,)), ones(1, 1))
    assert not np.shares_memory(answer, request.get_tensor("logits").data)
    with pytest.raises(InputRefused, match=r"covers 3 tokens; the cache and input_ids have 2\.$"):
        ours.step(ids((1,)), ones(1, 3))
    with pytest.raises(BuildError, match=r"^OpenVINO failed on \{'input_ids': \(1, 1\), .*\}: no such token$"):
        ours.step(ids((13,)), ones(1, 2))


def test_the_precision_of_each_variable_is_read() -> None:
    request = Request(("a", "b"))
    compiled: Any = SimpleNamespace(create_infer_request=lambda: request)
    assert openvino_decoder.states(compiled) == {"a": "float16", "b": "float16"}

"""Triton's configuration: its text, and batches that pay by measured latencies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.serving.triton import batching
from dinoexport.serving.triton.config import Entry, Word, to_text


@given(st.text(), st.integers(-(2**31), 2**31 - 1), st.booleans(), st.lists(st.integers(-9, 9), min_size=1))
def test_any_value_survives_the_text_format(text: str, number: int, flag: bool, numbers: list[int]) -> None:
    """What is written is what protobuf reads back, whatever a name or a comment holds."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    written = to_text(
        [
            Entry("name", text, text),
            Entry("max_batch_size", number, text),
            Entry("response_cache", (Entry("enable", flag),), text),
            Entry("input", (Entry("data_type", Word("TYPE_FP32")), Entry("dims", numbers, text))),
        ]
    )
    config = text_format.Parse(written, model_config_pb2.ModelConfig())
    assert (config.name, config.max_batch_size, config.response_cache.enable) == (text, number, flag)
    assert list(config.input[0].dims) == numbers


def test_batches_that_pay() -> None:
    chosen = batching.from_latency({1: 10.0, 2: 12.0, 4: 20.0, 8: 40.0}, 8, of="x")
    assert chosen.preferred == (2, 4) and chosen.queue_delay_us == 1000
    alike = batching.from_latency({1: 10.0, 2: 20.0, 4: 40.0}, 4, of="x")
    assert (alike.preferred, alike.queue_delay_us) == ((), 0)
    assert batching.from_latency({1: 5000.0}, 4, of="x").queue_size == 8  # never less than two full batches


@pytest.mark.parametrize(
    ("latency_ms", "largest"),
    [
        ({1: 10.0, 2: 12.0, 4: 20.0, 8: 80.0}, 4),
        ({1: 10.0, 2: 12.0, 4: 20.0, 8: 41.0, 16: 160.0}, 8),
        ({1: 35.0, 2: 70.0, 4: 140.0, 8: 280.0, 16: 560.0}, 4),
        ({1: 68.0, 2: 133.0, 4: 280.0, 8: 577.0, 16: 1412.0}, 4),
        ({1: 546.0, 2: 1130.0, 4: 2600.0, 8: 5600.0}, 4),  # twos and fours are never held back
    ],
)
def test_batches_that_win_nothing_do_not_form(latency_ms: dict[int, float], largest: int) -> None:
    chosen = batching.from_latency(latency_ms, 8, of="x")
    # With any delay at all Triton would merge past the preferred size whenever it is busy.
    assert (chosen.preferred, chosen.queue_delay_us) == ((largest,), 0)
    assert f"larger batches than {largest}" in chosen.queue_delay_why


def test_measuring() -> None:
    asked = []

    def run(arrays: Any) -> Any:
        asked.append(len(arrays["x"]))
        return {}

    latency_ms = batching.measure(run, {"x": np.zeros((1, 2))}, 6, progress=lambda *_: None)
    assert list(latency_ms) == [1, 2, 4, 6] and set(asked) == {1, 2, 4, 6}
    assert all(ms >= 0 for ms in latency_ms.values())


def test_a_machine_that_is_slow_at_first_makes_no_batch_look_worth_waiting_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, calls = 0.0, iter(range(1000))
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: now_s))

    def run(arrays: Any) -> Any:
        nonlocal now_s
        now_s += 0.02 * len(arrays["x"]) + (0.1 if next(calls) < 4 else 0.0)
        return {}

    latency_ms = batching.measure(run, {"x": np.zeros((1, 2))}, 4, progress=lambda *_: None)
    assert latency_ms[1] < 100 and batching.from_latency(latency_ms, 4, of="x").queue_delay_us == 0


@pytest.mark.parametrize(
    ("latency_ms", "chosen"),
    [
        # Two items in 1.8 times the time of one save a tenth each, exactly what waiting may cost; in 1.81 they do not.
        ({1: 10.0, 2: 18.0}, ((2,), 1000, "a tenth of what one item takes")),
        ({1: 10.0, 2: 18.1}, ((), 0, "no batch was found worth waiting for")),
        # An item of eight takes 0.9 of the time of an item of the best batch, twice, and then less than that.
        ({1: 20.0, 2: 18.0, 8: 80.0}, ((2, ), 2000, "a tenth of what one item takes")),
        ({1: 20.0, 2: 18.0, 8: 80.1},
         ((4,), 0, "none, or larger batches than 4 would form under load, which win an item nothing")),
        ({8: 10.0, 1: 10.0}, ((8,), 1000, "a tenth of what one item takes")),
        # Only sizes up to four are never held back.
        ({1: 10.0, 5: 50.0, 6: 60.0},
         ((1,), 0, "none, or larger batches than 1 would form under load, which win an item nothing")),
    ],
)  # fmt: skip
def test_what_is_worth_waiting_for(latency_ms: dict[int, float], chosen: tuple[tuple[int, ...], int, str]) -> None:
    if 2 in latency_ms and 8 in latency_ms:
        latency_ms = {**latency_ms, 4: 36.0}
    found = batching.from_latency(latency_ms, 8, of="x")
    assert (found.preferred, found.queue_delay_us, found.queue_delay_why) == chosen


@pytest.mark.parametrize(("one_ms", "queue"), [(10_000.0, 8), (1000.0, 10), (990.0, 10), (100.0, 100), (1.0, 1024)])
def test_the_queue_holds_what_is_answered_in_ten_seconds(one_ms: float, queue: int) -> None:
    assert batching.from_latency({1: one_ms}, 4, of="x").queue_size == queue


def test_the_text_is_indented() -> None:
    """Two spaces for each level; a reason is one line behind its value."""
    entries = [
        Entry("name", 'a "b"'),
        Entry("outer", (Entry("inner", (Entry("kind", Word("KIND_CPU")),), "two\nlines"), Entry("on", True)), "why"),
        Entry("dims", (3, -1), "a range"),
    ]
    assert to_text(entries) == (
        'name: "a \\"b\\""\n'
        "outer {  # why\n"
        "  inner {  # two lines\n"
        "    kind: KIND_CPU\n"
        "  }\n"
        "  on: true\n"
        "}\n"
        "dims: [3, -1]  # a range\n"
    )


def test_without_a_measurement_nothing_waits() -> None:
    found = batching.unmeasured((2, 4), "why", 3)
    assert (found.preferred, found.preferred_why, found.queue_size, found.latency_ms) == ((2, 4), "why", 24, {})
    assert (found.queue_delay_us, found.queue_delay_why) == (
        0, "what queued up while the last batch ran is merged all the same",
    )  # fmt: skip

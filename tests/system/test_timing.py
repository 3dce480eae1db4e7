"""Latencies: taken in turn, with percentiles as NumPy has them, and noise that is noticed."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.system import timing

samples = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50)


@given(samples, st.floats(0, 100))
def test_percentiles_are_numpys(taken: list[float], percent: float) -> None:
    found = timing.Latencies(samples_ms=tuple(taken))
    assert np.isclose(found.percentile_ms(percent), np.percentile(taken, percent))
    assert np.isclose(found.median_ms, np.median(taken))


def test_samples_are_taken_in_turn_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SETTLE_S", 0)
    calls: list[str] = []
    found = timing.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, budget_s=9)
    assert calls[:2] == ["a", "b"]
    turns = {"".join(calls[at : at + 2]) for at in range(2, 10, 2)}
    assert turns == {"ab", "ba"}, "each once a round, and nobody always after the same other"
    assert {name: len(latencies.samples_ms) for name, latencies in found.items()} == {"a": 4, "b": 4}


def test_threads_that_still_spin_for_one_are_not_on_the_next_ones_time() -> None:
    stopped = 0.0

    def spins_on() -> None:
        nonlocal stopped
        stopped = time.perf_counter() + 0.1

    found = timing.in_turn(
        {"spins": spins_on, "next": lambda: time.sleep(max(0.0, stopped - time.perf_counter()))}, rounds=6, budget_s=9
    )
    assert max(found["next"].samples_ms) < 50


def test_a_budget_ends_it_after_three_rounds() -> None:
    found = timing.in_turn({"a": lambda: time.sleep(0.01)}, rounds=1000, budget_s=0)
    assert len(found["a"].samples_ms) == 3
    assert found["a"].median_ms >= 10
    found = timing.in_turn({"a": lambda: time.sleep(0.01)}, rounds=1000, budget_s=0, least=1)
    assert len(found["a"].samples_ms) == 1


def test_other_processes_are_noticed_and_our_own_work_is_not() -> None:
    neighbours = timing.Neighbours()
    stop = time.monotonic() + 0.5
    while time.monotonic() < stop:
        pass
    before = neighbours.share()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        neighbours = timing.Neighbours()
        time.sleep(1)
        during = neighbours.share()
        other.kill()
    assert 0 <= before < 1 and during > 0.05

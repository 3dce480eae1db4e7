"""Latencies: taken in turn, with percentiles as NumPy has them, and noise that is noticed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_the_spread_is_that_of_the_middle_half() -> None:
    assert timing.Latencies(samples_ms=(10.0, 2.0, 4.0, 1.0, 3.0)).spread == (4 - 2) / 3


class Clock:
    """A clock that only what runs moves on: the wall's and the CPU's seconds, and every pause."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s, self.cpu_s = 1000.0, 100.0
        self.pauses: list[float] = []
        self.order = ""
        clock: Any = SimpleNamespace(
            perf_counter=lambda: self.wall_s, process_time=lambda: self.cpu_s, sleep=self.pauses.append
        )
        monkeypatch.setattr(timing, "time", clock)

    def taking(self, name: str, wall_s: float, cpu_s: float) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.wall_s += wall_s
            self.cpu_s += cpu_s

        return run


def test_samples_are_in_milliseconds_of_both_clocks_and_the_order_is_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    runs = {"a": clock.taking("a", 2.0, 3.0), "b": clock.taking("b", 0.5, 0.25), "c": clock.taking("c", 1.0, 0.0)}
    found = timing.in_turn(runs, rounds=4, budget_s=99)
    assert found == {
        "a": timing.Latencies(samples_ms=(2000.0,) * 4, cpu_samples_ms=(3000.0,) * 4),
        "b": timing.Latencies(samples_ms=(500.0,) * 4, cpu_samples_ms=(250.0,) * 4),
        "c": timing.Latencies(samples_ms=(1000.0,) * 4, cpu_samples_ms=(0.0,) * 4),
    }
    assert clock.order == "abc" + "acb" + "bca" + "bca" + "bac"
    assert clock.pauses == [0.15] * 12, "before each, that the last one's threads come to rest"


def test_one_candidate_needs_no_pauses_and_goes_on_until_more_than_the_budget_is_spent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounds of half a second: exactly 2.0 s are spent after the fourth, 2.5 after the fifth."""
    clock = Clock(monkeypatch)
    found = timing.in_turn({"a": clock.taking("a", 0.5, 0.5)}, rounds=9, budget_s=2.0)
    assert len(found["a"].samples_ms) == 5 and clock.pauses == []
    timing.in_turn({"a": clock.taking("a", 1.0, 1.0), "b": clock.taking("b", 1.0, 1.0)}, rounds=2, budget_s=99)
    assert clock.pauses == [0.15] * 4, "and two do"


class Machine:
    """The kernel's count of CPU time, in hundredths of a second, and this process's, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        # user, nice, system, idle, iowait, irq, softirq, steal; then guests, who are in user and nice already
        self.ticks = [1000, 100, 200, 3000, 400, 50, 60, 70, 500, 90]
        # user, system, children's user, children's system; then the wall's
        self.own_s = [1.0, 2.0, 3.0, 4.0, 500.0]
        self._stat = folder / "stat"
        self.write()
        monkeypatch.setattr(timing, "Path", {"/proc/stat": self._stat}.__getitem__)
        system: Any = SimpleNamespace(times=lambda: tuple(self.own_s), sysconf={"SC_CLK_TCK": 100}.__getitem__)
        monkeypatch.setattr(timing, "os", system)

    def passes(self, ticks: tuple[int, ...], own_s: tuple[float, ...]) -> None:
        self.ticks = [old + more for old, more in zip(self.ticks, ticks, strict=True)]
        self.own_s = [old + more for old, more in zip(self.own_s, own_s, strict=True)]
        self.write()

    def write(self) -> None:
        self._stat.write_text(f"cpu  {' '.join(map(str, self.ticks))}\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 1 2\n")

    def gone(self) -> None:
        self._stat.unlink()


PASSED_S = (1.0, 0.5, 0.25, 0.25, 10.0)


@pytest.mark.parametrize(
    ("ticks", "own_s", "share"),
    [
        # 10 s of all CPUs: 5.4 idle or waiting for a disk, 4.6 busy, 2.0 of them ours
        ((400, 10, 30, 500, 40, 5, 5, 10, 77, 33), PASSED_S, 0.26),
        # half a second in all, 0.4 busy, 0.1 ours
        ((20, 5, 5, 10, 0, 5, 3, 2, 0, 0), (0.1, 0.0, 0.0, 0.0, 0.25), 0.6),
        # more of ours than the kernel has counted yet
        ((100, 0, 0, 900, 0, 0, 0, 0, 0, 0), PASSED_S, 0.0),
        ((0,) * 10, (0.0,) * 5, 0.0),
    ],
)
def test_the_share_of_others_is_what_is_neither_idle_nor_ours(
    ticks: tuple[int, ...], own_s: tuple[float, ...], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, tmp_path)
    neighbours = timing.Neighbours()
    machine.passes(ticks, own_s)
    assert neighbours.share() == pytest.approx(share, abs=1e-9)


def test_where_the_kernel_counts_nothing_no_share_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, tmp_path)
    machine.gone()
    neighbours = timing.Neighbours()
    machine.own_s = [9.0] * 5
    assert neighbours.share() == 0.0

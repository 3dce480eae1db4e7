"""How latencies of batches are measured: which sizes, how often, and what is told meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.serving.triton import batching


class Machine:
    """Runs a batch in a second for each item; the clock is its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
        self.now_s, self.seconds = 0.0, seconds
        self.asked: list[int] = []
        self.told: list[tuple[int, int]] = []
        monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def measured(self, largest: int) -> dict[int, float]:
        def run(arrays: Any) -> Any:
            self.asked.append(len(arrays["x"]))
            self.now_s += self.seconds * len(arrays["x"])
            return {}

        return batching.measure(
            run, {"x": np.zeros((1, 2))}, largest, progress=lambda _doing, done, total: self.told.append((done, total))
        )


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_sizes_are_powers_of_two_and_the_largest(
    largest: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is run once before it is timed, and then three times; what is told counts all of them."""
    machine = Machine(monkeypatch, seconds=0.001)
    assert machine.measured(largest) == pytest.approx({size: 1.0 * size for size in sizes})
    assert machine.asked == [size for size in sizes for _ in range(2)] + 2 * sizes
    assert machine.told == [(done, 3 * len(sizes)) for done in range(1, 3 * len(sizes) + 1)]


@pytest.mark.parametrize(
    ("seconds", "sizes"), [(2.75, [1]), (5.0, [1]), (2.5, [1, 2]), (0.8, [1, 2, 4]), (0.16, [1, 2, 4, 8, 16])]
)
def test_no_larger_sizes_after_five_seconds(seconds: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size takes its time twice in the first round: 2 x 15 items at 0.16 s are 4.8 s."""
    machine = Machine(monkeypatch, seconds=seconds)
    assert list(machine.measured(16)) == sizes
    assert machine.asked[2 * len(sizes) :] == 2 * sizes
    assert all(0 < done <= total for done, total in machine.told)

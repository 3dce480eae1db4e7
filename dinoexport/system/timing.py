"""Measure comparable latencies: samples in turn, with their spread and the load of the machine."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoexport.spec import Progress, silent

# Samples whose middle half is wider than this cannot show a difference of 10 %.
NOISY_SPREAD = 0.1
# NumPy's threads spin for a tenth of a second after a product, which made the next candidate 1.5 times as slow.
_SETTLE_S = 0.15
# If other processes use a tenth of the machine, a time changes by as much.
NOISY_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """The samples of one candidate, in milliseconds, in the order they were taken.

    cpu_samples_ms: the CPU time that this process spent meanwhile, all threads together; empty where it is not known.
    """

    samples_ms: tuple[float, ...]
    cpu_samples_ms: tuple[float, ...] = ()

    @property
    def best_ms(self) -> float:
        """The least disturbed sample."""
        return min(self.samples_ms)

    @property
    def cpu_ms(self) -> float | None:
        """The least CPU time of a sample."""
        return min(self.cpu_samples_ms, default=None)

    def __add__(self, other: Latencies) -> Latencies:
        return Latencies(
            samples_ms=self.samples_ms + other.samples_ms, cpu_samples_ms=self.cpu_samples_ms + other.cpu_samples_ms
        )

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.samples_ms)

    def percentile_ms(self, percent: float) -> float:
        """The percentile of the samples, interpolated between neighbours."""
        ordered = sorted(self.samples_ms)
        at = (len(ordered) - 1) * percent / 100
        below = int(at)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (at - below)

    @property
    def spread(self) -> float:
        """The width of the middle half of the samples, as a share of the median."""
        return (self.percentile_ms(75) - self.percentile_ms(25)) / self.median_ms


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    budget_s: float,
    least: int = 3,
    progress: Progress = silent,
) -> dict[str, Latencies]:
    """Latencies of each of `runs`, one sample of each per round, so that a slow moment affects all of them.

    Each is run once before it counts. Every round has its own order, the same on each call, so that a candidate does
    not always follow the same other one. Stops after `rounds`, or after `least` rounds once `budget_s` is spent.
    """
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    cpu_samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs.items()), random.Random(0).shuffle  # noqa: S311 (no secret)
    started = time.perf_counter()
    for done in range(1, rounds + 1):
        shuffle(order)
        for name, run in order:
            if len(order) > 1:
                time.sleep(_SETTLE_S)
            before, cpu_before = time.perf_counter(), time.process_time()
            run()
            cpu_samples[name].append((time.process_time() - cpu_before) * 1e3)
            samples[name].append((time.perf_counter() - before) * 1e3)
        progress("timing", done, rounds)
        if done >= min(least, rounds) and time.perf_counter() - started > budget_s:
            break
    return {
        name: Latencies(samples_ms=tuple(taken), cpu_samples_ms=tuple(cpu_samples[name]))
        for name, taken in samples.items()
    }


class Neighbours:
    """The CPU time that other processes use between `__init__` and `share`. Linux only; 0 on other systems."""

    def __init__(self) -> None:
        self._busy, self._own, self._total = self._now()

    def share(self) -> float:
        """The share of all CPU time, 0 to 1, that other processes used since the start."""
        busy, own, total = self._now()
        passed = total - self._total
        return max(0.0, ((busy - self._busy) - (own - self._own)) / passed) if passed > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """(busy, our own, all) CPU seconds since boot; children count as our own once they have ended."""
        own = sum(os.times()[:4])
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return own, own, 0.0
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, own, sum(ticks)

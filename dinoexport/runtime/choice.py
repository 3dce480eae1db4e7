"""Choose the fastest of several ways from samples that other processes may have disturbed.

Each way has three figures, which agree on a quiet machine. The median is what a user experiences; it grows with the
load of other processes. The best of many visits is the time of an undisturbed run, if there was one. The CPU time,
divided by the threads, hardly grows with other load, but it counts threads that wait for each other as working. A way
is chosen when all three figures put it first; while they disagree, there are more visits. Chance does not decide
between ways with equal figures: the one that was faster in an earlier quiet measurement, on this CPU with these
versions, is chosen; if there was none, the one that is usually faster.

Where others use most of the CPUs, no run is undisturbed and the wall clock says nothing: beside ten other processes
on two CPUs the best of up to ten runs was 1.5 to 10 times its CPU time per thread. Then only the CPU time counts,
coarsely.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Literal, Protocol

from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import untrusted
from dinoexport.system.cache import cache_folder

# What is this near to the first cannot be told from it.
_ALIKE = 1.04
# By how much a way must be behind in every figure not to be visited again.
_BEHIND = 1.1
# The share of the CPUs from which on two threads never run together: one of two CPUs is not ours.
CROWDED_SHARE = 0.4
# The least CPU time of one way differed by up to 1.5 between choices on such a machine, from 57 to 86 ms, because
# others empty the caches (`benchmarks/busy_choice.py`, ViT-S with four blocks).
_ALIKE_CROWDED = 1.5
# For runtimes with equal times: in all our comparisons on a quiet CPU the first was faster. In four bits, which only
# decoders have, the second was: 9.7 and 16.7 ms a step (benchmarks/results/text.md).
_USUALLY = (Runtime.OPENVINO, Runtime.ONNXRUNTIME)
_RECORD_MAX_BYTES = 4096

Basis = Literal["measured", "known", "usual"]


class Taken(Protocol):
    """The measurements of one way, such as `timing.Latencies`. cpu_ms: all threads together, None if not known."""

    @property
    def median_ms(self) -> float:
        """The median of its samples."""

    @property
    def best_ms(self) -> float:
        """The shortest of its samples."""

    @property
    def cpu_ms(self) -> float | None:
        """The smallest CPU time of a sample."""


@dataclass(frozen=True, kw_only=True)
class ChosenWay:
    """The way, and on what it was chosen: figures that agree, an earlier choice, or what is usually the faster one."""

    way: Way
    basis: Basis


def figures(way: Way, taken: Taken) -> tuple[float, ...]:
    """The figures that rank the way, in ms: median, best, and CPU time for each of its threads if that is known.

    CPU time does not show how well threads share the work, so with several threads it is compared with the best.
    """
    cpu = () if taken.cpu_ms is None else (taken.cpu_ms / max(1, way.threads),)
    return (taken.median_ms, taken.best_ms, *cpu)


def settled(samples: Mapping[Way, Taken]) -> bool:
    """Whether every figure puts the same way first, or cannot distinguish the same ways: more visits would not help."""
    near = _near(samples)
    return all(ways == near[0] for ways in near)


def agreed(samples: Mapping[Way, Taken]) -> Way | None:
    """The way that every figure puts first, and clearly; None if they disagree or another way is too close."""
    near = _near(samples)
    if len(near[0]) != 1 or not settled(samples):
        return None
    (way,) = near[0]
    return way


def hopeful(samples: Mapping[Way, Taken], *, behind: float = _BEHIND) -> tuple[Way, ...]:
    """The ways that are not more than `behind` times as slow as the first one in every figure."""
    firsts = _firsts(samples)
    return tuple(
        way
        for way, taken in samples.items()
        if any(figure <= behind * first for figure, first in zip(figures(way, taken), firsts, strict=True))
    )


def choose(samples: Mapping[Way, Taken], *, known: Way | None = None, others_share: float = 0.0) -> ChosenWay:
    """The best way after the last visit.

    known: the fastest way in an earlier, quiet measurement. others_share: the share of the CPUs that other processes
    used.
    """
    if _crowded(samples, others_share):
        alike = _least_work(samples)
        decided = len({way.runtime for way in alike}) == 1
    else:
        way = agreed(samples)
        if way is not None:
            return ChosenWay(way=way, basis="measured")
        # Without the median, which others disturb most.
        scores = {way: geometric_mean(figures(way, taken)[1:]) for way, taken in samples.items()}
        first = min(scores.values())
        alike = [way for way, score in scores.items() if score <= _ALIKE * first]
        decided = len(alike) == 1
    if known in alike and not decided:
        assert known is not None
        return ChosenWay(way=known, basis="known")
    return ChosenWay(way=min(alike, key=_unusual), basis="measured" if decided else "usual")


def times(way: Way, fastest_of: Collection[Way], samples: Mapping[Way, Taken], *, others_share: float) -> float:
    """How many times as long `way` takes as the best of `fastest_of`, by the figure that others disturb least.

    Medians are not used: a process that starts during one measurement would decide whether a precision is worth it.
    """
    crowded = _crowded(samples, others_share)

    def figure(taken: Taken) -> float:
        return taken.cpu_ms if crowded and taken.cpu_ms is not None else taken.best_ms

    return figure(samples[way]) / min(figure(samples[other]) for other in fastest_of)


def _crowded(samples: Mapping[Way, Taken], others_share: float) -> bool:
    """Whether wall-clock times are meaningless, and CPU times are known."""
    return others_share > CROWDED_SHARE and all(taken.cpu_ms is not None for taken in samples.values())


def _least_work(samples: Mapping[Way, Taken]) -> list[Way]:
    """All ways of the runtimes that need the least CPU time, each with its best number of threads."""
    work_ms: dict[Runtime, float] = {}
    for way, taken in samples.items():
        assert taken.cpu_ms is not None
        work_ms[way.runtime] = min(taken.cpu_ms, work_ms.get(way.runtime, taken.cpu_ms))
    least = min(work_ms.values())
    return [way for way in samples if work_ms[way.runtime] <= _ALIKE_CROWDED * least]


def _unusual(way: Way) -> tuple[int, int]:
    """A sort key: small for ways that are usually the fastest."""
    usually = _USUALLY[::-1] if way.precision is Precision.INT4 else _USUALLY
    return (usually.index(way.runtime) if way.runtime in usually else len(usually), -way.threads)


def _firsts(samples: Mapping[Way, Taken]) -> tuple[float, ...]:
    return tuple(map(min, zip(*(figures(way, taken) for way, taken in samples.items()), strict=True)))


def _near(samples: Mapping[Way, Taken]) -> list[set[Way]]:
    """For each figure, the way that is first and those that cannot be distinguished from it."""
    firsts = _firsts(samples)
    return [
        {way for way, taken in samples.items() if figures(way, taken)[i] <= _ALIKE * first}
        for i, first in enumerate(firsts)
    ]


def occasion(
    *, machine: str, cpus: int, versions: Mapping[str, str], precision: Precision, load: str, graphs: Collection[Path]
) -> str:
    """What an earlier choice must have in common with this one: CPU, versions, precision, load, the graphs' size."""
    sizes = sorted(path.stat().st_size for path in graphs)
    described = [machine, cpus, sorted(versions.items()), precision, load, sizes]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def remembered(on: str, among: Sequence[Way]) -> Way | None:
    """The choice of an earlier occasion of this kind, if it is one of these ways."""
    try:
        kept = json.loads(untrusted.read_text(_record(on), max_bytes=_RECORD_MAX_BYTES, links=False))
    except (ValueError, RecursionError, untrusted.Unreadable):
        return None
    return next((way for way in among if _content(on, way) == kept), None)


def remember(on: str, way: Way) -> None:
    """Stores a choice in the cache, if the cache can be written to."""
    path = _record(on)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(_content(on, way)))
        os.replace(partial, path)


def _record(on: str) -> Path:
    return cache_folder() / "choices" / f"{on}.json"


def _content(on: str, way: Way) -> dict[str, str | int | None]:
    return {
        "on": on,
        "runtime": way.runtime.value,
        "precision": way.precision.value,
        "threads": way.threads,
        "rest": way.rest,
    }

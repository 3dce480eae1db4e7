"""Choose the runtime and the number of threads by measuring them on this machine, in seconds.

The ways are visited in turn until what was measured agrees (`choice`). A precision lower than fp32 is timed beside
fp32: it must be faster, or it is not worth its error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from dinoexport.bundle import CpuFacts, Timed
from dinoexport.errors import BuildError, MissingRequirement, UsageError, require
from dinoexport.family import Runnable
from dinoexport.runtime import Arithmetic, choice, cpu, table
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Graph, Precision, Progress, Runtime, Way, Workload, silent
from dinoexport.system import timing

# Visits to each way, there and back, each this long at most: a machine that grows slower meanwhile is nobody's fault.
_VISIT_S = 0.6
_RUNS = 10
# How often all are visited, at most; fewer times once the figures agree. Twice at least, if there is time.
_VISITS, _VISITS_MAX = 2, 8
# All visits together, opening included: the graphs of a decoder take seconds to open and to run. Another turn is begun
# only if it will end within this time, as the one before it did; every way is visited once whatever it takes.
_BUDGET_S = 45.0
# 1.5 times as slow as the best on the first visit, by CPU time too: not worth a second one.
_HOPELESS = 1.5
# The runtimes that may compute in a precision on a CPU; for int8 each needs its own form of the graph.
RUNTIMES: dict[Precision, tuple[Runtime, ...]] = {
    precision: tuple(runtime for runtime, facts in TABLE.items() if precision in facts.cpu_precisions)
    for precision in Precision
}


def runtimes(precision: Precision, among: Collection[Runtime]) -> tuple[Runtime, ...]:
    """The installed runtimes of `among` that compute in `precision` on this machine, the most likely choice first."""
    found = [runtime for runtime in table.installed(among) if runtime in RUNTIMES[precision]]
    return tuple(runtime for runtime in found if TABLE[runtime].computes(precision))


def ways(precision: Precision, among: Collection[Runtime], *, carried: bool = False) -> tuple[Way, ...]:
    """Every way to run in `precision` with an installed runtime of `among`, the most likely choice first.

    carried: whether a graph carries state.

    Raises UsageError if none of them supports the precision on any machine, MissingRequirement if this machine has no
    runtime for it, or a CPU without it.
    """
    if not set(RUNTIMES[precision]) & set(among):
        raise UsageError(
            f"{' and '.join(among)} has no {precision} on a CPU; {' and '.join(RUNTIMES[precision])} has.",
            next_step="Leave --runtime out.",
        )
    threads = sorted({cpu.usable_cpus(), max(1, cpu.usable_cpus() // 2)}, reverse=True)
    found = tuple(
        Way(runtime=runtime, precision=precision, threads=count, rest=TABLE[runtime].rest(precision, carried))
        for runtime in runtimes(precision, among)
        for count in threads
    )
    if not found:
        for runtime in RUNTIMES[precision]:
            if runtime in among:
                require(TABLE[runtime].extra, *TABLE[runtime].modules)
        raise MissingRequirement(
            f"This CPU has no {precision} arithmetic that {' or '.join(TABLE[r].title for r in RUNTIMES[precision])} "
            "would use.",
            next_step="Use --precision fp32.",
        )
    return found


@dataclass(frozen=True, kw_only=True)
class GraphForms:
    """The files of the graphs in one precision, in the form that each possible runtime needs."""

    precision: Precision
    graphs: Mapping[Runtime, Mapping[Path, Graph]]

    @property
    def ways(self) -> tuple[Way, ...]:
        """Every way to run them here; raises as `ways`."""
        carried = any(graph.carried for graphs in self.graphs.values() for graph in graphs.values())
        return ways(self.precision, self.graphs, carried=carried)


def tune(
    model: Runnable, wanted: GraphForms, plain: GraphForms | None = None, *, progress: Progress = silent
) -> CpuFacts:
    """The fastest way to run `wanted` here, on the most common workload, with all measurements.

    plain: the same model in fp32, timed beside a lower precision.
    """
    own = wanted.ways
    workload = model.workloads[0]
    if plain is None and len({way.runtime for way in own}) == 1:
        return _without_choice(model, wanted, own[0], workload)
    candidates = [(way, wanted) for way in own]
    if plain is not None:
        candidates += [(way, plain) for way in plain.ways if way.threads == own[0].threads]
    neighbours = timing.Neighbours()
    taken, refused = _measured(model, candidates, workload, progress)
    ours = {way: found for way, found in taken.items() if way in own}
    on = choice.occasion(
        machine=cpu.machine(),
        cpus=cpu.usable_cpus(),
        versions={way.runtime: cpu.version(way.runtime) for way in ours},
        precision=wanted.precision,
        load=workload.name,
        graphs=wanted.graphs[own[0].runtime],
    )
    others = neighbours.share()
    best = choice.choose(ours, known=choice.remembered(on, list(ours)), others_share=others)
    if best.basis == "measured" and others <= timing.NOISY_SHARE:
        choice.remember(on, best.way)
    fp32 = [way for way in taken if way not in own]
    return CpuFacts(
        machine=cpu.machine(),
        usable_cpus=cpu.usable_cpus(),
        load=workload.name,
        chosen=best.way,
        runtime_version=cpu.version(best.way.runtime),
        arithmetic=dict(_arithmetic(model, wanted, best.way, workload)),
        times_fp32=choice.times(best.way, fp32, taken, others_share=others) if fp32 else None,
        measured=tuple(sorted((_timed(way, found) for way, found in taken.items()), key=lambda timed: timed.median_ms)),
        refused=refused,
        others_share=others,
        basis=best.basis,
    )


def _timed(way: Way, found: timing.Latencies) -> Timed:
    return Timed(
        way=way,
        median_ms=found.median_ms,
        best_ms=found.best_ms,
        cpu_ms=found.cpu_ms,
        spread=found.spread,
        samples=len(found.samples_ms),
    )


def without_chosen(model: Runnable, wanted: GraphForms, facts: CpuFacts, why: str) -> CpuFacts | None:
    """The next best way of another runtime, if the chosen one cannot be used; None if there is none.

    why: what is wrong with the chosen one, for the record. Nothing is timed again: the same rule is applied to the
    recorded measurements.
    """
    refused = {**facts.refused, facts.chosen.runtime: why}
    taken = {timed.way: _Recorded.of(timed) for timed in facts.measured}
    ours = {way: taken[way] for way in taken if way.precision is wanted.precision}
    left = {way: recorded for way, recorded in ours.items() if way.runtime not in refused}
    if not left:
        return None
    best, fp32 = choice.choose(left, others_share=facts.others_share), [way for way in taken if way not in ours]
    return facts.changed(
        chosen=best.way,
        runtime_version=cpu.version(best.way.runtime),
        arithmetic=dict(_arithmetic(model, wanted, best.way, model.workloads[0])),
        times_fp32=choice.times(best.way, fp32, taken, others_share=facts.others_share) if fp32 else None,
        refused=refused,
        basis=best.basis,
    )


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A `choice.Taken` made of the figures in a manifest."""

    median_ms: float
    best_ms: float
    cpu_ms: float | None

    @classmethod
    def of(cls, timed: Timed) -> _Recorded:
        best_ms = timed.median_ms if timed.best_ms is None else timed.best_ms
        return cls(median_ms=timed.median_ms, best_ms=best_ms, cpu_ms=timed.cpu_ms)


def _without_choice(model: Runnable, wanted: GraphForms, way: Way, workload: Workload) -> CpuFacts:
    """With a single runtime, all usable CPUs and no timing: the same result on each run."""
    return CpuFacts(
        machine=cpu.machine(),
        usable_cpus=cpu.usable_cpus(),
        load=workload.name,
        chosen=way,
        runtime_version=cpu.version(way.runtime),
        arithmetic=dict(_arithmetic(model, wanted, way, workload)),
        times_fp32=None,
        measured=(),
        others_share=0.0,
    )


def _measured(
    model: Runnable, candidates: Sequence[tuple[Way, GraphForms]], workload: Workload, progress: Progress
) -> tuple[dict[Way, timing.Latencies], dict[str, str]]:
    """The time of each way, and why a runtime was left out; raises BuildError if a precision has no runtime left.

    Only one way is open at a time, so that the largest model needs the memory of one session.
    """
    samples: dict[Way, timing.Latencies] = {}
    refused: dict[str, str] = {}
    precisions = {way.precision for way, _ in candidates}
    started = monotonic()
    for turn in range(_VISITS_MAX):
        turn_started = monotonic()
        for done, (way, candidate) in enumerate(candidates if turn % 2 == 0 else reversed(candidates)):
            if turn < _VISITS:
                progress("measuring runtimes and threads", turn * len(candidates) + done, _VISITS * len(candidates))
            if way.runtime in refused or not _worth_a_visit(way, samples, turn):
                continue
            try:
                taken = _visit(model, way, candidate, workload)
                samples[way] = samples[way] + taken if way in samples else taken
            except BuildError as error:
                refused[way.runtime] = error.message
                samples = {other: found for other, found in samples.items() if other.runtime != way.runtime}
                if precisions != {other.precision for other, _ in candidates if other.runtime not in refused}:
                    raise
        now = monotonic()
        ended = now - started + (now - turn_started) > _BUDGET_S
        ended = ended or (turn + 1 >= _VISITS and all(_settled(samples, precision) for precision in precisions))
        if ended:
            break
    progress("measuring runtimes and threads", _VISITS * len(candidates), _VISITS * len(candidates))
    return samples, refused


def _worth_a_visit(way: Way, samples: Mapping[Way, timing.Latencies], turn: int) -> bool:
    """Whether the way may still come out first, or has not been visited at all."""
    if way not in samples:
        return True
    if way not in choice.hopeful(samples, behind=_HOPELESS):
        return False
    rivals = {other: found for other, found in samples.items() if other.precision == way.precision}
    return turn < _VISITS or way in choice.hopeful(rivals)


def _settled(samples: Mapping[Way, timing.Latencies], precision: Precision) -> bool:
    return choice.settled({way: found for way, found in samples.items() if way.precision == precision})


def _visit(model: Runnable, way: Way, candidate: GraphForms, workload: Workload) -> timing.Latencies:
    opened = cpu.open_graphs(candidate.graphs[way.runtime], way)
    run = {"": lambda: model.drive(opened, workload.inputs)}
    return timing.in_turn(run, rounds=_RUNS, budget_s=_VISIT_S, least=1)[""]


def _arithmetic(model: Runnable, candidate: GraphForms, way: Way, workload: Workload) -> Arithmetic:
    return cpu.arithmetic(model, cpu.open_graphs(candidate.graphs[way.runtime], way), workload.inputs)

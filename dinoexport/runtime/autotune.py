"""Choose the runtime and the number of threads by measuring them on this machine, in seconds.

A precision lower than fp32 is timed beside fp32: it must be faster, or it is not worth its error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoexport.bundle import CpuFacts, Timed
from dinoexport.errors import BuildError, MissingRequirement, UsageError, require
from dinoexport.family import Runnable
from dinoexport.runtime import Arithmetic, cpu, table
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Graph, Precision, Progress, Runtime, Way, Workload, silent
from dinoexport.system import timing

# Each way is timed twice, forward and then backward through the list, each time this long at most, so that a machine
# that slows down affects all ways alike.
_VISIT_S = 0.6
_ROUNDS = 10
# A way that takes 1.5 times as long as the best the first time is not timed again.
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


def ways(precision: Precision, among: Collection[Runtime]) -> tuple[Way, ...]:
    """Every way to run in `precision` with an installed runtime of `among`, the most likely choice first.

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
        Way(runtime=runtime, precision=precision, threads=count)
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


def tune(
    model: Runnable, wanted: GraphForms, plain: GraphForms | None = None, *, progress: Progress = silent
) -> CpuFacts:
    """The fastest way to run `wanted` here, on the most common workload, with all measurements.

    plain: the same model in fp32, timed beside a lower precision.
    """
    own = ways(wanted.precision, wanted.graphs)
    workload = model.workloads[0]
    if plain is None and len({way.runtime for way in own}) == 1:
        return _without_choice(model, wanted, own[0], workload)
    candidates = [(way, wanted) for way in own]
    if plain is not None:
        candidates += [(way, plain) for way in ways(plain.precision, plain.graphs) if way.threads == own[0].threads]
    neighbours = timing.Neighbours()
    measured, refused = _measured(model, candidates, workload, progress)
    best = min((timed for timed in measured if timed.way in own), key=lambda timed: timed.median_ms)
    beaten = [timed for timed in measured if timed.way not in own]
    fp32_ms = min((timed.median_ms for timed in beaten), default=None)
    return CpuFacts(
        machine=cpu.machine(),
        usable_cpus=cpu.usable_cpus(),
        load=workload.name,
        chosen=best.way,
        runtime_version=cpu.version(best.way.runtime),
        arithmetic=dict(_arithmetic(model, wanted, best.way, workload)),
        times_fp32=None if fp32_ms is None else best.median_ms / fp32_ms,
        measured=tuple(sorted(measured, key=lambda timed: timed.median_ms)),
        refused=refused,
        others_share=neighbours.share(),
    )


def without_chosen(model: Runnable, wanted: GraphForms, facts: CpuFacts, why: str) -> CpuFacts | None:
    """The next fastest way of another runtime, where the chosen one is out of the question; None if there is none.

    why: what is wrong with it, for the record. Nothing is timed again.
    """
    refused = {**facts.refused, facts.chosen.runtime: why}
    left = [
        timed
        for timed in facts.measured
        if timed.way.precision is wanted.precision and timed.way.runtime not in refused
    ]
    if not left:
        return None
    best = min(left, key=lambda timed: timed.median_ms)
    chosen_ms, times_fp32 = facts.measured_ms, facts.times_fp32
    assert chosen_ms is not None
    return facts.changed(
        chosen=best.way,
        runtime_version=cpu.version(best.way.runtime),
        arithmetic=dict(_arithmetic(model, wanted, best.way, model.workloads[0])),
        times_fp32=None if times_fp32 is None else times_fp32 * best.median_ms / chosen_ms,
        refused=refused,
    )


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
) -> tuple[list[Timed], dict[str, str]]:
    """The time of each way, and why a runtime was left out; raises BuildError if a precision has no runtime left.

    Only one way is open at a time, so that the largest model needs the memory of one session.
    """
    samples: dict[Way, tuple[float, ...]] = {}
    refused: dict[str, str] = {}
    precisions = {way.precision for way, _ in candidates}
    visits = [*candidates, *reversed(candidates)]
    for done, (way, candidate) in enumerate(visits, start=1):
        fastest = min((min(taken) for taken in samples.values()), default=0.0)
        if way.runtime not in refused and (way not in samples or min(samples[way]) <= _HOPELESS * fastest):
            try:
                samples[way] = samples.get(way, ()) + _visit(model, way, candidate, workload)
            except BuildError as error:
                refused[way.runtime] = error.message
                samples = {other: taken for other, taken in samples.items() if other.runtime != way.runtime}
                if precisions != {other.precision for other, _ in candidates if other.runtime not in refused}:
                    raise
        progress("measuring runtimes and threads", done, len(visits))
    latencies = {way: timing.Latencies(samples_ms=taken) for way, taken in samples.items()}
    timed = [
        Timed(way=way, median_ms=found.median_ms, spread=found.spread, samples=len(found.samples_ms))
        for way, found in latencies.items()
    ]
    return timed, refused


def _visit(model: Runnable, way: Way, candidate: GraphForms, workload: Workload) -> tuple[float, ...]:
    opened = cpu.open_graphs(candidate.graphs[way.runtime], way)
    run = {"": lambda: model.drive(opened, workload.inputs)}
    return timing.in_turn(run, rounds=_ROUNDS, budget_s=_VISIT_S)[""].samples_ms


def _arithmetic(model: Runnable, candidate: GraphForms, way: Way, workload: Workload) -> Arithmetic:
    return cpu.arithmetic(model, cpu.open_graphs(candidate.graphs[way.runtime], way), workload.inputs)

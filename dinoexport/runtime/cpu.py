"""Open a model's graphs in the CPU runtime, precision and threads that a bundle names."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dinoexport.family import Runnable
from dinoexport.runtime import Arithmetic, Opened, decoding, ort, sizes, table
from dinoexport.runtime.decoding import Decoder
from dinoexport.runtime.sizes import Specialised
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Array, Arrays, Graph, Precision, Runner, Runtime, Way

# As Linux names them: what runtimes choose their kernels and their precisions by.
_INSTRUCTIONS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
PLAIN = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32)


def way_here(built: Way) -> Way:
    """How this machine runs a bundle that was built to run as `built`; the runtime chooses the number of threads.

    If only ONNX Runtime is installed, it runs an fp32 graph that was built for another runtime.
    """
    if built.precision is Precision.FP32 and not table.installed((built.runtime,)):
        return PLAIN
    return replace(built, threads=0)


def open_graphs(graphs: Mapping[Path, Graph], way: Way) -> dict[str, Opened]:
    """Every graph by its name, opened in `way`.

    Raises MissingRequirement without the runtime or without the precision on this CPU.
    """
    open_graph = TABLE[way.runtime].open_graph
    assert open_graph is not None, f"{way.runtime} opens no graph on a CPU"
    return {graph.name: open_graph(path, graph, way, None) for path, graph in graphs.items()}


def open_for_sizes(
    graphs: Mapping[Path, Graph], way: Way, *, named: Sequence[str] = (), spend: sizes.Budget | None = None
) -> dict[str, Opened | Specialised]:
    """Every graph by its name, opened in `way`, with forms of its own for sizes that are often requested.

    named: sizes that get a form at once, as `224x224`; raises UsageError for one that no graph takes. Raises as
    `open_graphs`. A graph that carries state stays as it is: its sizes change with every call.
    """
    open_graph = TABLE[way.runtime].open_graph
    assert open_graph is not None, f"{way.runtime} opens no graph on a CPU"
    spend = sizes.budget() if spend is None else spend
    opened: dict[str, Opened | Specialised] = {}
    for path, graph in graphs.items():
        general = open_graph(path, graph, way, None)
        if graph.carried:
            opened[graph.name] = general
            continue
        opened[graph.name] = Specialised(
            graph,
            general,
            partial(open_graph, path, graph, way),
            precision=way.precision,
            spend=spend,
            named=[sizes.shapes_of(size, graph) for size in named],
        )
    return opened


def open_decoder(path: Path, graph: Graph, way: Way = PLAIN) -> Decoder:
    """A graph that carries state, opened in `way`: sequences of tokens with an empty cache. Raises as `open_graphs`."""
    return decoding.begin(open_graphs({path: graph}, way)[graph.name], graph)


def arithmetic(model: Runnable, opened: Mapping[str, Opened], inputs: Arrays) -> Arithmetic:
    """The arithmetic that the graphs really used for `inputs`, all graphs together."""
    first_calls = dict(reversed(_calls(model, opened, inputs)))
    total: Counter[str] = Counter()
    for name, arrays in first_calls.items():
        total.update(opened[name].arithmetic(arrays))
    return dict(total)


def flops(model: Runnable, graphs: Mapping[Path, Graph], opened: Mapping[str, Opened], inputs: Arrays) -> int:
    """Multiplications and additions in the graphs' products for `inputs`, counted as ONNX Runtime runs them."""
    paths = {graph.name: path for path, graph in graphs.items()}
    return sum(
        operator.flops
        for name, arrays in _calls(model, opened, inputs)
        for operator in ort.executed(paths[name], arrays, optimised=False)
    )


def _calls(model: Runnable, opened: Mapping[str, Opened], inputs: Arrays) -> list[tuple[str, Arrays]]:
    """The graphs that run for `inputs`, in order, each with its own inputs."""
    calls: list[tuple[str, Arrays]] = []

    def watched(name: str) -> Runner:
        def run(arrays: Arrays) -> dict[str, Array]:
            calls.append((name, arrays))
            return opened[name](arrays)

        return run

    model.drive({name: watched(name) for name in opened}, inputs)
    return calls


def title(runtime: Runtime) -> str:
    """The runtime's name and version for people."""
    return f"{TABLE[runtime].title} {version(runtime)}"


def version(runtime: Runtime) -> str:
    """The installed version of a runtime; empty when it is not installed."""
    return TABLE[runtime].installed_version() or ""


def usable_cpus() -> int:
    """The number of CPUs this process may use: its CPU affinity, or the container's quota if that is less."""
    bound = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return bound if quota == "max" else max(1, min(bound, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return bound


def machine() -> str:
    """The CPU's name in /proc/cpuinfo, and those of its instructions that decide how fast and in what it computes.

    Virtual machines give CPUs with and without AVX-512 one name.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = facts.get("model name") or platform.machine()
    has = set((facts.get("flags") or facts.get("Features", "")).split())
    instructions = [instruction for instruction in _INSTRUCTIONS if instruction in has]
    return f"{name} ({', '.join(instructions)})" if instructions else name

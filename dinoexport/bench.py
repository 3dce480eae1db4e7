"""Measure a bundle's speed on this machine, compared with the machine's peak and with PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dinoexport import bundle, family
from dinoexport.bundle import Manifest
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.family import Model, Runnable
from dinoexport.runtime import Arithmetic, Opened, cpu, runners
from dinoexport.runtime import sizes as of_size
from dinoexport.spec import SYNTHETIC, Graph, Precision, Progress, Runner, Way, Workload, silent
from dinoexport.system import timing
from dinoexport.validation import evaluate

_ROUNDS = 30
_BUDGET_S = 6.0
# A workload that takes longer than this at the machine's peak is left out: its thirty rounds would take too long.
_LONGEST_S = 5.0
# Large enough that memory does not matter, small enough for a tenth of a second: 17 GFLOP.
_GEMM_SIDE = 2048
GEMM_GFLOP = 2 * _GEMM_SIDE**3 / 1e9
_GEMM_ROUNDS = 5
# Environment variables that change the speed of NumPy's BLAS. On a CPU with AVX-512, a setting for Haswell halved the
# speed of the product, and code that ignores the setting then reached 170 % of the measured peak.
BLAS_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class WorkloadTimes:
    """One workload, timed in turn with a large fp32 matrix product and, if it is installed, with PyTorch.

    gflop: arithmetic of the products in one run. peak: times of the matrix product, measured under the
    same load of the machine.
    """

    workload: Workload
    gflop: float
    ours: timing.Latencies
    peak: timing.Latencies
    pytorch: timing.Latencies | None

    @property
    def gflop_per_s(self) -> float:
        """The products' arithmetic divided by the median time."""
        return self.gflop / self.ours.median_ms * 1e3

    @property
    def share_of_peak(self) -> float:
        """The speed divided by the median speed of the matrix product in the same minute."""
        return self.gflop_per_s / (GEMM_GFLOP / self.peak.median_ms * 1e3)

    @property
    def noisy(self) -> bool:
        """Whether the samples vary too much to show a difference of 10 %."""
        return self.ours.spread > timing.NOISY_SPREAD


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All loads of one bundle. peak_gflop_per_s: the best of a few large fp32 matrix products.

    notes: what a reader must know to interpret the figures.
    """

    machine: str
    usable_cpus: int
    candidate: str
    peak_gflop_per_s: float
    rows: tuple[WorkloadTimes, ...]
    notes: tuple[str, ...]

    def table(self) -> list[dict[str, Any]]:
        """A row for each load, for a terminal."""
        return [
            {
                "load": row.workload.name,
                "median ms": f"{row.ours.median_ms:.1f}",
                "p90": f"{row.ours.percentile_ms(90):.1f}",
                "p99": f"{row.ours.percentile_ms(99):.1f}",
                f"{row.workload.unit}/s": f"{row.workload.items / row.ours.median_ms * 1e3:.2f}",
                "GFLOP/s": f"{row.gflop_per_s:.0f}",
                "of fp32 peak": f"{row.share_of_peak:.0%}",
                "of PyTorch's time": "" if row.pytorch is None else f"{row.ours.median_ms / row.pytorch.median_ms:.2f}",
                "spread": f"{row.ours.spread:.0%}{' noisy' if row.noisy else ''}",
            }
            for row in self.rows
        ]

    def to_json(self) -> dict[str, Any]:
        """Every figure, and every sample."""
        return {
            "machine": self.machine,
            "usable_cpus": self.usable_cpus,
            "candidate": self.candidate,
            "peak_gflop_per_s": self.peak_gflop_per_s,
            "workloads": [
                {
                    "load": row.workload.name,
                    "items": row.workload.items,
                    "unit": row.workload.unit,
                    "gflop": row.gflop,
                    "median_ms": row.ours.median_ms,
                    "p90_ms": row.ours.percentile_ms(90),
                    "p99_ms": row.ours.percentile_ms(99),
                    "items_per_s": row.workload.items / row.ours.median_ms * 1e3,
                    "gflop_per_s": row.gflop_per_s,
                    "share_of_fp32_peak": row.share_of_peak,
                    "times_pytorch": row.pytorch and row.ours.median_ms / row.pytorch.median_ms,
                    "noisy": row.noisy,
                    "samples_ms": row.ours.samples_ms,
                    "pytorch_samples_ms": row.pytorch and row.pytorch.samples_ms,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }


def bench(
    folder: Path,
    *,
    weights: str | None = None,
    head_weights: str | None = None,
    sizes: Sequence[str] = (),
    progress: Progress = silent,
) -> Bench:
    """Times the bundle in `folder` with every workload of its family, and PyTorch if torch and the weights are here.

    sizes: as `224x224`; instead of those loads, each is timed in the general form and in a form of its own.

    Every byte is checked first. Raises ValidationFailed for a damaged or a rejected bundle: the speed of wrong outputs
    is meaningless.
    """
    with bundle.checked(folder, progress=progress) as manifest:
        return _timed(folder, manifest, (weights, head_weights), sizes, progress)


def _timed(
    folder: Path,
    manifest: Manifest,
    given: tuple[str | None, str | None],
    sizes: Sequence[str],
    progress: Progress,
) -> Bench:
    """What `bench` finds of a bundle that was checked. given: weights of the model and of its head."""
    if manifest.verdict == "rejected":
        raise ValidationFailed(f"{folder} is marked rejected, so it is not timed.", next_step="Build one that passes.")
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    way = _way(manifest)
    opened = cpu.open_graphs(graphs, way)
    ask_pytorch, why_not = _pytorch(folder, model, recipe, manifest, given, progress)
    neighbours, peak = timing.Neighbours(), peak_gflop_per_s()
    rows, notes = [], [why_not] if why_not else []
    if runners.is_for_gpu(manifest):
        notes.append("the bundle is for a GPU, but its graph was timed on this machine's CPU")
    if told := [f"{name}={os.environ[name]}" for name in BLAS_SETTINGS if name in os.environ]:
        notes.append(f"the peak was measured with {', '.join(told)} set: without it the machine may be faster")
    loads, forms = model.workloads, dict[str, Mapping[str, Runner]]()
    if sizes:
        loads, forms = _own_forms(model, graphs, way, sizes, notes)
    for done, workload in enumerate(loads, start=1):
        gflop = cpu.flops(model, graphs, opened, workload.inputs) / 1e9
        if gflop / peak > _LONGEST_S:
            notes.append(
                f"{workload.name} was left out: {gflop:.0f} GFLOP take {gflop / peak:.0f} s at this machine's peak"
            )
        else:
            rows.append(_row(model, forms.get(workload.name, opened), workload, gflop, ask_pytorch))
        progress("timing workloads", done, len(loads))
    if (others := neighbours.share()) > timing.NOISY_SHARE:
        notes.append(f"noisy: other processes used {others:.0%} of the CPUs' time; ratios are more reliable than times")
    return Bench(
        machine=cpu.machine(),
        usable_cpus=cpu.usable_cpus(),
        candidate=runners.candidate_name(manifest.precision, way, _arithmetic(model, opened)),
        peak_gflop_per_s=peak,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _own_forms(
    model: Runnable, graphs: Mapping[Path, Graph], way: Way, wanted: Sequence[str], notes: list[str]
) -> tuple[tuple[Workload, ...], dict[str, Mapping[str, Runner]]]:
    """Two workloads for each size, and the runner of the second one: a form of the graph for that size alone."""
    if len(graphs) != 1 or next(iter(graphs.values())).carried:
        raise UsageError("This bundle's graph has no size of its own.", next_step="Leave --size out.")
    (graph,) = graphs.values()
    loads: list[Workload] = []
    forms: dict[str, Mapping[str, Runner]] = {}
    for size in wanted:
        shapes = of_size.shapes_of(size, graph)
        inputs = of_size.sample(graph, shapes)
        items = next(iter(shapes.values()))[0]
        own = f"{size}, a form of its own"
        loads += [Workload(name=name, inputs=inputs, items=items, unit=model.workloads[0].unit) for name in (size, own)]
        spend = replace(of_size.budget(), most=1)
        opened = cpu.open_for_sizes(graphs, way, named=[size], spend=spend)
        specialised = opened[graph.name]
        assert isinstance(specialised, of_size.Specialised)
        specialised.settle()
        (form,) = specialised.forms
        notes.append(f"{own}: {form.state}{form.why and f', {form.why}'}; it takes {form.memory_bytes / 1e6:.0f} MB")
        forms[own] = dict(opened)
    return tuple(loads), forms


def _way(manifest: Manifest) -> Way:
    """How the bundle runs: with the recorded threads on the machine that chose them, with all CPUs on others."""
    way, facts = runners.way_of(manifest), manifest.cpu
    same = facts is not None and (facts.machine, facts.usable_cpus) == (cpu.machine(), cpu.usable_cpus())
    threads = facts.chosen.threads if facts is not None and same else cpu.usable_cpus()
    return replace(way, threads=threads)


def _arithmetic(model: Runnable, opened: Mapping[str, Opened]) -> Arithmetic:
    return cpu.arithmetic(model, opened, model.workloads[0].inputs)


def _row(
    model: Runnable,
    opened: Mapping[str, Runner],
    workload: Workload,
    gflop: float,
    ask_pytorch: Callable[[Workload], object] | None,
) -> WorkloadTimes:
    runs: dict[str, Callable[[], object]] = {"ours": lambda: model.drive(opened, workload.inputs), "peak": gemm()}
    if ask_pytorch is not None:
        runs["pytorch"] = lambda: ask_pytorch(workload)
    taken = timing.in_turn(runs, rounds=_ROUNDS, budget_s=_BUDGET_S)
    return WorkloadTimes(
        workload=workload, gflop=gflop, ours=taken["ours"], peak=taken["peak"], pytorch=taken.get("pytorch")
    )


def _pytorch(
    folder: Path,
    model: Model,
    recipe: Recipe,
    manifest: Manifest,
    given: tuple[str | None, str | None],
    progress: Progress,
) -> tuple[Callable[[Workload], object] | None, str]:
    """The plain formulation in eager PyTorch with its weights in memory; or None and the reason. Downloads nothing."""
    if find_spec("torch") is None:
        return None, "PyTorch was not timed: torch is not installed"
    source, head = given[0] or manifest.checkpoint.source, manifest.head
    if given[0] is None and not _is_here(source):
        return None, "PyTorch was not timed: give the weights that the bundle was built from as --weights"
    head_source = given[1]
    if head is not None and head.sha256 is not None and head_source is None:
        head_source = str(folder / head.file) if head.file else head.source
        if not _is_here(head_source):
            return None, "PyTorch was not timed: give the head that the bundle was built from as --head-weights"
    checkpoint = evaluate.same_weights(model, recipe, manifest, source, progress, head_weights=head_source)
    import torch

    torch.set_num_threads(cpu.usable_cpus())
    # PyTorch may read more than the graph has: a depth head leaves the final norm out.
    read = cache(checkpoint.read)

    def ask(workload: Workload) -> object:
        return model.reference(read, [workload.inputs], precision=Precision.FP32, progress=silent)

    return ask, ""


def _is_here(source: str) -> bool:
    return source.startswith(SYNTHETIC) or Path(source).is_file() or Path(source).is_dir()


def gemm() -> Callable[[], object]:
    """A large fp32 matrix product in NumPy, `GEMM_GFLOP` of work: it measures the machine's peak."""
    import numpy as np

    side = np.random.RandomState(0).standard_normal((_GEMM_SIDE, _GEMM_SIDE)).astype(np.float32)
    return lambda: side @ side


def peak_gflop_per_s() -> float:
    """The fastest of a few such products, in GFLOP/s."""
    taken = timing.in_turn({"": gemm()}, rounds=_GEMM_ROUNDS, budget_s=_BUDGET_S)[""]
    return GEMM_GFLOP / min(taken.samples_ms) * 1e3

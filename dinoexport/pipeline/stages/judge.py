"""Stage `judge`: compare the graph's outputs with PyTorch's. Always repeated on this machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoexport import bundle
from dinoexport.bundle import CpuFacts
from dinoexport.bundle.reference_file import Reference
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.versions import RUNTIMES, versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.report import html_report
from dinoexport.runtime import runners
from dinoexport.spec import Candidate, Graph, Progress
from dinoexport.validation import evaluate
from dinoexport.validation.error_analysis import Growth
from dinoexport.validation.judge import Report
from dinoexport.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A candidate's verdict. kept: the outputs and errors that the report draws, by the name of the candidate.

    An engine that is validated later adds its own to `kept`.
    """

    report: Report
    kept: dict[str, html_report.Kept]


def judge_graph(
    request: BuildRequest, folder: Path, reference: Reference, facts: CpuFacts | None, progress: Progress
) -> Judged:
    """Evaluates the graphs in `folder`: the files that will be published, in the runtime that will run them."""
    graphs = request.graph_files(folder)
    kept = html_report.Kept()
    candidate, name, one_thread = _opened(request, graphs, facts)
    watched = html_report.keeping(candidate, reference.expectations, kept)
    report = evaluate.judged(watched, reference, name, progress=progress)
    report = evaluate.with_determinism(report, reference, candidate, one_thread)
    report = evaluate.with_ranges(report, request.model, graphs, request.cases, progress=progress)
    return Judged(report=report, kept={name: kept})


def _opened(
    request: BuildRequest, graphs: Mapping[Path, Graph], facts: CpuFacts | None
) -> tuple[Candidate, str, Callable[[], Candidate] | None]:
    """The graphs opened, their name as a candidate, and what opens them with one thread; see `with_one_thread`.

    They run on a GPU if that is what will run them and this machine has one. An engine's graphs run on the CPU: the
    engine itself is evaluated on the GPU.
    """
    if not request.chosen.on_cpu and request.engine is None and runners.has_gpu_for_graphs():
        sample = request.model.workloads[0].inputs
        there = runners.open_graphs_on_gpu(request.model, graphs, request.precision, named_by=sample)
        return there.candidate, there.name, None
    way = facts.chosen if facts else runners.graph_way(request.precision)
    name = runners.candidate_name(request.precision, way, facts.arithmetic if facts else {})
    candidate = runners.open_candidate(request.model, graphs, way)
    return candidate, name, runners.with_one_thread(request.model, graphs, way)


def follow_error(
    request: BuildRequest,
    folder: Path,
    checkpoint: Checkpoint,
    report: Report,
    facts: CpuFacts | None,
    progress: Progress,
) -> Growth | None:
    """How the error grows inside the graphs in `folder`, block by block; None if inner values are not available."""
    return evaluate.growth_of(
        report,
        request.cases,
        request.model,
        request.graph_files(folder),
        checkpoint,
        request.limits,
        way=facts.chosen if facts else runners.graph_way(request.precision),
        precision=request.precision,
        progress=progress,
    )


def record_verdict(work: Workspace, report: Report, growth: Growth | None, facts: CpuFacts | None) -> Stage:
    """The verdict as `report.json`."""
    content = {
        **report.to_json(),
        **({"growth": growth.to_json()} if growth else {}),
        "cpu": facts and facts.model_dump(mode="json"),
        "versions": versions_of(RUNTIMES),
        "machine": platform.machine(),
    }

    def make(folder: Path) -> None:
        (folder / bundle.REPORT_JSON).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    return work.stage("judge", key_of(report=content), make)

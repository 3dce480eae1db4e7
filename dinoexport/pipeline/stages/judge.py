"""Stage `judge`: compare the graph's outputs with PyTorch's. Always repeated on this machine."""

from __future__ import annotations

import json
import platform
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
from dinoexport.spec import Progress
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
    way = facts.chosen if facts else runners.graph_way(request.precision)
    kept = html_report.Kept()
    candidate = runners.open_candidate(request.model, graphs, way)
    name = runners.candidate_name(request.precision, way, facts.arithmetic if facts else {})
    watched = html_report.keeping(candidate, reference.expectations, kept)
    report = evaluate.judged(watched, reference, name, progress=progress)
    one_thread = runners.with_one_thread(request.model, graphs, way)
    report = evaluate.with_determinism(report, reference, candidate, one_thread)
    report = evaluate.with_ranges(report, request.model, graphs, request.cases, progress=progress)
    return Judged(report=report, kept={name: kept})


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

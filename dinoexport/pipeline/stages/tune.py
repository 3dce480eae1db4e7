"""Choose how a bundle runs on a CPU: measured on this machine, never reused."""

from __future__ import annotations

from dinoexport.bundle import CpuFacts
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.stages.quantise import Forms
from dinoexport.pipeline.workspace import Stage
from dinoexport.runtime import autotune
from dinoexport.runtime.autotune import GraphForms
from dinoexport.spec import Precision, Progress
from dinoexport.validation.judge import Report


def choose_runtime(request: BuildRequest, forms: Forms, plain: Stage, progress: Progress) -> CpuFacts:
    """The fastest way to run the graphs on this machine; a precision below fp32 is compared with fp32."""
    graphs = {runtime: request.graph_files(stage.folder) for runtime, stage in forms.items()}
    wanted = GraphForms(precision=request.precision, graphs=graphs)
    later = request.precision is not request.chosen.traced  # only then is there an fp32 graph beside
    if not later:
        return autotune.tune(request.model, wanted, None, progress=progress)
    fp32_graphs = dict.fromkeys(request.cpu_runtimes, request.graph_files(plain.folder))
    fp32 = GraphForms(precision=Precision.FP32, graphs=fp32_graphs)
    return autotune.tune(request.model, wanted, fp32, progress=progress)


def choose_another(request: BuildRequest, forms: Forms, facts: CpuFacts, report: Report) -> CpuFacts | None:
    """The next fastest runtime where the chosen one's arithmetic misses the limits; None if there is none left."""
    graphs = {runtime: request.graph_files(stage.folder) for runtime, stage in forms.items()}
    wanted = GraphForms(precision=request.precision, graphs=graphs)
    worst = ", ".join(sorted({f"{row.case}/{row.output}" for row in report.failures})[:4])
    return autotune.without_chosen(request.model, wanted, facts, f"its outputs are not PyTorch's ({worst})")

"""Open a bundle for a worker, on its GPU or with forms of the graphs for named sizes; and prove it on one case."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dinoexport import bundle
from dinoexport.bundle import Manifest, reference_file
from dinoexport.errors import MissingRequirement, ValidationFailed
from dinoexport.family import Runnable
from dinoexport.runtime import Opened, cpu, runners
from dinoexport.runtime.sizes import Budget, Specialised
from dinoexport.spec import Candidate, Graph, Way
from dinoexport.validation import evaluate


def prove(candidate: Candidate, folder: Path, name: str) -> None:
    """Raises ValidationFailed unless this machine gives PyTorch's outputs on the bundle's smallest case."""
    reference = reference_file.read(folder / bundle.REFERENCE).smallest()
    report = evaluate.judged(candidate, reference, name)
    if not report.passed and not report.not_covered:
        raise ValidationFailed(
            f"On this machine the bundle does not give PyTorch's outputs (case {reference.expectations[0].case.name}).",
            next_step=f"dinoexport validate {folder} shows by how much.",
        )


def opened(
    folder: Path, manifest: Manifest, model: Runnable, threads: int, forms: Sequence[str]
) -> tuple[Candidate, str]:
    """What the bundle has for this machine's GPU, else its graphs with forms for these sizes; and its name."""
    if runners.is_for_gpu(manifest):
        try:
            there = runners.open_on_gpu(model, folder, manifest, trusted=False)  # no signature was asked for
        except MissingRequirement:
            pass
        else:
            return there.candidate, there.name
    graphs = {folder / graph.file: graph.graph() for graph in manifest.graphs}
    way = replace(runners.way_of(manifest), threads=threads)
    opened = _with_forms(graphs, way, forms) if forms else cpu.open_graphs(graphs, way)
    return runners.driven(model, opened), runners.candidate_name(manifest.precision, way, {})


def _with_forms(graphs: Mapping[Path, Graph], way: Way, forms: Sequence[str]) -> Mapping[str, Opened | Specialised]:
    """The graphs with a form for each size, ready before the first image: which form a batch takes is the plan's."""
    spend = Budget(most=len(forms), memory_bytes=sys.maxsize, often=sys.maxsize)
    opened = cpu.open_for_sizes(graphs, way, named=forms, spend=spend)
    for graph in opened.values():
        if not isinstance(graph, Specialised):
            continue
        graph.settle()
        for form in graph.forms:
            if form.state != "ready":
                raise ValidationFailed(
                    f"The form of the graph for {dict(form.shapes)} cannot be used: {form.why}.",
                    next_step="Embed without --size.",
                )
    return opened

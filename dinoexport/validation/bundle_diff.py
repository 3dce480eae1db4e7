"""Compare two bundles: sources, sizes, graphs, outputs and speed on this machine.

Both are verified first, and both run the inputs in the reference of the first. Timings alternate between the two, so
that a machine that slows down slows both.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dinoexport import bundle, family
from dinoexport.bundle import Manifest, reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.runtime import runners
from dinoexport.spec import Array, Candidate, OutputKind, Progress, silent
from dinoexport.validation.metrics import distance

Differences = list[dict[str, Any]]
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One of the two bundles, opened."""

    folder: Path
    manifest: Manifest
    candidate: Candidate

    @property
    def inputs(self) -> list[list[dict[str, Any]]]:
        return [[dict(tensor) for tensor in graph.inputs] for graph in self.manifest.graphs]


def compare(first: Path, second: Path, *, progress: Progress = silent) -> dict[str, Differences]:
    """Tables by title: what differs, files, operations, outputs, speed.

    Raises UsageError when the two take different inputs, or the first has no reference to take inputs from.
    """
    with bundle.checked(first, progress=progress) as one, bundle.checked(second, progress=progress) as other:
        return _compared(_opened(first, one), _opened(second, other), progress)


def _compared(a: _Side, b: _Side, progress: Progress) -> dict[str, Differences]:
    first, second = a.folder, b.folder
    if a.manifest.family != b.manifest.family or a.inputs != b.inputs:
        raise UsageError(
            f"{first} and {second} do not take the same inputs, so they cannot be compared.",
            next_step="dinoexport inspect shows the inputs of each.",
        )
    if a.manifest.verdict == "unjudged":
        raise UsageError(
            f"{first} was exported without a reference, so there are no inputs to compare on.",
            next_step="Give the validated bundle first, or build one.",
        )
    outputs, speed = _asked(a, b, reference_file.read(first / bundle.REFERENCE), progress)
    return {
        "What differs": _differences(a.manifest, b.manifest),
        "Files": _files(a.manifest, b.manifest),
        "Operations": _operations(a, b),
        "Outputs": outputs,
        "Speed": speed,
    }


def _opened(folder: Path, manifest: Manifest) -> _Side:
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {folder / bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    graphs = {folder / graph.file: graph.graph() for graph in manifest.graphs}
    return _Side(folder=folder, manifest=manifest, candidate=runners.open_candidate(model, graphs))


def _differences(a: Manifest, b: Manifest) -> Differences:
    """The facts that differ between the manifests; an empty table means that none do."""
    first, second = _facts(a), _facts(b)
    return [
        {"what": name, "first": first.get(name, ""), "second": second.get(name, "")}
        for name in first | second
        if first.get(name) != second.get(name)
    ]


def _facts(manifest: Manifest) -> dict[str, str]:
    facts = {
        "variant": manifest.variant,
        "precision": manifest.precision.value,
        "target": manifest.target,
        "verdict": manifest.verdict,
        "weights": manifest.checkpoint.source,
        "weights' SHA-256": manifest.checkpoint.sha256,
        "head's SHA-256": (manifest.head.sha256 if manifest.head else None) or "",
        **{f"version of {package}": version for package, version in manifest.versions.items()},
    }
    return facts | _flat("recipe", {key: value for key, value in manifest.recipe.items() if key != "precision"})


def _flat(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {name: str(value)}
    return {key: text for inner, content in value.items() for key, text in _flat(f"{name}.{inner}", content).items()}


def _files(a: Manifest, b: Manifest) -> Differences:
    first, second = ({file.name: file for file in manifest.files} for manifest in (a, b))
    rows = []
    for name in first | second:
        ours, theirs = first.get(name), second.get(name)
        rows.append(
            {
                "file": name,
                "first, bytes": ours.size_bytes if ours else "",
                "second, bytes": theirs.size_bytes if theirs else "",
                "second / first": _ratio(theirs.size_bytes, ours.size_bytes) if ours and theirs else "",
                "same bytes": "yes" if ours and theirs and ours.sha256 == theirs.sha256 else "no",
            }
        )
    return rows


def _operations(a: _Side, b: _Side) -> Differences:
    """The number of each operation, where it differs. Without the package onnx, a row that says so."""
    try:
        import onnx
    except ImportError:
        return [{"operation": "not compared: onnx is not installed", "first": "", "second": ""}]

    def counted(side: _Side) -> Counter[str]:
        loaded = (onnx.load(side.folder / g.file, load_external_data=False) for g in side.manifest.graphs)
        return Counter(node.op_type for model in loaded for node in model.graph.node)

    first, second = counted(a), counted(b)
    rows: Differences = [
        {"operation": op, "first": first[op], "second": second[op]}
        for op in sorted(first | second)
        if first[op] != second[op]
    ]
    return [*rows, {"operation": "all", "first": first.total(), "second": second.total()}]


def _asked(a: _Side, b: _Side, reference: Reference, progress: Progress) -> tuple[Differences, Differences]:
    """The error of the second's outputs against the first's, of both against PyTorch's, and the time of each case."""
    outputs, speed = [], []
    asked = reference.expectations
    kinds = {name: kind for name, (kind, _) in reference.kinds.items()}
    for done, expectation in enumerate(asked, start=1):
        inputs = expectation.case.inputs
        ours, theirs = a.candidate(inputs), b.candidate(inputs)
        outputs += [
            {
                "case": expectation.case.name,
                "output": name,
                "second from first": _apart(kinds.get(name), theirs.get(name), ours.get(name)),
                "first from PyTorch": _apart(kinds.get(name), ours.get(name), expectation.outputs.get(name)),
                "second from PyTorch": _apart(kinds.get(name), theirs.get(name), expectation.outputs.get(name)),
            }
            for name in sorted(ours | theirs)
        ]
        times_ms: tuple[list[float], list[float]] = ([], [])
        for turn in range(2 * _ROUNDS):
            which = turn % 2
            started = time.perf_counter()
            (a, b)[which].candidate(inputs)
            times_ms[which].append(1000 * (time.perf_counter() - started))
        first_ms, second_ms = map(median, times_ms)
        speed.append(
            {
                "case": expectation.case.name,
                "first, ms": f"{first_ms:.1f}",
                "second, ms": f"{second_ms:.1f}",
                "second / first": _ratio(second_ms, first_ms),
            }
        )
        progress("asking both", done, len(asked))
    return outputs, speed


def _apart(kind: OutputKind | None, candidate: Array | None, reference: Array | None) -> str:
    """The relative L2 error as text, for labels the share that differs, or the reason why there is none."""
    if candidate is None or reference is None:
        return "not there"
    if kind == "labels":
        return (
            f"{(candidate != reference).mean():.2%} differ" if candidate.shape == reference.shape else "another shape"
        )
    try:
        return f"{distance(candidate, reference).relative_l2:.1e}"
    except ValueError as error:
        return str(error)


def _ratio(second: float, first: float) -> str:
    return f"{second / first:.2f}" if first else ""

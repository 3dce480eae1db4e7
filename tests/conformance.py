"""The kit every family must pass: whatever it models, these hold. A family's tests call `check` with a model.

Values only, never shapes alone: the traced pieces run by PyTorch, the exported files run by ONNX Runtime, and the plain
reference must agree on every case, and every tensor of the checkpoint must matter.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoexport.family import Call, Model, Read
from dinoexport.graph import traces as kept
from dinoexport.graph.onnx_writer import Trace, export, traced
from dinoexport.runtime import runners
from dinoexport.spec import Arrays, Case, Graph, Precision, silent
from dinoexport.validation import error_analysis
from dinoexport.validation.metrics import distance

LIMIT = 1e-5


def check(
    model: Model,
    cases: Sequence[Case],
    folder: Path,
    *,
    seed: int = 7,
    traces: dict[str, Any] | None = None,
    changing: Collection[str] | None = None,
) -> None:
    """All of the kit on one fp32 model.

    traces: pieces that other models of the same backbone were traced for. changing: the tensors that must be seen to
    matter, by default all; where many models share a backbone, one of them answers for it.
    """

    read = reading(model, seed)
    inputs = [case.inputs for case in cases]
    expected = reference(model, read, inputs)
    _signature(model)
    _weights_are_read_when_they_are_written(model)
    _weights_are_the_same_every_time(model, seed)
    _agree(eagerly(model, read, inputs), expected)
    _agree(exported(model, read, inputs, folder, traces), expected)
    _probes_are_the_reference_s(model, read, inputs, folder)
    _stress_is_finite_and_matters(model, seed, inputs, expected)
    _every_tensor_matters(model, read, inputs, expected, model.tensors if changing is None else changing)


def reading(model: Model, seed: int) -> Read:
    """The synthetic checkpoint's tensors, each made once: twenty million random numbers take a second."""
    return functools.cache(lambda name: model.synthetic(name, seed))


def reference(model: Model, read: Read, inputs: Sequence[Arrays]) -> list[dict[str, Any]]:
    """The plain formulation's answers."""
    return model.reference(read, inputs, precision=Precision.FP32, progress=silent)


@torch.inference_mode()
def run_calls(calls: Sequence[Call], graph: Graph, arrays: Arrays) -> dict[str, Any]:
    """A graph's traced pieces run by PyTorch, with the weights the exporter would write."""
    values = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for call in calls:
        for name, parameter in call.piece.module.named_parameters():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(call.weights[name].read())))
        results = call.piece.module(*(values[name] for name in call.inputs))
        results = (results,) if isinstance(results, torch.Tensor) else results
        values |= dict(zip(call.outputs, results, strict=True))
    return {tensor.name: values[tensor.name].numpy() for tensor in graph.outputs}


def eagerly(model: Model, read: Read, inputs: Sequence[Arrays]) -> list[dict[str, Any]]:
    """Each case driven through the traced modules, without ONNX."""
    calls = {graph.name: (graph, model.calls(graph, read)) for graph in model.graphs}
    opened = {
        name: (lambda arrays, g=graph, c=graph_calls: run_calls(c, g, arrays))
        for name, (graph, graph_calls) in calls.items()
    }
    return [model.drive(opened, arrays) for arrays in inputs]


def export_to(
    folder: Path, model: Model, read: Read, traces: dict[str, Any] | None = None, trace: Trace = kept.of
) -> None:
    """All graphs of the model as ONNX in `folder`. trace: a tracer, for pieces that a test has changed in memory."""
    for graph in model.graphs:
        made = functools.partial(traced, trace=trace)
        export(graph, model.calls(graph, read), folder, metadata={}, traces=traces, trace=made)


def exported(
    model: Model, read: Read, inputs: Sequence[Arrays], folder: Path, traces: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Each case driven through the exported files."""
    export_to(folder, model, read, traces)
    candidate = runners.open_candidate(model, {folder / f"{graph.name}.onnx": graph for graph in model.graphs})
    return [candidate(arrays) for arrays in inputs]


def _agree(answers: Sequence[Arrays], expected: Sequence[Arrays]) -> None:
    for ours, theirs in zip(answers, expected, strict=True):
        # By how much a choice leads is the judge's to know; no graph answers with it.
        named = {name for name in theirs if not name.endswith("/lead")}
        assert ours.keys() == named
        for name in named:
            assert distance(ours[name], theirs[name]).relative_l2 <= LIMIT, name


def _probes_are_the_reference_s(model: Model, read: Read, inputs: Sequence[Arrays], folder: Path) -> None:
    """What the exported files hold at the family's probes is what the plain formulation has there."""
    names = {name for probes in model.probes.values() for name in probes}
    graphs = {folder / f"{graph.name}.onnx": graph for graph in model.graphs}
    answers = model.reference(read, inputs, precision=Precision.FP32, progress=silent, inside=True)
    for arrays, answer in zip(inputs, answers, strict=True):
        inside = error_analysis.values_inside(model, graphs, arrays)
        assert inside.keys() == names <= answer.keys()
        for name in names:
            assert distance(inside[name], answer[name]).relative_l2 <= LIMIT, name


def _stress_is_finite_and_matters(
    model: Model, seed: int, inputs: Sequence[Arrays], expected: Sequence[Arrays]
) -> None:
    """Weights with massive activations are float32, other weights, and give other answers that are still finite."""
    stressed = reference(model, lambda name: model.synthetic(name, seed, peak=300), inputs)
    for ours, theirs in zip(stressed, expected, strict=True):
        assert all(np.isfinite(array).all() for array in ours.values())
        assert any(not np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert all(model.synthetic(name, seed, peak=300).dtype == np.float32 for name in model.tensors)


def _signature(model: Model) -> None:
    names = [graph.name for graph in model.graphs]
    assert len(set(names)) == len(names) >= 1
    for graph in model.graphs:
        tensors = [tensor.name for tensor in (*graph.inputs, *graph.outputs)]
        assert len(set(tensors)) == len(tensors)
        assert all(tensor.meaning for tensor in (*graph.inputs, *graph.outputs))


def _weights_are_read_when_they_are_written(model: Model) -> None:
    """Not when calls are asked for: tracing begins before the checkpoint is there."""

    def unread(name: str) -> Any:
        raise AssertionError(f"{name} was read to trace the graph")

    for graph in model.graphs:
        assert model.calls(graph, unread)


def _weights_are_the_same_every_time(model: Model, seed: int) -> None:
    for name, shape in model.tensors.items():
        once, again, other = (model.synthetic(name, s) for s in (seed, seed, seed + 1))
        assert once.dtype == np.float32 and once.shape == shape, name
        constant = once.size == 1 or np.ptp(once) == 0
        assert np.array_equal(once, again) and (constant or not np.array_equal(once, other)), name


def _every_tensor_matters(
    model: Model, read: Read, inputs: Sequence[Arrays], expected: Sequence[Arrays], changing: Collection[str]
) -> None:
    """Turning any tensor over moves some output far past the limit: nothing in the synthetic weights can hide a bug."""
    for changed in changing:
        if changed in model.optional_tensors:
            continue

        def turned(name: str, changed: str = changed) -> Any:
            if name != changed:
                return read(name)
            flipped = np.ascontiguousarray(np.flip(read(name)))
            return flipped + 1 if np.array_equal(flipped, read(name)) else flipped

        worst = 0.0
        for arrays, theirs in zip(inputs, expected, strict=True):
            (ours,) = reference(model, turned, [arrays])
            worst = max(worst, *(distance(ours[name], theirs[name]).relative_l2 for name in theirs))
            if worst > 100 * LIMIT:
                break  # one case that shows it is enough
        assert worst > 100 * LIMIT, f"{changed} hardly matters: {worst:.1e}"

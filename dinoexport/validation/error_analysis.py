"""Locate an error inside a graph: where it grows faster than expected, and which values approach fp16's maximum.

A CPU runtime computes fp16 graphs in fp32 between casts and removes pairs of casts, so an overflow that a GPU would
have may never reach the outputs. Values are therefore measured where they are computed, not only in the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from dinoexport.config.limits import Limits
from dinoexport.errors import DinoexportError, require
from dinoexport.family import Model, Runnable
from dinoexport.runtime import ort
from dinoexport.spec import Array, Arrays, Case, Graph, Progress, Runner, silent
from dinoexport.validation.judge import Bound, Report, Row, without_nan
from dinoexport.validation.metrics import distance

FP16_LARGEST = 65504.0
RANGE = "(fp16 range)"


@dataclass(frozen=True, kw_only=True)
class GrowthStep:
    """The error of one value inside the graphs. norm: the mean norm of its vectors, in candidate and reference.

    expected: the largest relative L2 error that normal error growth explains. largest: the largest magnitude in the
    reference; times_median: the same divided by the median magnitude. holds: false for NaN.
    """

    name: str
    relative_l2: float
    expected: float
    norm: float
    reference_norm: float
    largest: float
    times_median: float
    holds: bool

    @property
    def fp16_headroom(self) -> float:
        """fp16's maximum divided by `largest`; below one it overflows."""
        return FP16_LARGEST / self.largest if self.largest > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The error of one case from the first value inside the graphs to the last. rule: how `expected` is computed."""

    case: str
    rule: str
    steps: tuple[GrowthStep, ...]

    @property
    def leaves(self) -> GrowthStep | None:
        """The first step whose error is larger than expected."""
        return next((step for step in self.steps if not step.holds), None)

    def to_json(self) -> dict[str, Any]:
        """Every figure, ready for json.dumps."""
        steps = [{**asdict(step), "fp16_headroom": step.fp16_headroom} for step in self.steps]
        content: dict[str, Any] = without_nan({"case": self.case, "rule": self.rule, "steps": steps})
        return content


def telling_case(report: Report) -> str | None:
    """The most informative case: the first that overflows, else the one closest to its limits or farthest over them.

    None when nothing was measured, for example if every case is a refusal.
    """

    def share(row: Row) -> float:
        if row.distance is None or not row.distance.finite:
            return float("inf")
        return max((b.value / b.limit for b in row.bounds if b.figure == "relative_l2" and b.limit > 0), default=0.0)

    overflowing = [row.case for row in report.failures if row.output == RANGE]
    measured = [row for row in report.rows if row.distance is not None]
    return overflowing[0] if overflowing else max(measured, key=share).case if measured else None


def causes(report: Report, growth: Growth | None) -> list[str]:
    """Why the report failed, as far as known: the first value that overflows, or where the error grows too fast."""
    lines = []
    if overflowing := [row for row in report.failures if row.output == RANGE]:
        lines.append(f"{overflowing[0].problem} on {overflowing[0].case}")
        over = [step for step in growth.steps if step.largest > FP16_LARGEST] if growth else []
        if over:
            lines.append(
                f"PyTorch's fp32 reaches {over[0].largest:,.0f} in {over[0].name}; the largest fp16 number is 65,504"
            )
    elif growth and (left := growth.leaves):
        lines.append(
            f"on {growth.case} the error starts growing faster than expected at {left.name}: "
            f"{left.relative_l2:.1e} where {left.expected:.1e} is expected"
        )
    elif growth and not report.passed:
        lines.append(f"on {growth.case} the error is as expected up to {growth.steps[-1].name}: it starts after that")
    return lines


def growth(
    case: str, names: Sequence[str], candidate: Arrays, reference: Arrays, own: Arrays | None, limits: Limits
) -> Growth:
    """The error at the values `names`, all arrays (..., D). own: PyTorch's values in the candidate's precision.

    With `own`, the expected error is the limits' multiple of PyTorch's error at the same place. Without it, or where
    PyTorch itself overflows, it is i/n of the limit at place i of n: rounding adds up at most linearly.
    """
    import numpy as np

    steps = []
    times = limits.times_own_error_max.value if limits.times_own_error_max is not None and own is not None else None
    for i, name in enumerate(names, start=1):
        measured = distance(candidate[name], reference[name])
        expected = limits.relative_l2_max.value * i / len(names)
        if times is not None and own is not None:
            own_error = distance(own[name], reference[name]).relative_l2
            expected = times * own_error if isfinite(own_error) else expected
        magnitudes = np.abs(reference[name])
        median = float(np.median(magnitudes))
        steps.append(
            GrowthStep(
                name=name,
                relative_l2=measured.relative_l2,
                expected=expected,
                norm=_mean_norm(candidate[name]),
                reference_norm=_mean_norm(reference[name]),
                largest=float(magnitudes.max()),
                times_median=float(magnitudes.max()) / median if median else float("inf"),
                holds=measured.relative_l2 <= expected,
            )
        )
    share = f"the limit {limits.relative_l2_max.value:g}, reached linearly at the last part"
    rule = share if times is None else f"{times:g} times the error of PyTorch itself there, in the same precision"
    return Growth(case=case, rule=rule, steps=tuple(steps))


def _mean_norm(vectors: Array) -> float:
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(vectors.astype(np.float64), axis=-1).mean())


def values_inside(model: Model, graphs: Mapping[Path, Graph], inputs: Arrays) -> dict[str, Array]:
    """The values of the exported graphs at the model's probes that `drive` passes on, for one case, in float32."""
    require("export", "onnx")
    import numpy as np
    import onnx

    runners: dict[str, Runner] = {}
    for path, graph in graphs.items():
        edited = onnx.load(path, load_external_data=False)
        names = model.probes.get(graph.name, ())
        edited.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        runners[graph.name] = ort.open_edited(edited.SerializeToString(), path, graph, more_outputs=names)
    answers = model.drive(runners, inputs)
    probes = {name for names in model.probes.values() for name in names}
    return {name: array.astype(np.float32) for name, array in answers.items() if name in probes}


def range_rows(
    model: Runnable, graphs: Mapping[Path, Graph], cases: Sequence[Case], *, progress: Progress = silent
) -> tuple[Row, ...]:
    """A row for each case: whether every fp16 value of the graphs stays finite. No rows if they have no fp16 value."""
    require("export", "onnx")
    largest: dict[str, float] = {}
    edited = {path: _measuring(path) for path in graphs}
    if not any(measured for _, measured in edited.values()):
        return ()
    runners = {graph.name: _keeping(*edited[path], path, graph, largest) for path, graph in graphs.items()}
    rows = []
    for done, case in enumerate(cases, start=1):
        largest.clear()
        with suppress(DinoexportError):  # a case that is refused or fails has a row already
            model.drive(runners, case.inputs)
        progress("measuring fp16's range", done, len(cases))
        if largest:
            rows.append(_range_row(case, largest))
    return tuple(rows)


def _range_row(case: Case, largest: Mapping[str, float]) -> Row:
    """The first value that overflows, in the graph's order, because later ones inherit it; else the largest value."""
    overflowing = [name for name, value in largest.items() if not value <= FP16_LARGEST]
    name = overflowing[0] if overflowing else max(largest, key=lambda name: largest[name])
    bound = Bound(
        figure="largest",
        value=largest[name],
        limit=FP16_LARGEST,
        reason=f"fp16's maximum; {name} is closest to it",
        holds=largest[name] <= FP16_LARGEST,
    )
    problem = f"fp16 overflows in {name}" if overflowing else ""
    return Row(case=case.name, why=case.why, output=RANGE, shape=(), distance=None, bounds=(bound,), problem=problem)


def _measuring(path: Path) -> tuple[bytes, dict[str, str]]:
    """The model at `path` with an output for the largest magnitude of each fp16 value, and the name of each value."""
    import onnx

    edited = onnx.load(path, load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(edited)
    halves = {v.name for v in typed.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    made = [(name, node.op_type) for node in edited.graph.node for name in node.output if name in halves]
    for name, _ in made:
        magnitudes, result = f"{name}/magnitudes", f"{name}/largest"
        edited.graph.node.append(onnx.helper.make_node("Abs", [name], [magnitudes]))
        edited.graph.node.append(onnx.helper.make_node("ReduceMax", [magnitudes], [result], keepdims=0))
        edited.graph.output.append(onnx.ValueInfoProto(name=result))
    return edited.SerializeToString(), {f"{name}/largest": f"{name} ({op})" for name, op in made}


def _keeping(edited: bytes, measured: Mapping[str, str], path: Path, graph: Graph, largest: dict[str, float]) -> Runner:
    """A runner of `edited` that keeps the largest magnitude of each measured value in `largest`."""
    run = ort.open_edited(edited, path, graph, more_outputs=tuple(measured))

    def run_and_keep(arrays: Arrays) -> dict[str, Array]:
        answers = run(arrays)
        for result, name in measured.items():
            value = float(answers.pop(result))
            before = largest.get(name, 0.0)
            largest[name] = before if isnan(before) or value <= before else value
        return answers

    return run_and_keep

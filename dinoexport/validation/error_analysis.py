"""What happens inside a graph: where its error leaves the expected growth, and what comes near the end of fp16's range.

A CPU runtime computes fp16 graphs in fp32 between casts and drops casts that undo one another, so an overflow that any
GPU would meet may never reach its outputs. Values are therefore measured where they arise, and not only at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from dinoexport.config.recipe import Limits
from dinoexport.errors import DinoexportError, require
from dinoexport.family import Model, Runnable
from dinoexport.runtime import ort
from dinoexport.spec import Array, Arrays, Case, Graph, Progress, Runner, silent
from dinoexport.validation.judge import Bound, Report, Row, without_nan
from dinoexport.validation.metrics import distance

FP16_LARGEST = 65504.0
RANGE = "(fp16 range)"


@dataclass(frozen=True, kw_only=True)
class Step:
    """The error at one value inside the graphs. norm: the mean length of its vectors, in candidate and reference.

    expected: the relative L2 error that is still growth and no defect. largest: the largest magnitude the reference
    has here, times_median times its median one. holds: false for NaN.
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
        """How many times `largest` fits into fp16's range; below one it overflows."""
        return FP16_LARGEST / self.largest if self.largest > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The error of one case from the first value inside the graphs to the last. rule: what `expected` rests on."""

    case: str
    rule: str
    steps: tuple[Step, ...]

    @property
    def leaves(self) -> Step | None:
        """The first step whose error is more than expected."""
        return next((step for step in self.steps if not step.holds), None)

    def to_json(self) -> dict[str, Any]:
        """Every figure, ready for json.dumps."""
        steps = [{**asdict(step), "fp16_headroom": step.fp16_headroom} for step in self.steps]
        content: dict[str, Any] = without_nan({"case": self.case, "rule": self.rule, "steps": steps})
        return content


def telling_case(report: Report) -> str | None:
    """The case that says most: the first that overflows, else the one nearest to its limits or farthest past them.

    None when nothing was measured, as when every case is one of refusal.
    """

    def share(row: Row) -> float:
        if row.distance is None or not row.distance.finite:
            return float("inf")
        return max((b.value / b.limit for b in row.bounds if b.figure == "relative_l2" and b.limit > 0), default=0.0)

    overflowing = [row.case for row in report.failures if row.output == RANGE]
    measured = [row for row in report.rows if row.distance is not None]
    return overflowing[0] if overflowing else max(measured, key=share).case if measured else None


def causes(report: Report, growth: Growth | None) -> list[str]:
    """What is known of why the report failed: the first value that overflows, or where the error leaves its growth."""
    lines = []
    if overflowing := [row for row in report.failures if row.output == RANGE]:
        lines.append(f"{overflowing[0].problem} on {overflowing[0].case}")
        over = [step for step in growth.steps if step.largest > FP16_LARGEST] if growth else []
        if over:
            lines.append(f"PyTorch's fp32 reaches {over[0].largest:,.0f} in {over[0].name}, fp16 ends at 65,504")
    elif growth and (left := growth.leaves):
        lines.append(
            f"on {growth.case} the error leaves the expected growth at {left.name}: "
            f"{left.relative_l2:.1e} where {left.expected:.1e} is expected"
        )
    elif growth and not report.passed:
        lines.append(f"on {growth.case} the error is as expected up to {growth.steps[-1].name}: it arises after that")
    return lines


def growth(
    case: str, names: Sequence[str], candidate: Arrays, reference: Arrays, own: Arrays | None, limits: Limits
) -> Growth:
    """The error at the values `names`, all arrays (..., D). own: PyTorch's values in the candidate's own precision.

    With `own`, an error may be the limits' multiple of PyTorch's at the same place. Without, or where PyTorch itself
    overflows, it may at place i of n be i/n of the limit: rounding adds up from part to part, at worst linearly.
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
            Step(
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
    share = f"the limit {limits.relative_l2_max.value:g}, growing linearly to the last part"
    rule = share if times is None else f"{times:g} times what PyTorch itself loses there in the same precision"
    return Growth(case=case, rule=rule, steps=tuple(steps))


def _mean_norm(vectors: Array) -> float:
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(vectors.astype(np.float64), axis=-1).mean())


def values_inside(model: Model, graphs: Mapping[Path, Graph], inputs: Arrays) -> dict[str, Array]:
    """What the exported graphs hold for one case at the model's probes that `drive` passes on, float32."""
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
    """A row for each case: whether every fp16 value of the graphs stays finite. None where they have no such value."""
    require("export", "onnx")
    largest: dict[str, float] = {}
    edited = {path: _measuring(path) for path in graphs}
    if not any(measured for _, measured in edited.values()):
        return ()
    runners = {graph.name: _keeping(*edited[path], path, graph, largest) for path, graph in graphs.items()}
    rows = []
    for done, case in enumerate(cases, start=1):
        largest.clear()
        with suppress(DinoexportError):  # what refuses or breaks on a case has a row from the judge
            model.drive(runners, case.inputs)
        progress("measuring fp16's range", done, len(cases))
        if largest:
            rows.append(_range_row(case, largest))
    return tuple(rows)


def _range_row(case: Case, largest: Mapping[str, float]) -> Row:
    """The first value that overflows, in the graph's order; what follows it only inherits. Else the largest one."""
    overflowing = [name for name, value in largest.items() if not value <= FP16_LARGEST]
    name = overflowing[0] if overflowing else max(largest, key=lambda name: largest[name])
    bound = Bound(
        figure="largest",
        value=largest[name],
        limit=FP16_LARGEST,
        reason=f"the end of fp16's range, to which {name} comes nearest",
        holds=largest[name] <= FP16_LARGEST,
    )
    problem = f"fp16 overflows in {name}" if overflowing else ""
    return Row(case=case.name, why=case.why, output=RANGE, shape=(), distance=None, bounds=(bound,), problem=problem)


def _measuring(path: Path) -> tuple[bytes, dict[str, str]]:
    """The model at `path` with an output for the largest magnitude of each fp16 value, and what each measures."""
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
    """A runner of `edited` that keeps in `largest` the largest magnitude that each measured value ever had."""
    run = ort.open_edited(edited, path, graph, more_outputs=tuple(measured))

    def run_and_keep(arrays: Arrays) -> dict[str, Array]:
        answers = run(arrays)
        for result, name in measured.items():
            value = float(answers.pop(result))
            before = largest.get(name, 0.0)
            largest[name] = before if isnan(before) or value <= before else value
        return answers

    return run_and_keep

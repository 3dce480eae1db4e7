"""Which case tells most, and how fp16 values inside a graph are measured, without running one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import BuildError
from dinoexport.spec import Case, Graph
from dinoexport.validation import error_analysis
from dinoexport.validation.answers import Bound
from dinoexport.validation.judge import Report, Row
from dinoexport.validation.metrics import distance

onnx = pytest.importorskip("onnx")
NEAR = distance(np.array([[1.0]]), np.array([[1.0]]))
BROKEN = distance(np.array([[math.nan]]), np.array([[1.0]]))


def row(case: str, *bounds: tuple[str, float, float], output: str = "y", measured: Any = NEAR) -> Row:
    made = tuple(
        Bound(figure=figure, value=value, limit=limit, reason="", holds=value <= limit)
        for figure, value, limit in bounds
    )
    return Row(case=case, why="", output=output, shape=(), distance=measured, bounds=made)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((), None), ((row("a", measured=None),), None),
        ((row("a", ("relative_l2", 0.5, 1.0)), row("b", ("relative_l2", 0.3, 0.5))), "b"),
        ((row("a", ("relative_l2", 0.5, 1.0)), row("b", ("worst_l2", 9.0, 0.5))), "a"),
        ((row("a", ("relative_l2", 0.5, 1.0)), row("b", ("relative_l2", 9.0, 0.0))), "a"),
        ((row("a", ("relative_l2", 9.0, 1.0)), row("b", measured=BROKEN)), "b"),
        ((row("a", ("relative_l2", 0.1, 1.0), ("relative_l2", 0.9, 1.0)), row("b", ("relative_l2", 0.5, 1.0))), "a"),
        ((row("a", ("relative_l2", 9.0, 1.0)), row("b", ("largest", 1e6, 65504.0), output=error_analysis.RANGE)), "b"),
        ((row("a", ("relative_l2", 9.0, 1.0)), row("b", ("largest", 1e3, 65504.0), output=error_analysis.RANGE)), "a"),
        ((row("a"), row("b")), "a"),
    ],
)  # fmt: skip
def test_the_case_that_tells_most(rows: tuple[Row, ...], told: str | None) -> None:
    """One that overflows; else one without figures; else the largest share of the limit on the error."""
    assert error_analysis.telling_case(Report(candidate="c", reference="r", rows=rows)) == told


def written(path: Path, *kinds: int) -> Path:
    """A chain x -> v0 -> v1 ... -> y, whose inner values are cast to `kinds`; the file of its weights is not there."""
    values = ["x", *(f"v{i}" for i in range(len(kinds))), "y"]
    nodes = [
        onnx.helper.make_node("Cast", [before], [after], to=kind)
        for before, after, kind in zip(values, values[1:], (*kinds, onnx.TensorProto.FLOAT), strict=False)
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
    weight = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=onnx.TensorProto.EXTERNAL
    )
    weight.external_data.add(key="location", value="absent.data")
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=[weight])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def test_every_fp16_value_gets_an_output_of_its_largest(tmp_path: Path) -> None:
    raw, measured = error_analysis._measuring(written(tmp_path / "m.onnx", HALF, SINGLE, HALF))
    assert measured == {"v0/largest": "v0 (Cast)", "v2/largest": "v2 (Cast)"}
    graph = onnx.load_from_string(raw).graph
    assert [output.name for output in graph.output] == ["y", "v0/largest", "v2/largest"]
    added = [(node.op_type, list(node.input), list(node.output)) for node in graph.node[4:]]
    assert added == [
        ("Abs", ["v0"], ["v0/magnitudes"]), ("ReduceMax", ["v0/magnitudes"], ["v0/largest"]),
        ("Abs", ["v2"], ["v2/magnitudes"]), ("ReduceMax", ["v2/magnitudes"], ["v2/largest"]),
    ]  # fmt: skip
    (keeps,) = graph.node[5].attribute
    assert (keeps.name, keeps.i) == ("keepdims", 0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The outputs that each opened graph has more; each gives the number of its call, and raises where that is 2."""
    more: list[Any] = []

    def open_edited(_raw: bytes, path: Path, graph: Graph, *, more_outputs: tuple[str, ...]) -> Callable[..., Any]:
        more.append((path.name, graph.name, more_outputs))
        calls = iter(range(1, 9))

        def run(_arrays: Any) -> dict[str, Any]:
            call = next(calls)
            if call == 2:
                raise BuildError("it broke")
            return {"y": np.zeros(2, np.float64), **{name: np.float16(call) for name in more_outputs}}

        return run

    monkeypatch.setattr(error_analysis.ort, "open_edited", open_edited)
    return more


def case(name: str) -> Case:
    return Case(name=name, why=f"why {name}", inputs={})


GRAPH = Graph(name="model", inputs=(), outputs=(), dims=())


def test_a_row_of_the_range_for_each_case_that_ran(opened: list[Any], tmp_path: Path) -> None:
    model: Any = SimpleNamespace(drive=lambda runners, inputs: runners["model"](inputs))
    told: list[Any] = []
    found = error_analysis.range_rows(
        model, {written(tmp_path / "m.onnx", HALF): GRAPH}, [case("a"), case("b"), case("c")],
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert opened == [("m.onnx", "model", ("v0/largest",))]
    assert [(r.case, r.why, r.output, r.bounds[0].value) for r in found] == [
        ("a", "why a", error_analysis.RANGE, 1.0), ("c", "why c", error_analysis.RANGE, 3.0),
    ]  # fmt: skip
    assert told == [("measuring fp16's range", i, 3) for i in (1, 2, 3)]


def test_a_graph_without_fp16_has_no_range(opened: list[Any], tmp_path: Path) -> None:
    assert error_analysis.range_rows(None, {written(tmp_path / "m.onnx", SINGLE): GRAPH}, [case("a")]) == ()  # type: ignore[arg-type]
    assert opened == []


def test_values_inside_are_the_probes_in_fp32(opened: list[Any], tmp_path: Path) -> None:
    """Of the exported graphs; other outputs of the model are left out."""

    def drive(runners: Any, inputs: Any) -> Any:
        return runners["model"](inputs)

    model: Any = SimpleNamespace(probes={"model": ("v0", "v1"), "other": ("z",)}, drive=drive)
    found = error_analysis.values_inside(model, {written(tmp_path / "m.onnx", HALF, SINGLE): GRAPH}, {})
    assert opened == [("m.onnx", "model", ("v0", "v1"))]
    assert {name: (value.dtype, float(value)) for name, value in found.items()} == {
        "v0": (np.float32, 1.0), "v1": (np.float32, 1.0),
    }  # fmt: skip

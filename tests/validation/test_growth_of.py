"""When inner values are compared, which ones, and what PyTorch is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.spec import Precision, Runtime, Way
from dinoexport.validation import error_analysis, evaluate

PROBES = {"model": ("stem", "block", "hidden")}


def growth(
    monkeypatch: pytest.MonkeyPatch, *, told: str | None = "two", probes: Any = PROBES, inside: Any = ("block", "stem"),
    runtime: Runtime = Runtime.ONNXRUNTIME, times: Any = None,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """What is compared, and the precisions in which PyTorch was asked."""
    asked: list[Any] = []
    monkeypatch.setattr(error_analysis, "telling_case", lambda _report: told)
    monkeypatch.setattr(evaluate, "require", lambda *_: None)

    def values_inside(_model: Any, _graphs: Any, inputs: Any) -> dict[str, str]:
        assert inputs == "inputs of two"
        return dict.fromkeys(inside, "a value")

    monkeypatch.setattr(error_analysis, "values_inside", values_inside)
    monkeypatch.setattr(error_analysis, "growth", lambda *compared: compared)

    def reference(_read: Any, inputs: Any, *, precision: Precision, progress: Any, inside: bool) -> list[str]:
        assert inputs == ["inputs of two"] and inside
        asked.append(precision)
        return [f"PyTorch's in {precision}"]

    model: Any = SimpleNamespace(probes=probes, reference=reference)
    cases: Any = [SimpleNamespace(name=name, inputs=f"inputs of {name}") for name in ("one", "two", "three")]
    nothing: Any = SimpleNamespace(read=None)
    limits: Any = SimpleNamespace(times_own_error_max=times)
    way = Way(runtime=runtime, threads=1, precision=Precision.FP16)
    compared = evaluate.growth_of(
        nothing, cases, model, {}, nothing, limits, way=way, precision=Precision.FP16
    )  # fmt: skip
    return compared, asked


@pytest.mark.parametrize(
    "without", [{"told": None}, {"probes": {}}, {"runtime": Runtime.OPENVINO}, {"inside": ("another",)}, {"inside": ()}]
)
def test_nothing_to_compare(without: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No error, no inner values that the family names, or a runtime that does not show them."""
    assert growth(monkeypatch, **without) == (None, [])


def test_values_of_the_telling_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the graph; PyTorch's own error counts only where limits are a multiple of it."""
    (case, names, _, reference, own, _), asked = growth(monkeypatch)
    assert (case, names, reference, own) == ("two", ("stem", "block"), "PyTorch's in fp32", None)
    assert asked == [Precision.FP32]
    (*_, own, _), asked = growth(monkeypatch, times=3)
    assert own == "PyTorch's in fp16" and set(asked) == {Precision.FP16, Precision.FP32}

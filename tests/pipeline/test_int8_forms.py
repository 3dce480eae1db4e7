"""The int8 form of each CPU runtime: its own, and none for a runtime that will not be used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.graph import quantise
from dinoexport.pipeline import versions
from dinoexport.pipeline.stages import quantise as stage
from dinoexport.runtime import autotune
from dinoexport.runtime.table import TABLE
from dinoexport.spec import CPU_RUNTIMES, Precision, Runtime

OWN = {Runtime.ONNXRUNTIME: quantise.to_int8, Runtime.OPENVINO: quantise.to_wide_int8}


def forms(monkeypatch: pytest.MonkeyPatch, among: tuple[Runtime, ...], usable: tuple[Runtime, ...]) -> Any:
    monkeypatch.setattr(stage, "_quantised", lambda _work, _source, form: form)
    monkeypatch.setattr(autotune, "runtimes", lambda _precision, _among: usable)
    request: Any = SimpleNamespace(
        precision=Precision.INT8, cpu_runtimes=among, chosen=SimpleNamespace(traced=Precision.FP32)
    )
    return stage.forms_of(SimpleNamespace(), request, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("usable", [CPU_RUNTIMES, *((runtime,) for runtime in CPU_RUNTIMES)])
def test_each_usable_runtime_gets_its_own_form(usable: tuple[Runtime, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert forms(monkeypatch, CPU_RUNTIMES, usable) == {runtime: OWN[runtime] for runtime in usable}


def test_a_requested_runtime_keeps_its_form_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forms(monkeypatch, (Runtime.OPENVINO,), ()) == {Runtime.OPENVINO: quantise.to_wide_int8}


def test_every_runtime_with_int8_has_a_form() -> None:
    assert {runtime for runtime, facts in TABLE.items() if Precision.INT8 in facts.cpu_precisions} == stage._INT8.keys()


def test_stages_depend_on_every_package_that_a_runtime_may_come_in() -> None:
    """onnxruntime-gpu is ONNX Runtime too: another version of it makes the stages again."""
    assert set(versions.RUNTIMES) == {"onnxruntime", "onnxruntime-gpu", "openvino", "numpy"}
    assert {"onnxruntime", "onnxruntime-gpu"} <= set(versions.QUANTISERS)

"""The table of runtimes: which is installed, by whichever package or system, and what an operator of one computes."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from dinoexport.runtime import table
from dinoexport.runtime.ort import Operator
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Precision, Runtime
from dinoexport.system import hardware


@pytest.mark.parametrize(
    ("runtime", "packages", "version"),
    [
        (Runtime.TENSORRT, {}, "10.3 of the system"),
        (Runtime.TENSORRT, {"tensorrt_cu12": "11.1"}, "11.1"),
        (Runtime.TENSORRT, {"tensorrt_cu12": "11.1", "tensorrt": "11.2"}, "11.2"),
        (Runtime.TENSORRT_RTX, {}, None),
        (Runtime.TENSORRT_RTX, {"tensorrt_rtx": "1.7"}, "1.7"),
        (Runtime.ONNXRUNTIME, {}, None),
        (Runtime.ONNXRUNTIME, {"onnxruntime-gpu": "1.32"}, "1.32"),
    ],
)
def test_the_version_is_that_of_whichever_package_brought_it(
    runtime: Runtime, packages: dict[str, str], version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classic TensorRT alone may come with the system, outside of pip."""
    monkeypatch.setattr(hardware, "installed", packages.get)
    monkeypatch.setattr(hardware, "installed_engine_runtime", lambda asked: "10.3 of the system" if asked else None)
    assert TABLE[runtime].installed_version() == version


def test_runtimes_that_run_a_graph_here_are_those_that_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    here: dict[str, Any] = dict.fromkeys(
        ("onnxruntime", "openvino", "tensorrt", "cuda.bindings"), ModuleSpec("m", None)
    )
    monkeypatch.setattr(table, "find_spec", here.get)
    assert table.installed() == (Runtime.ONNXRUNTIME, Runtime.OPENVINO)
    assert table.installed((Runtime.TENSORRT, Runtime.OPENVINO)) == (Runtime.OPENVINO,)
    del here["openvino"]
    assert table.installed() == (Runtime.ONNXRUNTIME,)

    def disabled(_name: str) -> None:
        raise ValueError("onnxruntime.__spec__ is None")

    monkeypatch.setattr(table, "find_spec", disabled)
    assert table.installed() == ()
    assert all(TABLE[Runtime.ONNXRUNTIME].computes(precision) for precision in Precision)


def operator(
    kind: str, *shapes: tuple[int, ...], output: tuple[int, ...] = (), types: tuple[str, ...] = ()
) -> Operator:
    return Operator(kind=kind, types=types, shapes=shapes, output_shape=output, written_bytes=0)


@pytest.mark.parametrize(
    ("ran", "flops"),
    [
        # two for each of 5 x 7 outputs and 3 products
        (operator("MatMul", (5, 3), (3, 7), output=(5, 7)), 210),
        (operator("FusedGemm", (5, 3), (3, 7), output=(5, 7)), 210),
        # 2 outputs of 3 x 3, each of 4 channels in windows of 5 x 6
        (operator("Conv", (1, 4, 9, 9), (2, 4, 5, 6), output=(1, 2, 3, 3)), 2 * 18 * 120),
        # queries of 2 heads, 3 tokens, 4 wide, with 5 keys; then the same with 5 values
        (operator("Attention", (1, 2, 3, 4), (1, 2, 5, 4), output=(1, 2, 3, 4)), 2 * 2 * (2 * 3 * 4 * 5)),
        (operator("Softmax", (5, 3), output=(5, 3)), 0),
    ],
)
def test_multiplications_and_additions_of_products(ran: Operator, flops: int) -> None:
    assert ran.flops == flops and ran.is_product is (flops > 0)

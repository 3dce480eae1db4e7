"""What OpenVINO is asked for when a graph is opened and run: by a package that writes all of it down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.runtime import openvino, openvino_products, telemetry
from dinoexport.spec import Dim, Graph, Precision, Tensor
from tests.runtime import toy_decoder

FP32, BF16, FP16, INT8, INT4 = Precision.FP32, Precision.BF16, Precision.FP16, Precision.INT8, Precision.INT4
FILE = Path("folder/model.onnx")
GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="x", dtype="float32", shape=("batch", 2), meaning="values"),),
    outputs=(Tensor(name="y", dtype="float32", shape=("batch", 2), meaning="twice the values"),),
    dims=(Dim(name="batch", min=1, opt=1, max=4),),
)
X = {"x": np.array([[1, 2]], np.float32)}
PLAIN = {
    "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 0,
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}  # fmt: skip


class Said:
    """A value of the information that a compiled model gives of itself."""

    def __init__(self, value: str) -> None:
        self._value = value

    def astype(self, kind: type) -> Any:
        return kind(self._value)


class Compiled:
    """A compiled model, which is its own request."""

    def __init__(self, core: Core, options: dict[str, Any]) -> None:
        self.core, self.options = core, options
        self._answer = np.zeros((1, 2), np.float32)

    def create_infer_request(self) -> Any:
        return self

    def infer(self, given: dict[str, Any], *, share_inputs: bool) -> None:
        assert share_inputs, "inputs are read where they are"
        if self.core.fails:
            raise RuntimeError(self.core.fails)
        self._answer = 2 * given["x"] + self.core.widening * (self.options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0)

    def get_tensor(self, name: str) -> Any:
        assert name == "y"
        return SimpleNamespace(data=self._answer)

    def get_runtime_model(self) -> Any:
        layers = [
            {"layerType": Said(kind), "runtimePrecision": Said(precision)} for kind, precision in self.core.layers
        ]
        return SimpleNamespace(get_ops=lambda: [SimpleNamespace(get_rt_info=lambda f=f: f) for f in layers])


class Core:
    """OpenVINO's Core. can: the CPU's precisions; layers: (type, precision); widening: added without int8 products."""

    def __init__(self) -> None:
        self.can = ["FP32", "INT8", "BF16"]
        self.layers = [("Input", "f32"), ("FullyConnected", "f32"), ("MatMul", "f32"), ("Convolution", "bf16")]
        self.widening: Any = 0
        self.fails = self.refuses = ""
        self.compiled: list[tuple[Any, str, dict[str, Any]]] = []

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.can

    def read_model(self, path: Path) -> Any:
        model = SimpleNamespace(path=path, shapes=None)
        model.reshape = lambda shapes: setattr(model, "shapes", shapes)
        return model

    def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Compiled:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.compiled.append((model, device, options))
        return Compiled(self, options)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    made = Core()
    package = SimpleNamespace(Core=lambda: made, __version__="2026.2.0-19412-3c6a-releases/2026/2")
    monkeypatch.setattr(telemetry, "openvino", lambda: package)
    return made


def test_the_version_is_without_the_builds_number(core: Core) -> None:
    assert openvino.version() == "2026.2.0"


def test_a_precision_is_computed_where_the_cpu_lists_it(core: Core) -> None:
    can = {precision for precision in Precision if openvino.computes(precision)}
    assert can == {FP32, BF16, INT8, INT4}
    core.can = ["BF16"]
    assert {precision for precision in Precision if openvino.computes(precision)} == {BF16}
    with pytest.raises(MissingRequirement) as caught:
        openvino.open_graph(FILE, GRAPH)
    assert caught.value.message == "OpenVINO does not compute in fp32 on this CPU."


def test_what_is_beside_narrow_products(core: Core) -> None:
    for can, carried, expected in (
        (True, False, BF16), (True, True, FP32), (False, False, FP32), (False, True, FP32)
    ):  # fmt: skip
        core.can = ["FP32", "INT8", "BF16"][: 3 if can else 2]
        assert [openvino.rest(precision, carried) for precision in (INT8, INT4)] == [expected] * 2
        assert [openvino.rest(precision, carried) for precision in (FP32, BF16, FP16)] == [None] * 3


NARROW = PLAIN | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}


@pytest.mark.parametrize(
    ("asked", "without_bf16", "expected"),
    [
        ({}, False, PLAIN),
        ({"threads": 3}, False, PLAIN | {"INFERENCE_NUM_THREADS": 3}),
        ({"precision": BF16}, False, PLAIN | {"INFERENCE_PRECISION_HINT": "bf16"}),
        ({"precision": INT8}, False, NARROW | {"INFERENCE_PRECISION_HINT": "bf16"}),
        ({"precision": INT4}, True, NARROW),
        ({"precision": INT8, "rest_in": FP32}, False, NARROW),
        ({"precision": INT8, "rest_in": BF16}, False, NARROW | {"INFERENCE_PRECISION_HINT": "bf16"}),
        ({"precision": INT8, "rest_in": BF16}, True, NARROW),
    ],
)
def test_the_precision_and_the_blocks_of_narrow_products_are_set(
    core: Core, asked: dict[str, Any], without_bf16: bool, expected: dict[str, Any]
) -> None:
    core.can = core.can[: 2 if without_bf16 else 3]
    opened = openvino.open_graph(FILE, GRAPH, **asked)
    ((model, device, options),) = core.compiled
    assert (model.path, model.shapes, device, options) == (FILE, None, "CPU", expected)
    assert opened.begin is None
    answer = opened(X)["y"]
    assert answer.tolist() == [[2, 4]] and opened({"x": 3 * X["x"]})["y"].tolist() == [[6, 12]]
    assert answer.tolist() == [[2, 4]], "the callers own"


def test_a_fixed_shape_is_set_before_products_are_made_several(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(openvino_products, "separate", lambda model: seen.append(model.shapes))
    openvino.open_graph(FILE, GRAPH)
    openvino.open_graph(FILE, GRAPH, shapes={"x": (3, 2)})
    assert seen == [{"x": [3, 2]}] == [core.compiled[1][0].shapes] and core.compiled[0][0].shapes is None


def test_a_decoders_cache_has_the_precision_of_the_rest(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[Any] = []
    monkeypatch.setattr(openvino, "make_stateful", lambda model, graph: changed.append(graph))
    monkeypatch.setattr(openvino, "OpenVinoDecoder", lambda compiled, graph: SimpleNamespace(call=(compiled, graph)))
    opened = openvino.open_graph(FILE, toy_decoder.GRAPH, precision=INT8)
    assert changed == [toy_decoder.GRAPH]
    assert core.compiled[0][2] == NARROW | {"KV_CACHE_PRECISION": "f32"}
    assert opened.begin is not None and opened.begin().call == opened.run  # type: ignore[attr-defined]
    openvino.open_graph(FILE, toy_decoder.GRAPH, precision=BF16)
    assert core.compiled[1][2] == PLAIN | {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}


def test_a_refusal_is_one_line_of_300_characters_without_the_path(core: Core) -> None:
    core.refuses = f"Check failed in {FILE}:\n  no  operator " + "x" * 300
    with pytest.raises(BuildError) as caught:
        openvino.open_graph(FILE, GRAPH)
    said = "Check failed in model.onnx: no operator "
    assert caught.value.message == f"OpenVINO refuses model.onnx: {said}{'x' * (300 - len(said))}"
    core.refuses, core.fails = "", "shapes differ"
    with pytest.raises(BuildError) as caught:
        openvino.open_graph(FILE, GRAPH)(X)
    assert caught.value.message == "OpenVINO failed on {'x': (1, 2)}: shapes differ"


def test_products_are_counted_by_the_precision_they_ran_in(core: Core) -> None:
    """Narrow weights that are widened before they are multiplied give the same answers without narrow activations."""
    assert openvino.open_graph(FILE, GRAPH).arithmetic(X) == {"f32": 2, "bf16": 1}
    core.layers += [("FullyConnected", "i8"), ("ScaledDotProductAttention", "i8")]
    core.compiled.clear()
    opened = openvino.open_graph(FILE, GRAPH, precision=INT8)
    assert opened.arithmetic(X) == {"f32": 2, "bf16": 3}
    assert [options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] for _, _, options in core.compiled] == [128, 0]
    core.widening = np.array([[0, 1]], np.float32)
    assert opened.arithmetic(X) == {"f32": 2, "bf16": 1, "int8": 2}, "one value of two differs"

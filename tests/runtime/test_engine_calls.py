"""What an engine is asked for, call by call: against the stand-in of `test_trt.py` and a graph that is computed here.

The graph is small enough that every buffer, every byte of scratch memory and every run is counted by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.config.recipe import Range
from dinoexport.engines.profiles import profile
from dinoexport.errors import BuildError, InputRefused, MissingRequirement, OutsideProfile
from dinoexport.runtime import trt, weight_streaming
from dinoexport.spec import Dim, Graph, Runtime, Tensor
from tests.standin import face, gpu
from tests.standin.gpu import Device

GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="x", dtype="float32", shape=("batch", "side"), meaning="values"),),
    outputs=(
        Tensor(name="twice", dtype="float32", shape=("batch", "side"), meaning="2 x"),
        Tensor(name="most", dtype="float32", shape=(), meaning="the largest value"),
    ),
    dims=(Dim(name="batch", min=1, opt=1, max=4), Dim(name="side", min=1, opt=10, max=100)),
)
SMALL = {"batch": Range(min=1, opt=1, max=1), "side": Range(min=1, opt=5, max=10)}
TOO_LITTLE = "The engine's profile whole cannot be used; most likely the device has too little memory for it."
CLASSIC = (face.VERSIONS[0], face.VERSIONS[-1])


class Session:
    """What stands for the session that computes the stand-in's answers."""

    def get_inputs(self) -> Any:
        return [SimpleNamespace(name="x", type="tensor(float)")]

    def get_outputs(self) -> Any:
        return [SimpleNamespace(name="twice"), SimpleNamespace(name="most")]

    def run(self, names: list[str], feeds: Any) -> Any:
        assert names == ["twice", "most"]
        return [2 * feeds["x"], feeds["x"].max(keepdims=False)]


def stand_in(version: str, patch: pytest.MonkeyPatch) -> Device:
    made = Device()
    name = "tensorrt_rtx" if version == face.RTX else "tensorrt"
    patch.setitem(sys.modules, name, face.tensorrt(version, made))
    for name, module in made.modules().items():
        patch.setitem(sys.modules, name, module)
    patch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    patch.setattr(trt, "require", lambda *_: None)
    patch.setattr(gpu, "session_of", lambda _: Session())
    return made


@pytest.fixture(params=CLASSIC)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield stand_in(request.param, monkeypatch)


def profiles(**named: dict[str, Range]) -> list[Any]:
    return [profile(name, GRAPH, ranges) for name, ranges in named.items()]


def opened(folder: Path, *, streamable_bytes: int = 0, **named: dict[str, Range]) -> trt.Engine:
    """The graph's engine with these profiles, `whole` by default."""
    made = profiles(**(named or {"whole": {}}))
    (folder / "model.plan").write_bytes(gpu.plan(Path("model.onnx"), made, streamable_bytes=streamable_bytes))
    return trt.open_engine(folder / "model.plan", GRAPH, runtime=Runtime.TENSORRT, profiles=made)


def x(batch: int, side: int, first: int = 0) -> dict[str, Any]:
    return {"x": np.arange(first, first + batch * side, dtype=np.float32).reshape(batch, side)}


def answered(engine: trt.Engine, given: dict[str, Any]) -> None:
    values = given["x"].copy()
    answers = engine(given)
    assert list(answers) == ["twice", "most"]
    np.testing.assert_array_equal(answers["twice"], 2 * values)
    np.testing.assert_array_equal(answers["most"], values.max())
    np.testing.assert_array_equal(given["x"], values)
    assert answers["most"].shape == () and answers["most"].dtype == np.float32


def test_a_shape_is_run_then_captured_then_replayed(tmp_path: Path, device: Device) -> None:
    engine = opened(tmp_path)
    for first in range(4):
        answered(engine, x(2, 10, first))
    assert device.calls == ["malloc"] * 4 + ["run", "replay", "replay", "replay"]
    for first in range(3):
        answered(engine, x(1, 5, first))
    assert device.calls[8:] == ["graph destroyed", "run", "replay", "replay"], "smaller shapes fit the buffers"
    engine.close()
    assert device.calls[12:] == ["graph destroyed"] + ["free"] * 4 + ["destroy"]
    assert not device.buffers and not device.graphs
    engine.close()
    assert device.calls[-1] == "destroy" and len(device.calls) == 18


def test_buffers_are_as_large_as_the_largest_shape_so_far(tmp_path: Path, device: Device) -> None:
    """x and twice have 4 bytes for each value, most has 4 bytes, and scratch memory here 16 for each value of x."""
    engine = opened(tmp_path)
    for batch, side in ((1, 10), (2, 10), (1, 5)):
        answered(engine, x(batch, side))
    assert sorted(map(len, device.buffers.values())) == [4, 80, 80, 320]
    assert device.opened[0].contexts[0].managed
    device.failing = "update_device_memory_size_for_shapes"
    answered(engine, x(1, 6))
    assert sorted(map(len, device.buffers.values())) == [4, 80, 80, 16 * 4 * 100], "then the profile's largest decides"


def test_each_profile_has_one_context_and_the_first_that_covers_is_used(tmp_path: Path, device: Device) -> None:
    engine = opened(tmp_path, small=SMALL, whole={})
    for batch, side in ((1, 11), (1, 10), (2, 5), (1, 1), (1, 10), (4, 100)):
        answered(engine, x(batch, side))
    assert [context.profile for context in device.opened[0].contexts] == [1, 0]
    with pytest.raises(InputRefused, match="side 101 is outside 1 to 100"):
        engine(x(1, 101))
    small = opened(tmp_path, small=SMALL)
    with pytest.raises(OutsideProfile) as caught:
        small(x(2, 3))
    assert caught.value.message == "No profile of the engine (small) covers {'x': (2, 3)}."


def test_kernels_that_cannot_be_captured_run_each_time(tmp_path: Path, device: Device) -> None:
    device.captures = False
    engine = opened(tmp_path)
    for first in range(3):
        answered(engine, x(1, 5, first))
    assert device.calls == ["malloc"] * 4 + ["run", "error cleared", "run", "run"]
    device.captures, device.instantiates = True, False
    for first in range(3):
        answered(engine, x(1, 6, first))
    assert [call for call in device.calls[8:] if call not in ("malloc", "free")] == [
        "run", "error cleared", "run", "run"
    ]  # fmt: skip
    assert device.graphs == 0


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        (
            "create_execution_context",
            f"{TOO_LITTLE} TensorRT said: Out of device memory.",
        ),
        ("set_optimization_profile_async", TOO_LITTLE),
        ("set_input_shape", "The engine refuses x of shape (1, 5)."),
        ("get_tensor_shape", "The engine does not know the shape of twice: (-1,)."),
        ("set_tensor_address", "The engine refuses the buffer of x."),
        ("execute_async_v3", "The engine failed to run. TensorRT said: Cask convolution execution failed."),
        ("cudaMemcpyAsync", "CUDA failed: cudaErrorInvalidValue from cudaMemcpyAsync."),
    ],
)
def test_what_fails_is_one_error_and_the_next_call_is_right(
    tmp_path: Path, device: Device, failing: str, words: str
) -> None:
    engine = opened(tmp_path)
    device.failing = failing
    with pytest.raises(BuildError) as caught:
        engine(x(1, 5))
    assert caught.value.message == words
    with pytest.raises(BuildError):
        engine(x(1, 5))
    device.failing = ""
    for first in range(3):
        answered(engine, x(1, 5, first))


def test_kernels_that_fail_while_they_are_captured_leave_no_graph(tmp_path: Path, device: Device) -> None:
    engine = opened(tmp_path)
    answered(engine, x(1, 5))
    device.failing = "execute_async_v3"
    with pytest.raises(BuildError, match="failed to run"):
        engine(x(1, 5))
    assert device.graphs == 0 and "replay" not in device.calls


def test_a_plan_is_of_its_graph_and_profiles(tmp_path: Path, device: Device) -> None:
    opened(tmp_path)
    fewer = Graph(name="model", inputs=GRAPH.inputs, outputs=GRAPH.outputs[:1], dims=GRAPH.dims)
    for graph, made, words in (
        (fewer, profiles(whole={}), "1 profiles; the bundle says twice, x and 1."),
        (GRAPH, profiles(one={}, two={}), "1 profiles; the bundle says most, twice, x and 2."),
    ):
        with pytest.raises(BuildError) as caught:
            trt.open_engine(tmp_path / "model.plan", graph, runtime=Runtime.TENSORRT, profiles=made)
        assert caught.value.message == f"model.plan has the tensors most, twice, x and {words}"


def test_a_file_that_is_no_plan_is_refused_with_tensorrts_words(tmp_path: Path, device: Device) -> None:
    plan = tmp_path / "model.plan"
    said = " TensorRT said: Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
    for content, words in ((b"", ""), (b"ftrt", said)):
        plan.write_bytes(content)
        with pytest.raises(BuildError) as caught:
            trt.open_plan(plan, Runtime.TENSORRT)
        version = sys.modules["tensorrt"].__version__
        assert caught.value.message == f"tensorrt {version} cannot open model.plan.{words}"


def test_host_code_runs_only_where_it_is_allowed(tmp_path: Path, device: Device) -> None:
    opened(tmp_path)
    device.host_code, plan = True, tmp_path / "model.plan"
    for opens in (
        lambda **more: trt.open_plan(plan, Runtime.TENSORRT, **more),
        lambda **more: trt.open_engine(plan, GRAPH, runtime=Runtime.TENSORRT, profiles=profiles(whole={}), **more),
    ):
        with pytest.raises(BuildError, match="host code, which is not allowed"):
            opens()
        opens(host_code=True)


def test_a_stripped_plan_gets_the_weights_of_its_onnx(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).close()
    refitted: dict[str, Any] = {
        "runtime": Runtime.TENSORRT, "profiles": profiles(whole={}), "weights_from": tmp_path / "model.onnx"
    }  # fmt: skip
    answered(trt.open_engine(tmp_path / "model.plan", GRAPH, **refitted), x(1, 5))
    assert device.calls[:2] == ["destroy", "refitted from model.onnx"]
    words = r"^The weights in model\.onnx do not fit the plan\.$"
    device.failing = "refit_cuda_engine"
    with pytest.raises(BuildError, match=words):
        trt.open_engine(tmp_path / "model.plan", GRAPH, **refitted)
    device.failing = ""
    monkeypatch.setattr(gpu.OnnxParserRefitter, "refit_from_file", lambda *_: False)
    with pytest.raises(BuildError, match=words):
        trt.open_engine(tmp_path / "model.plan", GRAPH, **refitted)


def test_tensorrt_rtx_captures_its_own_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = stand_in(face.RTX, monkeypatch)
    made = profiles(whole={})
    (tmp_path / "model.rtx").write_bytes(gpu.plan(Path("model.onnx"), made))
    engine = trt.open_engine(tmp_path / "model.rtx", GRAPH, runtime=Runtime.TENSORRT_RTX, profiles=made)
    for first in range(3):
        answered(engine, x(1, 5, first))
    assert device.calls == ["malloc"] * 4 + ["run"] * 3
    (context,) = device.opened[0].contexts
    assert context.managed and context.config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"


def test_the_weights_budget_is_what_scratch_and_tensors_leave(tmp_path: Path, device: Device) -> None:
    """At one row of 10: scratch 160 bytes and 64 for streaming, x and twice 40 each, most 4."""
    for room in (0, 1000, 4999):
        device.memory_bytes = 160 + 64 + 84 + room
        engine = opened(tmp_path, streamable_bytes=5000, small=SMALL)
        assert device.opened[-1].weight_streaming_budget_v2 == room
        answered(engine, x(1, 10))
        engine.close()
        device.opened.clear()
    device.memory_bytes = 160 + 64 + 83
    with pytest.raises(MissingRequirement, match="even with every weight streamed"):
        opened(tmp_path, streamable_bytes=5000, small=SMALL)
    assert not device.buffers and device.calls[-1] == "destroy"


def engine_of(streamable_bytes: int, scratch_bytes: int) -> Any:
    return SimpleNamespace(
        streamable_weights_size=streamable_bytes,
        device_memory_size_v2=scratch_bytes,
        weight_streaming_budget_v2=streamable_bytes,
    )


def test_a_budget_is_no_more_than_the_weights_and_no_less_than_nothing() -> None:
    def cuda(name: str) -> tuple[int, int]:
        assert name == "cudaMemGetInfo"
        return 4_000_000_000, 8_000_000_000

    for streamable, tensors, expected in (
        (2_000_000_000, 1_000_000_000, 1_750_000_000),
        (1_500_000_000, 1_000_000_000, 1_500_000_000),
        (1_500_000_000, 2_750_000_000, 0),
    ):
        engine = engine_of(streamable, 1_250_000_000)
        budget = weight_streaming.fit(cuda, engine, lambda tensors=tensors: tensors)  # type: ignore[arg-type,misc]
        assert budget == engine.weight_streaming_budget_v2 == expected
    engine = engine_of(2_000_000_000, 1_250_000_000)
    with pytest.raises(MissingRequirement) as caught:
        weight_streaming.fit(cuda, engine, lambda: 2_750_000_001)  # type: ignore[arg-type]
    assert caught.value.message == (
        "The engine needs 4.00 GB even with every weight streamed; the device has 4.00 GB free."
    )
    assert engine.weight_streaming_budget_v2 == 0


def test_a_budget_that_is_not_taken_is_noticed(tmp_path: Path, device: Device) -> None:
    device.failing = "weight_streaming_budget_v2"
    with pytest.raises(BuildError) as caught:
        opened(tmp_path, streamable_bytes=5000)
    assert caught.value.message == (
        "The engine keeps 5000 bytes of its weights on the device, not the 0 that were set."
    )


@pytest.mark.parametrize("version", [*CLASSIC, face.RTX])
def test_the_last_five_errors_are_told_once(version: str) -> None:
    module = face.tensorrt(version, Device())
    said, severity = trt.Said(module), module.ILogger.Severity
    for number in range(1, 6):
        said.logger.log(severity.ERROR, f" error {number}.\n")
    said.logger.log(severity.INTERNAL_ERROR, "inner error.")
    for level in (severity.WARNING, severity.INFO, severity.VERBOSE):
        said.logger.log(level, "no error.")
    error = said.error("It failed.", "Report it.")
    assert error.message == "It failed. TensorRT said: error 2. error 3. error 4. error 5. inner error."
    assert error.next_step == "Report it." and said.error("It failed.", "").message == "It failed."
    said.logger.log(severity.ERROR, "e" * 599 + "fg")
    assert said.error("It failed.", "").message == f"It failed. TensorRT said: {'e' * 599}f"

"""How an engine is run: against a stand-in for GPU and TensorRT in host memory (`standin/gpu.py`), and labelled so.

What TensorRT offers by which name is each version's own, by the table of facts (`standin/face.py`). With
STANDIN_BINDINGS in the environment NVIDIA's bindings themselves stand before it (`test_through_bindings.py`). What this
cannot show, that the calls do on a GPU what NVIDIA's pages say, `test_on_gpu.py` shows where there is one.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.config.recipe import Range
from dinoexport.engines.profiles import profile
from dinoexport.errors import BuildError, InputRefused, MissingRequirement, OutsideProfile
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import ort, trt
from dinoexport.spec import Graph, Runtime
from tests.conftest import DATA
from tests.standin import face, gpu
from tests.standin.gpu import Device

BINDINGS = os.environ.get("STANDIN_BINDINGS")
FACES = (BINDINGS,) if BINDINGS else (face.VERSIONS[0], face.VERSIONS[-1])
SMALL = {
    "batch": Range(min=1, opt=1, max=1),
    "height": Range(min=14, opt=14, max=28),
    "width": Range(min=14, opt=14, max=28),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny recipe with an fp32 graph."""
    if made := os.environ.get("STANDIN_BUNDLE"):
        return Path(made)
    out = tmp_path_factory.mktemp("published") / "bundle"
    pipeline.build(
        pipeline.build_request(str(DATA / "tiny_swiglu_reg.toml"), weights="synthetic:0", target="cpu", out=out)
    )
    return out


@pytest.fixture(params=FACES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The stand-in, where `runtime/trt.py` will look for CUDA and TensorRT."""
    return stand_in(request.param, monkeypatch)


def stand_in(version: str, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    if version == BINDINGS:
        module: Any = importlib.import_module("tensorrt")
        assert module.__version__ == version, "the bindings themselves"
        made.severity, module.driven.device = module.ILogger.Severity, made
    else:
        module = face.tensorrt(version, made)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx" if version == face.RTX else "tensorrt", module)
    for name, stands_in in made.modules().items():
        monkeypatch.setitem(sys.modules, name, stands_in)
    monkeypatch.setattr(trt, "require", lambda *_: None)
    return made


def graph_of(published: Path) -> Graph:
    return bundle.read_manifest(published).graphs[0].graph()


def opened(published: Path, folder: Path, *, streamable_bytes: int = 0, **named: dict[str, Range]) -> trt.Engine:
    """The bundle's graph as the stand-in's engine, with these profiles."""
    graph = graph_of(published)
    profiles = [profile(name, graph, ranges) for name, ranges in named.items()]
    content = gpu.plan(published / "model.onnx", profiles, streamable_bytes=streamable_bytes)
    (folder / "model.plan").write_bytes(content)
    return trt.open_engine(folder / "model.plan", graph, runtime=Runtime.TENSORRT, profiles=profiles)


def pixels(*shape: int, seed: int = 0) -> dict[str, Any]:
    return {"pixels": np.random.default_rng(seed).standard_normal(shape, np.float32)}


def test_answers_are_the_graphs_whatever_came_before(published: Path, tmp_path: Path, device: Device) -> None:
    """Sizes up and down, back and forth between profiles, again and again: what is stale would show."""
    engine = opened(published, tmp_path, small=SMALL, whole={})
    exact = ort.open_graph(published / "model.onnx", graph_of(published))
    shapes = [(1, 3, 14, 14), (1, 3, 28, 14), (4, 3, 42, 28), (1, 3, 14, 14), (2, 3, 14, 14), (1, 3, 28, 14)]
    for seed, shape in enumerate([shape for shape in shapes for _ in range(4)]):
        inputs = pixels(*shape, seed=seed)
        answers, expected = engine(inputs), exact(inputs)
        assert answers.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(answers[name], array)
    assert [context.profile for context in device.opened[0].contexts] == [0, 1]


def test_a_fixed_shape_is_replayed_and_allocates_nothing(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    engine(pixels(2, 3, 28, 28))
    after_the_first = device.calls.count("malloc")
    for seed in range(9):
        engine(pixels(2, 3, 28, 28, seed=seed))
    assert device.calls.count("malloc") == after_the_first
    assert (device.calls.count("run"), device.calls.count("replay")) == (1, 9)
    engine(pixels(1, 3, 14, 14))
    assert device.calls.count("malloc") == after_the_first, "smaller shapes fit the buffers that are there"
    assert device.calls[-2:] == ["graph destroyed", "run"]


def test_kernels_that_cannot_be_captured_just_run(published: Path, tmp_path: Path, device: Device) -> None:
    device.captures = False
    engine = opened(published, tmp_path, whole={})
    exact = ort.open_graph(published / "model.onnx", graph_of(published))
    for seed in range(3):
        inputs = pixels(1, 3, 14, 14, seed=seed)
        np.testing.assert_array_equal(engine(inputs)["class_token"], exact(inputs)["class_token"])
    assert device.calls.count("replay") == 0 and device.calls.count("error cleared") == 1


def test_results_are_the_callers_own(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    first = engine(pixels(1, 3, 14, 14, seed=1))["class_token"]
    kept = first.copy()
    engine(pixels(1, 3, 14, 14, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_a_strided_input_is_read_as_it_looks(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    wide = pixels(1, 3, 14, 28)["pixels"]
    strided = {"pixels": wide[..., ::2]}
    packed = {"pixels": np.ascontiguousarray(wide[..., ::2])}
    np.testing.assert_array_equal(engine(strided)["class_token"], engine(packed)["class_token"])


def test_what_no_profile_covers_is_refused(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, small=SMALL)
    with pytest.raises(OutsideProfile, match="small"):
        engine(pixels(2, 3, 14, 14))
    with pytest.raises(InputRefused, match="outside 1 to 4"):
        engine(pixels(5, 3, 14, 14))
    assert not device.opened[0].contexts


def test_close_gives_everything_back(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    for _ in range(3):
        engine(pixels(1, 3, 14, 14))
    engine.close()
    assert not device.buffers and device.calls[-1] == "destroy" and "graph destroyed" in device.calls


def test_a_full_device_and_a_broken_engine_are_one_error(published: Path, tmp_path: Path, device: Device) -> None:
    device.memory_bytes = 1000
    with pytest.raises(BuildError, match="cudaErrorMemoryAllocation from cudaMalloc"):
        opened(published, tmp_path, whole={})(pixels(1, 3, 28, 28))
    for content in (b"", b"ftrt", b"ONNX" * 100):
        (tmp_path / "model.plan").write_bytes(content)
        with pytest.raises(BuildError, match=r"cannot open model\.plan"):
            trt.open_engine(tmp_path / "model.plan", graph_of(published), runtime=Runtime.TENSORRT, profiles=[])


def test_tensorrts_own_words_reach_the_user(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    device.failing = "execute_async_v3"
    with pytest.raises(BuildError, match=r"failed to run\. TensorRT said: Cask convolution execution failed\."):
        engine(pixels(1, 3, 14, 14))
    device.failing = "create_execution_context"
    with pytest.raises(BuildError, match=r"profile whole cannot be used; .* TensorRT said: Out of device memory\.$"):
        opened(published, tmp_path, whole={})(pixels(1, 3, 14, 14))
    (tmp_path / "model.plan").write_bytes(b"ftrt")
    with pytest.raises(BuildError, match="TensorRT said: Serialization assertion"):
        trt.open_engine(tmp_path / "model.plan", graph_of(published), runtime=Runtime.TENSORRT, profiles=[])


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        ("set_optimization_profile_async", "profile whole cannot be used"),
        ("set_input_shape", r"refuses pixels of shape \(1, 3, 14, 14\)"),
        ("get_tensor_shape", r"does not know the shape of class_token: \(-1,\)"),
        ("set_tensor_address", "refuses the buffer of pixels"),
        ("cudaMemcpyAsync", "cudaErrorInvalidValue from cudaMemcpyAsync"),
        ("cudaStreamBeginCapture", None),
    ],
)
def test_what_fails_is_one_error_and_the_next_call_is_right(
    published: Path, tmp_path: Path, device: Device, failing: str, words: str | None
) -> None:
    """Nothing half done stays: the same engine answers as soon as the device does."""
    engine = opened(published, tmp_path, whole={})
    inputs = pixels(1, 3, 14, 14)
    device.failing = failing
    for _ in range(2):
        if words is not None:
            with pytest.raises(BuildError, match=words):
                engine(inputs)
    device.failing = ""
    exact = ort.open_graph(published / "model.onnx", graph_of(published))(inputs)
    for _ in range(3):
        np.testing.assert_array_equal(engine(inputs)["class_token"], exact["class_token"])
    engine.close()
    assert not device.buffers and device.graphs == 0


def test_a_buffer_that_cannot_grow_is_forgotten(published: Path, tmp_path: Path, device: Device) -> None:
    """Its old place was given back: what writes there, or gives it back again, is stopped by the stand-in."""
    engine = opened(published, tmp_path, whole={})
    exact = ort.open_graph(published / "model.onnx", graph_of(published))
    engine(pixels(1, 3, 28, 28))
    device.memory_bytes = device.held_bytes()
    with pytest.raises(BuildError, match="cudaErrorMemoryAllocation"):
        engine(pixels(4, 3, 140, 140))
    assert "error cleared" in device.calls, "the failure must not be blamed on the next call"
    device.memory_bytes = 1 << 40
    for seed in range(3):
        inputs = pixels(1, 3, 14, 14, seed=seed)
        np.testing.assert_array_equal(engine(inputs)["class_token"], exact(inputs)["class_token"])
    engine.close()
    engine.close()
    assert not device.buffers and device.calls.count("destroy") == 1


def test_closing_goes_on_after_a_failure(published: Path, tmp_path: Path, device: Device) -> None:
    engine = opened(published, tmp_path, whole={})
    engine(pixels(1, 3, 14, 14))
    device.failing = "cudaFree"
    with pytest.raises(BuildError, match="cudaFree"):
        engine.close()
    assert device.calls[-1] == "destroy", "the stream is given back all the same"
    engine.close()


def test_a_graph_that_cannot_be_instantiated_leaks_nothing(published: Path, tmp_path: Path, device: Device) -> None:
    device.instantiates = False
    engine = opened(published, tmp_path, whole={})
    for _ in range(4):
        engine(pixels(1, 3, 14, 14))
    assert device.graphs == 0 and device.calls.count("replay") == 0 and "error cleared" in device.calls


def test_profiles_share_one_scratch_buffer_as_large_as_the_shapes_need(
    published: Path, tmp_path: Path, device: Device
) -> None:
    """TensorRT's own contexts would take the scratch of the largest profile, here 100 times more, each again."""
    engine = opened(published, tmp_path, small=SMALL, whole={})
    engine(pixels(1, 3, 14, 28))
    engine(pixels(4, 3, 28, 28))
    engine(pixels(1, 3, 14, 28))
    assert [context.managed for context in device.opened[0].contexts] == [True, True]
    tensors = sum(array.nbytes for array in (*pixels(4, 3, 28, 28).values(), *engine(pixels(4, 3, 28, 28)).values()))
    needed = gpu.SCRATCH_PER_ITEM * 4 * 3 * 28 * 28
    assert device.held_bytes() == tensors + needed
    assert device.opened[0].device_memory_size_v2 > 100 * needed


def test_scratch_of_unknown_size_is_the_profiles(published: Path, tmp_path: Path, device: Device) -> None:
    device.failing = "update_device_memory_size_for_shapes"
    engine = opened(published, tmp_path, small=SMALL, whole={})
    engine(pixels(1, 3, 14, 14))
    largest = gpu.SCRATCH_PER_ITEM * math.prod((1, 3, 28, 28))
    assert largest in [memory.memory[1] for memory in device.opened[0].contexts if memory.memory]


@pytest.mark.parametrize("fits_bytes", [0, 1000, 5000])
def test_the_weights_budget_is_what_scratch_and_tensors_leave(
    published: Path, tmp_path: Path, device: Device, fits_bytes: int
) -> None:
    """And then the largest shape runs on the very device it was counted for."""
    engine = opened(published, tmp_path, streamable_bytes=5000, small=SMALL)
    engine(pixels(1, 3, 28, 28))
    held = device.held_bytes() - 5000
    engine.close()
    device.opened.clear()
    streaming_scratch = 64
    device.memory_bytes = held + streaming_scratch + fits_bytes
    engine = opened(published, tmp_path, streamable_bytes=5000, small=SMALL)
    assert device.opened[0].weight_streaming_budget_v2 == fits_bytes
    engine(pixels(1, 3, 28, 28))
    assert device.held_bytes() <= device.memory_bytes
    device.memory_bytes = held - 1
    device.opened.clear()
    engine.close()
    with pytest.raises(MissingRequirement, match="even with every weight streamed"):
        opened(published, tmp_path, streamable_bytes=5000, small=SMALL)
    assert not device.buffers


def test_a_budget_that_is_not_taken_is_noticed(published: Path, tmp_path: Path, device: Device) -> None:
    device.failing = "weight_streaming_budget_v2"
    with pytest.raises(BuildError, match="keeps 5000 bytes of its weights on the device, not the 0 that were set"):
        opened(published, tmp_path, streamable_bytes=5000, small=SMALL)


def test_host_code_runs_only_where_it_is_allowed(published: Path, tmp_path: Path, device: Device) -> None:
    device.host_code = True
    with pytest.raises(BuildError, match="host code, which is not allowed"):
        opened(published, tmp_path, whole={})
    graph = graph_of(published)
    profiles = [profile("whole", graph, {})]
    plan = tmp_path / "model.plan"
    engine = trt.open_engine(plan, graph, runtime=Runtime.TENSORRT, profiles=profiles, host_code=True)
    assert engine(pixels(1, 3, 14, 14)).keys() == {tensor.name for tensor in graph.outputs}


def test_a_stripped_plan_gets_the_weights_of_its_onnx(published: Path, tmp_path: Path, device: Device) -> None:
    opened(published, tmp_path, whole={})
    graph, plan = graph_of(published), tmp_path / "model.plan"
    settings: dict[str, Any] = {"runtime": Runtime.TENSORRT, "profiles": [profile("whole", graph, {})]}
    trt.open_engine(plan, graph, weights_from=published / "model.onnx", **settings)
    assert device.calls[-1] != "destroy" and "refitted from model.onnx" in device.calls
    device.failing = "refit_cuda_engine"
    with pytest.raises(BuildError, match=r"weights in model\.onnx do not fit the plan"):
        trt.open_engine(plan, graph, weights_from=published / "model.onnx", **settings)


def test_a_plan_of_another_graph_or_with_other_profiles_is_refused(
    published: Path, tmp_path: Path, device: Device
) -> None:
    engine = opened(published, tmp_path, whole={})
    engine.close()
    graph, plan = graph_of(published), tmp_path / "model.plan"
    with pytest.raises(BuildError, match=r"1 profiles; the bundle says .* and 2"):
        twice = [profile(name, graph, {}) for name in ("one", "two")]
        trt.open_engine(plan, graph, runtime=Runtime.TENSORRT, profiles=twice)
    fewer = Graph(name=graph.name, inputs=graph.inputs, outputs=graph.outputs[:1], dims=graph.dims)
    with pytest.raises(BuildError, match="has the tensors class_token, patch_tokens, pixels, register_tokens"):
        trt.open_engine(plan, fewer, runtime=Runtime.TENSORRT, profiles=[profile("whole", graph, {})])


def test_a_runtime_whose_libraries_are_broken_is_a_missing_requirement(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingRequirement, match=r"tensorrt is installed and cannot be loaded: libnvinfer\.so\.11"):
        trt.open_plan(tmp_path / "model.plan", Runtime.TENSORRT)


def test_tensorrt_rtx_captures_its_own_graphs(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its runtime configuration, with kernels specialised before they run; a capture of ours could freeze others."""
    device = stand_in(face.RTX, monkeypatch)
    graph = graph_of(published)
    profiles = [profile("whole", graph, {})]
    (tmp_path / "model.rtx").write_bytes(gpu.plan(published / "model.onnx", profiles))
    engine = trt.open_engine(tmp_path / "model.rtx", graph, runtime=Runtime.TENSORRT_RTX, profiles=profiles)
    for _ in range(3):
        engine(pixels(1, 3, 14, 14))
    (context,) = device.opened[0].contexts
    assert context.managed and context.config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert context.config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert device.calls.count("run") == 3 and "replay" not in device.calls


def test_the_plan_is_mapped_not_copied(published: Path, tmp_path: Path, device: Device) -> None:
    seen: list[type] = []
    opens = gpu.Runtime.deserialize_cuda_engine

    def watched(self: gpu.Runtime, serialized_engine: Any) -> Any:
        seen.append(type(serialized_engine))
        return opens(self, serialized_engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.Runtime, "deserialize_cuda_engine", watched)
        opened(published, tmp_path, whole={})
    assert [kind.__name__ for kind in seen] == ["mmap"]

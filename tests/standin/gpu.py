"""A stand-in, not a GPU: enough of CUDA and TensorRT's runtime, in host memory, to see how `runtime/trt.py` uses them.

An "engine" is a plan's first bytes and the name of an ONNX file, run by ONNX Runtime on the addresses it is given.
Where the real thing has undefined behaviour this one raises: a freed buffer, scratch memory that is too small, a CUDA
graph replayed after its context was changed. What TensorRT offers by which name is not decided here: `face.py` puts the
members of a version's own bindings before these classes, `driven.py` the bindings themselves.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import itertools
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dinoexport.spec import Profile
from tests.standin.driven import Unknown

USER_MANAGED = 2  # of ExecutionContextAllocationStrategy
SCRATCH_PER_ITEM = 16  # bytes of scratch memory an engine needs for each number of its inputs


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorStreamCaptureUnsupported = 900


class CopyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


def plan(
    onnx: Path, profiles: Sequence[Profile], *, version: tuple[int, ...] = (11, 4, 0, 106), streamable_bytes: int = 0
) -> bytes:
    """What the stand-in opens as an engine of `onnx` with these profiles."""
    shapes = [{name: list(ends[2]) for name, ends in profile.shapes.items()} for profile in profiles]
    said = {"onnx": str(onnx), "largest": shapes, "streamable_bytes": streamable_bytes}
    return b"ftrt" + bytes(20) + bytes(version) + bytes(36) + json.dumps(said).encode()


@dataclass
class Device:
    """One device's memory, what was done with it, and what it shall refuse."""

    memory_bytes: int = 1 << 40
    buffers: dict[int, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    capturing: list[Any] | None = None
    captures: bool = True
    instantiates: bool = True
    graphs: int = 0  # captured or instantiated and not yet destroyed
    failing: str = ""  # the CUDA call or the member of TensorRT that shall fail
    host_code: bool = False  # whether the plan holds code that runs on the host
    opened: list[Opened] = field(default_factory=list)
    more_kinds: dict[str, Any] = field(default_factory=dict)  # what else may be made: class -> what makes it
    severity: Any = None  # ILogger.Severity of the module that stands for TensorRT

    def cuda(self) -> types.ModuleType:
        """The module `cuda.bindings.runtime`."""
        module: Any = types.ModuleType("cuda.bindings.runtime")
        for name in (name for name in dir(self) if name.startswith("cuda") and name != "cuda"):
            setattr(module, name, self._cuda_call(name))
        module.cudaMemcpyKind, module.cudaStreamCaptureMode = CopyKind, CaptureMode
        return module

    def modules(self) -> dict[str, types.ModuleType]:
        """What a process that shall find CUDA puts into `sys.modules`."""
        bindings: Any = types.ModuleType("cuda.bindings")
        bindings.runtime = self.cuda()
        for module in (bindings, bindings.runtime):
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        return {"cuda.bindings": bindings, "cuda.bindings.runtime": bindings.runtime}

    def _cuda_call(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if name == self.failing:
                return (Error.cudaErrorInvalidValue, None) if name != "cudaFree" else (Error.cudaErrorInvalidValue,)
            return getattr(self, name)(*args)

        return call

    def made(self, class_name: str, args: tuple[Any, ...]) -> Any:
        """What answers for an object that a caller makes."""
        kinds: dict[str, Any] = {"Runtime": Runtime, "Refitter": Refitter, "OnnxParserRefitter": OnnxParserRefitter}
        kinds |= self.more_kinds
        return kinds[class_name](self, *args) if class_name in kinds else None

    def held_bytes(self) -> int:
        """Of the device's memory, what is not free."""
        engines = sum(opened.held_bytes() for opened in self.opened)
        return engines + sum(map(ctypes.sizeof, self.buffers.values()))

    def address(self, of: int) -> Any:
        assert of in self.buffers, "memory that was freed, or never allocated"
        return self.buffers[of]

    def cudaStreamCreate(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        self.calls.append("destroy")
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self.memory_bytes - self.held_bytes(), self.memory_bytes

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        self.calls.append("malloc")
        if size + self.held_bytes() > self.memory_bytes:
            return Error.cudaErrorMemoryAllocation, None
        buffer = ctypes.create_string_buffer(size)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return Error.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[Error]:
        self.calls.append("free")
        self.address(address)
        del self.buffers[address]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: CopyKind, stream: int) -> tuple[Error]:
        assert isinstance(kind, CopyKind), "cuda-bindings 12.8 and 13.0 refuse plain integers"
        on_device = to if kind is CopyKind.cudaMemcpyHostToDevice else source
        assert size <= ctypes.sizeof(self.address(on_device)), "a copy past the end of a buffer"
        ctypes.memmove(to, source, size)
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[Error]:
        assert isinstance(mode, CaptureMode), "cuda-bindings 12.8 and 13.0 refuse plain integers"
        self.capturing = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        captured, self.capturing = self.capturing, None
        if not self.captures:
            return Error.cudaErrorStreamCaptureUnsupported, None
        self.graphs += 1
        return Error.cudaSuccess, captured

    def cudaGetLastError(self) -> tuple[Error]:
        self.calls.append("error cleared")
        return (Error.cudaSuccess,)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:
        assert flags == 0, "a launch frees, uploads and orders nothing"
        if not self.instantiates:
            return Error.cudaErrorMemoryAllocation, None
        self.graphs += 1
        return Error.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Error]:
        self.graphs -= 1
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, replay: Any) -> tuple[Error]:
        self.graphs -= 1
        self.calls.append("graph destroyed")
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, replay: Any, stream: int) -> tuple[Error]:
        self.calls.append("replay")
        for context, state in replay:
            assert state == context.state, "a graph replayed after its context was changed"
            context.compute()
        return (Error.cudaSuccess,)


@dataclass
class Runtime:
    """An IRuntime."""

    device: Device
    logger: Any
    engine_host_code_allowed: bool = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Opened | None:
        content = bytes(serialized_engine)
        if self.device.failing == "deserialize_cuda_engine" or content[:4] != b"ftrt" or len(content) < 65:
            return self._refused("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.")
        if self.device.host_code and not self.engine_host_code_allowed:
            return self._refused("The engine holds host code, which is not allowed.")
        self.device.opened.append(Opened(self.device, self.logger, **json.loads(content[64:])))
        return self.device.opened[-1]

    def _refused(self, why: str) -> None:
        self.logger.log(self.device.severity.ERROR, why)


@functools.cache
def session_of(onnx: str) -> Any:
    """What computes the answers; one for all engines of a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


class Opened:
    """An ICudaEngine."""

    def __init__(
        self, device: Device, logger: Any, *, onnx: str, largest: list[dict[str, list[int]]], streamable_bytes: int
    ) -> None:
        self.device, self.logger, self.largest = device, logger, largest
        self.session = session_of(onnx)
        self.output_shapes: dict[Any, dict[str, tuple[int, ...]]] = {}
        self.contexts: list[Context] = []
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.streamable_weights_size = streamable_bytes
        self._budget = streamable_bytes

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        """TensorRT takes none while there are contexts, and says so by a result the bindings drop."""
        if not self.living() and self.device.failing != "weight_streaming_budget_v2":
            self._budget = min(budget, self.streamable_weights_size)

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return 64 if self._budget < self.streamable_weights_size else 0

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.largest)

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(len(self.largest))))

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self.scratch_bytes(self.largest[profile_index])

    def scratch_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        items = sum(map(math.prod, shapes.values()))
        return SCRATCH_PER_ITEM * items + self.weight_streaming_scratch_memory_size

    def living(self) -> list[Context]:
        """The contexts that somebody still holds: closed engines drop theirs."""
        return [context for context in self.contexts if not context.dropped]

    def held_bytes(self) -> int:
        static = sum(self.device_memory_size_v2 for context in self.living() if not context.managed)
        return static + self._budget

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Any = 0) -> Context | None:
        if self.device.failing == "create_execution_context":
            self.logger.log(self.device.severity.ERROR, "Out of device memory.")
            return None
        strategy = how.strategy if isinstance(how, RuntimeConfig) else int(getattr(how, "value", how))
        self.contexts.append(Context(self, managed=strategy == USER_MANAGED, config=how))
        return self.contexts[-1]

    def create_engine_inspector(self) -> Inspector:
        return Inspector()

    def get_engine_stat(self, stat: Any = None) -> int:
        return 4321


@dataclass
class RuntimeConfig:
    """An IRuntimeConfig."""

    strategy: int = 0
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = int(getattr(strategy, "value", strategy))


LAYERS = [
    {"Name": "__myl_MulAdd_myl0_1", "TacticName": "__myl_MulAdd_0x1"},
    {"Name": "_gemm_mha_v2_myl0_7", "TacticName": "_gemm_mha_v2_0xabc"},
    {"Name": "_gemm_mha_v2_myl0_7 [profile 1]", "TacticName": "_gemm_mha_v2_0xabd"},
    {"Name": "_gemm_mha_v2_myl0_9", "TacticName": "_gemm_mha_v2_0xabc"},
    "a layer the inspector gives by name alone",
]


class Inspector:
    """An IEngineInspector."""

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 (TensorRT's name for it)
        return json.dumps({"Layers": LAYERS, "I/O Tensors": []})


@dataclass
class Refitter:
    """An IRefitter."""

    device: Device
    engine: Any
    logger: Any

    def refit_cuda_engine(self) -> bool:
        return self.device.failing != "refit_cuda_engine"


@dataclass
class OnnxParserRefitter:
    """An IParserRefitter."""

    device: Device
    refitter: Any
    logger: Any

    def refit_from_file(self, model: str) -> bool:
        self.device.calls.append(f"refitted from {Path(model).name}")
        return True


class Context:
    """An IExecutionContext."""

    def __init__(self, opened: Opened, *, managed: bool, config: Any) -> None:
        self.opened, self.managed, self.config = opened, managed, config
        self.dropped = False
        self.profile: int | None = None
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.versions = itertools.count()
        self.state = next(self.versions)

    def _changed(self, member: str) -> bool:
        self.state = next(self.versions)
        return self.opened.device.failing != member

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return self._changed("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self.shapes[name] = tuple(shape)
        return self._changed("set_input_shape")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._changed("set_tensor_address"):
            self.addresses[name] = memory
            return True
        return False

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.managed, "TensorRT has its own"
        self.memory = memory, size
        self._changed("set_device_memory")

    def update_device_memory_size_for_shapes(self) -> int:
        if self.opened.device.failing == "update_device_memory_size_for_shapes":
            return 0
        return self.opened.scratch_bytes(self.shapes)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.opened.outputs:
            raise Unknown(name)
        if self.opened.device.failing == "get_tensor_shape":
            return (-1,)
        key = tuple(self.shapes.items())
        if key not in self.opened.output_shapes:
            self.opened.output_shapes[key] = {name: array.shape for name, array in self._outputs().items()}
        return self.opened.output_shapes[key][name]

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.opened.device.failing == "execute_async_v3":
            self.opened.logger.log(self.opened.device.severity.ERROR, "Cask convolution execution failed.")
            return False
        if self.opened.device.capturing is not None:
            self.opened.device.capturing.append((self, self.state))
        else:
            self.opened.device.calls.append("run")
            self.compute()
        return True

    def compute(self) -> None:
        if self.managed:
            needed = self.opened.scratch_bytes(self.shapes)
            assert self.memory is not None, "no scratch memory was given"
            address, size = self.memory
            assert needed <= size <= ctypes.sizeof(self.opened.device.address(address)), "too little scratch memory"
        for name, array in self._outputs().items():
            flat = np.ascontiguousarray(array)
            assert flat.nbytes <= ctypes.sizeof(self.opened.device.address(self.addresses[name]))
            ctypes.memmove(self.addresses[name], flat.ctypes.data, flat.nbytes)

    def _outputs(self) -> dict[str, Any]:
        feeds = {}
        for name, value in self.opened.inputs.items():
            dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}[value.type]
            array = feeds[name] = np.zeros(self.shapes[name], dtype)
            if self.addresses.get(name) in self.opened.device.buffers:
                size = min(array.nbytes, ctypes.sizeof(self.opened.device.buffers[self.addresses[name]]))
                ctypes.memmove(array.ctypes.data, self.addresses[name], size)
        names = list(self.opened.outputs)
        return dict(zip(names, self.opened.session.run(names, feeds), strict=True))

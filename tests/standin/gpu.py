"""A stand-in, not a GPU: enough of CUDA and TensorRT's runtime, in host memory, to see how `runtime/trt.py` uses them.

An "engine" is an ONNX file, run by ONNX Runtime on the addresses it is given. Where the real thing has undefined
behaviour this one raises: a freed buffer, a CUDA graph replayed after its context was changed.
"""

from __future__ import annotations

import ctypes
import itertools
import types
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


@dataclass
class Device:
    """One device's memory, and a count of what was done with it."""

    memory_bytes: int = 1 << 40
    buffers: dict[int, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    capturing: list[Any] | None = None
    captures: bool = True
    opened: list[Opened] = field(default_factory=list)

    def cuda(self) -> types.ModuleType:
        """The module `cuda.bindings.runtime`."""
        module: Any = types.ModuleType("cuda.bindings.runtime")
        for name in (name for name in dir(self) if name.startswith("cuda")):
            setattr(module, name, getattr(self, name))
        module.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        module.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        del module.cuda
        return module

    def tensorrt(self) -> types.ModuleType:
        """The module `tensorrt`."""
        module: Any = types.ModuleType("tensorrt")
        module.__version__ = "11.4.0.106"
        module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
        device = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                pass

            def deserialize_cuda_engine(self, engine: bytes) -> Opened | None:
                if engine[:4] != b"ONNX":
                    return None
                device.opened.append(Opened(device, Path(engine[4:].decode())))
                return device.opened[-1]

        module.Runtime = Runtime
        return module

    def cudaStreamCreate(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        self.calls.append("destroy")
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        self.calls.append("malloc")
        if size + sum(map(ctypes.sizeof, self.buffers.values())) > self.memory_bytes:
            return Error.cudaErrorMemoryAllocation, None
        buffer = ctypes.create_string_buffer(size)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return Error.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[Error]:
        self.calls.append("free")
        del self.buffers[address]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[Error]:
        on_device = to if kind == 1 else source
        assert size <= ctypes.sizeof(self.buffers[on_device]), "a copy past the end of a buffer"
        ctypes.memmove(to, source, size)
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        self.capturing = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        captured, self.capturing = self.capturing, None
        return (Error.cudaSuccess, captured) if self.captures else (Error.cudaErrorStreamCaptureUnsupported, None)

    def cudaGetLastError(self) -> tuple[Error]:
        self.calls.append("error cleared")
        return (Error.cudaSuccess,)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:
        return Error.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, replay: Any) -> tuple[Error]:
        self.calls.append("graph destroyed")
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, replay: Any, stream: int) -> tuple[Error]:
        self.calls.append("replay")
        for context, state in replay:
            assert state == context.state, "a graph replayed after its context was changed"
            context.compute()
        return (Error.cudaSuccess,)


class Opened:
    """An ICudaEngine."""

    streamable_weights_size = 0

    def __init__(self, device: Device, onnx: Path) -> None:
        self.device = device
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.contexts: list[Context] = []

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    """An IExecutionContext."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.versions = itertools.count()
        self.state = next(self.versions)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.state = index, next(self.versions)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name], self.state = tuple(shape), next(self.versions)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name], self.state = address, next(self.versions)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._outputs()[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        if self.opened.device.capturing is not None:
            self.opened.device.capturing.append((self, self.state))
        else:
            self.opened.device.calls.append("run")
            self.compute()
        return True

    def compute(self) -> None:
        for name, array in self._outputs().items():
            flat = np.ascontiguousarray(array)
            assert flat.nbytes <= ctypes.sizeof(self.opened.device.buffers[self.addresses[name]])
            ctypes.memmove(self.addresses[name], flat.ctypes.data, flat.nbytes)

    def _outputs(self) -> dict[str, Any]:
        feeds = {}
        for value in self.opened.session.get_inputs():
            shape = self.shapes[value.name]
            feeds[value.name] = np.zeros(shape, np.float32)
            if value.name in self.addresses and self.addresses[value.name] in self.opened.device.buffers:
                array = feeds[value.name]
                size = min(array.nbytes, ctypes.sizeof(self.opened.device.buffers[self.addresses[value.name]]))
                ctypes.memmove(array.ctypes.data, self.addresses[value.name], size)
        names = [value.name for value in self.opened.session.get_outputs()]
        return dict(zip(names, self.opened.session.run(names, feeds), strict=True))

"""An engine on the GPU. Classic TensorRT and TensorRT-RTX alike: their interfaces agree in all that is used here.

No device memory is allocated per call: buffers grow to the largest shapes seen and stay, each profile has a context of
its own, and shapes that come again are replayed as a CUDA graph.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError, OutsideProfile, require
from dinoexport.runtime import check_inputs
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Array, Arrays, Graph, Profile, Runtime


def open_engine(
    path: Path, graph: Graph, *, runtime: Runtime, profiles: Sequence[Profile], weights_from: Path | None = None
) -> Engine:
    """A runner of the engine at `path`, whose profiles are `profiles` in its own order.

    `weights_from`: the ONNX a stripped plan's weights are put in from. Raises MissingRequirement without the packages,
    BuildError when the engine cannot be opened, InputRefused from the runner for inputs outside the signature and
    OutsideProfile for those that no profile covers.
    """
    require(TABLE[runtime].extra, *TABLE[runtime].modules)
    # CUDA counts the fastest GPU first, the driver by the PCI bus; the GPU that was checked is the one that shall run.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    trt: Any = importlib.import_module(runtime.value)
    logger = trt.Logger(trt.Logger.ERROR)
    opened = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if opened is None:
        raise BuildError(
            f"{runtime} {trt.__version__} cannot open {path.name}.",
            next_step="dinoexport doctor says what this machine has; build the bundle again here.",
        )
    if weights_from is not None:
        _put_weights_in(trt, logger, opened, weights_from)
    if opened.streamable_weights_size:
        opened.weight_streaming_budget_v2 = opened.get_weight_streaming_automatic_budget()
    return Engine(opened, graph, tuple(profiles))


def _put_weights_in(trt: Any, logger: Any, opened: Any, onnx: Path) -> None:
    refitter = trt.Refitter(opened, logger)
    if not (trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(onnx)) and refitter.refit_cuda_engine()):
        raise BuildError(f"The weights in {onnx.name} do not fit the plan.", next_step="Build the bundle again.")


@dataclass
class _Context:
    """A profile's execution context, and what it is bound to. runs: since it was; replay: those runs' CUDA graph."""

    context: Any
    shapes: Mapping[str, tuple[int, ...]] | None = None
    output_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    runs: int = 0
    replay: Any = None


class Engine:
    """An open engine: call it with named arrays. Not to be called from two threads at once."""

    def __init__(self, opened: Any, graph: Graph, profiles: tuple[Profile, ...]) -> None:
        from cuda.bindings import runtime as cuda

        self._cuda: Any = cuda
        self._opened = opened
        self._graph = graph
        self._profiles = profiles
        self._contexts: dict[int, _Context] = {}
        self._buffers: dict[str, tuple[int, int]] = {}  # tensor -> (device address, capacity in bytes)
        self._stream = self._done(cuda.cudaStreamCreate())

    def __call__(self, arrays: Arrays) -> dict[str, Array]:
        """The outputs for these inputs; all arrays in host memory."""
        import numpy as np

        check_inputs(self._graph, arrays)
        inputs = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        shapes = {name: array.shape for name, array in inputs.items()}
        used = self._context(self._profile_for(shapes))
        if used.shapes != shapes:
            self._bind(used, inputs)
        outputs = {t.name: np.empty(used.output_shapes[t.name], t.dtype) for t in self._graph.outputs}
        self._copy(inputs, to_device=True)
        self._enqueue(used)
        self._copy(outputs, to_device=False)
        self._done(self._cuda.cudaStreamSynchronize(self._stream))
        return outputs

    def close(self) -> None:
        """Gives the device's memory back."""
        for used in self._contexts.values():
            self._unbind(used)
        self._contexts.clear()
        for address, _ in self._buffers.values():
            self._done(self._cuda.cudaFree(address))
        self._buffers.clear()
        self._done(self._cuda.cudaStreamDestroy(self._stream))

    def _profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that covers the shapes: the recipe lists the preferred one first."""
        for index, profile in enumerate(self._profiles):
            if profile.covers(shapes):
                return index
        names = ", ".join(profile.name for profile in self._profiles)
        raise OutsideProfile(
            f"No profile of the engine ({names}) covers {dict(shapes)}.",
            next_step="Resize or split the input, or build the engine with another profile.",
        )

    def _context(self, index: int) -> _Context:
        if index not in self._contexts:
            context = self._opened.create_execution_context()
            if context is None or not context.set_optimization_profile_async(index, int(self._stream)):
                raise BuildError(
                    f"The engine's profile {self._profiles[index].name} cannot be used; most likely the device has too "
                    "little memory for it.",
                    next_step="Free the device, or build with a smaller profile.",
                )
            self._done(self._cuda.cudaStreamSynchronize(self._stream))
            self._contexts[index] = _Context(context)
        return self._contexts[index]

    def _bind(self, used: _Context, inputs: Arrays) -> None:
        """Gives the context its shapes and addresses. A captured graph holds both, so it ends here."""
        self._unbind(used)
        for name, array in inputs.items():
            if not used.context.set_input_shape(name, array.shape):
                raise BuildError(f"The engine refuses {name} of shape {array.shape}.", next_step="Report it.")
        used.output_shapes = {t.name: tuple(used.context.get_tensor_shape(t.name)) for t in self._graph.outputs}
        sizes_bytes = {name: array.nbytes for name, array in inputs.items()}
        for tensor in self._graph.outputs:
            sizes_bytes[tensor.name] = math.prod(used.output_shapes[tensor.name]) * _item_bytes(tensor.dtype)
        for name, size_bytes in sizes_bytes.items():
            used.context.set_tensor_address(name, self._buffer(name, size_bytes))
        used.shapes = {name: array.shape for name, array in inputs.items()}

    def _unbind(self, used: _Context) -> None:
        if used.replay:
            self._done(self._cuda.cudaGraphExecDestroy(used.replay))
        used.shapes, used.runs, used.replay = None, 0, None

    def _buffer(self, name: str, size_bytes: int) -> int:
        """The address of the tensor's buffer, which is at least this large; one that grows moves, for all contexts."""
        address, capacity = self._buffers.get(name, (0, 0))
        if capacity < size_bytes:
            for other in self._contexts.values():
                self._unbind(other)
            if address:
                self._done(self._cuda.cudaFree(address))
            address = int(self._done(self._cuda.cudaMalloc(size_bytes)))
            self._buffers[name] = (address, size_bytes)
        return address

    def _copy(self, arrays: Arrays, *, to_device: bool) -> None:
        kinds = self._cuda.cudaMemcpyKind
        for name, array in arrays.items():
            device, host = self._buffers[name][0], array.ctypes.data
            ends = (device, host) if to_device else (host, device)
            kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
            self._done(self._cuda.cudaMemcpyAsync(*ends, array.nbytes, kind, self._stream))

    def _enqueue(self, used: _Context) -> None:
        """Runs the kernels: as they are at first, for TensorRT sets a shape up there; then captured; then replayed.

        A graph is good only for the state its context was captured in (TensorRT's developer guide, CUDA graphs), so
        there is one for each context, and `_bind` ends it.
        """
        if used.runs == 1:
            used.replay = self._captured(used.context)
        used.runs += 1
        if used.replay:
            self._done(self._cuda.cudaGraphLaunch(used.replay, self._stream))
        elif not used.context.execute_async_v3(int(self._stream)):
            raise BuildError("The engine failed to run.", next_step="dinoexport doctor says what this machine has.")

    def _captured(self, context: Any) -> Any:
        """The kernels of one run as an executable graph; None where they cannot be captured."""
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._done(cuda.cudaStreamBeginCapture(self._stream, mode))
        ran = context.execute_async_v3(int(self._stream))
        error, captured = cuda.cudaStreamEndCapture(self._stream)
        if not ran or int(error):
            cuda.cudaGetLastError()  # a refused capture must not be blamed on the next call
            return None
        replay = self._done(cuda.cudaGraphInstantiate(captured, 0))
        self._done(cuda.cudaGraphDestroy(captured))
        return replay

    def _done(self, result: tuple[Any, ...]) -> Any:
        """A CUDA call's value; a BuildError when it failed."""
        error, *values = result
        if int(error):
            name = getattr(error, "name", str(error))
            raise BuildError(f"CUDA failed: {name}.", next_step="dinoexport doctor says what this machine has.")
        return values[0] if values else None


def _item_bytes(dtype: str) -> int:
    import numpy as np

    return np.dtype(dtype).itemsize

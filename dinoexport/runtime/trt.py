"""Run an engine on the GPU. Classic TensorRT and TensorRT-RTX share this code: their interfaces are nearly the same.

No device memory is allocated per call: buffers grow to the largest shapes seen and stay. Each profile has its own
context. Calls are serial, so all contexts share one scratch buffer, as large as the shapes need. Repeated shapes are
replayed as a CUDA graph, which TensorRT-RTX captures by itself.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError, MissingRequirement, OutsideProfile, require
from dinoexport.runtime import check_inputs, weight_streaming
from dinoexport.runtime.cuda import Buffers, Cuda
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Array, Arrays, Graph, Profile, Runtime
from dinoexport.system import hardware

_DOCTOR = "dinoexport doctor shows what this machine has."
# A name that no tensor has.
_SCRATCH = ""


def load(runtime: Runtime) -> Any:
    """The module that `runtime` names; raises MissingRequirement if its libraries cannot be loaded."""
    try:
        return importlib.import_module(runtime.value)
    except (ImportError, OSError) as error:
        package = next(filter(hardware.installed, TABLE[runtime].distributions), runtime.value)
        raise MissingRequirement(
            f"{runtime} is installed and cannot be loaded: {error}.",
            next_step=f"pip install --force-reinstall {package}, or put its libraries on LD_LIBRARY_PATH.",
        ) from None


class Said:
    """The last few errors of TensorRT's logger."""

    def __init__(self, trt: Any) -> None:
        severity = trt.ILogger.Severity
        heard = self._heard = collections.deque[str](maxlen=5)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                """Any thread of TensorRT may call this."""
                if level in (severity.INTERNAL_ERROR, severity.ERROR):
                    heard.append(message.strip())

        self.logger = Logger()

    def error(self, problem: str, next_step: str) -> BuildError:
        """The error for `problem` with TensorRT's own messages, which are then cleared."""
        words = " ".join(self._heard)[:600]
        self._heard.clear()
        return BuildError(f"{problem} TensorRT said: {words}" if words else problem, next_step=next_step)


def open_plan(path: Path, runtime: Runtime, *, host_code: bool = False) -> tuple[Any, Any, Said]:
    """The module, the engine at `path` and TensorRT's messages; raises BuildError if it cannot be opened.

    host_code: lets a version-compatible plan run the host code it holds. The file is mapped, not read, so its pages are
    the only copy in host memory besides TensorRT's own.
    """
    trt = load(runtime)
    said = Said(trt)
    opener = trt.Runtime(said.logger)
    if host_code:
        opener.engine_host_code_allowed = True
    opened = None
    if path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            opened = opener.deserialize_cuda_engine(content)
    if opened is None:
        raise said.error(
            f"{runtime} {trt.__version__} cannot open {path.name}.",
            "dinoexport doctor shows what this machine has; build the bundle again here.",
        )
    return trt, opened, said


def open_engine(
    path: Path,
    graph: Graph,
    *,
    runtime: Runtime,
    profiles: Sequence[Profile],
    weights_from: Path | None = None,
    host_code: bool = False,
) -> Engine:
    """A runner of the engine at `path`, whose profiles are `profiles` in its own order.

    `weights_from`: the ONNX with a stripped plan's weights. host_code: as in `open_plan`. Raises
    MissingRequirement without the packages or the memory, BuildError when the engine cannot be opened or is not
    `graph`'s, InputRefused from the runner for inputs outside the signature and OutsideProfile for those that no
    profile covers.
    """
    require(TABLE[runtime].extra, *TABLE[runtime].modules)
    # CUDA orders GPUs by speed, the driver by PCI bus; this setting makes the GPU that was checked the one that runs.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    trt, opened, said = open_plan(path, runtime, host_code=host_code)
    _check(opened, graph, profiles, path)
    if weights_from is not None:
        _put_weights_in(trt, said, opened, weights_from)
    return Engine(trt, opened, graph, tuple(profiles), said)


def _check(opened: Any, graph: Graph, profiles: Sequence[Profile], path: Path) -> None:
    """Raises BuildError if the engine's tensors or profiles are not those of the bundle."""
    tensors = {opened.get_tensor_name(index) for index in range(opened.num_io_tensors)}
    wanted = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    if tensors != wanted or opened.num_optimization_profiles != len(profiles):
        raise BuildError(
            f"{path.name} has the tensors {', '.join(sorted(tensors))} and {opened.num_optimization_profiles} profiles;"
            f" the bundle says {', '.join(sorted(wanted))} and {len(profiles)}.",
            next_step="Build the bundle again.",
        )


def _put_weights_in(trt: Any, said: Said, opened: Any, onnx: Path) -> None:
    refitter = trt.Refitter(opened, said.logger)
    parser = trt.OnnxParserRefitter(refitter, said.logger)
    if not (parser.refit_from_file(str(onnx)) and refitter.refit_cuda_engine()):
        raise said.error(f"The weights in {onnx.name} do not fit the plan.", "Build the bundle again.")


@dataclass
class _Context:
    """A profile's execution context and its bindings. runs: calls since it was bound; replay: their CUDA graph."""

    context: Any
    profile: int
    shapes: Mapping[str, tuple[int, ...]] | None = None
    output_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    runs: int = 0
    replay: Any = None


class Engine:
    """An open engine: call it with named arrays. Two threads must not call it at once."""

    def __init__(self, trt: Any, opened: Any, graph: Graph, profiles: tuple[Profile, ...], said: Said) -> None:
        self._trt = trt
        self._opened = opened
        self._graph = graph
        self._profiles = profiles
        self._said = said
        self._contexts: dict[int, _Context] = {}
        self._stream: Any = None
        self._cuda = Cuda()
        self._buffers = Buffers(self._cuda, self._unbind_all)
        self._stream = self._cuda("cudaStreamCreate")
        # TensorRT-RTX specialises its kernels to a shape and then captures its own graphs; a capture here could hold
        # the general kernels that it uses until then.
        self._captures_itself = hasattr(trt, "CudaGraphStrategy")
        try:
            if opened.streamable_weights_size:
                weight_streaming.fit(self._cuda, opened, self._buffer_bytes)
        except BaseException:
            self.close()
            raise

    def __call__(self, arrays: Arrays) -> dict[str, Array]:
        """The outputs for these inputs; all arrays are in host memory."""
        import numpy as np

        check_inputs(self._graph, arrays)
        inputs = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        shapes = {name: array.shape for name, array in inputs.items()}
        used = self._context(self._profile_for(shapes))
        if used.shapes != shapes:
            self._bind(used, shapes)
        outputs = {t.name: np.empty(used.output_shapes[t.name], t.dtype) for t in self._graph.outputs}
        self._copy(inputs, to_device=True)
        self._enqueue(used)
        self._copy(outputs, to_device=False)
        self._cuda("cudaStreamSynchronize", self._stream)
        return outputs

    def close(self) -> None:
        """Frees the device's memory, whatever went wrong before; a second call does nothing."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        try:
            self._unbind_all()
        finally:
            self._contexts.clear()
            self._opened = None
            try:
                self._buffers.free()
            finally:
                self._cuda("cudaStreamDestroy", stream)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # when the interpreter ends, CUDA's module may be gone
            self.close()

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
            self._contexts[index] = _Context(self._new_context(index), index)
        return self._contexts[index]

    def _new_context(self, index: int) -> Any:
        """An execution context without its own scratch memory, set to the profile."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._captures_itself:
            config = self._opened.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            kernels = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
            context = self._opened.create_execution_context(config)
        else:
            context = self._opened.create_execution_context(strategy)
        try:
            usable = context is not None and context.set_optimization_profile_async(index, int(self._stream))
        except RuntimeError:  # the bindings report a refusal with this exception
            usable = False
        if not usable:
            raise self._said.error(
                f"The engine's profile {self._profiles[index].name} cannot be used; most likely the device has too "
                "little memory for it.",
                "Free the device, or build with a smaller profile.",
            )
        self._cuda("cudaStreamSynchronize", self._stream)
        return context

    def _buffer_bytes(self) -> int:
        """The bytes of the tensors at the largest shapes of the largest profile, computed with temporary contexts."""
        found = 0
        for index, profile in enumerate(self._profiles):
            largest = {name: ends[2] for name, ends in profile.shapes.items()}
            context = self._new_context(index)
            found = max(found, sum(self._sizes_bytes(largest, self._shaped(context, largest)).values()))
        return found

    def _shaped(self, context: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes, once the context has the inputs'."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise self._said.error(f"The engine refuses {name} of shape {tuple(shape)}.", "Report it.")
        found = {t.name: tuple(context.get_tensor_shape(t.name)) for t in self._graph.outputs}
        for name, shape in found.items():
            if min(shape, default=0) < 0:
                raise self._said.error(f"The engine does not know the shape of {name}: {shape}.", "Report it.")
        return found

    def _sizes_bytes(
        self, shapes: Mapping[str, tuple[int, ...]], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, int]:
        import numpy as np

        known = {**shapes, **output_shapes}
        return {
            tensor.name: math.prod(known[tensor.name]) * np.dtype(tensor.dtype).itemsize
            for tensor in (*self._graph.inputs, *self._graph.outputs)
        }

    def _bind(self, used: _Context, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives the context its shapes, scratch memory and addresses. A captured graph holds them, so it ends here."""
        self._unbind(used)
        used.output_shapes = self._shaped(used.context, shapes)
        # Zero also when it fails; then the profile's largest shapes decide.
        scratch_bytes = used.context.update_device_memory_size_for_shapes()
        scratch_bytes = scratch_bytes or self._opened.get_device_memory_size_for_profile_v2(used.profile)
        sizes_bytes = self._sizes_bytes(shapes, used.output_shapes)
        for name, size_bytes in sizes_bytes.items():
            self._buffers.grown(name, size_bytes)
        if scratch_bytes:
            used.context.set_device_memory(*self._buffers.grown(_SCRATCH, scratch_bytes))
        for name in sizes_bytes:
            if not used.context.set_tensor_address(name, self._buffers.address(name)):
                raise self._said.error(f"The engine refuses the buffer of {name}.", "Report it.")
        used.shapes = dict(shapes)

    def _unbind(self, used: _Context) -> None:
        replay, used.shapes, used.runs, used.replay = used.replay, None, 0, None
        if replay:
            self._cuda("cudaGraphExecDestroy", replay)

    def _unbind_all(self) -> None:
        for used in self._contexts.values():
            self._unbind(used)

    def _copy(self, arrays: Arrays, *, to_device: bool) -> None:
        kinds = self._cuda.api.cudaMemcpyKind
        for name, array in arrays.items():
            device, host = self._buffers.address(name), array.ctypes.data
            ends = (device, host) if to_device else (host, device)
            kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
            self._cuda("cudaMemcpyAsync", *ends, array.nbytes, kind, self._stream)

    def _enqueue(self, used: _Context) -> None:
        """Runs the kernels: directly the first time, when TensorRT sets up a shape; then captured; then replayed.

        A graph is valid only for the context state in which it was captured (TensorRT's developer guide, CUDA graphs),
        so there is one for each context, and `_bind` discards it.
        """
        if used.runs == 1 and not self._captures_itself:
            used.replay = self._captured(used.context)
        used.runs += 1
        if used.replay:
            self._cuda("cudaGraphLaunch", used.replay, self._stream)
        elif not used.context.execute_async_v3(int(self._stream)):
            raise self._said.error("The engine failed to run.", _DOCTOR)

    def _captured(self, context: Any) -> Any:
        """The kernels of one run as an executable graph; None if they cannot be captured."""
        api = self._cuda.api
        self._cuda("cudaStreamBeginCapture", self._stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            ran = context.execute_async_v3(int(self._stream))
        finally:
            error, captured = api.cudaStreamEndCapture(self._stream)
        replay = None
        if not int(error):
            if ran:
                error, replay = api.cudaGraphInstantiate(captured, 0)
            self._cuda("cudaGraphDestroy", captured)
        if int(error):
            api.cudaGetLastError()  # so that the next call does not report the refused capture
            return None
        return replay

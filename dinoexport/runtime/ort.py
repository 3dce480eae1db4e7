"""ONNX Runtime, on the CPU or through CUDA."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dinoexport.errors import BuildError, MissingRequirement, require
from dinoexport.runtime import Arithmetic, Opened, check_inputs, telemetry
from dinoexport.spec import Array, Arrays, Graph, Runner

# ONNX Runtime's names of the types that are multiplied -> their usual names. The first one that an input of a product
# has decides, because a quantised product has float scales in addition to its bytes.
_ARITHMETIC = {"int8": "int8", "uint8": "int8", "float16": "f16", "bfloat16": "bf16", "float": "f32", "double": "f64"}

# A decoder's step is hundreds of operators of some microseconds each. Threads that spin from one to the next take 0.75
# of the step's time at the same CPU time (SmolLM2 in int4, two threads, idle machine: 26.4 to 19.8 ms). Without this
# bound they take up to twice the time beside other processes.
_SPINNING_US = 50
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# No TF32: fp32 is fp32 on the GPU too. And no search for the fastest convolution at each new size: on an H100 the first
# call of a size took 29 to 107 ms with it and 9 to 86 without (ViT-B, 8 images), and all later calls the same.
_CUDA_OPTIONS = {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
_CUDA_NEXT_STEP = "pip uninstall onnxruntime && pip install 'dinoexport[gpu]'; dinoexport doctor shows the driver."


def version() -> str:
    """ONNX Runtime's version."""
    onnxruntime = telemetry.onnxruntime()

    return str(onnxruntime.__version__)


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime has a CUDA provider."""
    onnxruntime = telemetry.onnxruntime()

    return _CUDA in onnxruntime.get_available_providers()


def open_graph(
    path: Path,
    graph: Graph,
    *,
    threads: int = 0,
    cuda: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Opened:
    """The ONNX file at `path`, opened, on the GPU with `cuda`. threads: 0 leaves their number to ONNX Runtime.

    shapes: fixed shapes of all inputs, for a session of one size; None keeps the graph dynamic.

    Raises BuildError when ONNX Runtime refuses the file, MissingRequirement if it cannot use the GPU, InputRefused from
    the runner for inputs outside the signature.
    """

    def arithmetic(arrays: Arrays) -> Arithmetic:
        products = [operator for operator in executed(path, arrays, cuda=cuda) if operator.is_product]
        strayed = " on the CPU"  # the GPU has no kernel for it
        return dict(Counter(f"{ran.arithmetic}{strayed if cuda and not ran.on_gpu else ''}" for ran in products))

    if graph.carried and not cuda:
        from dinoexport.runtime.ort_decoder import OrtDecoder, with_shared_cache

        if shared := with_shared_cache(path, graph):
            session = _session(path, model=shared.model, threads=threads, spinning_us=_SPINNING_US)
            tables = shared.tables and _session(path, model=shared.tables, threads=1)

            def begin() -> OrtDecoder:
                return OrtDecoder(session, graph, tables)

            return Opened(run=lambda arrays: begin().whole(arrays), arithmetic=arithmetic, begin=begin)
    session = _session(path, threads=threads, cuda=cuda, sizes={} if shapes is None else _sizes(graph, shapes))
    return Opened(run=_runner(session, graph, [tensor.name for tensor in graph.outputs]), arithmetic=arithmetic)


def open_edited(model: bytes, path: Path, graph: Graph, *, more_outputs: Sequence[str]) -> Runner:
    """A runner of `model`, the file at `path` with `more_outputs`; its weights stay where that file has them."""
    return _runner(_session(path, model=model), graph, [*(tensor.name for tensor in graph.outputs), *more_outputs])


def _sizes(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes that shapes of inputs give the graph's dynamic dimensions."""
    return {
        name: size
        for tensor in graph.inputs
        for name, size in zip(tensor.shape, shapes.get(tensor.name, ()), strict=False)
        if isinstance(name, str)
    }


def _runner(session: Any, graph: Graph, names: Sequence[str]) -> Runner:
    def run(arrays: Arrays) -> dict[str, Array]:
        check_inputs(graph, arrays)
        try:
            return dict(zip(names, session.run(list(names), dict(arrays)), strict=True))
        except Exception as error:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise BuildError(f"ONNX Runtime failed on {shapes}: {error}", next_step="Report it.") from error

    return run


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator as ONNX Runtime ran it. shapes, types: of its inputs; written_bytes: of its outputs."""

    kind: str
    types: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    written_bytes: int
    on_gpu: bool = False

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, attention (two products) or a convolution: nearly all arithmetic."""
        return any(word in self.kind for word in ("MatMul", "Gemm", "Conv", "Attention"))

    @property
    def arithmetic(self) -> str:
        """The arithmetic of the product; for packed weights of few bits on a CPU, the requested arithmetic."""
        if self.kind == "MatMulNBits" and not self.on_gpu:
            return "int8"
        return next((name for kind, name in _ARITHMETIC.items() if kind in self.types), "unknown")

    @property
    def flops(self) -> int:
        """Multiplications and additions of a product; other operators count as zero, as is common."""
        if not self.is_product:
            return 0
        if "Conv" in self.kind:
            return 2 * math.prod(self.output_shape) * math.prod(self.shapes[1][1:])
        if "Attention" in self.kind:  # of queries (B, H, T, K) and keys (B, G, S, K), then the same with values
            return 4 * math.prod(self.shapes[0]) * self.shapes[1][2]
        return 2 * math.prod(self.output_shape) * self.shapes[0][-1]


def executed(path: Path, arrays: Arrays, *, optimised: bool = True, cuda: bool = False) -> tuple[Operator, ...]:
    """The operators that ONNX Runtime ran for `arrays`, with their shapes, on the GPU with `cuda`.

    optimised: after its own optimisations; if false, the operators of the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = _session(path, profile=Path(folder) / "profile", optimised=optimised, cuda=cuda)
        session.run(None, dict(arrays))
        # Names in a bundle may be any bytes.
        events = json.loads(Path(session.end_profiling()).read_text(errors="replace"))
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return tuple(_operator(kernel["args"]) for kernel in kernels)


def _operator(facts: dict[str, Any]) -> Operator:
    inputs = [next(iter(tensor.items())) for tensor in facts["input_type_shape"] if tensor]
    return Operator(
        kind=facts["op_name"],
        types=tuple(kind for kind, _ in inputs),
        shapes=tuple(tuple(shape) for _, shape in inputs),
        output_shape=tuple(next(iter(facts["output_type_shape"][0].values()))) if facts["output_type_shape"] else (),
        written_bytes=int(facts["output_size"]),
        on_gpu=facts.get("provider") == _CUDA,
    )


def _session(
    path: Path,
    *,
    model: bytes | None = None,
    threads: int = 0,
    profile: Path | None = None,
    optimised: bool = True,
    cuda: bool = False,
    sizes: Mapping[str, int] = MappingProxyType({}),
    spinning_us: int = 0,
) -> Any:
    """A session of the file at `path`, or of `model`, whose weights lie beside it. sizes: of dynamic dimensions.

    spinning_us: microseconds for which an idle thread waits in a busy loop before it sleeps.
    """
    require("cpu", "onnxruntime")
    onnxruntime = telemetry.onnxruntime()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised too; as lines they hold a graph's own names, unescaped
    options.intra_op_num_threads = threads
    # By default idle threads of several sessions in one process compete by spinning for as long as a millisecond.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning_us > 0)))
    if spinning_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spinning_us))
    # Activations of products with weights of few bits are quantised to int8 in blocks: today's default, set explicitly.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if model is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    # Small integer operations on shapes run on the CPU even so.
    providers: list[Any] = [(_CUDA, _CUDA_OPTIONS)] if cuda else []
    if cuda:
        _load_cuda(onnxruntime)
    try:
        session = onnxruntime.InferenceSession(model or path, options, providers=[*providers, _CPU])
    except Exception as error:  # its exception classes share no public base but Exception
        raise BuildError(
            f"ONNX Runtime refuses {path.name}: {error}", next_step="dinoexport inspect shows what is in it."
        ) from error
    # A CUDA provider that does not load is only logged: the session then computes on the CPU.
    if cuda and _CUDA not in session.get_providers():
        raise MissingRequirement("ONNX Runtime does not reach the GPU.", next_step=_CUDA_NEXT_STEP)
    return session


def _load_cuda(onnxruntime: Any) -> None:
    """Loads CUDA's libraries from NVIDIA's packages, if they are installed; else the system's loader finds them."""
    # CUDA orders GPUs by speed, the driver by PCI bus; this setting makes the first of `hardware.gpus` the one used.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if _CUDA not in onnxruntime.get_available_providers():
        raise MissingRequirement("This ONNX Runtime has no CUDA provider.", next_step=_CUDA_NEXT_STEP)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; the session tells what matters
        onnxruntime.preload_dlls()

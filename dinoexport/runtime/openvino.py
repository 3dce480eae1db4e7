"""OpenVINO, on the CPU.

The precision is always said: left to itself OpenVINO computes an fp32 graph in bf16 on every CPU that has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError, MissingRequirement, require
from dinoexport.runtime import Arithmetic, Opened, check_inputs
from dinoexport.spec import Array, Arrays, Graph, Precision

# OpenVINO's names of the precisions it can compute a graph in, here and among its capabilities.
_HINTS = {Precision.FP32: ("f32", "FP32"), Precision.BF16: ("bf16", "BF16")}
# Layers of a compiled model in which products are computed; the rest moves or adds.
_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention"})


def version() -> str:
    """OpenVINO's version, without the build's number."""
    import openvino

    return str(openvino.__version__).split("-", maxsplit=1)[0]


def computes(precision: Precision) -> bool:
    """Whether OpenVINO has this precision on this machine's CPU."""
    require("openvino", "openvino")
    import openvino

    return precision in _HINTS and _HINTS[precision][1] in openvino.Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )


def open_graph(
    path: Path,
    graph: Graph,
    *,
    precision: Precision = Precision.FP32,
    threads: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Opened:
    """The ONNX file at `path`, compiled to compute in `precision`. threads: 0 leaves their number to OpenVINO.

    shapes: fixed shapes of all inputs, for a model of one size; as dynamic as the graph without. Raises
    MissingRequirement when this CPU lacks the precision, BuildError when OpenVINO refuses the file, InputRefused from
    the runner for inputs outside the signature.
    """
    if not computes(precision):
        raise MissingRequirement(
            f"OpenVINO does not compute in {precision} on this CPU.", next_step=f"Use --precision {Precision.FP32}."
        )
    import openvino

    core = openvino.Core()
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision][0],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    try:
        model = core.read_model(path)
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        # One line, and without where the file lay: it is kept in the bundle of a build that another runtime serves.
        why = " ".join(str(error).replace(str(path), path.name).split())
        raise BuildError(
            f"OpenVINO refuses {path.name}: {why[:300]}", next_step="dinoexport inspect shows what is in it."
        ) from error
    request = compiled.create_infer_request()

    def run(arrays: Arrays) -> dict[str, Array]:
        check_inputs(graph, arrays)
        try:
            request.infer(dict(arrays), share_inputs=True)
        except RuntimeError as error:
            given = {name: array.shape for name, array in arrays.items()}
            raise BuildError(f"OpenVINO failed on {given}: {error}", next_step="Report it.") from error
        # Copied, because the request writes its next answer to the same memory.
        return {tensor.name: request.get_tensor(tensor.name).data.copy() for tensor in graph.outputs}

    def arithmetic(_arrays: Arrays) -> Arithmetic:
        layers = [operator.get_rt_info() for operator in compiled.get_runtime_model().get_ops()]
        return dict(
            Counter(
                str(layer["runtimePrecision"].astype(str))
                for layer in layers
                if layer["layerType"].astype(str) in _PRODUCTS
            )
        )

    return Opened(run=run, arithmetic=arithmetic)

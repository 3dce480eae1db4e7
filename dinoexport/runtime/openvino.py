"""OpenVINO, on the CPU.

The precision is always set: by default OpenVINO computes an fp32 graph in bf16 on every CPU that has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport.errors import BuildError, MissingRequirement, require
from dinoexport.runtime import Arithmetic, Opened, check_inputs, openvino_products, telemetry
from dinoexport.runtime.openvino_decoder import OpenVinoDecoder, make_stateful
from dinoexport.spec import Array, Arrays, Graph, Precision, Runner

if TYPE_CHECKING:
    from dinoexport.runtime.decoding import Decoder

# OpenVINO's names of the precisions it can compute a graph in, as it lists a CPU's capabilities.
_CAPABILITIES = {Precision.FP32: "FP32", Precision.BF16: "BF16", Precision.INT8: "INT8", Precision.INT4: "INT8"}
_NARROW = (Precision.INT8, Precision.INT4)
# Activations of products with int8 weights are int8 in groups of this many channels. ViT-B at 224, 518: 0.50, 0.47 of
# fp32's time; 0.54, 0.50 in groups of 64; 0.61, 0.53 in groups of 32, OpenVINO's default; errors 1.6e-2 to 1.5e-2.
_GROUP_CHANNELS = 128
# OpenVINO's names of precisions in settings and in a compiled model.
_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}
_INT8 = "i8"
# Layers of a compiled model that compute products; the others move or add.
_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention"})


def version() -> str:
    """OpenVINO's version, without the build's number."""
    openvino = telemetry.openvino()

    return str(openvino.__version__).split("-", maxsplit=1)[0]


def computes(precision: Precision) -> bool:
    """Whether OpenVINO has this precision on this machine's CPU."""
    require("openvino", "openvino")
    openvino = telemetry.openvino()

    found: list[str] = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return _CAPABILITIES.get(precision) in found


def rest(precision: Precision, carried: bool) -> Precision | None:
    """What to compute in besides products of narrow weights, on this CPU; None for precisions without such weights.

    bf16 if this CPU has it, but fp32 in a graph that carries state: SmolLM2-135M in int8 with the rest in bf16 misses
    its limits (relative L2 of one token 6.4e-2, KL 2.8e-2), and a step takes 0.95 of fp32's time.
    """
    if precision not in _NARROW:
        return None
    return Precision.FP32 if carried or not computes(Precision.BF16) else Precision.BF16


def open_graph(
    path: Path,
    graph: Graph,
    *,
    precision: Precision = Precision.FP32,
    rest_in: Precision | None = None,
    threads: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Opened:
    """The ONNX file at `path`, compiled to compute in `precision`. threads: 0 leaves their number to OpenVINO.

    With int8, products with int8 weights are int8. rest_in: what the rest is computed in, by default `rest`; where this
    CPU lacks it fp32, which is nearer to PyTorch.

    shapes: fixed shapes of all inputs, for a model of one size; None keeps the graph dynamic. Raises MissingRequirement
    if this CPU lacks the precision, BuildError if OpenVINO refuses the file, InputRefused from the runner for inputs
    outside the signature.
    """
    if not computes(precision):
        raise MissingRequirement(
            f"OpenVINO does not compute in {precision} on this CPU.", next_step=f"Use --precision {Precision.FP32}."
        )
    openvino = telemetry.openvino()

    core = openvino.Core()
    wide = rest_in or rest(precision, bool(graph.carried)) or precision
    if precision in _NARROW and not computes(wide):
        wide = Precision.FP32
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[wide],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP_CHANNELS if precision in _NARROW else 0,
    }
    if graph.carried:  # the default is eight bits, which gives an error of 4e-3 where all else is fp32
        options["KV_CACHE_PRECISION"] = _HINTS[wide]
    try:
        model = _read(core, path, graph, shapes)
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        # One line without the file's path: it is stored in the bundle of a build for which another runtime is chosen.
        why = " ".join(str(error).replace(str(path), path.name).split())
        raise BuildError(
            f"OpenVINO refuses {path.name}: {why[:300]}", next_step="dinoexport inspect shows what is in it."
        ) from error

    def opened(compiled: Any) -> Runner:
        return OpenVinoDecoder(compiled, graph).call if graph.carried else _runner(compiled, graph)

    run = opened(compiled)

    def arithmetic(arrays: Arrays) -> Arithmetic:
        layers = [operator.get_rt_info() for operator in compiled.get_runtime_model().get_ops()]
        found = Counter(
            str(layer["runtimePrecision"].astype(str))
            for layer in layers
            if layer["layerType"].astype(str) in _PRODUCTS
        )
        if _INT8 in found:
            # A layer is named by its weights, even if they are widened before they are multiplied, as on a CPU
            # without VNNI. Then forbidding int8 activations changes nothing.
            widened = opened(core.compile_model(model, "CPU", options | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}))
            ours, wide_answers = run(arrays), widened(arrays)
            same = all((ours[name] == wide_answers[name]).all() for name in ours)
            found[_HINTS[wide] if same else "int8"] += found.pop(_INT8)
        return dict(found)

    def begin() -> Decoder:
        return OpenVinoDecoder(compiled, graph)

    return Opened(run=run, arithmetic=arithmetic, begin=begin if graph.carried else None)


def _read(core: Any, path: Path, graph: Graph, shapes: Mapping[str, tuple[int, ...]] | None) -> Any:
    model = core.read_model(path)
    if shapes is not None:
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        openvino_products.separate(model)
    if graph.carried:
        make_stateful(model, graph)
    return model


def _runner(compiled: Any, graph: Graph) -> Runner:
    request = compiled.create_infer_request()

    def run(arrays: Arrays) -> dict[str, Array]:
        check_inputs(graph, arrays)
        try:
            request.infer(dict(arrays), share_inputs=True)
        except RuntimeError as error:
            given = {name: array.shape for name, array in arrays.items()}
            raise BuildError(f"OpenVINO failed on {given}: {error}", next_step="Report it.") from error
        # Copied, because the request writes its next outputs to the same memory.
        return {tensor.name: request.get_tensor(tensor.name).data.copy() for tensor in graph.outputs}

    return run

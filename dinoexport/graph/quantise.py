"""Quantise an fp32 graph to int8 with ONNX Runtime's quantiser: weights per output channel, activations dynamically.

Dynamic quantisation needs no calibration images, so the result does not depend on them. Products of two activations, in
attention, and convolutions stay as they are. The weights come in two forms, because the two runtimes use int8
differently. ONNX Runtime multiplies integers where the graph has integer products, with one scale per tensor of
activations. OpenVINO multiplies integers where a floating-point product has int8 weights, with one scale per token and
group of channels, which is more accurate; it computes the rest in bf16.

ONNX Runtime's weights are unsigned. A CPU with AVX2 but without VNNI adds pairs of products in 16 bits, which overflow
for unsigned activations times signed weights ("When and why do I need to try U8U8", onnxruntime.ai/docs/performance):
a small model's class token was off by 14 % there, and by 5 % with unsigned weights. OpenVINO's int8 needs VNNI anyway.

Measured with signed weights in both forms, ViT-S and ViT-B at 224 and 518 on a CPU with avx512_vnni and avx512_bf16:
0.39 to 0.64 of ONNX Runtime's fp32 time in ONNX Runtime, 0.40 to 0.50 in OpenVINO; errors 1.7e-2 to 1.8e-2 and 1.6e-2.
ViT-g shows the value of the finer scale: errors 6e-2 to 7e-2 and 3e-2.

Static ranges were measured and rejected (`benchmarks/static_int8.py`, ViT-S with synthetic weights at 224 and 518),
although they were calibrated on crops of the same photographs that they were tested on: error 5.3 to 10 %, where the
limit is 5 % and dynamic quantisation has 3 %; 1.03 to 1.13 times the dynamic time in ONNX Runtime, 0.88 to 0.92 in
OpenVINO.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dinoexport.errors import BuildError, require
from dinoexport.runtime import telemetry


def to_int8(onnx: Path, folder: Path, *, signed: bool = False) -> tuple[Path, Path]:
    """Writes the int8 version of the file at `onnx` into `folder`, under the same name; returns its paths.

    signed: whether weights are -128 to 127, or else 0 to 255 with a zero point. The same file gives the same bytes.
    Raises BuildError if the quantiser refuses the graph.
    """
    require("export", "onnx")
    require("cpu", "onnxruntime")
    telemetry.onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / onnx.name
    try:
        with _quiet():
            quantize_dynamic(
                onnx,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                use_external_data_format=True,
            )
    except (ValueError, RuntimeError) as error:
        raise BuildError(f"{onnx.name} cannot be quantised: {error}", next_step="Use --precision fp32.") from error
    data = path.with_name(f"{path.name}.data")
    data.chmod(path.stat().st_mode)  # the quantiser makes the file readable only for its owner
    return path, data


def to_wide_int8(onnx: Path, folder: Path) -> tuple[Path, Path]:
    """Writes the int8 version for OpenVINO of the file at `onnx` into `folder`; returns its paths."""
    with TemporaryDirectory(dir=folder) as place:
        integer, _ = to_int8(onnx, Path(place), signed=True)
        return with_wide_products(integer, folder)


def with_wide_products(int8: Path, folder: Path) -> tuple[Path, Path]:
    """Converts the graph that `to_int8` wrote at `int8` to OpenVINO's form in `folder`; returns its paths.

    Each integer product becomes a float32 product of the activation and of the same weight behind DequantizeLinear.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = ir.load(int8)
    for product in [node for node in model.graph if node.op_type == "MatMulInteger"]:
        # x -> DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul by both scales multiplied.
        quantised, weight, _, zero_point = product.inputs
        assert quantised is not None and weight is not None
        split = quantised.producer()
        (cast,) = product.outputs[0].consumers()
        (scaled,) = cast.outputs[0].consumers()
        scales = next(value.producer() for value in scaled.inputs if value and value is not cast.outputs[0])
        assert split is not None and scales is not None
        weight_scale = next(value for value in scales.inputs if value and value.producer() is not split)
        wide = ir.node("DequantizeLinear", [weight, weight_scale, zero_point], {"axis": 1}, name=f"{weight.name}/wide")
        wide.outputs[0].name = wide.name
        result = ir.node("MatMul", [split.inputs[0], wide.outputs[0]], name=f"{product.name}/wide")
        made, replaced = result.outputs[0], scaled.outputs[0]
        made.name = result.name
        if replaced.is_graph_output():
            made.name, made.type, made.shape = replaced.name, replaced.type, replaced.shape
        model.graph.insert_before(product, [wide, result])
        ir.convenience.replace_all_uses_with(replaced, made, replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)
    path = folder / int8.name
    ir.save(model, path, external_data=f"{path.name}.data")
    return path, path.with_name(f"{path.name}.data")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the quantiser's advice to preprocess the graph: shapes are known and nothing is left to fold."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

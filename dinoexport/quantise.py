"""An fp32 graph made int8 by ONNX Runtime's quantiser: weights per output channel, activations as they come.

Dynamic, so no calibration images decide what the graph is good at. Products of two activations, in attention, stay
fp32, and so do convolutions. Static ranges, calibrated on crops of the very photographs they were then judged on, were
measured and left out (`benchmarks/static_int8.py`, ViT-S with made-up weights at 224 and 518): off by 5.3 to 10 %,
where the limit is 5 % and dynamic is off by 3 %, for 1.03 to 1.13 times its time in ONNX Runtime, 0.88 to 0.92
in OpenVINO.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinoexport.errors import BuildError, require

PACKAGES = ("onnx", "onnxruntime")


def to_int8(onnx: Path, folder: Path) -> tuple[Path, Path]:
    """Writes the int8 twin of the file at `onnx` into `folder`, under the same name; returns its paths.

    The same file gives the same bytes. Raises BuildError when the quantiser refuses the graph.
    """
    require("export", "onnx")
    require("cpu", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / onnx.name
    try:
        with _quiet():
            quantize_dynamic(
                onnx,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
    except (ValueError, RuntimeError) as error:
        raise BuildError(f"{onnx.name} cannot be quantised: {error}", next_step="Use --precision fp32.") from error
    data = path.with_name(f"{path.name}.data")
    data.chmod(path.stat().st_mode)  # the quantiser writes for its own user alone
    return path, data


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the quantiser's advice to prepare the graph first: shapes are known and nothing is left to fold."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

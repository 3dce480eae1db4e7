"""Whether static int8, calibrated on photographs, beats the dynamic one: `python benchmarks/static_int8.py [VARIANT]`.

It did not: see `dinoexport/graph/quantise.py`. Weights are synthetic; run it with `--weights FILE` on trained ones
before trusting that for them. Prints, per size, the worst relative L2 over photographs and outputs, and the ratio to
fp32.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from PIL import Image

from dinoexport import family, images
from dinoexport.config import recipe
from dinoexport.graph import quantise
from dinoexport.runtime import cpu
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import timing
from dinoexport.validation.metrics import distance

PHOTOGRAPHS = Path(__file__).parents[1] / "validate" / "images"
SIDES, CALIBRATED_SIDE, CROPS_EACH = (224, 518), 224, 8
ROUNDS, BUDGET_S = 15, 60.0
RUNTIMES = (Runtime.ONNXRUNTIME, Runtime.OPENVINO)


def pixels(image: Image.Image, side: int) -> np.ndarray:
    """The whole image as (1, 3, side, side) float32."""
    resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return images.Preprocessing().normalised(np.asarray(resized)[None])


class Crops(CalibrationDataReader):  # type: ignore[misc]
    """Random crops of the photographs, the same on each run."""

    def __init__(self) -> None:
        self.crops = self._crops()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next crop, as the quantiser asks for it."""
        return next(self.crops, None)

    def _crops(self) -> Iterator[dict[str, np.ndarray]]:
        random = np.random.RandomState(0)
        for image in photographs():
            for _ in range(CROPS_EACH):
                side = random.randint(min(image.size) // 3, min(image.size))
                left, top = random.randint(image.width - side + 1), random.randint(image.height - side + 1)
                yield {"pixels": pixels(image.crop((left, top, left + side, top + side)), CALIBRATED_SIDE)}


def photographs() -> list[Image.Image]:
    """Those the validation ships."""
    return [Image.open(path) for path in sorted(PHOTOGRAPHS.iterdir()) if path.suffix in (".jpg", ".png")]


def main(variant: str, weights: str) -> None:
    """Exports, quantises in each way, and compares."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as work:
        command = ["export", variant, "--weights", weights, "--precision", "fp32", "--out", f"{work}/bundle"]
        subprocess.run([sys.executable, "-m", "dinoexport", *command], check=True, stdout=subprocess.DEVNULL)
        fp32 = Path(work) / "bundle" / "model.onnx"
        graph = onnx.load(fp32, load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        products = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in constants]
        files = {"fp32": fp32, "dynamic": quantise.to_int8(fp32, _folder(work, "dynamic"))[0]}
        for name, method in (("minmax", CalibrationMethod.MinMax), ("percentile", CalibrationMethod.Percentile)):
            files[f"static, {name}"] = _folder(work, name) / "model.onnx"
            quantize_static(
                fp32, files[f"static, {name}"], Crops(), op_types_to_quantize=["MatMul"], per_channel=True,
                weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, nodes_to_quantize=products,
                calibrate_method=method, extra_options={"CalibPercentile": 99.99}, use_external_data_format=True,
            )  # fmt: skip
        loaded = recipe.load(variant)
        (signature,) = family.find(loaded.family).model(loaded).graphs
        ways = [Way(runtime=r, precision=Precision.FP32, threads=cpu.usable_cpus()) for r in RUNTIMES]
        runs = {
            f"{name}, {way.runtime}": cpu.open_graphs({path: signature}, way)[signature.name]
            for way in ways
            for name, path in files.items()
        }
        for side in SIDES:
            inputs = [{"pixels": pixels(image, side)} for image in photographs()]
            exact = [runs["fp32, onnxruntime"](each) for each in inputs]
            taken = timing.in_turn(
                {name: (lambda run=run, first=inputs[0]: run(first)) for name, run in runs.items()},
                rounds=ROUNDS,
                budget_s=BUDGET_S,
            )
            base = np.array(taken["fp32, onnxruntime"].samples_ms)
            for name, run in runs.items():
                worst = max(
                    distance(answer[output], right[output]).relative_l2
                    for each, right in zip(inputs, exact, strict=True)
                    for answer in [run(each)]
                    for output in right
                )
                ratio = float(np.median(np.array(taken[name].samples_ms) / base))
                print(f"{side:4} {name:28} ratio {ratio:.2f}  worst relative L2 {worst:.4f}")


def _folder(work: str, name: str) -> Path:
    folder = Path(work) / name
    folder.mkdir()
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", nargs="?", default="vits14")
    parser.add_argument("--weights", default="synthetic:0")
    asked = parser.parse_args()
    main(asked.variant, asked.weights)

"""Files opened for one size, beside the static exports of PyTorch: `python -m benchmarks.one_size`.

The weights are the same synthetic ones in every file. Files take turns, in another order in each round. Two figures:
the shortest run of each, and the median of the ratios within a round, with its quartiles, which shows what is noise.
Peers are exported for each size alone. Counters of OpenVINO do not serve: each is the mean of all runs so far.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks import peers
from dinoexport.runtime import openvino_products, telemetry

Run = Callable[[np.ndarray], object]
OURS, GENERAL = "dinoexport, one size", "dinoexport, every size"
PEERS = {"torch.onnx, static": True, "torch.onnx, TorchScript, static": False}
SIDES = (224, 518)
HEADER = (
    "variant",
    "side",
    "runtime",
    "file",
    "shortest ms",
    "ours / theirs",
    "median of rounds",
    "quartiles",
    "rounds",
)


def peer(checkpoint: Path, side: int, path: Path, *, dynamo: bool) -> Path:
    """The file that PyTorch's exporter writes for one image of this side."""
    import torch

    warnings.simplefilter("ignore")
    path.parent.mkdir(parents=True)
    pixels = torch.zeros(1, 3, side, side)
    names = {"input_names": ["pixel_values"], "output_names": ["last_hidden_state"]}
    torch.onnx.export(
        peers.pytorch(checkpoint), (pixels,), str(path), dynamo=dynamo, verbose=False, opset_version=20, **names
    )
    return path


def openvino(path: Path, side: int, threads: int, *, fixed: bool, ours: bool) -> Run:
    """The file in OpenVINO. ours: with what the product changes in a form of one size."""
    module = telemetry.openvino()
    core = module.Core()
    model = core.read_model(path)
    if fixed:
        model.reshape({model.inputs[0].get_any_name(): [1, 3, side, side]})
        if ours:
            openvino_products.separate(model)
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()

    return lambda pixels: request.infer({0: pixels}, share_inputs=True)


def onnxruntime(path: Path, side: int, threads: int, *, fixed: bool) -> Run:
    """The file in ONNX Runtime."""
    module = telemetry.onnxruntime()
    options = module.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if fixed:
        sizes = {"batch": 1, "height": side, "width": side}
        for name, size in sizes.items():
            options.add_free_dimension_override_by_name(name, size)
    session = module.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (pixels_name,) = (tensor.name for tensor in session.get_inputs())

    return lambda pixels: session.run(None, {pixels_name: pixels})


def measure(
    files: Mapping[str, tuple[Path, bool]], runtime: str, side: int, seconds: float, threads: int
) -> dict[str, list[float]]:
    """File -> its milliseconds in each round. files: path, and whether its sizes are to be fixed."""
    pixels = np.random.RandomState(0).randn(1, 3, side, side).astype(np.float32)
    random = np.random.RandomState(1)
    if runtime == "OpenVINO":
        runs = {
            name: openvino(path, side, threads, fixed=fixed or name in PEERS, ours=name == OURS)
            for name, (path, fixed) in files.items()
        }
    else:
        runs = {name: onnxruntime(path, side, threads, fixed=fixed) for name, (path, fixed) in files.items()}
    for run in runs.values():
        run(pixels)  # reserves memory
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name in random.permutation(list(runs)):
            started = time.perf_counter()
            runs[name](pixels)
            taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def row(ours: list[float], theirs: list[float]) -> list[str]:
    """The figures of a file beside ours, in the same rounds."""
    low, middle, high = np.quantile(np.array(ours) / np.array(theirs), (0.25, 0.5, 0.75))
    return [
        f"{min(theirs):.1f}",
        f"{min(ours) / min(theirs):.3f}",
        f"{middle:.3f}",
        f"{low:.3f} to {high:.3f}",
        str(len(theirs)),
    ]


def main() -> None:
    """Prints a Markdown table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["vits14"])
    parser.add_argument("--seconds", type=float, default=40, help="of each runtime and size")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER))
    for variant in asked.variants:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            peers.write_checkpoint(variant, work / "checkpoint")
            command = peers.export_command("dinoexport", variant, work / "checkpoint", work / "ours", "fp32")
            peers.subprocess.run(command, check=True, capture_output=True)
            ours = work / "ours" / "model.onnx"
            for side in SIDES:
                files = {OURS: (ours, True), GENERAL: (ours, False)} | {
                    label: (
                        peer(work / "checkpoint", side, work / f"{label}{side}" / "model.onnx", dynamo=dynamo),
                        False,
                    )
                    for label, dynamo in PEERS.items()
                }
                for runtime in ("OpenVINO", "ONNX Runtime"):
                    found = measure(files, runtime, side, asked.seconds, asked.threads)
                    for label, taken in found.items():
                        print(
                            "|",
                            " | ".join([variant, str(side), runtime, label, *row(found[OURS], taken)]),
                            "|",
                            flush=True,
                        )


if __name__ == "__main__":
    main()

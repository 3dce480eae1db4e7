"""Files opened for one size, beside the static exports of PyTorch: `python -m benchmarks.one_size`.

The weights are the same synthetic ones in every file. Each runtime times every operator. The figure is the sum of each
operator's shortest time over many runs that take turns: other processes lengthen a run, but hardly ever the shortest
run of an operator, so that 1 % can be seen on a machine that is in use. Peers are exported for each size alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from dinoexport.runtime import openvino_products, telemetry

# Runs a file once and gives each operator's milliseconds, by the operator's name.
Profiled = Callable[[np.ndarray], Mapping[str, float]]
OURS, GENERAL = "dinoexport, one size", "dinoexport, every size"
PEERS = {"torch.onnx, static": True, "torch.onnx, TorchScript, static": False}
SIDES = (224, 518)
HEADER = ("variant", "side", "runtime", "file", "ms", "ours / theirs")


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


def openvino(path: Path, side: int, threads: int, *, fixed: bool, ours: bool) -> Profiled:
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
        "PERF_COUNT": "YES",
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(pixels: np.ndarray) -> Mapping[str, float]:
        request.infer({0: pixels}, share_inputs=True)
        operators = request.get_profiling_info()
        return {o.node_name: o.real_time.total_seconds() * 1e3 for o in operators if o.status.name == "EXECUTED"}

    return run


def onnxruntime(path: Path, side: int, threads: int, *, fixed: bool) -> Callable[[np.ndarray], Any]:
    """The file in ONNX Runtime, which writes its profile when the session ends: `profile` reads it."""
    module = telemetry.onnxruntime()
    options = module.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if fixed:
        sizes = {"batch": 1, "height": side, "width": side}
        for name, size in sizes.items():
            options.add_free_dimension_override_by_name(name, size)
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_name(f"profile-{fixed}"))
    session = module.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (pixels_name,) = (tensor.name for tensor in session.get_inputs())

    def run(pixels: np.ndarray) -> Any:
        session.run(None, {pixels_name: pixels})
        return session

    return run


def profile(session: Any) -> Mapping[str, float]:
    """Each operator's shortest time in milliseconds, over all runs of the session."""
    path = Path(session.end_profiling())
    shortest: dict[str, float] = {}
    for event in json.loads(path.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"]
            shortest[name] = min(shortest.get(name, float("inf")), event["dur"] / 1e3)
    path.unlink()
    return shortest


def measure(
    files: Mapping[str, tuple[Path, bool]], runtime: str, side: int, seconds: float, threads: int
) -> dict[str, float]:
    """File -> the sum of its operators' shortest milliseconds. files: path, and whether its sizes are to be fixed."""
    pixels = np.random.RandomState(0).randn(1, 3, side, side).astype(np.float32)
    random = np.random.RandomState(1)
    shortest: dict[str, dict[str, float]] = {name: {} for name in files}
    if runtime == "OpenVINO":
        runs: dict[str, Any] = {
            name: openvino(path, side, threads, fixed=fixed or name in PEERS, ours=name == OURS)
            for name, (path, fixed) in files.items()
        }
    else:
        runs = {name: onnxruntime(path, side, threads, fixed=fixed) for name, (path, fixed) in files.items()}
    end, sessions = time.monotonic() + seconds, {}
    while time.monotonic() < end:
        for name in random.permutation(list(runs)):
            times = runs[name](pixels)
            if runtime == "OpenVINO":
                for operator, ms in times.items():
                    shortest[name][operator] = min(shortest[name].get(operator, ms), ms)
            else:
                sessions[name] = times
    for name, session in sessions.items():
        shortest[name] = dict(profile(session))
    return {name: sum(times.values()) for name, times in shortest.items()}


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
                    for label, ms in found.items():
                        ratio = f"{found[OURS] / ms:.3f}"
                        print(f"| {variant} | {side} | {runtime} | {label} | {ms:.1f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()

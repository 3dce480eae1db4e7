"""dinoexport beside its peers, in one run: `make bench`, or `python benchmarks/run.py [--again | --quick] VARIANT …`.

Inference: every contender on the same weights and images in one process, one sample of each in turn, medians with their
spread, as ratios to dinoexport on ONNX Runtime, as a share of a large matrix product timed in turn with them, and with
the error against the plain upstream formulation in PyTorch. Export: whole processes in turn, seconds and peak memory.
Writes results/inference.md, .json and .png beside this file. `make bench QUICK=1` takes five minutes on two cores: one
variant, the leading exporter beside ours, one export of each; it prints the tables and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from dinoexport import family
from dinoexport.bench import BLAS_SETTINGS, GEMM_GFLOP, gemm
from dinoexport.config import recipe
from dinoexport.models.dinov2 import synthetic
from dinoexport.runtime import cpu, ort
from dinoexport.spec import Array, Precision, silent
from dinoexport.system import timing
from dinoexport.validation.metrics import distance
from dinoexport.weights.checkpoint import open_checkpoint

RESULTS = Path(__file__).parent / "results"
SIDES = (224, 518)
ROUNDS, EXPORT_ROUNDS = 15, 3
# For one size of all contenders of a small model, or of two of a large one.
BUDGET_S, PAIR_BUDGET_S, QUICK_BUDGET_S = 120.0, 45.0, 20.0
# Parameters from which on not every contender fits into memory beside the others.
LARGE = 2e8
OURS = "dinoexport, ONNX Runtime"
# Half of what transformers' way of resizing positions is off by; rounding is a thousandth of it.
WRONG, LOSSY = 1e-3, ("bf16", "int8")


def inference(variant: str, work: Path, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each contender and size.

    All contenders of a small model are open at once and take turns, those of any size and then those of one. A large
    one's are opened two at a time, one of the leading ones and ours on ONNX Runtime, so that memory is enough.
    """
    checkpoint = work / "checkpoint"
    large = parameters(variant) > LARGE
    makers = peers.contenders(variant, checkpoint, work, peers.LEADING if large or quick else peers.EXPORTERS)
    if quick:
        makers = {name: make for name, make in makers.items() if "torch compiled" not in name}
    fixed = [name for name in makers if name.endswith(peers.ONE_SIZE)]
    others = [name for name in makers if name not in (OURS, *fixed)]
    groups = [[OURS, *others], [OURS, *fixed]]
    if large:
        groups = [[OURS, other] for other in others if other != "torch compiled"]
    loaded = recipe.load(variant)
    model = family.find(loaded.family).model(loaded)
    weights = open_checkpoint(model, loaded, str(checkpoint / "model.safetensors"), progress=silent)
    images = [synthetic.pixels(1, side, side, seed=0) for side in SIDES]
    asked = [{"pixels": pixels} for pixels in images]
    expected = list(model.reference(weights.read, asked, precision=Precision.FP32, progress=silent))
    onnx = work / "dinoexport" / "model.onnx"
    gflop = [sum(done.flops for done in ort.executed(onnx, inputs, optimised=False)) / 1e9 for inputs in asked]
    rows: list[dict[str, Any]] = []
    for group in groups:
        runs = peers.open_those_that_run({name: makers[name] for name in group})
        for side, pixels, answer, work_gflop in zip(SIDES, images, expected, gflop, strict=True):
            budget_s = QUICK_BUDGET_S if quick else PAIR_BUDGET_S if large else BUDGET_S
            timed = _rows(runs, pixels, answer["patch_tokens"], work_gflop, budget_s)
            kept = [row for row in timed if row["contender"] != OURS or group is groups[0]]
            rows += [{"variant": variant, "side": side} | row for row in kept]
        runs.clear()  # before the next two are opened
    return rows


def _rows(
    runs: dict[str, peers.Run], pixels: Array, expected: Array, gflop: float, budget_s: float
) -> list[dict[str, Any]]:
    """What each of `runs` took for one image in turn with all others, and how far off it was."""
    errors = {name: distance(run(pixels), expected).relative_l2 for name, run in runs.items()}
    neighbours = timing.Neighbours()
    asking: dict[str, Callable[[], object]] = {name: partial(run, pixels) for name, run in runs.items()}
    taken = timing.in_turn(asking | {"peak": gemm()}, rounds=ROUNDS, budget_s=budget_s)
    # In turn like the rest, so that it has no more of a shared machine than they.
    peak = GEMM_GFLOP / taken.pop("peak").median_ms * 1e3
    share = neighbours.share()
    rows = []
    for name, latencies in taken.items():
        ratios = np.array(latencies.samples_ms) / np.array(taken[OURS].samples_ms)
        lossy = any(word in name for word in LOSSY)
        rows.append(
            {
                "contender": name,
                "ratio": float(np.median(ratios)),
                "ratio_quartiles": [float(value) for value in np.percentile(ratios, (25, 75))],
                "median_ms": latencies.median_ms,
                "spread": latencies.spread,
                "share_of_peak": gflop / latencies.median_ms * 1e3 / peak,
                "peak_gflop_per_s": peak,
                "relative_l2": errors[name],
                "wrong": errors[name] > (0.05 if lossy else WRONG),
                "others_share": share,
                "samples_ms": latencies.samples_ms,
            }
        )
    return rows


def exports(variant: str, work: Path, precision: str, rounds: int = EXPORT_ROUNDS) -> list[dict[str, Any]]:
    """A row for each way to export, with the copy of the same bytes as what the disk costs."""
    checkpoint = work / "checkpoint"
    ways = ["dinoexport", "torch.onnx", "torch.onnx, TorchScript"] + (["optimum"] if precision == "fp32" else [])
    samples: dict[str, list[tuple[float, int]]] = {way: [] for way in (*ways, "copy of the bytes")}
    for _ in range(rounds):
        for way in ways:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                out = Path(folder) / "out"
                samples[way].append(measure(peers.export_command(way, variant, checkpoint, out, precision)))
                if way == "dinoexport":
                    copy = ["cp", str(out / "model.onnx.data"), f"{folder}/copy"]
                    samples["copy of the bytes"].append(measure(copy))
    return [
        {
            "variant": variant,
            "precision": precision,
            "way": way,
            "seconds": sorted(taken)[len(taken) // 2][0],
            "peak_mb": max(peak_mb for _, peak_mb in taken),
            "ratio": float(
                np.median([mine[0] / ours[0] for mine, ours in zip(taken, samples["dinoexport"], strict=True)])
            ),
            "samples_s": [seconds for seconds, _ in taken],
            "load": round(os.getloadavg()[1], 1),
        }
        for way, taken in samples.items()
    ]


def measure(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak memory in MB of one whole process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:5])} … failed with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss // 1024


def copy_gb_per_s() -> float:
    """The best of a few copies of 256 MB within memory, read and written bytes together."""
    source = np.zeros(1 << 28, np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds) / 1e9


def markdown(result: dict[str, Any], picture: str = "") -> str:
    """The result as tables, and the name of the picture that belongs to them."""
    rounds = max((len(row["samples_s"]) for row in result["export"]), default=0)
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines = [
        "# dinoexport beside its peers",
        "",
        f"`make bench` on {machine['cpu']}, {machine['usable_cpus']} CPUs, {result['date']}: {versions}.",
        f"Memory copy {machine['copy_gb_per_s']:.0f} GB/s. Synthetic weights, batch 1, {peers.THREADS} threads,",
        "one sample of each in turn. Ratio: median of the samples' ratios to dinoexport on ONNX Runtime, with",
        "quartiles; lower is faster. Of models too large for all contenders beside each other, only the leading ones",
        "were measured, each in turn with ours on ONNX Runtime alone.",
        "",
        *_inference_table([row for row in result["inference"] if not row["contender"].endswith(peers.ONE_SIZE)]),
        "",
        "The same files told their image's size when they were opened, in turns of their own:",
        "",
        *_inference_table([row for row in result["inference"] if row["contender"].endswith(peers.ONE_SIZE)]),
    ]
    shares = [row["others_share"] for row in result["inference"]]
    if shares and max(shares) > timing.NOISY_SHARE:
        lines += [
            "",
            f"The machine was shared: other processes had up to {max(shares):.0%} of its CPUs meanwhile. Trust ratios.",
        ]
    lines += [
        "",
        "WRONG: off by more than 1e-3 from the plain upstream formulation. Away from 518 transformers resizes",
        "positions differently from upstream, so its own PyTorch is off as well, and every export of it.",
        "",
        f"Exports, the last {result['export_date']}: whole processes in turn, {rounds} of each. Median ratio to",
        "ours, median and range of the seconds, highest peak. On a virtual machine pages that nobody had before cost",
        "many times the others, so read the ratios. Load: of the machine in the five minutes before the end, these",
        "processes included; on two CPUs, more than 2 means that other processes waited too.",
        "",
        "| variant | precision | export | ratio | s | from | to | peak MB | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['variant']} | {row['precision']} | {row['way']} | {row['ratio']:.2f} | {row['seconds']:.1f} "
            f"| {min(row['samples_s']):.1f} | {max(row['samples_s']):.1f} | {row['peak_mb']} "
            f"| {row.get('load', '')} |"
            for row in result["export"]
        ),
    ]
    if picture:
        lines += ["", f"![latency against size; time and memory of export against parameters]({picture})"]
    return "\n".join(lines) + "\n"


def _inference_table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of a table, each size's fastest first."""
    lines = [
        "| variant | side | contender | ratio | quartiles | median ms | of fp32 peak | error | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (parameters(row["variant"]), row["side"], row["ratio"])):
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['variant']} | {row['side']} | {row['contender'].removesuffix(peers.ONE_SIZE)} "
            f"| {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {row['median_ms']:.0f} | {row['share_of_peak']:.0%} "
            f"| {row['relative_l2']:.0e} | {'WRONG' if row['wrong'] else ''} |"
        )
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency of the smallest model against size, and time and memory of export against parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5))
    axes[0].set_prop_cycle(color=pyplot.colormaps["tab20"].colors)
    smallest = min({row["variant"] for row in result["inference"]}, key=parameters, default="nothing")
    shown = [row for row in result["inference"] if row["variant"] == smallest]
    for name in sorted({row["contender"] for row in shown if not row["contender"].endswith(peers.ONE_SIZE)}):
        rows = [row for row in shown if row["contender"] == name]
        axes[0].plot([row["side"] for row in rows], [row["median_ms"] for row in rows], marker="o", label=name)
    axes[0].set(xlabel="pixels a side", ylabel="median ms", title=f"latency, {smallest}", yscale="log")
    axes[0].legend(fontsize=7, loc="center right", bbox_to_anchor=(-0.25, 0.5))
    for axis, key, label in ((axes[1], "seconds", "s"), (axes[2], "peak_mb", "MB")):
        for way in sorted({row["way"] for row in result["export"]}):
            rows = sorted((r for r in result["export"] if r["way"] == way), key=lambda r: parameters(r["variant"]))
            axis.plot([parameters(r["variant"]) for r in rows], [r[key] for r in rows], marker="o", label=way)
        axis.set(xlabel="parameters", ylabel=label, title=f"export, {label}", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def parameters(variant: str) -> int:
    """How many numbers the variant's checkpoint holds."""
    loaded = recipe.load(variant)
    return sum(int(np.prod(shape)) for shape in family.find(loaded.family).model(loaded).tensors.values())


def main() -> None:
    """Runs everything asked for, a variant's inference and fp32 export or one part of them after a colon.

    `VARIANT:inference` is the inference alone, `VARIANT:fp16` the export alone, in fp16.
    """
    parser = argparse.ArgumentParser()
    everything = ["vits14", "vitb14", "vitl14:inference", "vitg14:fp16", "vitg14:inference"]
    parser.add_argument("asked", nargs="*", default=everything, metavar="VARIANT[:inference|:fp32|:fp16]")
    parser.add_argument("--again", action="store_true", help="measure these again, and keep all other rows")
    parser.add_argument("--quick", action="store_true", help="one variant in five minutes; nothing is written")
    given = parser.parse_args()
    if given.quick and given.asked == everything:
        given.asked = ["vits14"]
    for name in BLAS_SETTINGS:
        os.environ.pop(name, None)  # before the processes begin that measure
    today = time.strftime("%Y-%m-%d")
    result: dict[str, Any] = {"date": today, "inference": [], "export_date": today, "export": []}
    if given.again:
        result = json.loads((RESULTS / "inference.json").read_text())
    packages = ("dinoexport", "torch", "onnxruntime", "openvino", "transformers", "optimum-onnx")
    result["machine"] = {
        "cpu": cpu.machine(),
        "usable_cpus": cpu.usable_cpus(),
        "kernel": platform.release(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "copy_gb_per_s": peers.apart(copy_gb_per_s),
        "versions": {package: version(package) for package in packages},
    }
    for asked in given.asked:
        variant, _, part = asked.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            peers.apart(peers.write_checkpoint, variant, Path(folder) / "checkpoint")
            if part in ("", "inference"):
                rows = peers.apart(inference, variant, Path(folder), given.quick)
                others = [row for row in result["inference"] if row["variant"] != variant]
                result |= {"date": today, "inference": others + rows}
            if part != "inference":
                precision = part or "fp32"
                rows = exports(variant, Path(folder), precision, 1 if given.quick else EXPORT_ROUNDS)
                same = (variant, precision)
                others = [row for row in result["export"] if (row["variant"], row["precision"]) != same]
                result |= {"export_date": today, "export": others + rows}
        if given.quick:
            continue
        # After each variant: the last one may run out of memory, and takes nothing with it.
        (RESULTS / "inference.json").write_text(json.dumps(result, indent=1) + "\n")
        picture = RESULTS / "inference.png"
        plot(result, picture)
        (RESULTS / "inference.md").write_text(markdown(result, picture.name))
    print(markdown(result))


if __name__ == "__main__":
    main()

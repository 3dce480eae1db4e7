"""Load on a real Triton server, at concurrency 1 to 32: `make soak`.

A bundle of synthetic weights is deployed to the Python backend and asked for one image a request, by our own client and
by NVIDIA's perf_analyzer in turns. Beside each level the same graph runs in this process with as many threads, so that
what the server costs is a ratio of neighbours in time, whatever else the machine does. Memory is looked at three times
a level, each page counted once though server and models share many: a larger batch takes more, the same load must not
for long. Any error ends the run.
Writes benchmarks/results/soak.md and soak.svg.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import ort
from dinoexport.serving.client import DinoClient
from dinoexport.serving.triton import model_repository
from dinoexport.spec import Arrays, Runner
from tests.triton_server import HOME, Server, environment, missing

RESULTS = Path(__file__).parent / "results"
LEVELS = (1, 2, 4, 8, 16, 32)
LOOKS = 3
CASE = "evaluation_size"
HEADER = (
    "in flight", "requests", "client, images/s", "perf_analyzer, images/s", "in process, images/s",
    "client / in process", "median ms", "99 % ms", *(f"server MB after {i + 1}/{LOOKS}" for i in range(LOOKS)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of concurrency. *_per_s: images a second; memory_mb: what the server's processes hold, at each look."""

    concurrency: int
    requests: int
    client_per_s: float
    perf_analyzer_per_s: float
    in_process_per_s: float
    p50_ms: float
    p99_ms: float
    memory_mb: tuple[int, ...]


def main() -> None:
    """Runs every level and writes the table and the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--variant", default="vits14")
    given = parser.parse_args()
    if why := missing():
        raise SystemExit(why)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server does not outlive it
    stretch_s = given.seconds / len(LEVELS) / 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = pipeline.build(pipeline.build_request(given.variant, weights="synthetic:0", out=folder / "bundle"))
        model_repository.deploy(built.folder, folder / "models", backend="python", triton="24.10")
        item = item_of(built.folder)
        run = ort.open_graph(built.folder / "model.onnx", built.manifest.graphs[0].graph())
        server = Server(folder / "models", folder)
        try:
            levels = [level(server, run, item, concurrency, stretch_s) for concurrency in LEVELS]
        finally:
            server.kill(gently=True)
    report(given.variant, given.seconds, levels)


def item_of(folder: Path) -> Arrays:
    """One of the images the bundle was judged on."""
    reference = reference_file.read(folder / bundle.REFERENCE)
    (inputs,) = [e.case.inputs for e in reference.expectations if e.case.name == CASE]
    return {name: array[:1] for name, array in inputs.items()}


def level(server: Server, run: Runner, item: Arrays, concurrency: int, stretch_s: float) -> Level:
    """A third of the time each for the client, the graph in this process, in turns, and perf_analyzer."""
    client = DinoClient(server.grpc)
    latencies_s: list[float] = []
    client_per_s, in_process_per_s, held_mb = [], [], []
    for _ in range(LOOKS):
        took_s, per_s = under_load(lambda: client(item), concurrency, stretch_s / LOOKS)
        latencies_s += took_s
        client_per_s.append(per_s)
        held_mb.append(memory_mb(server))
        # One image a call, one call at a time: what a server could at best pass on.
        in_process_per_s.append(under_load(lambda: run(item), 1, stretch_s / LOOKS)[1])
    p50_ms = 1000 * statistics.median(latencies_s)
    measured = Level(
        concurrency=concurrency,
        requests=len(latencies_s),
        client_per_s=statistics.mean(client_per_s),
        in_process_per_s=statistics.mean(in_process_per_s),
        perf_analyzer_per_s=perf_analyzer(server, client, item, concurrency, max(1000 * stretch_s / 3, 3 * p50_ms)),
        p50_ms=p50_ms,
        p99_ms=1000 * float(np.quantile(latencies_s, 0.99)),
        memory_mb=tuple(held_mb),
    )
    print(measured, flush=True)
    return measured


def under_load(ask: Callable[[], object], concurrency: int, seconds: float) -> tuple[list[float], float]:
    """(seconds each request took, requests a second) of `concurrency` threads that ask for `seconds` on end."""
    ask()
    begun = time.perf_counter()
    deadline = begun + seconds

    def one() -> list[float]:
        took = []
        while (started := time.perf_counter()) < deadline:
            ask()
            took.append(time.perf_counter() - started)
        return took

    with ThreadPoolExecutor(concurrency) as pool:
        took = [s for future in [pool.submit(one) for _ in range(concurrency)] for s in future.result()]
    return took, len(took) / (time.perf_counter() - begun)


def perf_analyzer(server: Server, client: DinoClient, item: Arrays, concurrency: int, window_ms: float) -> float:
    """Images a second as NVIDIA's own load generator measures them, in windows of `window_ms`."""
    shapes = [f"--shape={name}:{','.join(map(str, array.shape[1:]))}" for name, array in item.items()]
    with tempfile.TemporaryDirectory() as name:
        table = Path(name) / "measured.csv"
        for tensor, array in item.items():  # its own random bytes would be NaN, which is refused
            (Path(name) / tensor).write_bytes(array.tobytes())
        command = [
            HOME / "client" / "bin" / "perf_analyzer", "-m", client.served.name, "-i", "grpc",
            "-u", f"127.0.0.1:{server.grpc_port}", f"--concurrency-range={concurrency}", *shapes,
            f"--input-data={name}", f"--measurement-interval={int(window_ms)}", "--max-trials=3",
            "--stability-percentage=999", "-f", table,
        ]  # fmt: skip
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode or not table.is_file():
            raise RuntimeError(f"perf_analyzer failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        with table.open() as file:
            (row,) = csv.DictReader(file)
        return float(row["Inferences/Second"])


def memory_mb(server: Server) -> int:
    """What the server and the processes of its models hold resident, in MB; a page that n of them share is 1/n each."""
    total_kb = 0
    for process in (server.process.pid, *server.stubs("")):
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        total_kb += int(found[1]) if found else 0
    return total_kb // 1000


def report(variant: str, seconds: float, levels: list[Level]) -> None:
    """The table and the plot; the rows are what was measured, the ratio is to the direct calls beside it."""
    lines = [
        "# Load on a real Triton server",
        "",
        f"`make soak SOAK_S={seconds:g}`: {variant}, 224x224, fp32, synthetic weights, one image a request over gRPC,",
        f"Triton 2.51 with the Python backend, {os.cpu_count()} CPU cores ({platform.machine()}). Load average at the",
        f"end: {os.getloadavg()[1]:.1f}; where it exceeds the cores, read the ratios, not rates. No request failed.",
        "",
        f"| {' | '.join(HEADER)} |",
        "| ---: " * len(HEADER) + "|",
    ]
    lines += [
        f"| {x.concurrency} | {x.requests} | {x.client_per_s:.1f} | {x.perf_analyzer_per_s:.1f} "
        f"| {x.in_process_per_s:.1f} | {x.client_per_s / x.in_process_per_s:.2f} "
        f"| {x.p50_ms:.0f} | {x.p99_ms:.0f} | {' | '.join(map(str, x.memory_mb))} |"
        for x in levels
    ]
    (RESULTS / "soak.md").write_text("\n".join(lines) + "\n\n![latency](soak.svg)\n")
    plot(levels)


def plot(levels: list[Level]) -> None:
    """Latency over concurrency."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    x = [each.concurrency for each in levels]
    axes.plot(x, [each.p50_ms for each in levels], marker="o", label="median")
    axes.plot(x, [each.p99_ms for each in levels], marker="o", label="99th percentile")
    axes.set(xscale="log", yscale="log", xlabel="requests in flight", ylabel="ms a request", xticks=x)
    axes.set_xticks(x, [str(each) for each in x])
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "soak.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

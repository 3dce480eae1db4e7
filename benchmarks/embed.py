"""`python -m benchmarks.embed BUNDLE --images DIR`: the cost of `embed` beside that of a session and a decoder alone.

CPU seconds are compared, which other load on the machine changes little: those of `embed` with all its processes and
those of decoding the same images and running the same batches with one thread, in as many processes at once as `embed`
has workers: sessions beside each other slow each other down, which is not the cost of `embed`. Starting the workers
costs the same for any number of images, so `embed` runs twice, on all images and on half: the difference is what an
image costs. The resident memory of the workers is sampled on the way, for a trend.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dinoexport import bundle
from dinoexport.embed import run, sources
from dinoexport.embed.embedder import model_of
from dinoexport.embed.layout import layout_of
from dinoexport.errors import UsageError
from dinoexport.runtime import cpu, runners
from dinoexport.spec import Way

BATCH = 16


def cpu_s(who: int) -> float:
    """CPU seconds that this process, or its children that have ended, have used."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def alone(folder: Path, images: Path, count: int) -> tuple[float, float]:
    """CPU seconds an image of preparation (reading and hashing left out), and of the session in batches."""
    manifest = bundle.read_manifest(folder)
    model = model_of(manifest)
    way = runners.way_of(manifest)
    graphs = {folder / graph.file: graph.graph() for graph in manifest.graphs}
    candidate = runners.driven(
        model, cpu.open_graphs(graphs, Way(runtime=way.runtime, precision=way.precision, threads=1))
    )
    source = sources.open_source(str(images))
    names = [item.name for item in source.items()][:count]
    prepared: list[Any] = []
    started = cpu_s(resource.RUSAGE_SELF)
    for _, read in source.readers(names):
        with suppress(UsageError):  # a broken image costs embed its decoding too
            prepared.append(model.prepare("images", {}, [read()]))
    decoding = cpu_s(resource.RUSAGE_SELF) - started
    batch = min(BATCH, next(dim.max for dim in model.graphs[0].dims if dim.name == "batch"))
    batches = [
        {n: np.concatenate([item[n] for item in prepared[i : i + batch]]) for n in prepared[0]}
        for i in range(0, len(prepared), batch)
    ]
    candidate(batches[0])
    started = cpu_s(resource.RUSAGE_SELF)
    for inputs in batches:
        candidate(inputs)
    return decoding / len(names), (cpu_s(resource.RUSAGE_SELF) - started) / len(names)


def sampled(stop: threading.Event, found: list[tuple[float, int]]) -> None:
    """The largest resident set of any child, in bytes, once a second."""
    while not stop.wait(1.0):
        sizes = []
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                facts = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except OSError:
                continue
            if facts.get("PPid", "").strip() == str(os.getpid()):
                sizes.append(int(facts.get("VmRSS", "0 kB").split()[0]) * 1024)
        if sizes:
            found.append((time.monotonic(), max(sizes)))


def embedded(
    folder: Path, images: Path, out: Path, workers: int | None
) -> tuple[float, run.Embedded, list[tuple[float, int]]]:
    """(CPU seconds of all workers, what was embedded, their resident memory on the way)."""
    stop, memory = threading.Event(), []  # type: ignore[var-annotated]
    watcher = threading.Thread(target=sampled, args=(stop, memory))
    watcher.start()
    before = cpu_s(resource.RUSAGE_CHILDREN)
    try:
        found = run.embed(folder, str(images), str(out), workers=workers, max_failed=1)
    finally:
        stop.set()
        watcher.join()
    return cpu_s(resource.RUSAGE_CHILDREN) - before, found, memory


def main() -> None:
    """Measures, and prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256, help="images that are decoded and run alone")
    parser.add_argument("--workers", type=int)
    wanted = parser.parse_args()
    workers = wanted.workers or layout_of(bundle.read_manifest(wanted.bundle), None).workers
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        beside = [pool.submit(alone, wanted.bundle, wanted.images, wanted.count) for _ in range(workers)]
        decoding, session = (float(np.mean(parts)) for parts in zip(*(one.result() for one in beside), strict=True))
    names = [item.name for item in sources.open_source(str(wanted.images)).items()]
    with tempfile.TemporaryDirectory() as scratch:
        half = Path(scratch) / "half"
        for name in names[::2]:
            (half / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(wanted.images / name, half / name)
        of_half, _, _ = embedded(wanted.bundle, half, Path(scratch) / "first", wanted.workers)
        started = time.monotonic()
        of_all, found, memory = embedded(wanted.bundle, wanted.images, Path(scratch) / "second", wanted.workers)
        wall_s = time.monotonic() - started
    used = (of_all - of_half) / (len(names) - len(names[::2]))
    sizes = [size for _, size in memory]
    tenth = max(1, len(sizes) // 10)
    middle, last = sizes[4 * tenth : 5 * tenth] or sizes, sizes[-2 * tenth : -tenth] or sizes
    print(json.dumps({
        "rows": found.rows,
        "wall_s": round(wall_s, 1),
        "workers": found.layout and found.layout.workers,
        "decoding_ms": round(decoding * 1e3, 2),
        "session_ms": round(session * 1e3, 2),
        "embed_ms": round(used * 1e3, 2),
        "start_s": round(of_all - used * len(names), 1),
        "share": round((decoding + session) / used, 3),
        "resident_mb_middle": round(float(np.median(middle)) / 1e6, 1),
        "resident_mb_late": round(float(np.median(last)) / 1e6, 1),
        "resident_mb_peak": round(max(sizes) / 1e6, 1),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()

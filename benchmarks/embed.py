"""`python -m benchmarks.embed BUNDLE --images DIR`: the cost of `embed` beside that of its decoder and session alone.

Each of as many processes as `embed` would use takes a few shards. For each shard it prepares the images alone, runs the
same batches in the session alone, and embeds the shard as a worker does, in turn and in alternating order; the CPU
seconds of the three are compared. One process does all of it with one session, seconds apart, so that a load on the
machine, another session or other memory changes both sides alike. Reading, hashing and writing count for `embed` only.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dinoexport import bundle
from dinoexport.embed import plan as plans
from dinoexport.embed import run
from dinoexport.embed.embedder import Embedder, Job
from dinoexport.embed.layout import layout_of
from dinoexport.errors import UsageError
from dinoexport.system import store


def cpu_s() -> float:
    """CPU seconds that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def resident_mb() -> float:
    """The resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1e3


def alone(embedder: Embedder, names: list[str], batch: int) -> tuple[float, float]:
    """CPU seconds of preparation (reading left out), and of the session in the batches that `embed` runs."""
    prepared: list[Any] = []
    decoding = 0.0
    for _, read in embedder._source.readers(names):
        encoded = read()
        started = cpu_s()
        with suppress(UsageError):  # a broken image costs embed its decoding too
            prepared.append(embedder._model.prepare("images", {}, [encoded]))
        decoding += cpu_s() - started
    batches = [
        {n: np.concatenate([item[n] for item in prepared[i : i + batch]]) for n in prepared[0]}
        for i in range(0, len(prepared), batch)
    ]
    started = cpu_s()
    for inputs in batches:
        embedder._candidate(inputs)
    return decoding, cpu_s() - started


def measured(job: Job, shards: list[int]) -> list[dict[str, float]]:
    """Of each shard: how many images it has, CPU seconds of decoding, of the session, and of `embed`."""
    embedder = Embedder(job)
    plan = plans.read_all(store.open_place(job.out))[0]
    found = []
    for turn, shard in enumerate(shards):
        names = plans.items_of(store.open_place(job.out), plan, shard)
        if turn == 0:
            alone(embedder, names, plan.settings.batch)  # the first runs are slower
        sides: dict[str, float] = {"images": len(names)}
        for side in ("alone", "embed") if turn % 2 else ("embed", "alone"):
            if side == "alone":
                sides["decoding"], sides["session"] = alone(embedder, names, plan.settings.batch)
            else:
                started = cpu_s()
                embedder.embed(plan, shard)
                sides["embed"] = cpu_s() - started
        found.append(sides | {"resident_mb": resident_mb()})
    return found


def main() -> None:
    """Measures, and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=8, help="shards that each process takes")
    parser.add_argument("--workers", type=int)
    given = parser.parse_args()
    layout = layout_of(bundle.read_manifest(given.bundle), given.workers)
    count = layout.workers * given.turns + 1
    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(scratch) / "out")
        # The plan, and the first shard as a user has it; the other shards are measured.
        run.embed(given.bundle, str(given.images), out, shards=count, part=(0, count), workers=1, max_failed=1)
        job = Job(
            bundle=str(given.bundle.absolute()),
            out=out,
            images=str(given.images.absolute()),
            threads=layout.threads,
            decoders=layout.decoders,
        )
        shares = [list(range(1 + worker, count, layout.workers)) for worker in range(layout.workers)]
        with ProcessPoolExecutor(layout.workers, mp_context=get_context("spawn")) as pool:
            turns = [turn for found in pool.map(measured, [job] * layout.workers, shares) for turn in found]
    shares_of = sorted((turn["decoding"] + turn["session"]) / turn["embed"] for turn in turns)
    total = {side: sum(turn[side] for turn in turns) for side in ("images", "decoding", "session", "embed")}
    print(json.dumps({
        "images": round(total["images"]),
        "workers": layout.workers,
        "turns": len(turns),
        **{f"{side}_ms": round(1e3 * total[side] / total["images"], 2) for side in ("decoding", "session", "embed")},
        "share": round((total["decoding"] + total["session"]) / total["embed"], 3),
        "share_median": round(median(shares_of), 3),
        "share_quartiles": [round(float(q), 3) for q in np.quantile(shares_of, (0.25, 0.75))],
        "resident_mb": [round(turn["resident_mb"]) for turn in turns],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()

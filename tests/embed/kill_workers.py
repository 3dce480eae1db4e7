"""`python -m tests.embed.kill_workers BUNDLE IMAGES OUT KILLS SEED`: two runners on one folder, killed at random.

Each runner is a fork of this process, so that a start takes no second and kills land in the midst of reading, running,
writing and renaming. Prints what is there in the end as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from dinoexport.embed import plan as plans
from dinoexport.embed import run
from dinoexport.embed.embedder import Embedder, Job
from dinoexport.system import store


def work(job: Job, seed: int) -> None:
    """Does whatever shard is missing, in an order of its own; ends when none is."""
    place = store.open_place(job.out)
    (plan,) = plans.read_all(place)
    embedder = Embedder(job)
    while missing := [s for s in range(plan.shards) if not (Path(job.out) / plan.part(s)).exists()]:
        embedder.embed(plan, random.Random(f"{seed} {len(missing)}").choice(missing))


def main(bundle: str, images: str, out: str, kills: int, seed: int) -> None:
    generator = random.Random(seed)
    # The plan alone: no shard is I modulo N for an I that no shard has.
    run.embed(Path(bundle), images, out, shards=60, part=(99_999, 100_000), max_failed=1)
    job = Job(bundle=bundle, out=out, images=images, threads=1, decoders=1)
    done = lost = 0
    while done < kills:
        runners = []
        for number in range(2):
            pid = os.fork()
            if not pid:
                work(job, seed + done + number)
                os._exit(0)
            runners.append(pid)
        time.sleep(generator.uniform(0.0, 0.4))
        for pid in runners:
            os.kill(pid, signal.SIGKILL)
            lost += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        done = lost
        parts = sorted(Path(out).glob("*.parquet"))
        if len(parts) == 60 and done < kills:  # so that there is always something to be killed at
            for part in generator.sample(parts, 30):
                part.unlink()
    run.embed(Path(bundle), images, out, max_failed=1, workers=1)
    rows = [name for part in Path(out).glob("*.parquet") for name in pq.read_table(part)["path"].to_pylist()]
    left = [path.name for path in Path(out).rglob("*.partial")]
    print(json.dumps({"kills": lost, "rows": len(rows), "distinct": len(set(rows)), "left": left}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]))

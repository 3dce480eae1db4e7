"""`python -m benchmarks.embed_endurance kills|restart|memory`: what `embed` withstands, with a tiny bundle made for it.

kills: `dinoexport embed` as a user starts it, with two workers; at a random moment SIGKILL hits the command with its
workers, the command alone, or one worker, and the same command is given again. Only what died of the signal counts as a
kill. When the run is finished, its parts are compared byte for byte with those of a run that nobody disturbed, its rows
with the images, and the next run begins.
restart: a finished run of 1,000 shards is given again, as a whole process.
memory: the resident memory of each worker over 50,000 images, at every tenth of them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from dinoexport.embed import run
from tests.attack import kit

ALL, COMMAND, WORKER = "the command and its workers", "the command alone", "one worker"


def fill(folder: Path, count: int, distinct: int) -> list[str]:
    """`count` names of `distinct` small JPEGs, hard links in a hundred folders; every fiftieth picture is cut short."""
    pictures = folder.with_name(f"{folder.name}-pictures")
    pictures.mkdir()
    for i in range(distinct):
        small = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((96 + i % 7 * 16, 80 + i % 5 * 24), Image.Resampling.BICUBIC).save(out, "JPEG")
        content = out.getvalue()
        (pictures / str(i)).write_bytes(content[: len(content) // 2] if i % 50 == 7 else content)
    names = [f"{i % 100:02d}/{i:06d}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(pictures / str(i % distinct), folder / name)
    return names


def small_bundle(folder: Path) -> Path:
    """A bundle of one block that passed; made in another process."""
    recipe = kit.narrow_recipe(folder)
    out = folder / "bundle"
    words = ["build", str(recipe), "--weights", "synthetic:0", "--out", str(out), "--target", "cpu"]
    subprocess.run([sys.executable, "-m", "dinoexport", *words], check=True, capture_output=True)
    return out


def command(bundle: Path, images: Path, out: Path, shards: int) -> list[str]:
    """`dinoexport embed` as a process with two workers."""
    words = ["embed", str(bundle), "--images", str(images), "--out", str(out), "--shards", str(shards)]
    return [sys.executable, "-m", "dinoexport", *words, "--workers", "2", "--max-failed", "100%"]


def hashes(out: Path) -> dict[str, str]:
    """The SHA-256 of each part."""
    return {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in sorted(out.glob("*.parquet"))}


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@dataclass(kw_only=True)
class _Kills:
    """What was killed, what was wrong then. begin_s, work_s: an undisturbed run's, before and from its first part."""

    chance: random.Random
    begin_s: float = 0.0
    work_s: float = 0.0
    found: Counter[str] = field(default_factory=Counter)
    parts_there: Counter[str] = field(default_factory=lambda: Counter(none=0, some=0, all=0))
    faults: Counter[str] = field(
        default_factory=lambda: Counter(lost=0, doubled=0, other_bytes=0, left_behind=0, ended_otherwise=0)
    )


def kills(count: int, seed: int, items: int, shards: int) -> dict[str, Any]:
    """Kills `count` times and more until the run that is under way is finished; faults are counted, none stops it."""
    state = _Kills(chance=random.Random(seed))  # noqa: S311 (which moment, no secret)
    faults, runs = state.faults, 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bundle = small_bundle(work)
        names = fill(work / "images", items, min(items, 400))
        undisturbed = work / "undisturbed"
        started = time.monotonic()
        process = subprocess.Popen(command(bundle, work / "images", undisturbed, shards), stdout=subprocess.DEVNULL)
        _wait(process, undisturbed, 0)
        state.begin_s = time.monotonic() - started
        if process.wait():
            raise SystemExit("the undisturbed run failed")
        state.work_s = time.monotonic() - started - state.begin_s
        right = hashes(undisturbed)
        while state.found.total() < count:
            runs += 1
            out = work / f"run-{runs}"
            words = command(bundle, work / "images", out, shards)
            while state.found.total() < count and _disturbed(words, out, shards, state):
                pass
            subprocess.run(words, check=True, capture_output=True)
            rows = Counter(name for part in out.glob("*.parquet") for name in pq.read_table(part)["path"].to_pylist())
            faults["lost"] += len(set(names) - rows.keys())
            faults["doubled"] += sum(rows.values()) - len(rows) + len(rows.keys() - set(names))
            faults["other_bytes"] += hashes(out) != right
            faults["left_behind"] += sum(1 for path in out.rglob("*") if path.name.endswith(".partial"))
            faults["other_bytes"] += json.loads((out / "_SUCCESS.json").read_text())["rows"] != items
            print(runs, dict(state.found), dict(state.parts_there), dict(faults), file=sys.stderr, flush=True)
            shutil.rmtree(out)
    return {
        "kills": dict(state.found),
        "total": state.found.total(),
        "when_parts_were_there": dict(state.parts_there),
        "runs": runs,
        "images": items,
        "shards": shards,
        "seed": seed,
        "faults": dict(faults),
    }


def _parts(out: Path) -> int:
    return sum(1 for _ in out.glob("*.parquet"))


def _wait(process: subprocess.Popen[bytes], out: Path, parts: int) -> None:
    """Until the process has written more than `parts` parts, or has ended."""
    while process.poll() is None and _parts(out) <= parts:
        time.sleep(0.005)


def _disturbed(words: list[str], out: Path, shards: int, state: _Kills) -> bool:
    """Runs the command and kills somebody at a random moment; False if it was finished, with or without a kill.

    Two of three moments are counted from the first part that it writes, because half of its time is its start.
    """
    chance, before = state.chance, _parts(out)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0)
    ends = time.monotonic() + chance.uniform(0.2, state.begin_s + state.work_s)
    if chance.random() < 2 / 3:
        _wait(process, out, before)
        ends = time.monotonic() + chance.uniform(0.0, state.work_s * (shards - before) / shards)
    while time.monotonic() < ends and process.poll() is None:
        time.sleep(0.002)
    whom = chance.choice((ALL, ALL, COMMAND, WORKER))
    parts = _parts(out)
    killed = _kill(process, whom, chance)
    assert process.stderr is not None
    said = process.stderr.read()  # until the workers have ended too: they hold its other end
    code = process.wait()
    if killed and (whom == WORKER or code == -signal.SIGKILL):
        state.found[whom] += 1
        state.parts_there["none" if not parts else "all" if parts == shards else "some"] += 1
    if code not in (0, -signal.SIGKILL):
        state.faults["ended_otherwise"] += 1
        print(said.decode(errors="replace")[-2000:], file=sys.stderr)
    return code != 0


def _kill(process: subprocess.Popen[bytes], whom: str, chance: random.Random) -> bool:
    """Sends the signal; for a worker, whether it died of that. The command stands still until that is known."""
    if process.poll() is not None:
        return False
    if whom == ALL:
        os.killpg(process.pid, signal.SIGKILL)
        return True
    if whom == COMMAND:
        process.kill()
        return True
    process.send_signal(signal.SIGSTOP)
    victims = [pid for pid in children(process.pid) if _stat(pid)[0] != "Z"]
    died = False
    if victims:
        victim = chance.choice(victims)
        os.kill(victim, signal.SIGKILL)
        while _stat(victim)[0] != "Z":
            time.sleep(0.001)
        died = int(_stat(victim)[-1]) == signal.SIGKILL
    process.send_signal(signal.SIGCONT)
    return died


def _stat(pid: int) -> list[str]:
    """A process's state and what follows it in /proc/PID/stat, its exit status last; a zombie's if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0"]


def restart(shards: int) -> dict[str, Any]:
    """Seconds of a whole process that finds a finished run."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bundle = small_bundle(work)
        fill(work / "images", 2 * shards, 400)
        words = command(bundle, work / "images", work / "out", shards)
        subprocess.run(words, check=True, capture_output=True)
        wall, used = [], []
        for _ in range(5):
            before, started = _children_cpu_s(), time.monotonic()
            subprocess.run(words, check=True, capture_output=True)
            wall.append(time.monotonic() - started)
            used.append(_children_cpu_s() - before)
    return {
        "shards": shards,
        "wall_s": [round(value, 2) for value in sorted(wall)],
        "cpu_s": [round(value, 2) for value in sorted(used)],
    }


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(items: int) -> dict[str, Any]:
    """Megabytes of each worker and of the command itself at every tenth of the images.

    widest_after_the_first_tenth: by how much the largest median of a tenth is above the smallest.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bundle = small_bundle(work)
        fill(work / "images", items, 500)
        done, stop = [0], threading.Event()
        samples: list[tuple[float, int, list[int]]] = []

        def sample() -> None:
            while not stop.wait(0.5):
                sizes = [size for pid in sorted(children(os.getpid())) if (size := _resident_bytes(pid))]
                if done[0] and sizes:
                    samples.append((done[0] / items, _resident_bytes(os.getpid()), sizes))

        def watch(state: run.State) -> None:
            done[0] = state.rows

        watcher = threading.Thread(target=sample)
        watcher.start()
        before_s = _children_cpu_s()
        started = time.monotonic()
        try:
            found = run.embed(bundle, str(work / "images"), str(work / "out"), workers=2, max_failed=1, watch=watch)
        finally:
            stop.set()
            watcher.join()
        seconds = time.monotonic() - started
        cpu_s = _children_cpu_s() - before_s
    tenths = [[s for share, _, s in samples if i <= share * 10 < i + 1 and len(s) == 2] for i in range(10)]
    workers = [[round(median(sizes[w] for sizes in some) / 1e6, 1) for w in (0, 1)] for some in tenths if some]
    parents = [[p for share, p, _ in samples if i <= share * 10 < i + 1] for i in range(10)]
    return {
        "images": found.rows,
        "failed": found.failed,
        "shards": found.shards,
        "seconds": round(seconds),
        "workers_cpu_ms_an_image": round(1000 * cpu_s / items, 2),
        "workers_mb_by_tenths": workers,
        "command_mb_by_tenths": [round(median(some) / 1e6, 1) for some in parents if some],
        "growth_after_the_first_tenth": [round(workers[-1][w] / workers[1][w] - 1, 4) for w in (0, 1)],
        "widest_after_the_first_tenth": [
            round(max(some[w] for some in workers[1:]) / min(some[w] for some in workers[1:]) - 1, 4) for w in (0, 1)
        ],
    }


def _resident_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def main() -> None:
    """Runs one of the three, and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    kill = verbs.add_parser("kills")
    kill.add_argument("--count", type=int, default=200)
    kill.add_argument("--seed", type=int, default=0)
    kill.add_argument("--images", type=int, default=2000)
    kill.add_argument("--shards", type=int, default=200)
    verbs.add_parser("restart").add_argument("--shards", type=int, default=1000)
    verbs.add_parser("memory").add_argument("--images", type=int, default=50_000)
    given = parser.parse_args()
    chosen: dict[str, Callable[[], dict[str, Any]]] = {
        "kills": lambda: kills(given.count, given.seed, given.images, given.shards),
        "restart": lambda: restart(given.shards),
        "memory": lambda: memory(given.images),
    }
    print(json.dumps(chosen[given.verb](), indent=1))


if __name__ == "__main__":
    main()

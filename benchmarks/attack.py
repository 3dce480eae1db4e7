"""A thousand kills and two thousand hostile inputs against this copy of the product; one table, whose faults are all 0.

    python -m benchmarks.attack --kills 1000 --inputs 2000 --seed 0 --out benchmarks/results/attack.md

Kills: a process is killed, or gets SIGINT or SIGTERM, before one of its file operations; what it leaves is looked at,
then the same verb is run again. Inputs: command lines on files, folders, words and outputs that are wrong on purpose,
each in a forked process whose time and memory are watched. Every fault is printed with what repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from dinoexport.family import registry
from dinoexport.serving.triton import batching, served_models
from tests.attack import commands, hostile, kit, scenarios

Rows = list[dict[str, object]]
_SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
_KILL_COLUMNS = ("half done", "another state when repeated", "cannot be repeated", "left behind", "other ends")
_INPUT_COLUMNS = (
    "traceback", "hangs", "memory", "dies", "no error said", "steers the terminal", "accepted",
    "touches what is not ours",
)  # fmt: skip


def kills(count: int, scratch: Path, things: hostile.Kit, rng: random.Random, stride: int) -> tuple[Rows, list[str]]:
    """At least `count` kills over all verbs: the table's rows, and a line for each fault."""
    small = kit.small_bundle(scratch, things.bundle)
    public = things.key.with_name("verify.pem")
    found: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    for turn in itertools.count():
        wanted: list[tuple[scenarios.Scenario, signal.Signals, Iterator[int] | range]] = []
        for scenario in (
            *scenarios.of_deploying(things.bundle),
            *scenarios.of_signing(small, things.key, public),
            *scenarios.of_publishing(),
        ):
            wanted += [(scenario, by, range(1 << 20)) for by in _SIGNALS]
        if turn == 0:
            for scenario in scenarios.of_building(things.recipe):
                wanted += [(scenario, by, range(rng.randrange(stride), 1 << 20, stride)) for by in _SIGNALS]
        for scenario, by, numbers in wanted:
            started = time.monotonic()
            attacked = scenarios.attack(scenario, scratch / "attacked", by=by, numbers=numbers)
            key = (scenario.verb, by.name)
            found[key] += attacked.kills
            faults += attacked.faults
            print(f"{scenario.verb} {by.name}: {attacked.kills} in {time.monotonic() - started:.0f} s", flush=True)
            for fault in attacked.faults:
                print(f"  FAULT {fault}", flush=True)
        if found.total() >= count:
            break
    rows = [
        {"verb": verb, "by": by, "kills": number}
        | {
            column: sum(f.startswith(f"{verb}, {by} ") and _column(f) == column for f in faults)
            for column in _KILL_COLUMNS
        }
        for (verb, by), number in sorted(found.items())
    ]
    return rows, faults


def _column(fault: str) -> str:
    words = {
        "neither": "half done", "half done": "half done", "another state": "another state when repeated",
        "fails": "cannot be repeated", "left behind": "left behind",
    }  # fmt: skip
    return next((column for word, column in words.items() if word in fault), "other ends")


def inputs(
    count: int, scratch: Path, things: hostile.Kit, rng: random.Random
) -> tuple[list[dict[str, object]], list[str]]:
    """`count` hostile command lines: the table's rows by kind, and a line for each fault."""
    found: dict[str, Counter[str]] = {}
    faults: list[str] = []
    for number, attempt in zip(range(count), hostile.attempts(things, scratch / "hostile", rng), strict=False):
        ended, wrong = hostile_run(attempt, scratch / "hostile" / "here")
        row = found.setdefault(attempt.kind, Counter())
        row["inputs"] += 1
        row.update(wrong)
        row["longest, s"] = max(row["longest, s"], round(ended.seconds))
        row["most memory, MB"] = max(row["most memory, MB"], ended.grown_bytes >> 20)
        for fault in wrong:
            faults.append(f"{attempt.kind}: {fault}: {attempt.arguments!r}: {ended.words[-600:]!r}")
            print(f"  FAULT {faults[-1]}", flush=True)
            kept = scratch / "faults" / str(number)
            shutil.copytree(scratch / "hostile" / "here", kept, symlinks=True, ignore=_special)
        if number % 100 == 99:
            print(f"{number + 1} inputs, {len(faults)} faults", flush=True)
    rows = [
        {
            "kind": kind,
            "inputs": row["inputs"],
            "longest, s": row["longest, s"],
            "most memory, MB": row["most memory, MB"],
        }
        | {column: row[column] for column in _INPUT_COLUMNS}
        for kind, row in found.items()
    ]
    return rows, faults


def hostile_run(attempt: hostile.Attempt, folder: Path) -> tuple[commands.Ended, list[str]]:
    """How the command line ended, and its faults."""
    before = None if attempt.victim is None else attempt.victim.read_bytes()
    ended = commands.run(attempt.arguments, folder)
    wrong = ended.faults
    if attempt.refused and ended.status == 0:
        wrong.append("accepted")
    if attempt.victim is not None and (not attempt.victim.is_file() or attempt.victim.read_bytes() != before):
        wrong.append("touches what is not ours")
    if list(folder.rglob("PWNED")):
        wrong.append("touches what is not ours")
    return ended, wrong


def _special(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_file() and not (Path(folder) / name).is_dir()]


def _table(rows: Rows) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Prints the tables, writes them to --out, and returns 1 where any fault was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument(
        "--stride", type=int, default=8, help="a whole build takes seconds: killed at every so many of its operations"
    )
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--scratch", type=Path, default=Path("build/attack"))
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    rng, started = random.Random(seed), time.monotonic()  # noqa: S311 (repeatable, no secret)
    scratch = given.scratch.absolute()
    shutil.rmtree(scratch, ignore_errors=True)
    things = kit.make(scratch / "kit")
    # Nothing is timed for a deployment that is killed: no runtime is opened in a process that is forked.
    measured, entry_points = served_models._measured, registry.entry_points
    registry.entry_points = cache(entry_points)  # a third of a deployment's time
    served_models._measured = lambda *_: batching.unmeasured((), "", 4)
    killed, kill_faults = kills(given.kills, scratch, things, rng, given.stride) if given.kills else ([], [])
    served_models._measured, registry.entry_points = measured, entry_points
    commands.load()  # only now: a process that is small is forked faster
    asked, input_faults = inputs(given.inputs, scratch, things, rng) if given.inputs else ([], [])
    faults = kill_faults + input_faults
    total = sum(int(str(row["kills"])) for row in killed)
    head = (
        f"{total:,} kills and {given.inputs:,} hostile inputs, seed {seed}, {datetime.now(UTC):%Y-%m-%d}, "
        f"{(time.monotonic() - started) / 60:.0f} minutes, Python {platform.python_version()}. "
        f"Faults: {len(faults)}. Made by `make attack`."
    )
    text = "\n".join(
        [
            "# Attack",
            "",
            head,
            *(("", "## Kills", "", _table(killed)) if killed else ()),
            *(("", "## Hostile inputs", "", _table(asked)) if asked else ()),
            *(("", "## Faults", "", *(f"- {fault!r}" for fault in faults)) if faults else ()),
            "",
        ]
    )
    print(text)
    if given.out is not None:
        given.out.write_text(text)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

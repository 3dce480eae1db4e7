"""A thousand kills and two thousand hostile inputs against this copy of the product; one table, whose faults are all 0.

    python -m benchmarks.attack --kills 1000 --inputs 2000 --seed 0 --out benchmarks/results/attack.md

Kills: a process is killed, or gets SIGINT or SIGTERM, before one of its file operations; what it leaves is looked at,
then the same verb is run again. Inputs: command lines on files, folders, words and outputs that are wrong on purpose,
each in a forked process whose time and memory are watched. Every fault is printed with what repeats it. What was done
is kept in --scratch: the same seed goes on where it was ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from dinoexport.family import registry
from dinoexport.serving.triton import batching, served_models
from tests.attack import commands, hostile, kit, scenarios, verb_scenarios

Rows = list[dict[str, object]]
_SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
_STARTED = time.monotonic()
_KILL_COLUMNS = ("half done", "another state when repeated", "cannot be repeated", "left behind", "other ends")
_MOST = ("longest, s", "most memory, MB")
_INPUT_COLUMNS = (
    "traceback", "hangs", "memory", "dies", "no error said", "steers the terminal", "accepted",
    "touches what is not ours",
)  # fmt: skip


@dataclass(kw_only=True)
class Found:
    """What was found so far, kept in a file. kills: by the scenario's number, verb and signal; inputs: by kind."""

    path: Path
    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, dict[str, int]] = field(default_factory=dict)
    kill_faults: list[str] = field(default_factory=list)
    input_faults: list[str] = field(default_factory=list)
    minutes: float = 0.0

    def keep(self, minutes: float) -> None:
        """Writes it, by rename."""
        content = {**asdict(self), "path": str(self.path), "minutes": self.minutes + minutes}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.replace(self.path)

    @classmethod
    def of(cls, path: Path, seed: int | None) -> Found:
        """What an earlier run with this seed left; nothing is left of another one."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_text())
            if seed == content["seed"]:
                return cls(**{**content, "path": path})
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        return cls(path=path, seed=random.SystemRandom().randrange(10**6) if seed is None else seed)


def kills(count: int, things: hostile.Kit, found: Found, stride: int) -> None:
    """At least `count` kills over all verbs."""
    scratch, rng = found.path.parent, random.Random(found.seed)  # noqa: S311 (repeatable, no secret)
    small = kit.small_bundle(scratch, things.bundle)
    public = things.key.with_name("verify.pem")
    for turn in itertools.count():
        wanted: list[tuple[scenarios.Scenario, signal.Signals, Iterator[int] | range]] = []
        for scenario in (
            *scenarios.of_deploying(things.bundle),
            *scenarios.of_signing(small, things.key, public),
            *scenarios.of_publishing(),
        ):
            wanted += [(scenario, by, range(1 << 20)) for by in _SIGNALS]
        if turn == 0 and stride:
            for scenario in (
                *scenarios.of_building(things.recipe),
                *verb_scenarios.of_compiling(scratch, things.bundle),
                *verb_scenarios.of_fitting(things.bundle, things.images),
                *verb_scenarios.of_embedding(things.bundle, things.images),
            ):
                wanted += [(scenario, by, range(rng.randrange(stride), 1 << 20, stride)) for by in _SIGNALS]
        for number, (scenario, by, numbers) in enumerate(wanted):
            key, started = f"{turn}.{number} {scenario.verb}/{by.name}", time.monotonic()
            if key in found.kills:
                continue
            shutil.rmtree(scratch / "attacked", ignore_errors=True)
            attacked = scenarios.attack(scenario, scratch / "attacked", by=by, numbers=numbers)
            found.kills[key] = attacked.kills
            found.kill_faults += attacked.faults
            print(f"{scenario.verb} {by.name}: {attacked.kills} in {time.monotonic() - started:.0f} s", flush=True)
            for fault in attacked.faults:
                print(f"  FAULT {fault}", flush=True)
            found.keep(_minutes())
        if sum(found.kills.values()) >= count:
            return


def _kill_rows(found: Found) -> Rows:
    total: Counter[tuple[str, str]] = Counter()
    for key, number in found.kills.items():
        verb, _, by = key.partition(" ")[2].rpartition("/")
        total[verb, by] += number
    return [
        {"verb": verb, "by": by, "kills": number}
        | {
            column: sum(f.startswith(f"{verb}, {by} ") and _column(f) == column for f in found.kill_faults)
            for column in _KILL_COLUMNS
        }
        for (verb, by), number in sorted(total.items())
    ]


def _minutes() -> float:
    return (time.monotonic() - _STARTED) / 60


def _column(fault: str) -> str:
    words = {
        "neither": "half done", "half done": "half done", "another state": "another state when repeated",
        "fails": "cannot be repeated", "left behind": "left behind",
    }  # fmt: skip
    return next((column for word, column in words.items() if word in fault), "other ends")


def inputs(count: int, things: hostile.Kit, found: Found) -> None:
    """`count` hostile command lines."""
    scratch, rng = found.path.parent, random.Random(found.seed + 1)  # noqa: S311
    before = sum(row["inputs"] for row in found.inputs.values())
    for number, attempt in zip(range(count), hostile.attempts(things, scratch / "hostile", rng), strict=False):
        if number < before:
            continue
        ended, wrong = hostile_run(attempt, scratch / "hostile" / "here")
        row = found.inputs.setdefault(attempt.kind, dict.fromkeys(("inputs", *_MOST, *_INPUT_COLUMNS), 0))
        row["inputs"] += 1
        for fault in wrong:
            row[fault] += 1
        for column, value in zip(_MOST, (round(ended.seconds), ended.grown_bytes >> 20), strict=True):
            row[column] = max(row[column], value)
        for fault in wrong:
            found.input_faults.append(f"{attempt.kind}: {fault}: {attempt.arguments!r}: {ended.words[-600:]!r}")
            print(f"  FAULT {number} {found.input_faults[-1]}", flush=True)
            kept = scratch / "faults" / str(number)
            shutil.copytree(scratch / "hostile" / "here", kept, symlinks=True, ignore=_special, dirs_exist_ok=True)
        if number % 50 == 49:
            found.keep(_minutes())
            print(f"{number + 1} inputs, {len(found.input_faults)} faults", flush=True)
    found.keep(_minutes())


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
        "--stride",
        type=int,
        default=8,
        help="a whole build, compile, fit or embed takes seconds: killed at every so many of its operations; 0: none",
    )
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--scratch", type=Path, default=Path("build/attack"))
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    found = Found.of(given.scratch.absolute() / "found.json", given.seed)
    print(f"seed {found.seed}", flush=True)
    things = kit.make(found.path.parent / "kit")
    # Nothing is timed for a deployment that is killed: no runtime is opened in a process that is forked.
    measured, entry_points = served_models._measured, registry.entry_points
    registry.entry_points = cache(entry_points)  # a third of a deployment's time
    served_models._measured = lambda *_: batching.unmeasured((), "", 4)
    if given.kills:
        kills(given.kills, things, found, given.stride)
    served_models._measured, registry.entry_points = measured, entry_points
    commands.load()  # only now: a process that is small is forked faster
    if given.inputs:
        inputs(given.inputs, things, found)
    faults = found.kill_faults + found.input_faults
    asked: list[dict[str, Any]] = [{"kind": kind, **row} for kind, row in found.inputs.items()]
    head = (
        f"{sum(found.kills.values()):,} kills and {sum(row['inputs'] for row in asked):,} hostile inputs, seed "
        f"{found.seed}, {datetime.now(UTC):%Y-%m-%d}, {found.minutes + _minutes():.0f} minutes, "
        f"Python {platform.python_version()}. Faults: {len(faults)}. Made by `make attack`."
    )
    text = "\n".join(
        [
            "# Attack",
            "",
            head,
            *(("", "## Kills", "", _table(_kill_rows(found))) if found.kills else ()),
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

"""Workers and their shards, with workers that are functions of this process: who gets what, who is replaced."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinoexport.embed import local
from dinoexport.embed.embedder import Job
from dinoexport.embed.local import ShardTask
from dinoexport.embed.plan import Done, Plan
from dinoexport.errors import BuildError, UsageError
from tests.embed.test_run_parts import SETTINGS

JOB = Job(bundle="b", out="o", images="i", threads=1, decoders=1)
PLAN = Plan(
    generation=0, shards=9, items=9, image_bytes=9, listing_sha256="0" * 64, lists="0-" + "0" * 12, settings=SETTINGS
)  # fmt: skip
DONE = {"rows": 3, "failed": 1, "sha256": "0" * 64, "size_bytes": 9}


class Process:
    """Answers each order at once with what `does` writes; it ends when that raises Died, or its input is closed."""

    def __init__(self, end: int, does: Callable[[dict[str, Any], Callable[..., None]], None]) -> None:
        self.end, self.does, self.code = end, does, 0
        self.stdin = self
        self.open = True

    def say(self, **message: Any) -> None:
        os.write(self.end, json.dumps(message).encode() + b"\n")

    def write(self, raw: bytes) -> None:
        assert raw.endswith(b"\n")
        try:
            self.does(json.loads(raw), self.say)
        except Died as died:
            self.code = died.code
            self.close()

    def flush(self) -> None: ...

    def close(self) -> None:
        if self.open:
            os.close(self.end)
        self.open = False

    def wait(self, timeout: float | None = None) -> int:
        assert timeout in (None, 10) and not self.open
        return self.code


class Died(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


class Workers:
    """What each worker was given; `does` is what all of them do with it."""

    def __init__(
        self, does: Callable[[int, dict[str, Any], Callable[..., None]], None], *, readies: bool = True
    ) -> None:
        self.does, self.readies = does, readies
        self.orders: list[tuple[int, dict[str, Any]]] = []
        self.environments: list[dict[str, str]] = []
        self.processes: list[Process] = []

    def start(self, _job: Job, environment: dict[str, str], log: Path) -> Any:
        number = int(log.stem)
        self.environments.append(environment)
        log.write_text("the last line\n")

        def one(order: dict[str, Any], say: Callable[..., None]) -> None:
            self.orders.append((number, order))
            self.does(number, order, say)

        pipe, end = os.pipe()
        process = Process(end, one)
        self.processes.append(process)
        if self.readies:
            process.say(ready=True)
        else:
            process.code = -signal.SIGKILL
            process.close()
        return local._Worker(process=process, pipe=pipe, log=log)  # type: ignore[arg-type]


def run(workers: Workers, monkeypatch: pytest.MonkeyPatch, *tasks: ShardTask, count: int = 2) -> tuple[list[Any], Any]:
    """(finished shards, ticks)."""
    monkeypatch.setattr(local, "_start", workers.start)
    finished: list[Done] = []
    ticks: list[tuple[int, int]] = []
    local.run(
        JOB, tasks, workers=count, environments=({"GPU": "a"}, {"GPU": "b"}), finished=finished.append,
        ticked=lambda *rows: ticks.append(rows),
    )  # fmt: skip
    assert not any(process.open for process in workers.processes), "every worker was let go"
    return finished, ticks


def tasks(*shards: int, **facts: Any) -> list[ShardTask]:
    return [ShardTask(plan=PLAN, shard=shard, rows=3, **facts) for shard in shards]


def does_it(_number: int, _order: dict[str, Any], say: Callable[..., None]) -> None:
    say(begins="x.png")
    say(rows=2, failed=0)
    say(rows=1, failed=1)
    say(done=DONE)


@pytest.mark.parametrize(("count", "started"), [(1, 1), (2, 2), (3, 3), (9, 4)])
def test_no_more_workers_than_shards(count: int, started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets a shard when it is ready, and the next when it is done; GPUs are handed out in turn."""
    workers = Workers(does_it)
    finished, ticks = run(workers, monkeypatch, *tasks(4, 5, 6, 7), count=count)
    assert len(workers.processes) == started and len(finished) == 4 and finished[0] == Done(**DONE)
    assert sorted(order["shard"] for _, order in workers.orders) == [4, 5, 6, 7]
    assert sorted(ticks) == [(1, 1)] * 4 + [(2, 0)] * 4
    assert workers.environments == [{"GPU": "ab"[i % 2]} for i in range(started)]
    assert workers.orders[0][1] == {
        "plan": PLAN.model_dump(mode="json"), "shard": 4, "again": False, "careful": False, "known_bad": {},
    }  # fmt: skip


def test_what_an_order_says(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(does_it)
    run(workers, monkeypatch, *tasks(1, deaths=1), *tasks(2, deaths=2, again=True, known_bad={"a": "why"}), count=1)
    assert [(o["careful"], o["again"], o["known_bad"]) for _, o in workers.orders] == [
        (False, False, {}), (True, True, {"a": "why"}),
    ]  # fmt: skip


def test_a_worker_that_dies_is_replaced_and_its_shard_done_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are taken back; the image that it had begun is left out, and the rest decoded one by one."""

    def dies_once(number: int, order: dict[str, Any], say: Callable[..., None]) -> None:
        if order["shard"] == 1 and not order["known_bad"]:
            say(rows=2, failed=1)
            say(begins="bad.png")
            raise Died(-signal.SIGSEGV)
        does_it(number, order, say)

    workers = Workers(dies_once)
    finished, ticks = run(workers, monkeypatch, *tasks(1, 2), count=1)
    assert [order["shard"] for _, order in workers.orders] == [1, 1, 2] and len(workers.processes) == 2
    assert workers.orders[1][1]["known_bad"] == {"bad.png": "the decoder died of SIGSEGV on it"}
    assert workers.orders[1][1]["careful"] and len(finished) == 2
    assert ticks == [(2, 1), (-2, -1), (2, 0), (1, 1), (2, 0), (1, 1)]


def test_workers_that_die_before_they_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five in a row, in one place, are the end; one that was ready counts anew."""
    workers = Workers(does_it, readies=False)
    with pytest.raises(BuildError, match=r"A worker died of SIGKILL before its first shard: the last line"):
        run(workers, monkeypatch, *tasks(1), count=1)
    assert len(workers.processes) == local.DEATHS_MAX + 1

    late = Workers(does_it, readies=False)
    begun = late.start

    def third_is_ready(job: Job, environment: dict[str, str], log: Path) -> Any:
        late.readies = len(late.processes) >= 3
        return begun(job, environment, log)

    monkeypatch.setattr(late, "start", third_is_ready)
    finished, _ = run(late, monkeypatch, *tasks(1), count=1)
    assert len(finished) == 1 and len(late.processes) == 4


def test_a_worker_that_was_ready_is_not_counted_among_those_that_never_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies of its shard, and five others that never start are the end, as if it had not been."""

    def dies(number: int, order: dict[str, Any], say: Callable[..., None]) -> None:
        workers.readies = False
        raise Died(-signal.SIGSEGV)

    workers = Workers(dies)
    with pytest.raises(BuildError, match=r"A worker died of SIGKILL before its first shard"):
        run(workers, monkeypatch, *tasks(1), count=1)
    assert len(workers.processes) == 1 + local.DEATHS_MAX + 1


def test_an_error_of_a_worker_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int, order: dict[str, Any], say: Callable[..., None]) -> None:
        say(error={"kind": "UsageError", "message": "m", "next_step": "n"})

    workers = Workers(fails)
    with pytest.raises(UsageError, match=r"^m"):
        run(workers, monkeypatch, *tasks(1, 2, 3))
    assert len(workers.processes) == 2

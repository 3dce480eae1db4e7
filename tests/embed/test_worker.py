"""The child process of a run, in this process: what it is told, what it does, and what it reports."""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.embed import worker
from dinoexport.embed.embedder import Job
from dinoexport.embed.plan import Done, Plan
from dinoexport.errors import ValidationFailed
from tests.embed.test_run_parts import SETTINGS

JOB = Job(bundle="b", out="o", images="i", threads=1, decoders=1)
PLAN = Plan(
    generation=0, shards=9, items=9, image_bytes=9, listing_sha256="0" * 64, lists="0-" + "0" * 12, settings=SETTINGS
)  # fmt: skip
DONE = Done(rows=3, failed=1, sha256="0" * 64, size_bytes=9)


class Recording:
    """An embedder that does nothing but say so; shard 8 cannot be done."""

    runtime = "written down"

    def __init__(self, job: Job) -> None:
        assert job == JOB
        self.asked: list[Any] = []
        made.append(self)

    def again(self, plan: Plan, shard: int, *, tick: Callable[[int, int], None]) -> Done:
        self.asked.append(("again", plan, shard))
        return DONE

    def embed(self, plan: Plan, shard: int, *, known_bad: Any, tick: Any, begins: Any) -> Done:
        self.asked.append(("embed", plan, shard, known_bad, begins is not None))
        if shard == 8:
            raise ValidationFailed("It is not right here.", next_step="Look.")
        if begins is not None:
            begins("x.png")
        tick(2, 1)
        return DONE


made: list[Recording] = []


def order(shard: int, *, again: bool = False, careful: bool = False, bad: Any = None) -> str:
    plan = PLAN.model_dump(mode="json")
    return json.dumps({"plan": plan, "shard": shard, "again": again, "careful": careful, "known_bad": bad or {}}) + "\n"


def test_shards_are_done_as_they_are_ordered_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message is a line; images are named before they are decoded only where one of them kills."""
    orders = [order(0), order(1, careful=True, bad={"a": "it kills"}), order(2, again=True), order(8)]
    signals: list[Any] = []
    listening: list[threading.Thread] = []

    def thread(**settings: Any) -> threading.Thread:
        listening.append(threading.Thread(**settings))
        return listening[0]

    monkeypatch.setattr(worker, "threading", SimpleNamespace(Thread=thread))
    monkeypatch.setattr(worker.signal, "signal", lambda *given: signals.append(given))
    monkeypatch.setattr(worker.sys, "stdin", io.StringIO("".join(orders)))
    monkeypatch.setattr(worker, "os", SimpleNamespace(_exit=lambda _code: None))
    monkeypatch.setattr(worker, "Embedder", Recording)
    report = io.StringIO()
    worker.main(JOB, report)
    listening[0].join()  # it calls the stand-in of _exit at the end, not the real one
    done = {"done": {"rows": 3, "failed": 1, "sha256": "0" * 64, "size_bytes": 9}}
    assert report.getvalue().endswith("\n")
    assert [json.loads(line) for line in report.getvalue().splitlines()] == [
        {"ready": "written down"}, {"rows": 2, "failed": 1}, done, {"begins": "x.png"}, {"rows": 2, "failed": 1}, done,
        done, {"error": {"kind": "ValidationFailed", "message": "It is not right here.", "next_step": "Look."}},
    ]  # fmt: skip
    assert made[-1].asked == [
        ("embed", PLAN, 0, {}, False), ("embed", PLAN, 1, {"a": "it kills"}, True), ("again", PLAN, 2),
        ("embed", PLAN, 8, {}, False),
    ]  # fmt: skip
    assert signals == [(worker.signal.SIGINT, worker.signal.SIG_IGN)], "Ctrl-C is the parent's"
    assert listening[0].daemon, "a thread that listens keeps no process alive"


def test_a_parent_that_ends_takes_its_worker_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error, and from within whatever the worker is doing."""
    ended: list[int] = []
    monkeypatch.setattr(worker, "os", SimpleNamespace(_exit=ended.append))
    monkeypatch.setattr(worker.sys, "stdin", io.StringIO('{"shard": 1}\n{"shard": 2}\n'))
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    worker._listen(orders)
    assert [orders.get(), orders.get()] == [{"shard": 1}, {"shard": 2}] and orders.empty() and ended == [0]

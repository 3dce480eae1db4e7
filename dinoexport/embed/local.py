"""Embed shards with several processes on this machine. A process that dies is replaced, and its shard repeated."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoexport import errors
from dinoexport.embed.embedder import Job
from dinoexport.embed.plan import Done, Plan
from dinoexport.errors import BuildError, DinoexportError
from dinoexport.system.subprocess_job import REPORT

# The number of workers that a shard may kill in a row without a single image as the cause, as when memory runs out.
DEATHS_MAX = 4
_STOP_S = 10


@dataclass(kw_only=True)
class ShardTask:
    """A shard to do. rows: about how many, for the progress. again: only its failed rows.

    deaths: workers that died on it since an image was last excluded.
    """

    plan: Plan
    shard: int
    rows: int
    again: bool = False
    deaths: int = 0
    known_bad: dict[str, str] = field(default_factory=dict)


OnFinished = Callable[[Done], None]
Ticked = Callable[[int, int], None]


@dataclass(kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: int
    log: Path
    heard: bytes = b""
    task: ShardTask | None = None
    begun: str | None = None
    counted: tuple[int, int] = (0, 0)
    ready: bool = False
    lost_before: int = 0


def run(
    job: Job,
    tasks: Sequence[ShardTask],
    *,
    workers: int,
    environments: Sequence[dict[str, str]],
    finished: OnFinished,
    ticked: Ticked,
) -> None:
    """Does every task in `workers` processes. environments: of each of them, in turn.

    finished: called with each finished shard; ticked: with rows and failures, negative if a worker died with them.
    Raises a worker's exception, BuildError if a shard cannot be done.
    """
    with tempfile.TemporaryDirectory() as scratch, selectors.DefaultSelector() as selector:
        pool = _Pool(
            job=job,
            waiting=deque(tasks),
            environments=environments,
            scratch=Path(scratch),
            selector=selector,
            finished=finished,
            ticked=ticked,
        )
        try:
            for number in range(min(workers, len(tasks))):
                pool.start(number)
            while pool.running:
                for key, _ in selector.select():
                    pool.serve(key.data)
        finally:
            for worker in pool.running.values():
                _stop(worker)


@dataclass(frozen=True, kw_only=True)
class _Pool:
    job: Job
    waiting: deque[ShardTask]
    environments: Sequence[dict[str, str]]
    scratch: Path
    selector: selectors.BaseSelector
    finished: OnFinished
    ticked: Ticked
    running: dict[int, _Worker] = field(default_factory=dict)

    def start(self, number: int, *, lost_before: int = 0) -> None:
        """Starts a worker in the place `number`. lost_before: workers there that were killed before they were ready."""
        environment = self.environments[number % len(self.environments)]
        worker = _start(self.job, environment, self.scratch / f"{number}.log")
        worker.lost_before = lost_before
        self.running[number] = worker
        self.selector.register(worker.pipe, selectors.EVENT_READ, number)

    def serve(self, number: int) -> None:
        """Reads a worker's messages and gives it the next task, replaces it, or lets it end."""
        worker = self.running[number]
        raw = os.read(worker.pipe, 1 << 16)
        for message in _messages(worker, raw):
            _hear(worker, message, self.finished, self.ticked)
            if worker.ready and worker.task is None and self.waiting:
                _give(worker, self.waiting.popleft())
        if not raw:
            left = _buried(worker, self.ticked)
            self._end(number)
            self.waiting.extendleft([left] if left else [])
            if self.waiting:
                self.start(number, lost_before=0 if worker.ready else worker.lost_before + 1)
        elif worker.ready and worker.task is None:
            self._end(number)

    def _end(self, number: int) -> None:
        worker = self.running.pop(number)
        self.selector.unregister(worker.pipe)
        _stop(worker)


def _start(job: Job, environment: dict[str, str], log: Path) -> _Worker:
    pipe, childs_end = os.pipe()
    with log.open("wb") as out, os.fdopen(childs_end, "wb") as end:
        process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
            [sys.executable, "-m", "dinoexport.embed.worker", job.model_dump_json()],
            env={**os.environ, **environment, REPORT: str(end.fileno())},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=[end.fileno()],
        )
    return _Worker(process=process, pipe=pipe, log=log)


def _stop(worker: _Worker) -> None:
    assert worker.process.stdin is not None
    with suppress(BrokenPipeError):
        worker.process.stdin.close()
    try:
        worker.process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        worker.process.wait()
    os.close(worker.pipe)


def _give(worker: _Worker, task: ShardTask) -> None:
    """Gives a task to a worker. From the second death on, items are decoded one by one, to find the failing one."""
    worker.task, worker.begun, worker.counted = task, None, (0, 0)
    order = {
        "plan": task.plan.model_dump(mode="json"),
        "shard": task.shard,
        "again": task.again,
        "careful": task.deaths >= 2,
        "known_bad": task.known_bad,
    }
    assert worker.process.stdin is not None
    with suppress(BrokenPipeError):  # it has just died; the end of its pipe reports that next
        worker.process.stdin.write(json.dumps(order).encode() + b"\n")
        worker.process.stdin.flush()


def _messages(worker: _Worker, raw: bytes) -> list[dict[str, Any]]:
    *lines, worker.heard = (worker.heard + raw).split(b"\n")
    return [json.loads(line) for line in lines]


def _hear(worker: _Worker, message: dict[str, Any], finished: OnFinished, ticked: Ticked) -> None:
    if "ready" in message:
        worker.ready = True
    elif "begins" in message:
        worker.begun = message["begins"]
    elif "rows" in message:
        rows, failed = worker.counted
        worker.counted = (rows + message["rows"], failed + message["failed"])
        ticked(message["rows"], message["failed"])
        worker.begun = None
    elif "done" in message:
        worker.task = None
        finished(Done.model_validate(message["done"]))
    else:
        raise _raised(message["error"])


def _raised(facts: dict[str, str]) -> DinoexportError:
    kind = getattr(errors, facts["kind"], BuildError)
    error: DinoexportError = kind(facts["message"], next_step=facts["next_step"])
    return error


def _buried(worker: _Worker, ticked: Ticked) -> ShardTask | None:
    """The task that a dead worker left, without the image that killed it if that is known."""
    code = worker.process.wait()
    task = worker.task
    said = worker.log.read_text(errors="replace").strip().splitlines()[-1:] or ["Its log is empty."]
    cause = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    if task is None:
        if worker.ready or (code < 0 and worker.lost_before < DEATHS_MAX):
            return None
        raise BuildError(
            f"A worker {cause} before its first shard: {said[0]}",
            next_step="If memory ran out, use fewer --workers." if code < 0 else "Report it.",
        )
    ticked(-worker.counted[0], -worker.counted[1])
    task.deaths += 1
    if worker.begun is not None and worker.begun not in task.known_bad:
        task.known_bad[worker.begun] = f"the decoder {cause} on it"
        task.deaths = 2  # the next death is searched for its image at once
        return task
    if task.deaths > DEATHS_MAX:
        raise BuildError(
            f"Shard {task.shard} killed {task.deaths} workers, the last one {cause}: {said[0]}",
            next_step="If memory ran out, use fewer --workers; finished shards are kept.",
        )
    return task

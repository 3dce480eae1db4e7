"""Embed shards with actors on a Ray cluster. If an actor dies with its node, another actor does its shard.

Only shard numbers are sent: every node must see the bundle, the images and OUT on a shared file system or in an object
store. Parts are written by dinoexport's own writer, because Ray's writer stores vectors as a type of its own.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from dinoexport.embed.embedder import Embedder, Job
from dinoexport.embed.local import DEATHS_MAX, OnFinished, ShardTask, Ticked
from dinoexport.embed.plan import Done, Plan
from dinoexport.errors import BuildError, DinoexportError, MissingRequirement, require


def run(job: Job, tasks: Sequence[ShardTask], *, finished: OnFinished, ticked: Ticked) -> None:
    """Does every task on the cluster that RAY_ADDRESS names, with one actor for every `job.threads` CPUs.

    A cluster with GPUs gives each actor one. Raises MissingRequirement without a cluster, and exceptions of shards.
    """
    require("ray", "ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # whatever the environment says
    import ray

    began = not ray.is_initialized()
    if began:
        try:
            ray.init(address="auto", log_to_driver=False, configure_logging=False)
        except ConnectionError:
            raise MissingRequirement(
                "There is no Ray cluster here.",
                next_step="Set RAY_ADDRESS, start one with `ray start --head`, or leave --engine out.",
            ) from None

    class Actor:
        """A bundle opened on one node."""

        def __init__(self, job: str) -> None:
            self._embedder = Embedder(Job.model_validate_json(job))

        def embed(self, plan: str, shard: int, again: bool) -> str:
            """Writes a shard's part; returns its facts as JSON."""
            do = self._embedder.again if again else self._embedder.embed
            return do(Plan.model_validate_json(plan), shard).model_dump_json()

    try:
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        threads = max(1, job.threads)
        count = max(1, min(len(tasks), gpus or int(found.get("CPU", 1)) // threads))
        remote: Any = ray.remote(num_cpus=0 if gpus else threads, num_gpus=1 if gpus else 0)(Actor)
        _spread(ray, lambda: remote.remote(job.model_dump_json()), tasks, count, finished, ticked)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, DinoexportError) else error) from None
    finally:
        if began:
            ray.shutdown()


def _spread(
    ray: Any, start: Callable[[], Any], tasks: Sequence[ShardTask], count: int, finished: OnFinished, ticked: Ticked
) -> None:
    """Keeps `count` actors at work. A dead actor is replaced, which may wait long for a node; its shard does not wait.

    Ray's own retries are not used: they keep a shard for its actor, for which no node may ever have room again.
    """
    waiting = deque(tasks)
    under_way: dict[Any, tuple[Any, ShardTask | None]] = {}

    def begin() -> None:
        actor = start()
        under_way[actor.__ray_ready__.remote()] = (actor, None)

    for _ in range(count):
        begin()
    left = len(tasks)
    while left:
        (ready, *_), _ = ray.wait(list(under_way), num_returns=1)
        actor, task = under_way.pop(ready)
        try:
            answer = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            if isinstance(error, ray.exceptions.ActorDiedError) and "creation task" in str(error):
                raise _never_opened(error) from None
            if task is not None:
                task.deaths += 1
                if task.deaths > DEATHS_MAX:
                    raise BuildError(
                        f"Shard {task.shard} killed {task.deaths} actors.",
                        next_step="Run embed with the local engine: it finds the image that is the cause, if any.",
                    ) from None
                waiting.appendleft(task)
            begin()
            continue
        if task is not None:
            done = Done.model_validate_json(answer)
            ticked(done.rows, done.failed)
            finished(done)
            left -= 1
        if waiting:
            task = waiting.popleft()
            ask = actor.embed.remote(task.plan.model_dump_json(), task.shard, task.again)
            under_way[ask] = (actor, task)


def _never_opened(error: Any) -> DinoexportError:
    """The error for an actor that could not open the bundle."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DinoexportError):
        return cause
    said = [line for line in str(error).splitlines() if line.strip()][-1]
    return BuildError(
        f"A worker on the cluster could not open the bundle: {said}", next_step="Check that every node sees it."
    )

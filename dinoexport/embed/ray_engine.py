"""Shards embedded by actors on a Ray cluster. Ray restarts an actor whose node died, and gives its shard out again.

Only shard numbers travel: the bundle, the images and OUT must be where every node sees them, on a shared file system or
in an object store. Parts are written by our own writer, for Ray's stores vectors as a type of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dinoexport.embed.embedder import Embedder, Job
from dinoexport.embed.local import Finished, Task, Ticked
from dinoexport.embed.plan import Done, Plan
from dinoexport.errors import DinoexportError, MissingRequirement, require


def run(job: Job, tasks: Sequence[Task], *, finished: Finished, ticked: Ticked) -> None:
    """Does every task on the cluster that RAY_ADDRESS names, with an actor for each `job.threads` CPUs it has now.

    A cluster with GPUs gives each actor one. Raises MissingRequirement without a cluster, and what a shard raised.
    """
    require("ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.util import ActorPool

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
        """A bundle opened on some node."""

        def __init__(self, job: str) -> None:
            self._embedder = Embedder(Job.model_validate_json(job))

        def embed(self, plan: str, shard: int, again: bool) -> str:
            """Writes a shard's part; what it holds, as JSON."""
            do = self._embedder.again if again else self._embedder.embed
            return do(Plan.model_validate_json(plan), shard).model_dump_json()

    try:
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        threads = max(1, job.threads)
        count = max(1, min(len(tasks), gpus or int(found.get("CPU", 1)) // threads))
        # max_task_retries: a shard is idempotent, so one that died with its node is simply done again.
        remote: Any = ray.remote(
            num_cpus=0 if gpus else threads, num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=-1
        )(Actor)
        pool = ActorPool([remote.remote(job.model_dump_json()) for _ in range(count)])

        def ask(actor: Any, task: Task) -> Any:
            return actor.embed.remote(task.plan.model_dump_json(), task.shard, task.again)

        for found_done in pool.map_unordered(ask, list(tasks)):
            done = Done.model_validate_json(found_done)
            ticked(done.rows, done.failed)
            finished(done)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, DinoexportError) else error) from None
    finally:
        if began:
            ray.shutdown()

"""What is asked of a Ray cluster, faked here: how many actors, with which resources, and what their deaths cost."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dinoexport.embed import ray_engine
from dinoexport.embed.embedder import Job
from dinoexport.embed.local import DEATHS_MAX, ShardTask
from dinoexport.embed.plan import Done, Plan, Settings
from dinoexport.errors import BuildError, DinoexportError, MissingRequirement, UsageError

HASH = "0" * 64
PLAN = Plan(
    generation=0, shards=9, items=9, image_bytes=9, listing_sha256=HASH, lists="0-000000000000",
    settings=Settings(
        images="/images", model_sha256=HASH, variant="tiny", precision="fp32", front_end="pixels", preparation={},
        outputs=("class_token",), dtype="float32", normalised=False, batch=1,
    ),
)  # fmt: skip


class RayActorError(Exception):
    """Ray's, for an actor that is gone."""


class ActorDiedError(RayActorError):
    """Ray's, for one that died by itself, in its constructor too."""


class RayTaskError(Exception):
    """Ray's, for an exception within a call."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class FakeRay(ModuleType):
    """Its calls end at once, as `ends` says: of an actor's number and its shard, None while it opens."""

    def __init__(self, resources: dict[str, float], ends: Callable[[int, int | None], Exception | None]) -> None:
        super().__init__("ray")
        self.__spec__ = ModuleSpec("ray", None)
        self.resources, self.ends = resources, ends
        self.exceptions = SimpleNamespace(
            RayActorError=RayActorError, ActorDiedError=ActorDiedError, RayTaskError=RayTaskError
        )
        self.began: dict[str, Any] | None = None
        self.stopped = 0
        self.demands: list[dict[str, float]] = []
        self.actors = 0
        self.asked: list[tuple[int, int, bool]] = []

    def is_initialized(self) -> bool:
        return self.began is not None

    def init(self, **settings: Any) -> None:
        self.began = settings

    def shutdown(self) -> None:
        self.stopped += 1

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **demands: float) -> Any:
        self.demands.append(demands)

        def start(job: str) -> Any:
            assert Job.model_validate_json(job).bundle == "/bundle"
            self.actors += 1
            number = self.actors

            def embed(plan: str, shard: int, again: bool) -> Any:
                assert Plan.model_validate_json(plan) == PLAN
                self.asked.append((number, shard, again))
                return number, shard, len(self.asked)

            return SimpleNamespace(
                __ray_ready__=SimpleNamespace(remote=lambda: (number, None, 0)),
                embed=SimpleNamespace(remote=embed),
            )

        return lambda _actor: SimpleNamespace(remote=start)

    def wait(self, calls: list[Any], *, num_returns: int) -> tuple[list[Any], list[Any]]:
        assert calls and num_returns == 1
        return calls[:1], calls[1:]

    def get(self, call: Any) -> str:
        number, shard, _ = call
        if error := self.ends(number, shard):
            raise error
        return done(shard).model_dump_json() if shard is not None else ""


def done(shard: int) -> Done:
    return Done(rows=10 + shard, failed=shard, sha256=HASH, size_bytes=1)


def all_well(_number: int, _shard: int | None) -> None:
    return None


Faked = Callable[..., FakeRay]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Faked:
    def fake(ends: Callable[[int, int | None], Exception | None] = all_well, **resources: float) -> FakeRay:
        ray = FakeRay(resources, ends)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
        return ray

    return fake


def ran(shards: int = 3, *, threads: int = 1, again: bool = False) -> tuple[list[Done], list[tuple[int, int]]]:
    finished: list[Done] = []
    ticks: list[tuple[int, int]] = []
    job = Job(bundle="/bundle", out="/out", images="/images", threads=threads, decoders=1)
    tasks = [ShardTask(plan=PLAN, shard=shard, rows=10, again=again) for shard in range(shards)]
    ray_engine.run(job, tasks, finished=finished.append, ticked=lambda *rows: ticks.append(rows))
    return finished, ticks


@pytest.mark.parametrize(
    ("resources", "threads", "shards", "demands", "actors"),
    [
        ({"CPU": 8.0}, 2, 9, {"num_cpus": 2, "num_gpus": 0}, 4),
        ({"CPU": 7.0}, 2, 9, {"num_cpus": 2, "num_gpus": 0}, 3),
        ({"CPU": 8.0}, 2, 3, {"num_cpus": 2, "num_gpus": 0}, 3),
        ({"CPU": 2.0}, 4, 9, {"num_cpus": 4, "num_gpus": 0}, 1),
        ({"CPU": 3.0}, 0, 9, {"num_cpus": 1, "num_gpus": 0}, 3),
        ({}, 1, 9, {"num_cpus": 1, "num_gpus": 0}, 1),
        ({"CPU": 64.0, "GPU": 2.0}, 4, 9, {"num_cpus": 0, "num_gpus": 1}, 2),
        ({"CPU": 64.0, "GPU": 1.0}, 4, 9, {"num_cpus": 0, "num_gpus": 1}, 1),
    ],
)
def test_actors_and_their_resources(
    resources: dict[str, float], threads: int, shards: int, demands: dict[str, int], actors: int, faked: Faked
) -> None:
    ray = faked(**resources)
    finished, ticks = ran(shards, threads=threads)
    assert ray.demands == [demands] and ray.actors == actors
    assert sorted(finished, key=lambda facts: facts.rows) == [done(shard) for shard in range(shards)]
    assert sorted(ticks) == [(10 + shard, shard) for shard in range(shards)]
    assert len({number for number, _, _ in ray.asked}) == actors, "every actor works"


@pytest.mark.parametrize("again", [False, True])
def test_only_shard_numbers_are_sent(again: bool, faked: Faked) -> None:
    ray = faked(CPU=1.0)
    ran(2, again=again)
    assert ray.asked == [(1, 0, again), (1, 1, again)]
    assert ray.began == {"address": "auto", "log_to_driver": False, "configure_logging": False}
    assert ray.stopped == 1 and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_callers_own_connection_is_kept(faked: Faked) -> None:
    ray = faked(CPU=1.0)
    ray.init(address="mine")
    ran(1)
    assert ray.began == {"address": "mine"} and ray.stopped == 0


def test_no_cluster(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(faked(), "init", nobody)
    with pytest.raises(MissingRequirement, match="no Ray cluster"):
        ran()


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingRequirement, match="ray is not installed"):
        ran()


def test_a_dead_actors_shard_is_the_next(faked: Faked) -> None:
    """The shard comes before those that wait, and another actor does it."""
    ray = faked(lambda number, shard: RayActorError() if (number, shard) == (1, 0) else None, CPU=1.0)
    finished, _ = ran(3)
    assert [shard for _, shard, _ in ray.asked] == [0, 0, 1, 2] and ray.asked[1][0] == 2
    assert len(finished) == 3


def test_an_actor_that_dies_idle_costs_no_shard(faked: Faked) -> None:
    ray = faked(lambda number, _: RayActorError() if number <= 2 * DEATHS_MAX else None, CPU=1.0)
    assert len(ran(2)[0]) == 2
    assert ray.actors == 2 * DEATHS_MAX + 1 and len(ray.asked) == 2


@pytest.mark.parametrize("deaths", [DEATHS_MAX, DEATHS_MAX + 1])
def test_a_shard_that_kills_its_actors(deaths: int, faked: Faked) -> None:
    left = [deaths]

    def ends(_number: int, shard: int | None) -> Exception | None:
        if shard != 1 or not left[0]:
            return None
        left[0] -= 1
        return ActorDiedError("the node is gone")

    ray = faked(ends, CPU=1.0)
    if deaths <= DEATHS_MAX:
        assert len(ran(3)[0]) == 3
    else:
        with pytest.raises(BuildError, match=f"Shard 1 killed {deaths} actors"):
            ran(3)
    assert ray.stopped == 1


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (UsageError("the bundle is damaged"), UsageError, "^the bundle is damaged$"),
        (None, BuildError, "could not open the bundle: OSError: no such folder"),
    ],
)
def test_a_bundle_that_no_actor_can_open(
    cause: Exception | None, kind: type[DinoexportError], words: str, faked: Faked
) -> None:
    error = ActorDiedError("The actor died in its creation task:\n  a traceback\nOSError: no such folder\n\n")
    if cause is not None:
        error.cause = cause  # type: ignore[attr-defined]
    ray = faked(lambda *_: error, CPU=1.0)
    with pytest.raises(kind, match=words):
        ran()
    assert ray.actors == 1 and ray.stopped == 1


@pytest.mark.parametrize(("cause", "kind"), [(UsageError("wrong"), UsageError), (ZeroDivisionError(), RayTaskError)])
def test_an_exception_within_a_shard(cause: Exception, kind: type[Exception], faked: Faked) -> None:
    """One of ours is raised as it is; another keeps Ray's traceback."""
    faked(lambda _, shard: RayTaskError(cause) if shard is not None else None, CPU=1.0)
    with pytest.raises(kind):
        ran()

"""Embed a source of images with a bundle: write or continue a plan, do the remaining shards, report the result."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinoexport import bundle
from dinoexport.bundle import Manifest
from dinoexport.embed import columns as tables
from dinoexport.embed import local
from dinoexport.embed import plan as plans
from dinoexport.embed.embedder import Job, fingerprint, front_end_graph, model_of
from dinoexport.embed.layout import Layout, layout_of
from dinoexport.embed.local import ShardTask
from dinoexport.embed.plan import Done, Plan, Settings
from dinoexport.embed.sources import open_source
from dinoexport.errors import UsageError, ValidationFailed, require
from dinoexport.family import FrontEnd, PreparesSizes, Servable
from dinoexport.runtime import runners
from dinoexport.runtime.sizes import dims_of, shapes_of
from dinoexport.spec import Graph, Progress, silent
from dinoexport.system import store
from dinoexport.system.store import Place

# "default", "nearest", or sizes that the user names: "224x224,518x518".
Size = str
Scheduler = Literal["local", "ray"]
# Larger batches gain nothing on a CPU: 71 to 92 ms an image for 1 to 64 (ViT-S at 224). A GPU needs larger ones.
_BATCH_CPU, _BATCH_GPU = 16, 64
_RATE_OVER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class State:
    """The progress of a run. rows, failed: of this call's shards. rate: rows a second over the last minute."""

    rows: int
    rows_total: int
    failed: int
    shards: int
    shards_total: int
    rate: float
    left_s: float | None


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The result of a call. rows, failed: of the requested shards. complete: whether every shard is done."""

    out: str
    rows: int
    failed: int
    shards: int
    done_before: int
    complete: bool
    layout: Layout | None


Watch = Callable[[State], None]


def embed(
    folder: Path,
    images: str,
    out: str,
    *,
    size: Size = "default",
    outputs: Sequence[str] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    normalised: bool = False,
    shards: int | None = None,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    engine: Scheduler = "local",
    max_failed: float = 0.01,
    retry_failed: bool = False,
    extend: bool = False,
    planned: Callable[[Sequence[Plan], Layout], None] = lambda _plans, _layout: None,
    watch: Watch = lambda _: None,
    progress: Progress = silent,
) -> Embedded:
    """Embeds `images` with the bundle in `folder` into Parquet files in `out`, and continues an earlier call.

    part: (I, N) for the shards that are I modulo N. max_failed: the share of images that may fail. Raises UsageError
    if `out` has another run or the bundle takes no images, ValidationFailed if the bundle did not pass its validation
    or is not right on this machine, or if too many images failed. Finished shards are kept in every case.
    """
    _require(engine)
    manifest = bundle.read_manifest(folder)
    place = store.open_place(out)
    if isinstance(place, store.LocalPlace):
        place.sweep()
    elif isinstance(place, store.RemotePlace):
        place.check_writable()
    known = plans.read_all(place)
    if not known and isinstance(place, store.LocalPlace):
        plans.refuse_foreign(place)
    layout = layout_of(manifest, workers)
    wanted = _settings(manifest, images, size, outputs, dtype, normalised, known, progress)
    if known:
        _refuse_others(known[0], wanted, shards, place, images, progress)
    if not known or extend:
        with _checked(folder, progress):
            pass  # before a long listing, not after
        made = plans.make(
            open_source(images),
            place,
            wanted,
            before=known,
            shards=shards,
            workers=layout.workers * part[1],
            row_bytes=_row_bytes(manifest, wanted),
            progress=progress,
        )
        if made is None and not known:
            raise UsageError(f"{images} lists no image.", next_step="Give another folder as --images.")
        known = (*known, made) if made else known
    present = {name for name, _ in place.files()}
    mine = [(plan, shard) for plan in known for shard in range(plan.shards) if shard % part[1] == part[0]]
    missing = [(plan, shard) for plan, shard in mine if plan.part(shard) not in present]
    tasks = [ShardTask(plan=plan, shard=shard, rows=plan.items // plan.shards) for plan, shard in missing]
    if retry_failed:
        finished = [(plan, shard) for plan, shard in mine if plan.part(shard) in present]
        tasks += [
            ShardTask(plan=p, shard=s, rows=n, again=True) for p, s in finished if (n := _done(place, p, s).failed)
        ]
    if tasks:
        planned(known, layout)
        job = Job(
            bundle=str(folder.absolute()),
            out=out if store.is_url(out) else str(Path(out).absolute()),
            images=wanted.images,
            threads=layout.threads,
            decoders=layout.decoders,
        )
        with _checked(folder, progress):
            _do(job, tasks, layout, engine, watch)
        if isinstance(place, store.LocalPlace):
            place.sweep()  # of workers that died meanwhile, and of those that an earlier killed command left behind
    return _summary(place, known, mine, len(mine) - len(tasks), max_failed, layout if tasks else None)


def _require(engine: Scheduler) -> None:
    """Raises MissingRequirement, before anything is written."""
    require("embed", "pyarrow")
    if engine == "ray":
        require("ray", "ray")


def _summary(
    place: Place,
    known: tuple[Plan, ...],
    mine: Sequence[tuple[Plan, int]],
    done_before: int,
    max_failed: float,
    layout: Layout | None,
) -> Embedded:
    """The result so far; raises ValidationFailed if too many images failed."""
    present = {name for name, _ in place.files()}
    everything = [(plan, shard) for plan in known for shard in range(plan.shards)]
    complete = all(plan.part(shard) in present for plan, shard in everything)
    recorded = _recorded(place, known) if complete and layout is None else None
    done = recorded or {plan.part(s): _done(place, plan, s) for plan, s in (everything if complete else mine)}
    if complete and recorded is None:
        plans.success(place, known, done)
    rows, failed = (sum(getattr(done[plan.part(s)], n) for plan, s in mine) for n in ("rows", "failed"))
    if failed > max_failed * rows:
        raise ValidationFailed(
            f"{failed} of {rows} images could not be embedded, more than {max_failed:.2%}; their rows say why.",
            next_step="Everything is kept. Fix them and give --retry-failed, or allow more with --max-failed.",
        )
    return Embedded(
        out=str(place),
        rows=rows,
        failed=failed,
        shards=len(mine),
        done_before=done_before,
        complete=complete,
        layout=layout,
    )


def _recorded(place: Place, known: tuple[Plan, ...]) -> dict[str, Done] | None:
    """The content of `_SUCCESS.json` if it is of these plans: a finished run is not counted again."""
    try:
        content = json.loads(place.read(plans.SUCCESS))
        if content["plans"] != [plan.sha256 for plan in known]:
            return None
        return {name: Done.model_validate(facts) for name, facts in content["parts"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _done(place: Place, plan: Plan, shard: int) -> Done:
    """The facts of a finished shard; read from the part itself if a worker died before it could report them."""
    import hashlib
    import io

    import pyarrow.parquet as pq

    try:
        return Done.model_validate_json(place.read(plan.done_name(shard)))
    except (FileNotFoundError, ValueError):
        raw = place.read(plan.part(shard))
        errors = pq.read_table(io.BytesIO(raw), columns=["error"]).column(0)
        done = Done(
            rows=len(errors),
            failed=len(errors) - errors.null_count,
            sha256=hashlib.sha256(raw).hexdigest(),
            size_bytes=len(raw),
        )
        place.write(plan.done_name(shard), done.model_dump_json().encode())
        return done


def _do(job: Job, tasks: Sequence[ShardTask], layout: Layout, engine: Scheduler, watch: Watch) -> None:
    counter = _Counter(tasks, watch)
    if engine == "ray":
        from dinoexport.embed import ray_engine

        ray_engine.run(job, tasks, finished=counter.finished, ticked=counter.ticked)
        return
    local.run(
        job,
        tasks,
        workers=layout.workers,
        environments=layout.environments,
        finished=counter.finished,
        ticked=counter.ticked,
    )


class _Counter:
    """Turns workers' messages into `State`s, with the rate of the last minute."""

    def __init__(self, tasks: Sequence[ShardTask], watch: Watch) -> None:
        self._total = sum(task.rows for task in tasks)
        self._tasks, self._watch = tasks, watch
        self._rows = self._failed = self._shards = 0
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def ticked(self, rows: int, failed: int) -> None:
        self._rows, self._failed = self._rows + rows, self._failed + failed
        self._say()

    def finished(self, _done: Done) -> None:
        self._shards += 1
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        self._seen.append((now, self._rows))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_OVER_S:
            self._seen.popleft()
        since, before = self._seen[0]
        rate = (self._rows - before) / (now - since) if now > since else 0.0
        left = max(0, self._total - self._rows)
        self._watch(
            State(
                rows=self._rows,
                rows_total=max(self._total, self._rows),
                failed=self._failed,
                shards=self._shards,
                shards_total=len(self._tasks),
                rate=rate,
                left_s=left / rate if rate > 0 else None,
            )
        )


def _settings(
    manifest: Manifest,
    images: str,
    size: Size,
    outputs: Sequence[str] | None,
    dtype: Literal["float32", "float16"],
    normalised: bool,
    known: tuple[Plan, ...],
    progress: Progress,
) -> Settings:
    """The complete settings. Sizes that were once learnt from samples are kept: more images would change them."""
    model = model_of(manifest)
    graph = front_end_graph(model)
    samples = None
    if size == "nearest" and not (known and known[0].settings.preparation):
        samples = open_source(images).samples
        if samples is None:
            raise UsageError(
                "--size nearest learns sizes from files on a local disk.", next_step="Leave it out, or copy a sample."
            )
    if size == "nearest" and samples is None:
        front_end, preparation = known[0].settings.front_end, known[0].settings.preparation
    elif size not in ("default", "nearest"):
        end = _named_sizes(model, graph, size)
        front_end, preparation = end.name, json.loads(json.dumps(dict(end.settings)))
    else:
        end = model.front_ends(samples, progress=progress)[-1 if samples else 0]
        front_end, preparation = end.name, json.loads(json.dumps(dict(end.settings)))
    largest = next((dim.max for dim in graph.dims if dim.name == graph.inputs[0].shape[0]), 1)
    batch = _BATCH_GPU if runners.is_for_gpu(manifest) else _BATCH_CPU
    if manifest.engines:
        name = graph.inputs[0].name
        largest = min(largest, *(max(s[name][2][0] for s in e.profiles.values()) for e in manifest.engines))
    return Settings(
        images=_absolute(images),
        model_sha256=fingerprint(manifest),
        variant=manifest.variant,
        precision=manifest.precision,
        front_end=front_end,
        preparation=preparation,
        outputs=tuple(column.name for column in tables.choose(graph, outputs)),
        dtype=dtype,
        normalised=normalised,
        batch=min(batch, largest),
        forms=() if size in ("default", "nearest") else _forms(manifest, size, min(batch, largest)),
    )


def _named_sizes(model: Servable, graph: Graph, size: str) -> FrontEnd:
    """The preparation at sizes that the user names; UsageError for one that the graph does not take."""
    if not isinstance(model, PreparesSizes):
        raise UsageError("This bundle's model prepares images at its own size only.", next_step="Leave --size out.")
    for word in size.split(","):
        shapes_of(word, graph)
        if word.count("x") != 1:
            raise UsageError(f"--size {word!r} is not HxW.", next_step="Write default, nearest, or sizes as 224x224.")
    return model.of_sizes([dims_of(word, graph) for word in size.split(",")])


def _forms(manifest: Manifest, size: str, batch: int) -> tuple[str, ...]:
    """The sizes of full batches; what runs on a GPU has no forms."""
    return () if runners.is_for_gpu(manifest) else tuple(f"{batch}x{word}" for word in sorted(set(size.split(","))))


def _absolute(images: str) -> str:
    return images if store.is_url(images) else str(Path(images).absolute())


def _row_bytes(manifest: Manifest, settings: Settings) -> int:
    graph = front_end_graph(model_of(manifest))
    return tables.row_bytes(tables.choose(graph, settings.outputs), graph, settings.dtype)


def _refuse_others(
    plan: Plan, wanted: Settings, shards: int | None, place: Place, images: str, progress: Progress
) -> None:
    """A source at another path is the same if its listing is the same."""
    if plan.settings.images != wanted.images:
        moved = wanted.changed(images=plan.settings.images)
        plans.refuse_others(plan, moved, shards, place)
        if plans.listing_hash(open_source(images), progress) == plan.listing_sha256:
            return
    plans.refuse_others(plan, wanted, shards, place)


@contextmanager
def _checked(folder: Path, progress: Progress) -> Iterator[None]:
    """Refuses a bundle that is damaged or did not pass its validation, and keeps it from being changed meanwhile."""
    manifest = bundle.read_manifest(folder)
    if manifest.verdict != "passed":
        raise ValidationFailed(
            f"{folder} is {manifest.verdict}; only bundles that passed are used to embed.",
            next_step="dinoexport build makes a validated bundle.",
        )
    with bundle.checked(folder, progress=progress):
        yield


def part_of(word: str) -> tuple[int, int]:
    """(I, N) of `I/N`, where I counts from 0."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", word)
    if not found or not int(found[1]) < int(found[2]):
        raise UsageError(
            f"--shard {word!r} is not I/N.", next_step="Write 0/64 to 63/64, as $SLURM_ARRAY_TASK_ID/64 gives."
        )
    return int(found[1]), int(found[2])


def share_of(word: str) -> float:
    """The share that `1%` or `0.01` names."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", word.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"--max-failed {word!r} is not a share.", next_step="Write 1% or 0.01.")
    return share

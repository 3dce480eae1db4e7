"""What else is killed: the verbs that make a bundle or a run of others', in processes that end with their work.

A whole `fit` or `embed` takes a second or two, so `make attack` kills it at every few of its operations.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dinoexport import bundle
from dinoexport.embed import local, run
from dinoexport.embed.embedder import Embedder, Job
from dinoexport.embed.local import ShardTask
from dinoexport.embed.plan import SUCCESS
from dinoexport.engines import builder
from dinoexport.pipeline import compile_bundle as compiling
from dinoexport.pipeline import preflight
from dinoexport.pipeline.fit import flow
from dinoexport.pipeline.stages import engine as engine_stage
from dinoexport.system import hardware
from tests.attack.kit import small_bundle
from tests.attack.scenarios import READERS, Scenario
from tests.standin import plans

_CARDS = {"8.0": "NVIDIA A100-SXM4-80GB", "9.0": "NVIDIA H100 80GB HBM3"}
_SHARDS = 3


def of_compiling(scratch: Path, built: Path) -> Iterator[Scenario]:
    """Compile into another bundle, over a compiled one, and in place; merge of two cards' bundles.

    A header stands for each plan, and a card for a GPU: what is killed is what becomes of the files.
    """
    source = small_bundle(scratch, built)
    made = {capability: scratch / "compiled" / capability for capability in _CARDS}
    for capability, out in made.items():
        if not out.exists():
            pretended = Scenario(
                verb="", begin=_compiles(source, capability), work=_nothing, state=_nothing, apart=True
            )
            pretended.do(pretended.begin, out)

    def copied(place: Path) -> None:
        shutil.copytree(source, place)

    def merge(place: Path) -> None:
        compiling.merge(*made.values(), out=place)

    for begin in (_nothing, _compiles(source, "9.0"), copied):
        work = _compiles(None if begin is copied else source, "8.0")
        yield Scenario(
            verb="compile", begin=begin, work=work, state=of_bundle, name="bundle", apart=True, others=READERS
        )
    for begin in (_nothing, _compiles(source, "8.0")):
        yield Scenario(verb="merge", begin=begin, work=merge, state=of_bundle, name="bundle", others=READERS)


def of_fitting(built: Path, images: Path) -> Iterator[Scenario]:
    """A head fitted on the bundle's features, where nothing was and over an earlier one."""

    def fits(kind: str) -> Callable[[Path], object]:
        return lambda place: flow.fit(built, images, kind=kind, out=place)  # type: ignore[arg-type]

    for begin in (_nothing, fits("knn")):
        yield Scenario(
            verb="fit", begin=begin, work=fits("logreg"), state=of_bundle, name="bundle", apart=True, others=READERS
        )


def of_embedding(built: Path, images: Path) -> Iterator[Scenario]:
    """A run of three shards in this process, and one that another process has begun; a part must never differ."""
    right: dict[str, str] = {}

    def embed(place: Path) -> None:
        local.run = _in_this_process
        run.embed(built, str(images), str(place), shards=_SHARDS, max_failed=1, workers=1)

    def begun(place: Path) -> None:
        local.run = _in_this_process
        run.embed(built, str(images), str(place), shards=_SHARDS, part=(1, _SHARDS), max_failed=1, workers=1)

    def state(place: Path) -> Any:
        for part in sorted(place.glob("*.parquet")) if place.is_dir() else ():
            found = hashlib.sha256(part.read_bytes()).hexdigest()
            if right.setdefault(part.name, found) != found:
                return f"{part.name} differs"
        if not (place / SUCCESS).exists():
            return "not finished"
        return json.loads((place / SUCCESS).read_bytes()), sorted(path.name for path in place.rglob("*"))

    for begin in (_nothing, begun):
        yield Scenario(verb="embed", begin=begin, work=embed, state=state, name="out", apart=True)


def of_bundle(place: Path) -> Any:
    """A verified bundle's files and what it is for; not what the clock writes, of which its own hash is one."""
    if not place.exists():
        return "nothing"
    manifest = bundle.verify(place)
    engines = [(engine.file, engine.compute_capabilities) for engine in manifest.engines]
    head = manifest.recipe.get("head", {}).get("kind")
    return sorted(path.name for path in place.iterdir()), engines, head, manifest.target, manifest.verdict


def _nothing(_place: Path) -> None:
    return None


def _compiles(source: Path | None, capability: str) -> Callable[[Path], None]:
    """`compile` of `source`, or of the place itself, on a machine with the card of that capability."""

    def work(place: Path) -> None:
        gpu = hardware.Gpu(
            index=0, name=_CARDS[capability], uuid="GPU-1", compute_capability=capability, memory_bytes=80 * 10**9,
            driver="590.1",
        )  # fmt: skip
        hardware.gpus = lambda: (gpu,)
        preflight.compiler = lambda *_: None
        engine_stage.builder.build = _header
        compiling.compile_bundle(source or place, out=None if source is None else place)

    return work


def _header(onnx: Path, graph: Any, folder: Path, **asked: Any) -> builder.BuiltEngine:
    """`builder.build` without a compiler, the same plan each time."""
    wanted = tuple(asked["compute_capabilities"])
    return plans.written(graph, folder, capabilities=wanted, content=wanted[0].encode() * 40)


def _in_this_process(job: Job, tasks: Sequence[ShardTask], *, finished: Any, ticked: Any, **_: Any) -> None:
    """`local.run` without processes of its own, so that every file operation of a worker is one of this process."""
    embedder = Embedder(job)
    for task in tasks:
        finished(embedder.embed(task.plan, task.shard, tick=ticked))

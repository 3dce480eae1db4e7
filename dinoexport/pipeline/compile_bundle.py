"""`compile`: build engines from a bundle's own ONNX on the machine that will serve, and validate them there.

Needs TensorRT and Polygraphy, but no torch, onnx or checkpoint: the reference is in the bundle. `merge` puts the
engines of several cards into one bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dinoexport import bundle, family
from dinoexport.bundle import BundleFile, EngineFacts, Manifest, reference_file, sbom
from dinoexport.bundle.signing import Signer
from dinoexport.config import target as targets
from dinoexport.config.recipe import EngineChoices, Recipe, parse
from dinoexport.engines import builder
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.family import Model
from dinoexport.pipeline import preflight
from dinoexport.pipeline.request import EngineRequest, engine_request
from dinoexport.pipeline.stages import engine as engine_stage
from dinoexport.pipeline.workspace import Stage, Workspace, key_of, workspace
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Precision, Progress, Runtime, silent
from dinoexport.system import changes, files, hardware
from dinoexport.validation import evaluate, judge

_BILL, _ENGINE = "sbom", "engine"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A bundle with its engines. notes: what a user must know about it.

    reused: whether the engines existed already. engines: this machine's verdict on them.
    """

    folder: Path
    manifest: Manifest
    engines: evaluate.EngineVerdict
    reused: bool
    notes: tuple[str, ...] = ()


class EnginesRejected(ValidationFailed):
    """The engines do not give PyTorch's outputs on this machine. `report` says where."""

    def __init__(self, message: str, *, next_step: str, report: judge.Report) -> None:
        super().__init__(message, next_step=next_step)
        self.report = report


def compile_bundle(
    folder: Path,
    *,
    target: str | None = None,
    runtime: Runtime | None = None,
    engine_choices: Mapping[str, Any] = MappingProxyType({}),
    out: Path | None = None,
    signer: Signer | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Compiled:
    """Builds an engine of each graph in `folder` for `target` (default: the GPU here) and validates it if it runs here.

    The bundle at `out`, by default `folder` itself, changes in one step, or not at all if the engines are rejected.
    Raises UsageError for a bundle that holds nothing to compile or is signed and would be changed, MissingRequirement
    if TensorRT, the card or its memory is missing, EnginesRejected if the outputs are not PyTorch's.
    """
    manifest = bundle.verify(folder, progress=progress)
    bundle.check_graphs(folder, manifest)
    _check_compilable(folder, manifest)
    if out is None and signer is None:
        refuse_signed(folder, str(folder))
    model, request = _request(folder, manifest, target, runtime, engine_choices)
    preflight.compiler(request)
    if find_spec("onnx") is not None:
        _check_memory(folder, request)
    with _held(folder, out), workspace(out or folder, force=force, progress=progress) as work:
        seen = bundle.check_files(folder, manifest.files, progress=progress)
        kept = _kept(work, folder, manifest)
        graph_files = [file for name in _graph_stages(manifest) for file in kept[name].files]
        stage = engine_stage.compile_engines(work, request, folder, graph_files)
        content = json.loads((stage.folder / bundle.ENGINES).read_text())
        facts = [EngineFacts.model_validate(entry) for entry in content]
        verdict = evaluate.judge_engines(
            model,
            {stage.folder / engine.file: engine for engine in facts},
            {folder / graph.file: graph.graph() for graph in manifest.graphs},
            reference_file.read(folder / bundle.REFERENCE),
            progress=progress,
        )
        if verdict.report is not None and not verdict.report.passed:
            raise _rejected(out or folder, verdict.report)
        kept.pop(_ENGINE, None)
        made = {**kept, _ENGINE: stage}
        bundle.check_same(folder, seen)  # what was compiled and judged is what was checked
        changed, notes = _publish(
            work,
            made,
            manifest,
            signer,
            target=request.target.name,
            engines=verdict.facts,
            versions=manifest.versions | _versions(request.runtime),
        )
    return Compiled(folder=work.out, manifest=changed, engines=verdict, reused=stage.reused, notes=notes)


def refuse_signed(folder: Path, called: str) -> None:
    """Raises UsageError for a signed bundle, which engines would make another one."""
    if (folder / bundle.SIGNATURE).exists():
        raise UsageError(
            f"{called} is signed, and engines added to it would make the signature invalid.",
            next_step="Sign it again with --sign KEY, or leave it alone and give --out.",
        )


def merge(
    first: Path, second: Path, *, out: Path, signer: Signer | None = None, progress: Progress = silent
) -> Compiled:
    """One bundle at `out` with the engines of both, for several cards: `deploy` lets Triton choose among them.

    Raises UsageError unless both were made of the same graphs, with engines for different cards of one runtime.
    """
    manifests = [bundle.verify(folder, progress=progress) for folder in (first, second)]
    _check_mergeable((first, second), manifests)
    with _held(first, out), _held(second, out), workspace(out, force=False, progress=progress) as work:
        kept = _kept(work, first, manifests[0], without=(_BILL, _ENGINE))
        sources = list(zip((first, second), manifests, strict=True))
        renamed = [_for_cards(engine) for manifest in manifests for engine in manifest.engines]
        _check_distinct(renamed)

        def collect(into: Path) -> None:
            for folder, manifest in sources:
                for engine in manifest.engines:
                    new = _for_cards(engine)
                    for old, name in ((engine.file, new.file), (engine.log, new.log)):
                        listed = _listed(manifest, old)
                        files.copy(folder / old, into / name, sha256=listed.sha256, size_bytes=listed.size_bytes)

        key = key_of(engines=[engine.model_dump(mode="json") for engine in renamed])
        stage = work.stage(_ENGINE, key, collect)
        changed, notes = _publish(
            work,
            {**kept, _ENGINE: stage},
            manifests[0],
            signer,
            engines=tuple(renamed),
            target=" + ".join(dict.fromkeys(manifest.target for manifest in manifests)),
            versions=manifests[1].versions | manifests[0].versions,
        )
    return Compiled(folder=work.out, manifest=changed, engines=evaluate.NO_ENGINE, reused=False, notes=notes)


def _held(folder: Path, out: Path | None) -> AbstractContextManager[object]:
    """Locks a bundle that is only read against builds; one that is to be changed is locked by its workspace."""
    if out is None or files.same_place(out, folder):
        return nullcontext()
    return changes.reading(folder)


def _check_compilable(folder: Path, manifest: Manifest) -> None:
    if manifest.verdict != "passed":
        raise ValidationFailed(
            f"{folder} is {manifest.verdict}; only bundles that passed are compiled.",
            next_step="dinoexport build makes a validated bundle.",
        )
    way = manifest.cpu.chosen if manifest.cpu else None
    if way is not None and way.precision in (Precision.INT8, Precision.BF16):
        raise UsageError(
            f"{folder} is in {way.precision} for a CPU's runtime, and TensorRT needs another graph.",
            next_step="Compile a bundle that was built with --precision fp32, or one for a GPU in fp16 or bf16.",
        )


def _request(
    folder: Path,
    manifest: Manifest,
    target: str | None,
    runtime: Runtime | None,
    engine_choices: Mapping[str, Any],
) -> tuple[Model, EngineRequest]:
    """The resolved request; impossible ones are refused."""
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    changed = parse(EngineChoices, {**dict(recipe.engine), **engine_choices}, where="the command line")
    recipe = recipe.changed(engine=changed)
    gpus = hardware.gpus()
    if target is None and not gpus:
        raise UsageError("This machine has no GPU, so there is no default target.", next_step="Name one: --target l4.")
    chosen = targets.choose(recipe, target=target, runtime=runtime, precision=manifest.precision, gpus=gpus)
    model = family.find(manifest.family).model(recipe)
    request = engine_request(recipe, model, chosen, gpus)
    if request is None:
        raise UsageError(
            f"There is no engine to compile for {chosen.target.name} with {chosen.runtime}: {folder} runs as it is.",
            next_step="Name a GPU's target, or --runtime tensorrt_rtx if the target has it.",
        )
    return model, request


def _check_memory(folder: Path, request: EngineRequest) -> None:
    """The same estimate as before a build, if onnx is installed: the estimate walks the graph."""
    memory_gb, gpu = request.target.memory_gb, request.gpu
    if memory_gb is None and gpu is None:
        return
    for graph in request.graphs:
        builder.check_memory(
            folder / f"{graph.name}.onnx",
            graph,
            request.profiles[graph.name],
            memory_bytes=request.target.memory_for_engine(gpu.memory_bytes if gpu else (memory_gb or 0) * 10**9),
            where=gpu.name if gpu else f"the smallest {request.target.name}",
            choices=request.choices,
        )


def _graph_stages(manifest: Manifest) -> tuple[str, ...]:
    """The stages that the graphs' files came from."""
    graphs = {graph.file for graph in manifest.graphs}
    return tuple(dict.fromkeys(file.stage for file in manifest.files if file.name in graphs))


def _kept(
    work: Workspace, folder: Path, manifest: Manifest, *, without: tuple[str, ...] = (_BILL,)
) -> dict[str, Stage]:
    """The bundle's stages unchanged: in their folder, or copied if the bundle goes to another folder."""
    kept: dict[str, Stage] = {}
    for name, key in manifest.stage_keys.items():
        if name in without:
            continue
        made = tuple(file for file in manifest.files if file.stage == name)
        if files.same_place(folder, work.out):
            kept[name] = Stage(name=name, key=key, folder=work.out, files=made, reused=True)
            continue

        def copy(into: Path, made: Sequence[BundleFile] = made) -> None:
            for file in made:
                files.copy(folder / file.name, into / file.name, sha256=file.sha256, size_bytes=file.size_bytes)

        kept[name] = work.stage(name, key, copy)
    return kept


def _publish(
    work: Workspace, made: Mapping[str, Stage], manifest: Manifest, signer: Signer | None, **changes: Any
) -> tuple[Manifest, tuple[str, ...]]:
    """Publishes the stages with a new bill of materials, if the package that writes it is installed.

    changes: of the manifest's fields, which hold only together with the stages' files.
    """
    manifest = manifest.changed(
        **changes,
        files=tuple(file for stage in made.values() for file in stage.files),
        stage_keys={name: stage.key for name, stage in made.items()},
        created=datetime.now(UTC),
    )
    notes: tuple[str, ...] = ()
    if find_spec("cyclonedx") is None:
        notes = (f"{bundle.SBOM} was left out: cyclonedx-python-lib, which writes it, is not installed here.",)
    else:
        content = sbom.of(manifest)

        def write(into: Path) -> None:
            (into / bundle.SBOM).write_text(content, encoding="utf-8")

        bill = work.stage(_BILL, key_of(content=content), write)
        manifest = manifest.with_stage(bill.name, bill.key, bill.files)
        made = {**made, bill.name: bill}
    work.publish(made, manifest, sign=None if signer is None else signer.signature)
    return manifest, notes


def _versions(runtime: Runtime) -> dict[str, str]:
    found = {package: hardware.installed(package) for package in (*TABLE[runtime].distributions, "polygraphy")}
    return {package: version for package, version in found.items() if version}


def _rejected(out: Path, report: judge.Report) -> EnginesRejected:
    worst = ", ".join(sorted({f"{row.case}/{row.output}" for row in report.failures})[:4])
    return EnginesRejected(
        f"{out} was left as it was: the engine's outputs are not PyTorch's ({worst}).",
        next_step="The table shows each figure with its limit; try a newer TensorRT or --preset fast.",
        report=report,
    )


def _check_mergeable(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raises UsageError unless the bundles differ in nothing but their engines."""
    for folder, manifest in zip(folders, manifests, strict=True):
        if not manifest.engines:
            raise UsageError(f"{folder} holds no engine.", next_step="dinoexport compile builds one on its card.")
    first, second = manifests
    if _hashes_of_graphs(first) != _hashes_of_graphs(second):
        raise UsageError(
            f"{folders[0]} and {folders[1]} do not hold the same graphs, so they cannot be merged.",
            next_step="Compile copies of one bundle on each card, then merge those.",
        )
    runtimes = {engine.runtime for manifest in manifests for engine in manifest.engines}
    if len(runtimes) > 1:
        raise UsageError(
            f"Engines of {' and '.join(sorted(runtimes))} cannot be in one bundle.",
            next_step="Merge bundles of one runtime.",
        )


def _hashes_of_graphs(manifest: Manifest) -> dict[str, str]:
    stages = _graph_stages(manifest)
    return {file.name: file.sha256 for file in manifest.files if file.stage in stages}


def _for_cards(engine: EngineFacts) -> EngineFacts:
    """The engine under a name that states its cards; an engine that has such a name keeps it."""
    cards = "_".join(f"sm{capability.replace('.', '')}" for capability in engine.compute_capabilities)
    stem, suffix = f"{engine.graph}.{cards}", Path(engine.file).suffix
    return engine.changed(file=f"{stem}{suffix}", log=f"{stem}{suffix}.log")


def _check_distinct(engines: Sequence[EngineFacts]) -> None:
    seen: set[tuple[str, str]] = set()
    for engine in engines:
        for capability in engine.compute_capabilities:
            if (engine.graph, capability) in seen:
                raise UsageError(
                    f"Both bundles hold an engine of {engine.graph} for SM {capability}, and Triton "
                    "distinguishes cards only by that.",
                    next_step='For two models of one capability build with [engine] compatibility = "same-cc".',
                )
            seen.add((engine.graph, capability))


def _listed(manifest: Manifest, name: str) -> BundleFile:
    return next(file for file in manifest.files if file.name == name)

"""The manifest of a bundle (files, sources, measurements) and checks of the bundle's files."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    WrapSerializer,
    model_serializer,
    model_validator,
)

from dinoexport.config.recipe import Frozen, Sha256
from dinoexport.errors import DinoexportError, MissingRequirement, UsageError, ValidationFailed
from dinoexport.spec import SYNTHETIC, Dim, Graph, Precision, Progress, Runtime, Tensor, Way, silent
from dinoexport.system import change_steps, changes, files, untrusted
from dinoexport.system.untrusted import Unreadable

SCHEMA: Final = 1
MANIFEST = "manifest.json"
REFERENCE = "reference.npz"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
SBOM = "sbom.cdx.json"
SIGNATURE = "model.sig"
ENGINES = "engines.json"
PRECISION = "precision.json"
# A plain file name: no separator, no leading dot, so no path out of the bundle.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=128)]
# A thousand times the size of a real manifest; a larger file is not a manifest and is not read.
MANIFEST_MAX_BYTES = 1 << 24
Verdict = Literal["passed", "rejected", "unjudged"]


class BundleFile(Frozen):
    """One file of the bundle besides the manifest."""

    name: FileName
    stage: str
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class CheckpointFacts(Frozen):
    """Where the weights came from. sha256: the file's, or for synthetic weights that of the rule that generates them.

    prefix: the prefix of the model's tensor names in the file, if one was requested. assumed: recipe key -> its value
    and the reason, for values that neither a file nor the weights show. notes: what was chosen and left out.
    """

    source: str
    sha256: Sha256
    licence: str
    prefix: str | None = None
    assumed: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A bundle written before these keys existed keeps its content and its hash."""
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if value or key not in ("prefix", "assumed", "notes")}


class HeadManifest(Frozen):
    """The head that turns the backbone's outputs into results; see `spec.HeadFacts`.

    source, sha256: of the head's own file; empty if the checkpoint holds the head. file: for a head that was fitted
    here and is published nowhere, its copy in the bundle.
    """

    kind: str
    dataset: str
    terms: str
    value_range: tuple[float, float] | None = None
    classes: tuple[str, ...] = ()
    source: str = ""
    sha256: Sha256 | None = None
    file: FileName | None = None


class GraphFacts(Frozen):
    """A graph's signature as data."""

    name: FileName
    file: FileName
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    dims: tuple[dict[str, Any], ...]
    carried: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, file: str) -> GraphFacts:
        """The facts of `graph`, which is stored in `file`."""
        return cls(
            name=graph.name,
            file=file,
            inputs=tuple(_plain(tensor) for tensor in graph.inputs),
            outputs=tuple(_plain(tensor) for tensor in graph.outputs),
            dims=tuple(_plain(dim) for dim in graph.dims),
            carried=dict(graph.carried),
        )

    @model_validator(mode="after")
    def _describes_a_graph(self) -> Self:
        self.graph()
        return self

    def graph(self) -> Graph:
        """The signature these facts describe."""
        tensors, dims = _adapters()
        return Graph(
            name=self.name,
            inputs=tensors.validate_python(self.inputs),
            outputs=tensors.validate_python(self.outputs),
            dims=dims.validate_python(self.dims),
            carried=self.carried,
        )


@cache
def _adapters() -> tuple[TypeAdapter[tuple[Tensor, ...]], TypeAdapter[tuple[Dim, ...]]]:
    """Made once: each takes 15 ms."""
    return TypeAdapter(tuple[Tensor, ...]), TypeAdapter(tuple[Dim, ...])


ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class EngineFacts(Frozen):
    """An engine built from the graph of the same name.

    device: the GPU it was built on, empty when it was compiled without one. profiles: profile -> input -> smallest,
    most likely and largest shape, in the engine's own order. scratch_bytes: device memory it needs in addition to
    weights, inputs and outputs. scratch_bytes, weight_bytes and fused_attentions are None if they are unknown.
    executed: `never`, or `on DEVICE at TIME` when a GPU has run every case that the profiles cover and the outputs
    passed; report has the figures. caution: the target's, and what could not be inspected.
    """

    graph: FileName
    file: FileName
    runtime: Runtime
    runtime_version: str
    compute_capabilities: tuple[str, ...]
    device: str = ""
    compatibility: str = "this-gpu"
    version_compatible: bool = False
    stripped: bool = False
    precision: Precision
    profiles: dict[str, dict[str, ShapeRange]] = Field(min_length=1)
    size_bytes: int = Field(gt=0)
    weight_bytes: int | None
    scratch_bytes: int | None = Field(ge=0)
    attentions: int
    fused_attentions: int | None
    build_s: float
    peak_memory_bytes: int
    log: FileName
    log_sha256: Sha256
    executed: str = "never"
    report: dict[str, Any] = Field(default_factory=dict)
    caution: str = ""


def _as_older(way: Way, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """The fields; a `rest` that is left to the runtime is left out, as in older bundles."""
    return {name: value for name, value in fields(way).items() if name != "rest" or value is not None}


_Way = Annotated[Way, WrapSerializer(_as_older)]


class Timed(Frozen):
    """A way to run the graphs and how long it took. spread: of the middle half of the samples, by the median.

    best_ms: the shortest. cpu_ms: the least CPU time of a run, all threads together.
    """

    way: _Way
    median_ms: float = Field(gt=0)
    best_ms: float | None = Field(default=None, gt=0)
    cpu_ms: float | None = Field(default=None, ge=0)
    spread: float = Field(ge=0)
    samples: int = Field(ge=1)


class CpuFacts(Frozen):
    """The fastest way to run the graphs on the CPU that built the bundle, measured with the workload `load`.

    arithmetic: how many products really ran in which precision. times_fp32: the chosen way's time divided by that of
    the fastest fp32. measured: empty if there was no choice. refused: runtime -> why it does not run these graphs; it
    was left out of the choice. others_share: the share of the CPUs' time that other processes used. basis: `measured`
    if the figures agreed; if several ways took equal times, `known` if the one was chosen that was faster here when the
    machine was quiet, `usual` if it is the one that is usually faster.
    """

    machine: str
    usable_cpus: int = Field(ge=1)
    load: str
    chosen: _Way
    runtime_version: str
    arithmetic: dict[str, int]
    times_fp32: float | None
    measured: tuple[Timed, ...]
    refused: dict[str, str] = Field(default_factory=dict)
    others_share: float = Field(ge=0)
    basis: Literal["measured", "known", "usual"] = "measured"

    @property
    def measured_ms(self) -> float | None:
        """The chosen way's median time, if anything was measured."""
        return next((timed.median_ms for timed in self.measured if timed.way == self.chosen), None)


class Manifest(Frozen):
    """Everything a bundle says about itself."""

    schema_version: Literal[1] = SCHEMA
    variant: str
    family: str
    precision: Precision
    target: str
    verdict: Verdict
    recipe: dict[str, Any]
    checkpoint: CheckpointFacts
    head: HeadManifest | None = None
    graphs: tuple[GraphFacts, ...]
    engines: tuple[EngineFacts, ...] = ()
    cpu: CpuFacts | None = None
    files: tuple[BundleFile, ...]
    stage_keys: dict[str, Sha256]
    versions: dict[str, str]
    card: dict[str, str]
    report: dict[str, Any]
    created: datetime

    @property
    def synthetic(self) -> str:
        """Which weights are synthetic, so that the outputs mean nothing; empty if they all come from a file."""
        if self.checkpoint.source.startswith(SYNTHETIC):
            return "the weights"
        return "the weights of the head" if self.head and self.head.source.startswith(SYNTHETIC) else ""

    @model_validator(mode="after")
    def _lists_what_is_opened(self) -> Self:
        """Refuses a manifest that refers to a file it does not list: such a file has no hash to check."""
        needed = {graph.file for graph in self.graphs} | {engine.file for engine in self.engines}
        needed |= set() if self.verdict == "unjudged" else {REFERENCE}
        if missing := sorted(needed - {file.name for file in self.files}):
            raise ValueError(f"files lacks {', '.join(missing)}")
        return self

    def with_stage(self, name: str, key: str, files: tuple[BundleFile, ...]) -> Manifest:
        """This manifest with the files of one more stage."""
        return self.changed(files=(*self.files, *files), stage_keys={**self.stage_keys, name: key})

    def to_bytes(self) -> bytes:
        """The manifest file's content. It ends in a hash of itself, so that a changed byte in it is noticed too."""
        content = self.model_dump(mode="json")
        return _canonical({**content, "manifest_sha256": hashlib.sha256(_canonical(content)).hexdigest()})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """The manifest in `raw`; raises ValidationFailed if it is damaged or has another schema version."""
        try:
            content = json.loads(raw)
            if not isinstance(content, dict):
                raise TypeError("it is not an object")
            if content.get("schema_version") != SCHEMA:
                raise UsageError(
                    f"{MANIFEST} has schema version {content.get('schema_version')!r}; this dinoexport reads {SCHEMA}.",
                    next_step="Use the dinoexport that built the bundle, or build it again.",
                )
            content.pop("manifest_sha256", None)
            manifest = cls.model_validate(content)
            unchanged = raw == manifest.to_bytes()  # its own hash included
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise damaged(f"{MANIFEST}: {key}: {first['msg']}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise damaged(f"{MANIFEST} is not readable: {error}") from None
        if not unchanged:
            raise damaged(f"{MANIFEST} was changed after it was written")
        return manifest


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _plain(value: Tensor | Dim) -> dict[str, Any]:
    """The fields, for JSON. An empty `sum_of` is left out, as in older bundles."""
    plain = asdict(value)
    lists = {key: list(plain[key]) for key in ("shape", "sum_of") if key in plain}
    return {key: content for key, content in (plain | lists).items() if key != "sum_of" or content}


def damaged(problem: str) -> ValidationFailed:
    """The error for a bundle that is not as it was written."""
    return ValidationFailed(f"The bundle is damaged: {problem}.", next_step="Copy it again, or build it again.")


def describe(
    folder: Path,
    names: Sequence[str],
    stage: str,
    *,
    known: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> tuple[BundleFile, ...]:
    """Hash and size of the files `names` in `folder`, which `stage` wrote. known: the SHA-256 of some of them."""
    return tuple(
        BundleFile(
            name=name,
            stage=stage,
            sha256=(known or {}).get(name) or files.sha256(folder / name, progress=progress),
            size_bytes=(folder / name).stat().st_size,
        )
        for name in names
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`; the files are not checked."""
    try:
        raw = untrusted.read_bytes(folder / MANIFEST, max_bytes=MANIFEST_MAX_BYTES, links=False)
    except Unreadable as error:
        if error.is_link:
            raise _linked(MANIFEST, folder) from None
        if error.absent or not untrusted.is_regular(folder / MANIFEST):
            raise UsageError(
                f"{folder} is not a bundle: it has no {MANIFEST}.", next_step="dinoexport build VARIANT makes one."
            ) from None
        if "bytes" in error.problem:
            raise damaged(f"{MANIFEST} is not readable: {error.problem}") from None
        raise
    return Manifest.from_bytes(raw)


def rewrite_manifest(folder: Path, manifest: Manifest) -> bool:
    """Replaces the bundle's manifest by `manifest`; False if the folder cannot be written to.

    The signature is removed with the old manifest: an unsigned bundle is better than one that differs from what was
    signed.
    """
    try:
        rewrite(folder, before=read_manifest(folder), after=manifest)
    except MissingRequirement:
        return False
    return True


def rewrite(
    folder: Path, *, before: Manifest, after: Manifest, sign: Callable[[Manifest, str], bytes] | None = None
) -> None:
    """Replaces the manifest `before` by `after`, and the old signature by a new one, in one step.

    sign: computes the signature of the files in a manifest, as those of a folder of the given name; without it an
    existing signature is removed. Raises ValidationFailed if the bundle's manifest is no longer `before`,
    UsageError if a bundle to be signed holds files that no build wrote, MissingRequirement if it cannot be written to.
    """
    with files.disk_errors(folder), changes.changing(folder, doing=f"changing {folder}") as change:
        if read_manifest(folder).to_bytes() != before.to_bytes():
            raise ValidationFailed(f"{folder} was changed by another process meanwhile.", next_step="Run it again.")
        steps = []
        if after != before:
            (change.new / MANIFEST).write_bytes(after.to_bytes())
            steps.append(change_steps.move(change.new / MANIFEST, change.place / MANIFEST))
        if sign is not None:
            known = {file.name for file in after.files} | {MANIFEST, SIGNATURE}
            if added := sorted({path.name for path in folder.iterdir()} - known):
                raise UsageError(
                    f"{folder} holds files that no build wrote: {', '.join(added)}.",
                    next_step="Move them away first: a signature covers everything in the folder.",
                )
            (change.new / SIGNATURE).write_bytes(sign(after, change.place.name))
            steps.append(change_steps.move(change.new / SIGNATURE, change.place / SIGNATURE))
        elif after != before:
            steps.append(change_steps.remove(change.place / SIGNATURE))
        what = "signed" if after == before else "recorded in its manifest, which is signed" if sign else "recorded"
        change.commit(steps, done=f"{folder}: the verdict is {what}.")


def unreadable(folder: Path, name: str, error: Unreadable) -> DinoexportError:
    """The error for a file of the bundle in `folder` that cannot or must not be opened."""
    if error.is_link:
        return _linked(name, folder)
    problem = "is missing or not a regular file" if not untrusted.is_regular(folder / name, links=False) else ""
    return damaged(f"{name} {problem or f'cannot be read: {error.problem}'}")


def _linked(name: str, folder: Path) -> ValidationFailed:
    """A cache such as Hugging Face's holds links. Nothing guarantees their targets, and ONNX Runtime opens no links."""
    return ValidationFailed(
        f"{name} in {folder} is a link, and a bundle holds plain files.",
        next_step=f"Copy what the links lead to, then use the copy: cp -rL {shlex.quote(str(folder))} COPY",
    )

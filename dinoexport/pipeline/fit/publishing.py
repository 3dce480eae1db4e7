"""A bundle with a fitted head: the graph extended, validated as a whole, and published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinoexport import bundle, family
from dinoexport.bundle import BundleFile, GraphFacts, HeadManifest, Manifest, reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import load_validation
from dinoexport.config.recipe import Recipe
from dinoexport.errors import ValidationFailed
from dinoexport.family import Model, Reported
from dinoexport.pipeline.fit import classifiers, fitted_graph
from dinoexport.pipeline.fit.classifiers import Fitted, HeadKind, HeldOutScores
from dinoexport.pipeline.fit.examples import Examples
from dinoexport.pipeline.stages.judge import record_verdict
from dinoexport.pipeline.stages.report import list_materials
from dinoexport.pipeline.versions import versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of, workspace
from dinoexport.report import html_report
from dinoexport.runtime import runners
from dinoexport.spec import Expectation, Picture, Progress
from dinoexport.system import files
from dinoexport.validation import evaluate
from dinoexport.validation.judge import Report

HEAD_FILE = "head.safetensors"
LABELS_FILE = "labels.json"
SEED = 0
_LARGE_BYTES = 50_000_000
_NOTES_MAX = 50  # in the bundle: a folder can hold any number of files that are no images


@dataclass(frozen=True, kw_only=True)
class FittedBundle:
    """A published bundle with a fitted head. said: notes for the user about the images and the head."""

    folder: Path
    manifest: Manifest
    held: HeldOutScores
    report: Report
    said: tuple[str, ...]


def publish(
    source: Path,
    out: Path,
    manifest: Manifest,
    recipe: Recipe,
    found: Examples,
    fitted: Fitted,
    held: HeldOutScores,
    confused: Sequence[Picture],
    reads: Sequence[tuple[str, str]],
    kind: HeadKind,
    force: bool,
    progress: Progress,
) -> FittedBundle:
    """Writes, validates and publishes the bundle with the head."""
    model = family.find(recipe.family).model(recipe)
    (graph,), (old,) = model.graphs, manifest.graphs
    graph = replace(graph, dims=old.graph().dims)
    said = (*found.said, *_warnings(fitted, manifest))
    facts = {
        "head": kind,
        "images": len(found.fitted) + len(found.held_out),
        "fitted_on": len(found.fitted),
        "held_out": asdict(held),
        "images_sha256": found.digest,
        "seed": SEED,
        "notes": list(_shortened(said)),
        **fitted.facts,
        "versions": versions_of(("scikit-learn", "numpy")),
    }
    metadata = {
        "dinoexport.head": recipe.head["kind"],
        "dinoexport.classes": json.dumps(found.classes),
        "dinoexport.recipe": json.dumps(recipe.model_dump(mode="json"), sort_keys=True),
    }
    with workspace(out, force=force, progress=progress) as work:
        key = key_of(
            graph=[f.sha256 for f in manifest.files if f.name.startswith(old.file)],
            tensors={name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in fitted.tensors.items()},
            metadata=metadata,
            code=family.code_of(model),
        )

        def make(folder: Path) -> None:
            _write(source, folder, manifest, fitted_graph.Extension(
                graph=graph, features=tuple(reads), tensors=fitted.tensors, table=fitted.table, metadata=metadata
            ), found.classes)  # fmt: skip

        made = {"export": work.stage("export", key, make)}
        reference = _expected(reference_file.read(source / bundle.REFERENCE), model, manifest, fitted, reads, kind)

        def store(folder: Path) -> None:
            reference_file.write(folder / bundle.REFERENCE, reference)

        made["reference"] = work.stage(
            "reference", key_of(graph=key, of=manifest.stage_keys, limits=str(reference.limits)), store
        )
        way = runners.built_way(manifest)
        opened = runners.open_candidate(model, {made["export"].folder / old.file: graph}, way)
        name = f"{runners.candidate_name(manifest.precision, way, {})}, with a fitted head"
        kept = html_report.Kept()
        report = evaluate.judged(
            html_report.keeping(opened, reference.expectations, kept), reference, name, progress=progress
        )
        made["judge"] = record_verdict(work, report, None, manifest.cpu)
        if not report.passed:
            worst = ", ".join(sorted({f"{row.case}/{row.output}" for row in report.failures})[:4])
            raise ValidationFailed(
                f"Nothing was published: the graph's probabilities are not those of PyTorch's tokens ({worst}).",
                next_step="Report it, with the bundle's manifest.",
            )
        new = _manifest(manifest, recipe, model, graph, old.file, made, report, facts)
        shown = html_report.HeldOut(
            images=held.images,
            right=held.right,
            interval=held.interval,
            recall=held.recall,
            counts=held.counts,
            confusions=tuple(confused),
            notes=_shortened(said),
        )
        page = _page(work, new, model, report, reference, {name: kept}, shown)
        made["page"] = page
        new = new.with_stage(page.name, page.key, page.files)
        bill = list_materials(work, new)
        new = new.with_stage(bill.name, bill.key, bill.files)
        work.publish({**made, bill.name: bill}, new)
    return FittedBundle(folder=out, manifest=new, held=held, report=report, said=said)


def _warnings(fitted: Fitted, manifest: Manifest) -> list[str]:
    said = []
    if "fitted.bank" in fitted.tensors and (size := fitted.tensors["fitted.bank"].size * 2) > _LARGE_BYTES:
        said.append(f"the graph holds {size / 1e6:.0f} MB of features; --head logreg holds a few kB instead")
    if manifest.engines:
        said.append("the bundle's engines output features and were left out; only the ONNX has the head")
    return said


def _shortened(notes: Sequence[str]) -> tuple[str, ...]:
    """The notes, the first of them `skipped` files, as a bundle keeps them."""
    if (rest := len(notes) - _NOTES_MAX) <= 0:
        return tuple(notes)
    first = _NOTES_MAX // 2
    return (*notes[:first], f"and {rest} more", *notes[first + rest :])


def _write(
    source: Path, folder: Path, manifest: Manifest, extension: fitted_graph.Extension, classes: Sequence[str]
) -> None:
    """The graph with its head, the backbone's own weights, the head's tensors by themselves, and the class names."""
    from safetensors.numpy import save_file

    (old,) = manifest.graphs
    for file in manifest.files:
        if file.name.startswith(f"{old.file}."):
            files.copy(source / file.name, folder / file.name, sha256=file.sha256, size_bytes=file.size_bytes)
    extension.write(source / old.file, folder / old.file)
    save_file(dict(extension.tensors), folder / HEAD_FILE)
    (folder / LABELS_FILE).write_text(json.dumps(list(classes), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _expected(
    of_backbone: Reference,
    model: Model,
    manifest: Manifest,
    fitted: Fitted,
    reads: Sequence[tuple[str, str]],
    kind: HeadKind,
) -> Reference:
    """The reference of the whole graph, computed in float64 from PyTorch's tokens in the bundle's reference."""
    import numpy as np

    expectations = []
    for expectation in of_backbone.expectations:
        parts = [
            expectation.outputs[name].mean(axis=1, dtype=np.float64) if form == "mean" else expectation.outputs[name]
            for name, form in reads
        ]
        shares = classifiers.probabilities(kind, fitted, np.concatenate(parts, axis=1))
        best = np.sort(shares, axis=1)
        expectations.append(
            Expectation(
                case=replace(expectation.case, neighbours=False),
                outputs={
                    "probabilities": shares.astype(np.float32),
                    "class_index": shares.argmax(axis=1).astype(np.int32),
                },
                leads={"class_index": (best[:, -1] - best[:, -2]).astype(np.float32)},
            )
        )
    validation, _ = load_validation(model.fitted_validation, beside=None)
    limit = evaluate.limits_for(validation, manifest.precision).probability_difference_max
    limits = of_backbone.limits.changed(probability_difference_max=limit)
    return Reference(
        name=f"{of_backbone.name}; the fitted head in float64",
        limits=limits,
        expectations=tuple(expectations),
        refusals=of_backbone.refusals,
        kinds=evaluate.kinds_of(model.graphs),
    )


def _manifest(
    old: Manifest,
    recipe: Recipe,
    model: Model,
    graph: Any,
    file: str,
    made: Mapping[str, Stage],
    report: Report,
    facts: Mapping[str, Any],
) -> Manifest:
    head = model.head_facts
    assert head is not None
    of_head: BundleFile = next(f for f in made["export"].files if f.name == HEAD_FILE)
    return old.changed(
        recipe=recipe.model_dump(mode="json"),
        head=HeadManifest(**asdict(head), source=HEAD_FILE, sha256=of_head.sha256, file=HEAD_FILE),
        graphs=(GraphFacts.of(graph, file),),
        engines=(),
        files=tuple(f for stage in made.values() for f in stage.files),
        stage_keys={name: stage.key for name, stage in made.items()},
        card=dict(model.card),
        report=report.to_json() | {"fit": dict(facts)},
        created=datetime.now(UTC),
    )


def _page(
    work: Workspace,
    manifest: Manifest,
    model: Reported,
    report: Report,
    reference: Reference,
    kept: Mapping[str, html_report.Kept],
    held_out: html_report.HeldOut,
) -> Stage:
    def make(folder: Path) -> None:
        html = html_report.render(manifest, model, report, None, reference, kept, held_out)
        (folder / bundle.REPORT_HTML).write_text(html, encoding="utf-8")

    key = key_of(
        code=family.code_of(model),
        template=files.sha256(html_report.TEMPLATE),
        manifest=manifest.model_dump(mode="json", exclude={"created"}),
        held_out=hashlib.sha256(repr(held_out).encode()).hexdigest(),
    )
    return work.stage("page", key, make)

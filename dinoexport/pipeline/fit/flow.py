"""The whole flow: labelled images -> the bundle's own features -> a classifier -> a new bundle, validated as a whole.

No torch and no checkpoint are needed: the backbone is the bundle's graph, byte for byte, and PyTorch's probabilities
are computed from PyTorch's tokens in the bundle's reference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinoexport import bundle, family
from dinoexport.bundle import BundleFile, GraphFacts, HeadManifest, Manifest, archive, reference_file, sbom
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.recipe import Limit, Recipe, parse
from dinoexport.errors import UsageError, ValidationFailed, require
from dinoexport.family import Model
from dinoexport.pipeline.fit import classifiers, examples, fitted_graph
from dinoexport.pipeline.fit.classifiers import Fitted, HeadKind, Held
from dinoexport.pipeline.fit.examples import Example, Examples
from dinoexport.pipeline.stages.judge import record_verdict
from dinoexport.pipeline.stages.report import list_materials
from dinoexport.pipeline.versions import versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, check_place, key_of, workspace
from dinoexport.report import html_report
from dinoexport.runtime import runners
from dinoexport.spec import Array, Arrays, Candidate, Expectation, Picture, Precision, Progress, silent
from dinoexport.system import files
from dinoexport.system.cache import cache_folder
from dinoexport.validation import evaluate
from dinoexport.validation.judge import Report

HEAD_FILE = "head.safetensors"
LABELS_FILE = "labels.json"
PACKAGES = ("onnx", "safetensors", "sklearn", *html_report.PACKAGES, *sbom.PACKAGES)
SEED = 0
_LARGE_BYTES = 50_000_000
_SHOWN_MAX = 24  # wrongly classified images on the page
# The largest difference of a probability, as in validate/dinov2_heads.toml.
_PROBABILITY_MAX = {Precision.FP32: 1e-4, Precision.FP16: 0.02, Precision.BF16: 0.03, Precision.INT8: 0.1}


@dataclass(frozen=True, kw_only=True)
class FittedBundle:
    """A published bundle with a fitted head. said: notes for the user about the images and the head."""

    folder: Path
    manifest: Manifest
    held: Held
    report: Report
    said: tuple[str, ...]


def fit(
    folder: Path,
    images: Path,
    *,
    kind: HeadKind = "logreg",
    balanced: bool = False,
    out: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> FittedBundle:
    """Fits a classifier on `images`, whose subfolders are classes, and publishes the bundle with the classifier.

    Raises UsageError for images or a bundle that cannot be used, ValidationFailed if the graph's probabilities are not
    those computed from PyTorch's tokens.
    """
    require("export", *PACKAGES)
    target = out or folder.with_name(f"{folder.name}-{kind}")
    if target.resolve() == folder.resolve():
        raise UsageError(f"{target} is the bundle the features come from.", next_step="Choose another --out.")
    check_place(target)  # before the work, not only after it
    with bundle.checked(folder, progress=progress) as manifest:
        return _fitted(folder, manifest, images, kind, balanced, target, force, progress)


def _fitted(
    folder: Path,
    manifest: Manifest,
    images: Path,
    kind: HeadKind,
    balanced: bool,
    target: Path,
    force: bool,
    progress: Progress,
) -> FittedBundle:
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    _refuse(folder, manifest, model, kind)
    found = examples.read(model, images, seed=SEED, progress=progress)
    reads = model.fits[kind]
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    candidate = runners.open_candidate(model, graphs, runners.way_of(manifest))
    features = _features(model, images, candidate, manifest, (*found.fitted, *found.held_out), progress)
    order = {label: k for k, label in enumerate(found.classes)}

    def joined(of: Sequence[Example]) -> Array:
        import numpy as np

        return np.stack([np.concatenate([features[e.digest][_key(read)] for read in reads]) for e in of])

    import numpy as np

    labels = np.array([order[example.label] for example in found.fitted])
    progress("fitting", 0, 0)
    fitted = classifiers.fit(
        kind, joined(found.fitted), labels, classes=len(found.classes), balanced=balanced, seed=SEED
    )
    held = classifiers.judge(
        classifiers.probabilities(kind, fitted, joined(found.held_out)),
        [example.label for example in found.held_out],
        [example.name for example in found.held_out],
        found.classes,
    )
    head = {"kind": model.fitted_head(kind), "classes": list(found.classes), **fitted.table}
    changed = recipe.changed(head=head)
    confused = _confused(model, images, held)
    return _publish(folder, target, manifest, changed, found, fitted, held, confused, reads, kind, force, progress)


def _refuse(folder: Path, manifest: Manifest, model: Model, kind: str) -> None:
    if manifest.verdict != "passed":
        raise ValidationFailed(
            f"{folder} is {manifest.verdict}; a head is fitted only on validated features.",
            next_step="dinoexport build makes a validated bundle.",
        )
    if kind not in model.fits or len(manifest.graphs) != 1:
        raise UsageError(
            f"{folder} gives no features that a classifier can be fitted on.",
            next_step="Build the variant without a head: dinoexport build VARIANT.",
        )


def _key(read: tuple[str, str]) -> str:
    return f"{read[0]} {read[1]}"


def _features(
    model: Model,
    images: Path,
    candidate: Candidate,
    manifest: Manifest,
    wanted: Sequence[Example],
    progress: Progress,
) -> dict[str, dict[str, Array]]:
    """Image's digest -> the features of all kinds, float32; cached, so that another head takes only seconds.

    Images are decoded one at a time, and only those whose features are not there.
    """
    key = key_of(graphs=[f.sha256 for f in manifest.files if ".onnx" in f.name], way=str(runners.way_of(manifest)))
    place = cache_folder() / "features" / key[:32]
    found: dict[str, dict[str, Array]] = {}
    missing: dict[str, str] = {}
    for example in wanted:
        if example.digest not in found and (stored := _stored(place, example.digest)) is not None:
            found[example.digest] = stored
    for example in wanted:
        if example.digest not in found and example.digest not in missing.values():
            missing[example.name] = example.digest
    cases = model.cases_from(images, progress=silent, only=missing) if missing else ()
    for done, case in enumerate(cases, start=1):
        progress("computing features", done, len(missing))
        if not isinstance(case, str):
            found[missing[case.name]] = _of_image(candidate(case.inputs))
            _store(place, missing[case.name], found[missing[case.name]])
    if gone := sorted(name for name, digest in missing.items() if digest not in found):
        raise UsageError(f"{gone[0]} changed while it was read.", next_step="Run fit again.")
    return found


def _stored(place: Path, digest: str) -> dict[str, Array] | None:
    try:
        return archive.read(place / f"{digest}.npz")
    except Exception:  # absent, or damaged in any way: it is computed again
        return None


def _store(place: Path, digest: str, features: Mapping[str, Array]) -> None:
    import numpy as np

    partial = place / f"{digest}.npz.{os.getpid()}.partial"
    arrays: Any = features
    with files.disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, place / f"{digest}.npz")


def _confused(model: Model, images: Path, held: Held) -> tuple[Picture, ...]:
    """The held-out images that were given another class, worst first, as pictures that say so."""
    worst = {name: (true, given, share) for name, true, given, share in held.confusions[:_SHOWN_MAX]}
    uses, drawn = model.uses, {}
    if uses is None or not worst:
        return ()
    for case in model.cases_from(images, progress=silent, only=worst):
        if not isinstance(case, str):
            true, given, share = worst[case.name]
            caption = f"{true}, taken for {given} with {share:.0%}"
            drawn[case.name] = replace(uses.thumbnail(case.inputs), title=case.name, caption=caption)
    return tuple(drawn[name] for name in worst if name in drawn)


def _of_image(outputs: Arrays) -> dict[str, Array]:
    """Every output of one image as it is, or its mean over the second axis if it has one."""
    import numpy as np

    return {
        _key((name, "as is" if array.ndim == 2 else "mean")): (
            array[0] if array.ndim == 2 else array[0].mean(axis=0, dtype=np.float64)
        ).astype(np.float32)
        for name, array in outputs.items()
        if array.ndim in (2, 3)
    }


def _publish(
    source: Path,
    out: Path,
    manifest: Manifest,
    recipe: Recipe,
    found: Examples,
    fitted: Fitted,
    held: Held,
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
    facts = {
        "head": kind,
        "images": len(found.fitted) + len(found.held_out),
        "fitted_on": len(found.fitted),
        "held_out": asdict(held),
        "images_sha256": found.digest,
        "seed": SEED,
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
            images=held.images, right=held.right, interval=held.interval, recall=held.recall, confusions=tuple(confused)
        )
        page = _page(work, new, model, report, reference, {name: kept}, shown)
        made["page"] = page
        new = new.with_stage(page.name, page.key, page.files)
        bill = list_materials(work, new)
        new = new.with_stage(bill.name, bill.key, bill.files)
        work.publish({**made, bill.name: bill}, new)
    return FittedBundle(
        folder=out, manifest=new, held=held, report=report, said=(*found.said, *_warnings(fitted, manifest))
    )


def _warnings(fitted: Fitted, manifest: Manifest) -> list[str]:
    said = []
    if "fitted.bank" in fitted.tensors and (size := fitted.tensors["fitted.bank"].size * 2) > _LARGE_BYTES:
        said.append(f"the graph holds {size / 1e6:.0f} MB of features; --head logreg holds a few kB instead")
    if manifest.engines:
        said.append("the bundle's engines output features and were left out; only the ONNX has the head")
    return said


def _write(
    source: Path, folder: Path, manifest: Manifest, extension: fitted_graph.Extension, classes: Sequence[str]
) -> None:
    """The graph with its head, the backbone's own weights, the head's tensors by themselves, and the class names."""
    from safetensors.numpy import save_file

    (old,) = manifest.graphs
    for file in manifest.files:
        if file.name.startswith(f"{old.file}."):
            files.copy(source / file.name, folder / file.name, sha256=file.sha256)
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
    limit = Limit(
        value=_PROBABILITY_MAX[manifest.precision],
        reason="a softmax changes by at most half of the change of its logits; the features' error in this precision",
    )
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
    model: Model,
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

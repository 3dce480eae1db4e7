"""The whole flow: labelled images -> the bundle's own features -> a classifier -> a new bundle, validated as a whole.

No torch and no checkpoint are needed: the backbone is the bundle's graph, byte for byte, and PyTorch's probabilities
are computed from PyTorch's tokens in the bundle's reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dinoexport import bundle, family
from dinoexport.bundle import Manifest, sbom
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import DinoexportError, UsageError, ValidationFailed, require
from dinoexport.family import CaseSource, Fittable
from dinoexport.pipeline.fit import classifiers, examples, features, publishing
from dinoexport.pipeline.fit.classifiers import HeadKind, HeldOutScores
from dinoexport.pipeline.fit.examples import Examples, LabelledImage
from dinoexport.pipeline.workspace import check_place
from dinoexport.report import html_report
from dinoexport.runtime import runners
from dinoexport.spec import Array, Picture, Progress, silent
from dinoexport.system import files

PACKAGES = ("onnx", "safetensors", "sklearn", *html_report.PACKAGES, *sbom.PACKAGES)
_SHOWN_MAX = 24  # wrongly classified images on the page


def fit(
    folder: Path,
    images: Path,
    *,
    kind: HeadKind = "logreg",
    balanced: bool = False,
    out: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> publishing.FittedBundle:
    """Fits a classifier on `images`, whose subfolders are classes, and publishes the bundle with the classifier.

    force: repeats every stage, and replaces a bundle at `out` that was not fitted on images of these classes.

    Raises UsageError for images or a bundle that cannot be used, ValidationFailed if the graph's probabilities are not
    those computed from PyTorch's tokens.
    """
    require("export", *PACKAGES)
    if balanced and kind == "knn":
        raise UsageError("knn has no weights of classes to balance.", next_step="Leave --balanced out, or use logreg.")
    target = out or folder.with_name(f"{folder.name}-{kind}")
    if files.same_place(target, folder):
        raise UsageError(f"{target} is the bundle the features come from.", next_step="Choose another --out.")
    check_place(target)  # before the work, not only after it
    examples.check_folder(images)  # likewise: a large bundle takes a minute to hash
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
) -> publishing.FittedBundle:
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    _refuse(folder, manifest, model, kind)
    found = examples.read(model, images, seed=publishing.SEED, progress=progress)
    replaced = _replaced(target, found, force=force)
    reads = model.fits[kind]
    graphs = {folder / g.file: g.graph() for g in manifest.graphs}
    candidate = runners.open_candidate(model, graphs, runners.way_of(manifest))
    by_image = features.of_images(model, images, candidate, manifest, (*found.fitted, *found.held_out), progress)
    order = {label: k for k, label in enumerate(found.classes)}

    def joined(of: Sequence[LabelledImage]) -> Array:
        import numpy as np

        return np.stack([np.concatenate([by_image[e.digest][features.name_of(read)] for read in reads]) for e in of])

    import numpy as np

    labels = np.array([order[example.label] for example in found.fitted])
    progress("fitting", 0, 0)
    fitted = classifiers.fit(
        kind, joined(found.fitted), labels, classes=len(found.classes), balanced=balanced, seed=publishing.SEED
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
    made = publishing.publish(
        folder, target, manifest, changed, found, fitted, held, confused, reads, kind, force, progress
    )
    # What stood there before is no property of the new bundle, whose bytes depend on the images alone.
    return replace(made, said=(*replaced, *made.said))


def _refuse(folder: Path, manifest: Manifest, model: Fittable, kind: str) -> None:
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


def _replaced(target: Path, found: Examples, *, force: bool) -> tuple[str, ...]:
    """A note if the bundle at `target`, which is replaced, was fitted on other images of the same classes.

    Raises UsageError, unless `force`, for a bundle that is something else: it may be of another data set.
    """
    try:
        old = bundle.read_manifest(target)
    except DinoexportError:  # absent or damaged: nothing to lose
        return ()
    fitted = old.report.get("fit")
    if old.head is None or not fitted:
        was = "has no fitted head"
    elif old.head.classes != found.classes:
        was = f"was fitted on other classes: {examples.listed(old.head.classes)}"
    else:
        same = fitted["images_sha256"] == found.digest
        return () if same else (f"replaced the bundle that was fitted on {fitted['images']} other images",)
    if not force:
        raise UsageError(
            f"{target} {was}. It would be replaced.", next_step="Choose another --out, or replace it with --force."
        )
    return ()


def _confused(model: CaseSource, images: Path, held: HeldOutScores) -> tuple[Picture, ...]:
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

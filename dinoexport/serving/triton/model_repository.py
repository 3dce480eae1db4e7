"""Deploy a bundle to a Triton model repository: a release is served by one change, and earlier releases stay.

    REPOSITORY/NAME.releases.json     which versions of which models belong together, and which are served
    REPOSITORY/NAME/config.pbtxt      names the version that is served
    REPOSITORY/NAME/1/config.pbtxt    that version's own configuration: rolling back copies it one folder up
    REPOSITORY/NAME/1/...             its files, copied from the bundle and checked against the manifest
    REPOSITORY/NAME/warmup/1-...      inputs that Triton runs before it reports the version as ready
    REPOSITORY/NAME/retired/...       models that are not in the served release

Everything is prepared beside the repository, because Triton treats every folder inside it, even a hidden one, as a
model. An ensemble names the version of every model it calls, so an answer never mixes two releases.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinoexport import bundle, family
from dinoexport.bundle import Manifest, reference_file, signing
from dinoexport.config.recipe import Recipe, parse
from dinoexport.config.target import triton_tags
from dinoexport.errors import DinoexportError, UsageError, ValidationFailed
from dinoexport.family import FrontEnd, Model, Runnable, Servable
from dinoexport.runtime.sizes import shapes_of
from dinoexport.serving.triton import model_files, releases, repository_state, served_models, text_models
from dinoexport.serving.triton.model_files import CONFIG
from dinoexport.serving.triton.releases import Release, Releases
from dinoexport.serving.triton.served_models import BACKENDS, Backend, TensorRTPlan, TritonModel
from dinoexport.spec import Precision, Progress, Runtime, closest, silent
from dinoexport.system import change_steps, changes, files
from dinoexport.system.change_steps import Step
from dinoexport.system.changes import Change

# Before this tag (a year and a month) a batcher whose queue has any limit loses count of the instances that wait for
# work, and sleeps up to half a second while requests wait (triton-inference-server/server#8870, core#509). Seen in
# 2.51, which is 24.10: two clients waited 649 ms at most with limits and 124 ms without.
_QUEUE_LIMITS_SINCE = "26.08"


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What a repository now serves. previous: the version served before, None for the first. models: Triton's names.

    note: how serving differs from the build; empty if it does not. retired: models that were served before and are not
    served now.
    """

    repository: Path | str
    name: str
    version: int
    previous: int | None
    models: tuple[str, ...]
    backend: str = ""
    note: str = ""
    retired: tuple[str, ...] = ()


def deploy(
    folder: Path,
    repository: Path,
    *,
    name: str | None = None,
    backend: Backend | None = None,
    triton: str | None = None,
    samples: Path | None = None,
    answers: Sequence[str] = (),
    sizes: Sequence[str] = (),
    verify: Path | None = None,
    progress: Progress = silent,
) -> Deployed:
    """Adds the bundle in `folder` to `repository` as the next version of `name`, and serves it.

    name: default: the bundle's variant, if what is served under that has the same head and outputs.

    backend: how its graphs run; default: classic TensorRT plans if the bundle has them, else Triton's ONNX Runtime;
    Python runs them as the bundle was validated, also in OpenVINO.
    triton: the tag of the image that will serve, or TAG=TENSORRT_VERSION; plans for another TensorRT are refused, and
    queues have no limits if limits would stall that image's batcher.
    samples: a folder of the user's own files, from which a front end derives sizes.
    answers: forms in which a front end gives a head's answers, each as a model of its own beside the plain one.
    sizes: sizes that are often requested, as `224x224`: the Python backend gives each a form of its own.
    verify: the public key whose owner must have signed the bundle.
    Raises ValidationFailed for a bundle that is damaged or not marked passed, UsageError for what cannot be served.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(repository)):
        raise UsageError(f"{repository} is an address, not a folder.", next_step="Give a folder as --to.")
    with changes.reading(folder, progress=progress):
        manifest = bundle.read_manifest(folder) if verify is None else signing.verify(folder, verify).manifest
        if manifest.verdict != "passed":
            raise ValidationFailed(
                f"{folder} is {manifest.verdict}; only bundles that passed are deployed.",
                next_step="dinoexport build makes a validated bundle.",
            )
        by_default = name is None
        name = _checked_name(name or manifest.variant)
        if triton is not None and not re.match(r"\d\d\.\d\d(=|$)", triton):
            raise UsageError(f"{triton!r} is not a tag of a Triton image.", next_step="Write it as --triton 26.08.")
        plans = served_models.plans_of(manifest)
        recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
        model = family.find(manifest.family).model(recipe)
        tokenizer = text_models.tokenizer_of(manifest, model)
        backend = _chosen(backend, plans) if tokenizer is None else _chosen_for_text(backend)
        _refuse_unloadable(plans if backend == "tensorrt_plan" else (), triton)
        asked_often = _with_sizes(manifest, model, backend, sizes)
        ends = model.front_ends(samples, progress=progress)
        ends = (*ends, *_with_answers(model, ends, answers))
        with (
            files.disk_errors(repository),
            changes.changing(repository, doing=f"deploying to {repository}", progress=progress) as change,
        ):
            known = repository_state.read_releases(change.place, name)
            if by_default:
                _refuse_another_model(change.place, known, model)
            wanted = model_files.wanted(manifest, backend, tokenizer)
            copied = model_files.copied(folder, change.new, manifest, wanted, progress=progress)
            model_files.check_readable(copied, manifest, triton if backend == "onnxruntime" else None)
            reference = reference_file.read(copied / bundle.REFERENCE)
            standing = repository_state.deployed_as(change.place, name)
            version = known.next_version([v for path in standing for v in repository_state.versions_of(path)])
            served: tuple[TritonModel, ...]
            if tokenizer is not None:
                served = (text_models.of_bundle(manifest, tokenizer, name=name, version=version),)
            else:
                served = served_models.of_bundle(
                    copied,
                    asked_often,
                    reference,
                    name=name,
                    version=version,
                    backend=backend,
                    queue_limits=triton is None or triton >= _QUEUE_LIMITS_SINCE,
                    front_ends=ends,
                    progress=progress,
                )
            models = tuple(each.name for each in served)
            _refuse_strangers(change.place, models, standing, known)
            uses = Counter(source for each in served for source in each.files.values())
            for each in served:
                model_files.write(copied, change.new / each.name, each, version, uses)
            release = Release(
                version=version,
                models=models,
                bundle=hashlib.sha256(manifest.to_bytes()).hexdigest(),
                deployed=datetime.now(UTC),
            )
            steps = [step for each in models for step in _arrival(change, each, version, known)]
            _serve(change, known.with_deployed(release), steps, known)
    return Deployed(
        repository=repository,
        name=name,
        version=version,
        previous=known.current.version if known.current else None,
        models=models,
        backend=backend,
        note=_note(manifest) if backend == "onnxruntime" else "",
    )


def _with_sizes(manifest: Manifest, model: Runnable, backend: Backend, sizes: Sequence[str]) -> Manifest:
    """The manifest as it is served, with these sizes beside the recipe's own; UsageError if they cannot have forms."""
    if not sizes:
        return manifest
    if backend != "python":
        raise UsageError(
            f"Triton's {backend} backend compiles no forms for sizes.",
            next_step="Use --backend python, or for an engine build with the sizes in the recipe's `sizes`: each is "
            "then a profile.",
        )
    graphs = [graph for graph in model.graphs if not graph.carried]
    if not graphs:
        raise UsageError("A text model's sizes change with every token.", next_step="Leave --size out.")
    for size in sizes:
        for graph in graphs:
            shapes_of(size, graph)
    return manifest.changed(recipe={**manifest.recipe, "sizes": [*manifest.recipe.get("sizes", ()), *sizes]})


def _note(manifest: Manifest) -> str:
    """A note if a CPU bundle has a precision only in OpenVINO, and Triton's ONNX Runtime will run it."""
    chosen = manifest.cpu.chosen if manifest.cpu else None
    if chosen is None or chosen.runtime is not Runtime.OPENVINO or chosen.precision is Precision.FP32:
        return ""
    return (
        f"this bundle has {chosen.precision} in OpenVINO; ONNX Runtime, which Triton runs it in, computes it in fp32. "
        "With --backend python it runs in OpenVINO"
    )


def rollback(repository: Path, name: str) -> Deployed:
    """Serves the previously served release again, each model with its own configuration.

    Nothing is removed; models that are not in that release are set aside. Raises UsageError if there is no such
    release.
    """
    name = _checked_name(name)
    if not repository.is_dir():
        raise releases.unknown(name, (), str(repository))
    with (
        files.disk_errors(repository),
        changes.changing(repository, doing=f"deploying to {repository}") as change,
    ):
        known = repository_state.read_releases(change.place, name)
        if known.current is None and known.releases:
            raise UsageError(
                f"{repository} serves several versions of {name} at once: an older dinoexport was interrupted.",
                next_step="Deploy the bundle that is to be served again.",
            )
        if known.current is None:
            raise releases.unknown(name, repository_state.names_in(change.place), str(repository))
        after = known.rolled_back(lambda release: repository_state.is_whole(change.place, release, known))
        release = after.current
        assert release is not None
        steps = []
        for model in release.models:
            config = repository_state.config_of(change.place, model, release.version, known)
            assert config is not None
            (change.new / f"{model}.{CONFIG}").write_text(config, encoding="utf-8")
            steps += _return(change, model, known)
            steps.append(change_steps.move(change.new / f"{model}.{CONFIG}", change.place / model / CONFIG))
        retired = _serve(change, after, steps, known)
    return Deployed(
        repository=repository,
        name=name,
        version=release.version,
        previous=known.current.version,
        models=release.models,
        retired=retired,
    )


def _serve(change: Change, after: Releases, steps: Sequence[Step], before: Releases) -> tuple[str, ...]:
    """Commits a change after which `after.current` is served; the names of the models that are set aside by it."""
    now = after.current
    assert now is not None
    there = before.current.models if before.current else ()
    retired = tuple(model for model in there if model not in now.models)
    steps = list(steps)
    for model in retired:
        steps.append(
            change_steps.move(change.place / model, change.place / now.models[0] / repository_state.RETIRED / model)
        )
    record = releases.record_name(after.name)
    (change.new / record).write_bytes(after.to_bytes())
    steps.append(change_steps.move(change.new / record, change.place / record))
    change.commit(steps, done=f"{change.place} serves {after.name} version {now.version}.")
    return retired


def _arrival(change: Change, model: str, version: int, known: Releases) -> list[Step]:
    """The steps that add the version of a model that was written to `change.new`; its configuration comes last."""
    new, folder = change.new / model, change.place / model
    back = _return(change, model, known)
    if not folder.exists() and not back:
        return [change_steps.move(new, folder)]
    warmup = [change_steps.move(file, folder / "warmup" / file.name) for file in sorted((new / "warmup").glob("*"))]
    version_folder = change_steps.move(new / str(version), folder / str(version))
    return [*back, *warmup, version_folder, change_steps.move(new / CONFIG, folder / CONFIG)]


def _return(change: Change, model: str, known: Releases) -> list[Step]:
    """The step that brings back a model that is not in the served release."""
    home = repository_state.home_of(change.place, model, known)
    return [] if home == change.place / model else [change_steps.move(home, change.place / model)]


def _checked_name(name: str) -> str:
    """A name that is valid in Triton, in a URL and in a path."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise UsageError(
            f"{name!r} is not a name for a served model.",
            next_step="Use lower-case letters, digits, - and _; give it as --name.",
        )
    return name


def _chosen(backend: Backend | None, plans: Sequence[TensorRTPlan]) -> Backend:
    if backend is None:
        return "tensorrt_plan" if plans else "onnxruntime"
    if backend not in BACKENDS:
        raise UsageError(
            f"--backend {backend!r} is unknown.{closest(backend, BACKENDS)}", next_step=f"Use {', '.join(BACKENDS)}."
        )
    if backend == "tensorrt_plan" and not plans:
        raise UsageError(
            "The bundle holds no TensorRT plan. Triton cannot load engines of TensorRT-RTX.",
            next_step="Build it for a target whose runtime is tensorrt, or deploy it with --backend onnxruntime.",
        )
    return backend


def _with_answers(model: Servable, ends: Sequence[FrontEnd], forms: Sequence[str]) -> list[FrontEnd]:
    """Each front end once more for each form; a UsageError for a form that the model does not have."""
    known = model.answer_forms if isinstance(model, family.FinishesAnswers) else ()
    for form in forms:
        if form not in known:
            raise UsageError(
                f"This model's answers have no form {form!r}.{closest(form, known)}",
                next_step=f"It has: {', '.join(known)}." if known else "Leave --answers out.",
            )
    found = []
    for form in dict.fromkeys(forms):
        assert isinstance(model, family.FinishesAnswers)
        found += [model.with_answers(end, form) for end in ends]
    return found


def _chosen_for_text(backend: Backend | None) -> Backend:
    if backend not in (None, "python"):
        raise UsageError(
            f"--backend {backend} keeps no cache from one token to the next, so it cannot generate text.",
            next_step="Leave --backend out: a text model runs in Triton's Python backend.",
        )
    return "python"


def _refuse_unloadable(plans: Sequence[TensorRTPlan], triton: str | None) -> None:
    """Raises UsageError for a plan that Triton, or the Triton in the image `triton`, cannot load."""
    if stripped := [plan.file for plan in plans if plan.stripped]:
        raise UsageError(
            f"{', '.join(stripped)} holds no weights, and Triton cannot refit them.",
            next_step="Build it unstripped, or deploy with --backend onnxruntime.",
        )
    if triton is None or not plans:
        return
    tag, given, version = triton.partition("=")
    known = triton_tags()
    if not given and tag not in known:
        raise UsageError(
            f"The TensorRT inside Triton {tag} is not known here.{closest(tag, list(known))}",
            next_step=f"Known: {', '.join(known)}. Else read it inside the image, dpkg -l 'libnvinfer*', "
            f"and give it: --triton {tag}=VERSION.",
        )
    wanted = version if given else known[tag]
    for plan in plans:
        if plan.tensorrt_version.split(".")[:3] != wanted.split(".")[:3] and not plan.version_compatible:
            raise UsageError(
                f"{plan.file} was built by TensorRT {plan.tensorrt_version}; Triton {tag} has {wanted} and cannot "
                "load it.",
                next_step=f"Build the plan with TensorRT {wanted}, or serve with the image that has "
                f"{plan.tensorrt_version}.",
            )


def _refuse_another_model(repository: Path, known: Releases, model: Model) -> None:
    """Refuses the variant's name if the served release has another head or outputs: its clients expect those."""
    served = repository_state.served_as(repository, known)
    if served is None:
        return
    try:
        there = family.find(served.family).model(parse(Recipe, served.recipe, where=f"the served {known.name}"))
    except DinoexportError:  # of another version of dinoexport
        return
    if _given(there) != _given(model):
        raise UsageError(
            f"{repository} serves {known.name} with {_in_words(there)}; this bundle has {_in_words(model)}.",
            next_step=f"Give it a name of its own with --name, or replace what is served with --name {known.name}.",
        )


def _given(model: Model) -> tuple[Any, ...]:
    """What a client relies on: the head, its classes, and the names of the outputs."""
    head = model.head_facts
    outputs = {tensor.name for graph in model.graphs for tensor in graph.outputs}
    return (head and head.kind, head and tuple(head.classes), outputs)


def _in_words(model: Model) -> str:
    kind, classes, outputs = _given(model)
    counted = f" of {len(classes)} classes" if classes else ""
    return f"{f'the head {kind}{counted}' if kind else 'no head'} (outputs {', '.join(sorted(outputs))})"


def _refuse_strangers(repository: Path, models: Sequence[str], standing: Sequence[Path], known: Releases) -> None:
    """Refuses to change a model that was not deployed under this name, and to leave an old one behind."""
    ours = {path.name for path in standing}
    for name in sorted(set(models) - ours):
        if os.path.lexists(repository / name):
            raise UsageError(
                f"{repository / name} is there already and was not deployed under this name.",
                next_step="Choose another --name, or move it away.",
            )
    if left := sorted(ours - set(models)):
        raise UsageError(
            f"{', '.join(left)} would stay behind in the previous version.",
            next_step="Deploy with the same options as before (--samples, --answers), give another model another "
            "--name, or remove it first.",
        )
    for name in models:  # a version's folder is new, and what else is written to must be no link to somewhere else
        home = repository_state.home_of(repository, name, known)
        for path in (home / "warmup", home / repository_state.RETIRED):
            if os.path.lexists(path) and not repository_state.is_folder(path):
                raise UsageError(f"{path} is a link or no folder.", next_step="Move it away.")

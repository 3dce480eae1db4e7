"""A bundle as a Triton model repository: what is served appears by rename, and the version before it stays.

    REPOSITORY/NAME/config.pbtxt      names the version that is served
    REPOSITORY/NAME/1/config.pbtxt    that version's own configuration: rolling back copies it one folder up
    REPOSITORY/NAME/1/...             its files, linked from the bundle where the file system allows it
    REPOSITORY/NAME/warmup/1-...      what Triton runs before it calls the version ready

Everything is made beside the repository, for Triton takes any folder inside it, hidden ones too, for a model.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dinoexport import bundle, family
from dinoexport.bundle import Manifest, reference_file
from dinoexport.config.recipe import Recipe, parse
from dinoexport.config.target import triton_tags
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.serving.triton import served_models, text_models
from dinoexport.serving.triton.served_models import BACKENDS, Backend, Plan, TritonModel
from dinoexport.spec import Precision, Progress, closest, silent
from dinoexport.system import files

CONFIG = "config.pbtxt"
# Before this tag (a year and a month) a batcher whose queue has any limit loses count of the instances that wait for
# work, and sleeps up to half a second while requests wait (triton-inference-server/server#8870, core#509). Seen in
# 2.51, which is 24.10: two clients waited 649 ms at most with limits and 124 ms without.
_QUEUE_LIMITS_SINCE = "26.08"
_SERVED_VERSION = re.compile(r"^version_policy \{.*?versions: \[(\d+)\]", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What a repository now serves. previous: the version served before, None for the first. models: Triton's names.

    note: what is served otherwise than it was built for; empty where nothing is.
    """

    repository: Path
    name: str
    version: int
    previous: int | None
    models: tuple[str, ...]
    backend: str = ""
    note: str = ""


def deploy(
    folder: Path,
    repository: Path,
    *,
    name: str | None = None,
    backend: Backend | None = None,
    triton: str | None = None,
    samples: Path | None = None,
    progress: Progress = silent,
) -> Deployed:
    """Adds the bundle in `folder` to `repository` as the next version of `name` (default: its variant), and serves it.

    backend: how its graphs run; default: classic TensorRT plans where the bundle has them, else Triton's ONNX Runtime;
    Python runs them as the bundle was judged, in OpenVINO if so.
    triton: the tag of the image that will serve, or TAG=TENSORRT_VERSION; plans for another TensorRT are refused, and
    queues have no limits where that image's batcher would stall by them.
    samples: a folder of the user's own files, from which a front end may learn what to expect.
    Raises ValidationFailed for a bundle that is damaged or not marked passed, UsageError for what cannot be served.
    """
    manifest = bundle.verify(folder, progress=progress)
    if manifest.verdict != "passed":
        raise ValidationFailed(
            f"{folder} is {manifest.verdict}, and only what passed is deployed.",
            next_step="dinoexport build makes a judged bundle.",
        )
    name = _checked_name(name or manifest.variant)
    if triton is not None and not re.match(r"\d\d\.\d\d(=|$)", triton):
        raise UsageError(f"{triton!r} is no tag of a Triton image.", next_step="Write it as --triton 26.08.")
    plans = served_models.plans_of(manifest)
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    model = family.find(manifest.family).model(recipe)
    writes = text_models.tokenizer_of(manifest, model)
    backend = _chosen(backend, plans) if writes is None else _chosen_for_text(backend)
    _refuse_unloadable(plans if backend == "tensorrt_plan" else (), triton)
    ends = model.front_ends(samples, progress=progress)
    reference = reference_file.read(folder / bundle.REFERENCE)
    with _staging(repository) as staging:
        standing = deployed_as(repository, name)
        previous = _served_version(standing[0]) if standing else None
        version = 1 + max((v for path in standing for v in _versions(path)), default=0)
        served = (
            (text_models.of_bundle(manifest, writes, name=name, version=version),)
            if writes is not None
            else served_models.of_bundle(
                folder,
                manifest,
                reference,
                name=name,
                version=version,
                backend=backend,
                queue_limits=triton is None or triton >= _QUEUE_LIMITS_SINCE,
                front_ends=ends,
                progress=progress,
            )
        )
        _refuse_strangers(repository, served, standing)
        for each in served:
            _write(folder, staging / each.name, each, version)
        for each in served:
            _publish(staging / each.name, repository / each.name, version)
    return Deployed(
        repository=repository,
        name=name,
        version=version,
        previous=previous,
        models=tuple(each.name for each in served),
        backend=backend,
        note=_note(manifest) if backend == "onnxruntime" else "",
    )


def _note(manifest: Manifest) -> str:
    """Precisions that a CPU bundle has in OpenVINO alone, for Triton's ONNX Runtime."""
    chosen = manifest.cpu.chosen if manifest.cpu else None
    if chosen is None or chosen.runtime != "openvino" or chosen.precision is Precision.FP32:
        return ""
    return (
        f"this bundle has {chosen.precision} in OpenVINO; ONNX Runtime, which Triton runs it in, computes it in fp32. "
        "With --backend python it runs in OpenVINO"
    )


def rollback(repository: Path, name: str) -> Deployed:
    """Serves the version before the one that is served, with its own configuration. Nothing is removed.

    Raises UsageError when there is no such version.
    """
    standing = deployed_as(repository, _checked_name(name))
    if not standing:
        configs = [path.read_text(encoding="utf-8") for path in repository.glob(f"*/{CONFIG}")]
        known = sorted({found for config in configs if (found := served_models.deployed_name(config))})
        raise UsageError(
            f"{repository} serves no {name!r}.{closest(name, known)}",
            next_step=f"It serves: {', '.join(known) or 'nothing; dinoexport deploy adds a bundle'}.",
        )
    with _staging(repository) as staging:
        current, kept = _served_version(standing[0]), _versions(standing[0])
        earlier = [v for v in kept if current is None or v < current]
        wanted = max(earlier, default=None)
        if wanted is None:
            raise UsageError(
                f"{name} has no version before {current}.",
                next_step=f"Versions there are: {', '.join(map(str, kept))}.",
            )
        group = [path for path in standing if wanted in _versions(path)]
        for path in group:
            shutil.copyfile(path / str(wanted) / CONFIG, staging / CONFIG)
            os.replace(staging / CONFIG, path / CONFIG)
    return Deployed(
        repository=repository,
        name=name,
        version=wanted,
        previous=current,
        models=tuple(path.name for path in group),
    )


def _checked_name(name: str) -> str:
    """A name Triton, a URL and a path can all bear."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise UsageError(
            f"{name!r} is no name for a served model.",
            next_step="Use lower-case letters, digits, - and _; give it as --name.",
        )
    return name


def _chosen(backend: Backend | None, plans: Sequence[Plan]) -> Backend:
    if backend is None:
        return "tensorrt_plan" if plans else "onnxruntime"
    if backend not in BACKENDS:
        raise UsageError(
            f"--backend {backend!r} is unknown.{closest(backend, BACKENDS)}", next_step=f"Use {', '.join(BACKENDS)}."
        )
    if backend == "tensorrt_plan" and not plans:
        raise UsageError(
            "The bundle holds no TensorRT plan; an engine of TensorRT-RTX is none, and Triton cannot load it.",
            next_step="Build it for a target whose runtime is tensorrt, or deploy it with --backend onnxruntime.",
        )
    return backend


def _chosen_for_text(backend: Backend | None) -> Backend:
    if backend not in (None, "python"):
        raise UsageError(
            f"--backend {backend} keeps no cache from one token to the next, so it cannot write text.",
            next_step="Leave --backend out: a text model runs in Triton's Python backend.",
        )
    return "python"


def _refuse_unloadable(plans: Sequence[Plan], triton: str | None) -> None:
    """Raises UsageError for a plan no Triton can load, or not the one in the image `triton` names."""
    if stripped := [plan.file for plan in plans if plan.stripped]:
        raise UsageError(
            f"{', '.join(stripped)} holds no weights, and Triton has nothing that would put them in.",
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


@contextmanager
def _staging(repository: Path) -> Iterator[Path]:
    """An empty folder on the repository's file system but outside it, held against other deployments."""
    repository = Path(os.path.realpath(repository))
    work = repository.with_name(f".{repository.name}.deploying")
    with files.disk_errors(repository), files.lock(work / "lock", doing=f"deploying to {repository}"):
        try:
            repository.mkdir(parents=True, exist_ok=True)
            if repository.stat().st_dev != work.stat().st_dev:
                raise UsageError(
                    f"{repository} is a mount of its own, so nothing can appear in it by rename.",
                    next_step=f"Use a folder inside it, {repository / 'models'} for one.",
                )
            staging = work / "new"
            shutil.rmtree(staging, ignore_errors=True)  # what a killed deployment left
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(work, ignore_errors=True)


def deployed_as(repository: Path, name: str) -> list[Path]:
    """The folders of the Triton models that were deployed as `name`, those of its graphs first."""
    return [
        path.parent
        for path in sorted(repository.glob(f"{name}*/{CONFIG}"))
        if served_models.deployed_name(path.read_text(encoding="utf-8")) == name
    ]


def _refuse_strangers(repository: Path, served: Sequence[TritonModel], standing: Sequence[Path]) -> None:
    """Neither a model that was not deployed under this name is touched, nor one that was left behind."""
    ours, wanted = {path.name for path in standing}, {model.name for model in served}
    for name in sorted(wanted - ours):
        if (repository / name).exists():
            raise UsageError(
                f"{repository / name} is there already and was not deployed under this name.",
                next_step="Choose another --name, or move it away.",
            )
    if left := sorted(ours - wanted):
        raise UsageError(
            f"{', '.join(left)} would be left behind with what the version before can do.",
            next_step="Deploy with what it was made with (--samples), or remove it first.",
        )


def _versions(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _served_version(folder: Path) -> int | None:
    try:
        found = _SERVED_VERSION.search((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return int(found[1]) if found else None


def _write(bundle_folder: Path, folder: Path, model: TritonModel, version: int) -> None:
    """A model's folder as if it were the first of its name."""
    place = folder / str(version)
    place.mkdir(parents=True)
    for destination, source in model.files.items():
        (place / destination).parent.mkdir(exist_ok=True)
        files.link_or_copy(bundle_folder / source, place / destination)
    if model.code:
        (place / "model.py").write_text(model.code, encoding="utf-8")
    if model.warmup:
        (folder / "warmup").mkdir()
    for file, array in model.warmup.items():
        (folder / "warmup" / file).write_bytes(array.tobytes())
    for config in (place / CONFIG, folder / CONFIG):
        config.write_text(model.config, encoding="utf-8")


def _publish(new: Path, folder: Path, version: int) -> None:
    """Moves the version from the staged folder `new` into `folder`; the configuration that serves it comes last."""
    if not folder.exists():
        os.rename(new, folder)
        return
    for file in (new / "warmup").glob("*"):
        (folder / "warmup").mkdir(exist_ok=True)
        os.replace(file, folder / "warmup" / file.name)
    os.rename(new / str(version), folder / str(version))
    os.replace(new / CONFIG, folder / CONFIG)

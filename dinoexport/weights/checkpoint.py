"""Open weights: the published files, a local file in a layout the family knows, or synthetic weights.

`synthetic:SEED` weights are plain; `synthetic-stress:SEED[:PEAK]` weights give activations of PEAK times the median, as
trained models do.

No pickled code is ever run. A tensor is read only when it is needed; all missing, unexpected or mis-shaped tensors are
listed before.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dinoexport.config import recipe
from dinoexport.config.recipe import Recipe, WeightFile
from dinoexport.errors import DinoexportError, UsageError, WeightsError
from dinoexport.family import HeadWeights, Read, Shapes, WeightLayout, find
from dinoexport.spec import SYNTHETIC, Array, Progress
from dinoexport.system import files
from dinoexport.weights import download, formats, pins

# Suffix of the name of a shipped variant that is built with other weights than its published ones.
YOURS = "-yours"
_SYNTHETIC = re.compile(
    r"synthetic(:|(?P<stress>-stress:))(?P<seed>\d{1,18})(?(stress)(:(?P<peak>\d{1,9}))?)", re.ASCII
)
# Hundreds of times the median, as published for large ViTs; still within fp16's range.
_STRESS_PEAK = 300


@dataclass(frozen=True, kw_only=True)
class HeadSource:
    """The source of a head's own weights; fields as in `Checkpoint`."""

    source: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights that were checked to fit a model.

    source: an address, a path, or synthetic:SEED. sha256: of the file, or for synthetic weights, which have no file, of
    the rule and the seed. read: returns a tensor in the published layout, float32, finite.
    """

    source: str
    sha256: str
    read: Read
    head: HeadSource | None = None

    @property
    def identity(self) -> str:
        """One hash for all weights, of the backbone and of the head."""
        if self.head is None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.head.sha256}".encode()).hexdigest()


def open_checkpoint(
    model: WeightLayout,
    wanted: Recipe,
    source: str | None,
    *,
    prefix: str | None = None,
    head_source: str | None = None,
    progress: Progress,
) -> Checkpoint:
    """The weights at `source` (None: the published ones), checked against what the model needs.

    prefix: of the model's tensor names, if the file holds several models. head_source: the head's own file, if any.
    Raises WeightsError if weights are unavailable, damaged, hold code, or are not this variant's.
    """
    checkpoint = _open_checkpoint(model, wanted, source, prefix, progress=progress)
    head = model.head_weights
    if head is None:
        if head_source is not None:
            raise UsageError(
                f"{wanted.name} has no head with its own weights, so {head_source} is not used.",
                next_step="Choose a head with --head; dinoexport list shows all.",
            )
        return checkpoint
    opened = _open_head(head, wanted, head_source, progress=progress)

    def read(name: str) -> Array:
        return opened.read(name) if name in head.tensors else checkpoint.read(name)

    return Checkpoint(
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        read=read,
        head=HeadSource(source=opened.source, sha256=opened.sha256),
    )


def _open_head(head: HeadWeights, wanted: Recipe, source: str | None, *, progress: Progress) -> Checkpoint:
    if source is not None and source.startswith(SYNTHETIC):
        found = _SYNTHETIC.fullmatch(source)
        if found is None or found["stress"]:
            raise UsageError(f"{source!r} is not a synthetic head.", next_step="Write synthetic:SEED, as synthetic:0.")
        seed = int(found["seed"])
        identity = f"synthetic:{seed}:{head.name}:{sorted(head.tensors.items())}"
        return Checkpoint(
            source=f"synthetic:{seed}",
            sha256=hashlib.sha256(identity.encode()).hexdigest(),
            read=lambda name: head.synthetic(name, seed),
        )
    published = wanted.heads.get(head.name)
    if source is None and published is None:
        raise WeightsError(
            f"The recipe {wanted.name} names no published weights for the head {head.name}.",
            next_step="Give a file as --head-weights PATH, or try it out with --head-weights synthetic:0.",
        )
    shown, digest, found_shapes, read = _files_at(
        source, (published,) if published else (), head.tensors, None, progress
    )
    shapes, adapted = head.adapt(found_shapes, _finite(read, shown))
    problems = _compared(head.tensors, frozenset(), shapes)
    if problems:
        other = head.recognised(shapes)
        if other:
            raise WeightsError(
                f"{shown} is not {head.name} of {wanted.name}: this is the file of {other}.",
                next_step="Give the file that belongs to --head, or choose the head that belongs to the file.",
            )
        listed = "\n  ".join(problems[:20])
        raise WeightsError(
            f"{shown} does not fit the head {head.name} of {wanted.name}:\n  {listed}\n",
            next_step="Give the published file of this head, or one trained with the same code.",
        )
    if source is not None:
        _refuse_other_name(head.name, wanted, Path(source).name)
    return Checkpoint(source=_named(source, shown), sha256=digest, read=adapted)


def _refuse_other_name(head: str, wanted: Recipe, file: str) -> None:
    """Refuses a file that fits `head` and has the name under which another head is published.

    Heads of one form fit one another: only their files' names tell what they were trained on.
    """

    def published(recipe: Recipe) -> dict[str, str]:
        return {PurePosixPath(weights.url).name: kind for kind, weights in recipe.heads.items()}

    if published(wanted).get(file) == head:
        return
    for variant in recipe.variants():
        other = recipe.load(variant)
        if other.family == wanted.family and (kind := published(other).get(file)) is not None:
            raise WeightsError(
                f"{file} is the name of the {kind} head published for {variant}; "
                f"this build has {head} of {wanted.name}.",
                next_step=f"dinoexport build {variant} --head {kind}, or another name for the file if it is {head}'s.",
            )


def _open_checkpoint(
    model: WeightLayout, wanted: Recipe, source: str | None, prefix: str | None, *, progress: Progress
) -> Checkpoint:
    if source is not None and source.startswith(SYNTHETIC):
        return _synthetic(model, source)
    if source is None and not wanted.weights:
        raise WeightsError(
            f"The recipe {wanted.name} names no published weights.",
            next_step=f"{wanted.obtain} Give what you have as --weights PATH, or try it out with --weights synthetic:0."
            if wanted.obtain
            else "Give a file as --weights PATH, or try it out with --weights synthetic:0.",
        )
    shown, digest, found, read = _files_at(source, wanted.weights, model.tensors, prefix, progress)
    # Checked under the names of the file, so that the error names the file's own tensor.
    shapes, adapted = model.adapt(found, _finite(read, shown))
    _check(model, wanted, shapes, shown)
    return Checkpoint(source=_named(source, shown), sha256=digest, read=adapted)


def _files_at(
    source: str | None, published: Sequence[WeightFile], needed: Shapes, prefix: str | None, progress: Progress
) -> tuple[str, str, Shapes, Read]:
    """The name of the files at `source` for the user, one hash of them, their tensors' shapes, and a reader.

    source: None for the published ones, downloaded once.
    """
    if source is None:
        pinned = [pins.with_hash(file, progress=progress) for file in published]
        paths = tuple(download.fetch(file, progress=progress) for file in pinned)
        shown = ", ".join(file.url for file in published)
        digests = [str(file.sha256) for file in pinned]
        _refuse_twice(digests, shown)
        found, read = formats.opened(paths, prefix=prefix, wanted=needed)
    else:
        shown = source
        with formats.readable(source):
            paths = formats.local(Path(source))
            # Each is opened before it is hashed: a file that is not a checkpoint may be of any size.
            for path in paths:
                formats.shapes_of(path)
            digests = [_sha256(path, progress) for path in paths]
            _refuse_twice(digests, shown)
            found, read = formats.opened(paths, prefix=prefix, wanted=needed)
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return shown, digest, found, read


def _refuse_twice(digests: Sequence[str], shown: str) -> None:
    if len(set(digests)) < len(digests):
        raise WeightsError(f"{shown} holds the same file twice.", next_step="Give each file of the checkpoint once.")


def _named(source: str | None, shown: str) -> str:
    """The name of the weights in a bundle: only the file's name, because a path would reveal who built it and where."""
    return shown if source is None else Path(source).name or "weights"


def digest_of(source: str, *, progress: Progress) -> str:
    """The SHA-256 of the local checkpoint at `source`; for several files, the hash of their hashes.

    Raises WeightsError if two files are the same.
    """
    with formats.readable(source):
        digests = [_sha256(path, progress) for path in formats.local(Path(source))]
    _refuse_twice(digests, source)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


# One build calls this twice: to recognise published weights, and to record the hash.
_HASHED: dict[tuple[str, int, int], str] = {}


def _sha256(path: Path, progress: Progress) -> str:
    status = path.stat()
    key = (str(path.absolute()), status.st_size, status.st_mtime_ns)
    if key not in _HASHED:
        _HASHED[key] = files.sha256(path, progress=progress)
    return _HASHED[key]


def _synthetic(model: WeightLayout, source: str) -> Checkpoint:
    found = _SYNTHETIC.fullmatch(source)
    if found is None:
        raise UsageError(
            f"{source!r} is not a synthetic checkpoint.",
            next_step="Write synthetic:SEED with a whole number, such as synthetic:0, or synthetic-stress:SEED[:PEAK].",
        )
    seed, peak = int(found["seed"]), None
    source = f"synthetic:{seed}"  # 07 and 7 are the same weights
    if found["stress"]:
        peak = int(found["peak"] or _STRESS_PEAK)
        source = f"synthetic-stress:{seed}:{peak}"
    identity = f"{source}:{sorted(model.tensors.items())}"
    return Checkpoint(
        source=source,
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        read=lambda name: model.synthetic(name, seed, peak=peak),
    )


def _finite(read: Read, source: str) -> Read:
    def checked(name: str) -> Array:
        import numpy as np

        array = read(name)
        if not np.isfinite(array).all():
            raise WeightsError(
                f"The tensor {name} of {source} holds NaN or Inf.", next_step="Use weights with finite values."
            )
        return array

    return checked


def _problems(model: WeightLayout, shapes: Shapes) -> list[str]:
    head = model.head_weights
    apart = head.tensors if head is not None else {}
    needed = {name: shape for name, shape in model.tensors.items() if name not in apart}
    return _compared(needed, model.optional_tensors, shapes)


def _compared(needed: Shapes, optional: frozenset[str], shapes: Shapes) -> list[str]:
    missing = [f"missing: {name} {needed[name]}" for name in needed if name not in shapes and name not in optional]
    misshaped = [
        f"mis-shaped: {name} is {shapes[name]}, needs {needed[name]}"
        for name in needed
        if name in shapes and shapes[name] != needed[name]
    ]
    return missing + misshaped + [f"unexpected: {name} {shapes[name]}" for name in shapes if name not in needed]


def _check(model: WeightLayout, wanted: Recipe, shapes: Shapes, source: str) -> None:
    problems = _problems(model, shapes)
    if not problems:
        return
    name = wanted.name.removesuffix(YOURS)
    other = _recognised(wanted, shapes)
    if other:
        raise WeightsError(
            f"{source} is not {name}: this is {' or '.join(other)}.",
            next_step=f"dinoexport build {other[0]} --weights {shlex.quote(source)}",
        )
    listed = "\n  ".join(problems)
    raise WeightsError(
        f"{source} does not fit {name}:\n  {listed}\n",
        next_step="Give a checkpoint of this architecture, or a recipe that says what differs: [model] keys are in "
        "dinoexport schema. Without a variant one is made from the weights and the files beside them.",
    )


def _recognised(wanted: Recipe, shapes: Shapes) -> list[str]:
    """The shipped variants of the same family that these tensors may be."""
    found = []
    for name in recipe.variants():
        candidate = recipe.load(name)
        if candidate.family != wanted.family or name == wanted.name.removesuffix(YOURS):
            continue
        try:
            if not _problems(find(candidate.family).model(candidate), shapes):
                found.append(name)
        except DinoexportError:
            continue
    return found

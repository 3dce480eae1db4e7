"""Where weights come from: the published files, a local file in a layout the family knows, or made-up ones.

`synthetic:SEED` are plain; `synthetic-stress:SEED[:PEAK]` have activations PEAK times the median, as trained models do.

No pickled code is ever run, a tensor is read only when it is wanted, and everything missing, unexpected or mis-shaped
is listed before that.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport.config import recipe
from dinoexport.config.recipe import Recipe, WeightFile
from dinoexport.errors import DinoexportError, UsageError, WeightsError, require
from dinoexport.family import HeadWeights, Read, Shapes, WeightLayout, find
from dinoexport.spec import Array, Progress
from dinoexport.system import files
from dinoexport.weights import download, gguf_file, pins, shards

if TYPE_CHECKING:
    import torch

# How much of a mapped file may be read before it is mapped anew.
_MAPPED_BYTES_MAX = 64 * 2**20
SYNTHETIC = ("synthetic:", "synthetic-stress:")
_SYNTHETIC = re.compile(
    r"synthetic(:|(?P<stress>-stress:))(?P<seed>\d{1,18})(?(stress)(:(?P<peak>\d{1,9}))?)", re.ASCII
)
# Hundreds of times the median, as published for large ViTs; fp16 still holds it.
_STRESS_PEAK = 300
_ZIP_START = b"PK\x03\x04"
# Far above any training checkpoint; a hostile one can hold a dict within itself, or one dict a million times.
_DICTS_DEEP_MAX = 8
_ENTRIES_MAX = 200_000


@dataclass(frozen=True, kw_only=True)
class HeadSource:
    """Where a head's own weights came from, as `Checkpoint` says it of all others."""

    source: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights that are known to fit a model.

    source: what the user would recognise: an address, a path, or synthetic:SEED. sha256: of the file, or of the rule
    and the seed for synthetic weights, which have no file. read: a tensor in the published layout, float32, finite.
    """

    source: str
    sha256: str
    read: Read
    head: HeadSource | None = None

    @property
    def identity(self) -> str:
        """One hash for all weights: of another file, of either kind, it is another."""
        if self.head is None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.head.sha256}".encode()).hexdigest()


def open_checkpoint(
    model: WeightLayout, wanted: Recipe, source: str | None, *, head_source: str | None = None, progress: Progress
) -> Checkpoint:
    """The weights at `source` (None: the published ones), checked against what the model needs.

    head_source: the same for the head's own file, where the model has one.
    Raises WeightsError when they cannot be had, are damaged, hold code, or are not this variant's.
    """
    checkpoint = _open_checkpoint(model, wanted, source, progress=progress)
    head = model.head_weights
    if head is None:
        if head_source is not None:
            raise UsageError(
                f"{wanted.name} has no head with weights of its own, so {head_source} has no use.",
                next_step="Choose one with --head; dinoexport list shows which there are.",
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
            raise UsageError(f"{source!r} is no synthetic head.", next_step="Write synthetic:SEED, as synthetic:0.")
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
    shown, digest, found_shapes, read = _files_at(source, (published,) if published else (), head.tensors, progress)
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
    return Checkpoint(source=shown, sha256=digest, read=adapted)


def _open_checkpoint(model: WeightLayout, wanted: Recipe, source: str | None, *, progress: Progress) -> Checkpoint:
    if source is not None and source.startswith(SYNTHETIC):
        return _synthetic(model, source)
    if source is None and not wanted.weights:
        raise WeightsError(
            f"The recipe {wanted.name} names no published weights.",
            next_step="Give a file as --weights PATH, or try it out with --weights synthetic:0.",
        )
    shown, digest, found, read = _files_at(source, wanted.weights, model.tensors, progress)
    # Checked as the file has it, so that the error names the file's own tensor.
    shapes, adapted = model.adapt(found, _finite(read, shown))
    _check(model, wanted, shapes, shown)
    return Checkpoint(source=shown, sha256=digest, read=adapted)


def _files_at(
    source: str | None, published: Sequence[WeightFile], needed: Shapes, progress: Progress
) -> tuple[str, str, Shapes, Read]:
    """What the user knows the files at `source` by, one hash for them, their tensors' shapes, and their reader.

    source: None for the published ones, downloaded once.
    """
    if source is None:
        pinned = [pins.with_hash(file, progress=progress) for file in published]
        paths = tuple(download.fetch(file, progress=progress) for file in pinned)
        digests = [str(file.sha256) for file in pinned]
        shown = ", ".join(file.url for file in published)
    else:
        shown = source
        try:
            paths = _local(Path(source))
            digests = [files.sha256(path, progress=progress) for path in paths]
        except OSError as error:
            raise WeightsError(
                f"{source} cannot be read: {error.strerror}.", next_step="Check the path and its permissions."
            ) from None
    if len(set(digests)) < len(digests):
        raise WeightsError(f"{shown} holds the same file twice.", next_step="Give each file of the checkpoint once.")
    found, read = shards.merged({path: _open(path) for path in paths}, needed)
    if not found:
        raise WeightsError(f"{shown} holds no tensors.", next_step="Give a model's state dict.")
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return shown, digest, found, read


def _synthetic(model: WeightLayout, source: str) -> Checkpoint:
    found = _SYNTHETIC.fullmatch(source)
    if found is None:
        raise UsageError(
            f"{source!r} is no synthetic checkpoint.",
            next_step="Write synthetic:SEED with a whole number, as synthetic:0, or synthetic-stress:SEED[:PEAK].",
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


def _local(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        for pattern in ("*.safetensors", "consolidated.*.pth"):
            if parts := tuple(sorted(path.glob(pattern))):
                return parts
        raise WeightsError(f"{path} holds no .safetensors file.", next_step="Give the weights file itself.")
    if not path.is_file():
        raise WeightsError(
            f"There is no file {path}.", next_step="Check --weights, or leave it out for the published ones."
        )
    return (path,)


def _open(path: Path) -> tuple[Shapes, Read]:
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    if len(start) < len(_ZIP_START):
        raise WeightsError(f"{path} is truncated: it has {len(start)} bytes.", next_step="Get the file again.")
    if start == gguf_file.START:
        return gguf_file.open_gguf(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if start == _ZIP_START:
        return _open_zip(path)
    raise WeightsError(
        f"{path} is neither a .safetensors file nor the zip that torch.save writes since PyTorch 1.6.",
        next_step="Save its state dict again: torch.save(model.state_dict(), 'weights.pth').",
    )


def _open_safetensors(path: Path) -> tuple[Shapes, Read]:
    require("export", "safetensors", "torch")  # NumPy has no bfloat16, so the tensors are torch's
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path} is truncated or no safetensors file ({error}).", next_step="Get the file again."
        ) from None
    return shapes, _reader(path, lambda: safetensors.safe_open(path, framework="pt").get_tensor)


def _open_zip(path: Path) -> tuple[Shapes, Read]:
    """The tensors of a `torch.save` file, mapped from disk; nested dicts become dotted names."""
    require("export", "torch")
    import torch

    _check_zip(path)

    def tensors() -> dict[str, torch.Tensor]:
        return _tensors(torch.load(path, map_location="cpu", mmap=True, weights_only=True))

    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    except Exception as error:  # a damaged or hostile pickle can make the unpickler raise anything
        # Torch's own text advises to load it unsafely.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise WeightsError(
                f"{path} holds pickled objects besides tensors ({code[1]}); nothing of it was run.",
                next_step="Save only its state dict: torch.save(model.state_dict(), 'weights.pth').",
            ) from None
        raise WeightsError(
            f"{path} is damaged or no torch.save file ({_first_line(error)}).", next_step="Get the file again."
        ) from None
    return shapes, _reader(path, lambda: tensors().__getitem__)


def _check_zip(path: Path) -> None:
    """Refuses a truncated file and a zip bomb: torch.save compresses nothing, so no entry may be compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises seven classes on damaged directories
        raise WeightsError(f"{path} is truncated or damaged ({error}).", next_step="Get the file again.") from None
    size = path.stat().st_size
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise WeightsError(
            f"{path} is a compressed zip, which torch.save never writes; it was not unpacked.",
            next_step="Use the file as it was published.",
        )


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    """The tensors in nested dicts by dotted name; a ValueError when the nesting does not end."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    level: list[tuple[str, Any]] = [("", content)]
    for _depth in range(_DICTS_DEEP_MAX):
        tensors |= {name: value for name, value in level if isinstance(value, torch.Tensor)}
        inside = (
            (f"{name}.{key}" if name else str(key), value)
            for name, entries in level
            if isinstance(entries, Mapping)
            for key, value in entries.items()
        )
        level = list(islice(inside, _ENTRIES_MAX + 1))
        if not level:
            return tensors
        if len(level) > _ENTRIES_MAX:
            break
    raise ValueError(f"dicts more than {_DICTS_DEEP_MAX} deep or of more than {_ENTRIES_MAX} entries")


def _reader(path: Path, mapped: Callable[[], Callable[[str], torch.Tensor]]) -> Read:
    """Reads a tensor of `path` as float32; a WeightsError for one that is none: quantised, sparse, without values.

    mapped: maps the file and returns what gets a tensor of it. It is mapped anew now and then, for a page that was once
    read counts as memory of this process until its mapping goes: 4.5 GB for 1.1 billion weights. Two threads may read
    at once: at worst it is mapped anew twice.
    """
    get, read_bytes = mapped(), 0

    def read(name: str) -> Array:
        nonlocal get, read_bytes
        try:
            if read_bytes > _MAPPED_BYTES_MAX:
                get, read_bytes = mapped(), 0
            tensor = get(name)
            read_bytes += tensor.nbytes
            floating = tensor.is_floating_point()
            array: Array | None = tensor.detach().float().contiguous().numpy() if floating else None
        except Exception as error:  # what a format can hold but NumPy cannot
            raise WeightsError(
                f"The tensor {name} of {path} cannot be read ({_first_line(error)}).",
                next_step="Give plain float weights.",
            ) from None
        if array is None:
            raise WeightsError(
                f"The tensor {name} of {path} is {tensor.dtype}, not floating point.",
                next_step="Give unquantised weights.",
            )
        return array

    return read


def _finite(read: Read, source: str) -> Read:
    def checked(name: str) -> Array:
        import numpy as np

        array = read(name)
        if not np.isfinite(array).all():
            raise WeightsError(
                f"The tensor {name} of {source} holds NaN or Inf.", next_step="Get weights that training left finite."
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
    other = _recognised(wanted, shapes)
    if other:
        raise WeightsError(
            f"{source} is not {wanted.name}: this is {' or '.join(other)}.",
            next_step=f"dinoexport build {other[0]} --weights {source}",
        )
    listed = "\n  ".join(problems)
    raise WeightsError(
        f"{source} does not fit {wanted.name}:\n  {listed}\n",
        next_step="Give an official, Hugging Face, timm or upstream training checkpoint of this variant.",
    )


def _recognised(wanted: Recipe, shapes: Shapes) -> list[str]:
    """The shipped variants of the same family that these tensors may be."""
    found = []
    for name in recipe.variants():
        candidate = recipe.load(name)
        if candidate.family != wanted.family or name == wanted.name:
            continue
        try:
            if not _problems(find(candidate.family).model(candidate), shapes):
                found.append(name)
        except DinoexportError:
            continue
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

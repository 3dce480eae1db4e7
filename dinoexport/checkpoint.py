"""Where weights come from: the published files, a local file in a layout the family knows, or `synthetic:SEED`.

No pickled code is ever run, a tensor is read only when it is wanted, and everything missing, unexpected or mis-shaped
is listed before that.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport import download, files, recipe
from dinoexport.errors import DinoexportError, UsageError, WeightsError, missing_package
from dinoexport.family import Model, Read, Shapes, find
from dinoexport.recipe import Recipe
from dinoexport.spec import Array, Progress

if TYPE_CHECKING:
    import torch

_SYNTHETIC = "synthetic:"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights that are known to fit a model.

    source: what the user would recognise: an address, a path, or synthetic:SEED. sha256: of the file, or of the rule
    and the seed for synthetic weights, which have no file. read: a tensor in the published layout, float32, finite.
    """

    source: str
    sha256: str
    read: Read


def open_checkpoint(model: Model, wanted: Recipe, source: str | None, *, progress: Progress) -> Checkpoint:
    """The weights at `source` (None: the published ones), checked against what the model needs.

    Raises WeightsError when they cannot be had, are damaged, hold code, or are not this variant's.
    """
    if source is not None and source.startswith(_SYNTHETIC):
        return _synthetic(model, source)
    if source is None:
        if not wanted.weights:
            raise WeightsError(
                f"The recipe {wanted.name} names no published weights.",
                next_step="Give a file as --weights PATH, or try it out with --weights synthetic:0.",
            )
        paths = tuple(download.fetch(file, progress=progress) for file in wanted.weights)
        digests = [file.sha256 for file in wanted.weights]
        shown = ", ".join(file.url for file in wanted.weights)
    else:
        paths = _local(Path(source))
        digests = [files.sha256(path, progress=progress) for path in paths]
        shown = str(source)
    found, read = _merged([_open(path) for path in paths])
    shapes, adapted = model.adapt(found, read)
    _check(model, wanted, shapes, shown)
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Checkpoint(source=shown, sha256=digest, read=_finite(adapted, shown))


def _synthetic(model: Model, source: str) -> Checkpoint:
    try:
        seed = int(source.removeprefix(_SYNTHETIC))
        if seed < 0:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{source!r} is no synthetic checkpoint.",
            next_step="Write synthetic:SEED with a whole number, synthetic:0.",
        ) from None
    identity = f"{source}:{sorted(model.tensors.items())}"
    return Checkpoint(
        source=source,
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        read=lambda name: model.synthetic(name, seed),
    )


def _local(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        shards = tuple(sorted(path.glob("*.safetensors")))
        if shards:
            return shards
        raise WeightsError(f"{path} holds no .safetensors file.", next_step="Give the weights file itself.")
    if not path.is_file():
        raise WeightsError(
            f"There is no file {path}.", next_step="Check --weights, or leave it out for the published ones."
        )
    return (path,)


def _open(path: Path) -> tuple[Shapes, Read]:
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < len(b"PK\x03\x04"):
        raise WeightsError(f"{path} is empty or all but empty.", next_step="Get the file again.")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        return _open_zip(path)
    raise WeightsError(
        f"{path} is neither a .safetensors file nor the zip that torch.save writes since PyTorch 1.6.",
        next_step="Save its state dict again: torch.save(model.state_dict(), 'weights.pth').",
    )


def _open_safetensors(path: Path) -> tuple[Shapes, Read]:
    try:
        import safetensors
    except ImportError:
        raise missing_package("safetensors", "export") from None
    try:
        file = safetensors.safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path} is truncated or no safetensors file ({error}).", next_step="Get the file again."
        ) from None
    return shapes, lambda name: _float32(name, file.get_tensor(name))


def _open_zip(path: Path) -> tuple[Shapes, Read]:
    """The tensors of a `torch.save` file, mapped from disk; nested dicts become dotted names."""
    try:
        import torch
    except ImportError:
        raise missing_package("torch", "export") from None
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds pickled objects besides tensors; it was not run ({_first_line(error)}).",
            next_step="Save only its state dict: torch.save(model.state_dict(), 'weights.pth').",
        ) from None
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError) as error:
        raise WeightsError(
            f"{path} is no intact torch.save file ({_first_line(error)}).", next_step="Get the file again."
        ) from None
    tensors = dict(_tensors(content, prefix=""))
    return {name: tuple(t.shape) for name, t in tensors.items()}, lambda name: _float32(name, tensors[name])


def _check_zip(path: Path) -> None:
    """Refuses a truncated file and a zip bomb: torch.save compresses nothing, so no entry may be compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise WeightsError(f"{path} is truncated or damaged ({error}).", next_step="Get the file again.") from None
    size = path.stat().st_size
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise WeightsError(
            f"{path} is a compressed zip, which torch.save never writes; it was not unpacked.",
            next_step="Use the file as it was published.",
        )


def _tensors(content: Any, *, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(content, torch.Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, prefix=f"{prefix}.{key}" if prefix else str(key))


def _float32(name: str, tensor: torch.Tensor) -> Array:
    if not tensor.is_floating_point():
        raise WeightsError(
            f"The tensor {name} is {tensor.dtype}, not floating point.", next_step="Give unquantised weights."
        )
    array: Array = tensor.detach().float().contiguous().numpy()
    return array


def _merged(opened: list[tuple[Shapes, Read]]) -> tuple[Shapes, Read]:
    readers = {name: read for shapes, read in opened for name in shapes}
    shapes = {name: shape for found, _ in opened for name, shape in found.items()}
    return shapes, lambda name: readers[name](name)


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


def _problems(model: Model, shapes: Shapes) -> list[str]:
    needed, optional = model.tensors, model.optional_tensors
    missing = [f"missing: {name} {needed[name]}" for name in needed if name not in shapes and name not in optional]
    misshaped = [
        f"mis-shaped: {name} is {shapes[name]}, needs {needed[name]}"
        for name in needed
        if name in shapes and shapes[name] != needed[name]
    ]
    return missing + misshaped + [f"unexpected: {name} {shapes[name]}" for name in shapes if name not in needed]


def _check(model: Model, wanted: Recipe, shapes: Shapes, source: str) -> None:
    problems = _problems(model, shapes)
    if not problems:
        return
    other = _recognised(wanted, shapes)
    if other:
        raise WeightsError(
            f"{source} is not {wanted.name}: this is {other}.",
            next_step=f"dinoexport build {other} --weights {source}",
        )
    listed = "\n  ".join(problems)
    raise WeightsError(
        f"{source} does not fit {wanted.name}:\n  {listed}\n",
        next_step="Give an official, Hugging Face, timm or upstream training checkpoint of this variant.",
    )


def _recognised(wanted: Recipe, shapes: Shapes) -> str | None:
    """The shipped variant of the same family that these tensors are."""
    for name in recipe.variants():
        candidate = recipe.load(name)
        if candidate.family != wanted.family or name == wanted.name:
            continue
        try:
            if not _problems(find(candidate.family).model(candidate), shapes):
                return name
        except DinoexportError:
            continue
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

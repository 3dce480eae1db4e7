"""DINOv2's validation cases: noise of a given size, and photographs prepared as upstream's evaluation does."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from dinoexport import images
from dinoexport.config.recipe import Frozen, Range, parse
from dinoexport.errors import UsageError
from dinoexport.models.dinov2 import synthetic
from dinoexport.models.dinov2.config import GRID, IMAGE_MEAN, IMAGE_STD, PATCH
from dinoexport.spec import Array, Case, Progress, Workload

_EVALUATION_SIDE = 224  # pixels, upstream's make_classification_eval_transform
_BATCH = 8


class CaseTable(Frozen):
    """One `[[cases]]` entry: noise with batch, height and width, or photographs."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    why: str = Field(min_length=10)
    batch: int = Field(default=1, ge=1)
    height: int | None = Field(default=None, ge=PATCH)
    width: int | None = Field(default=None, ge=PATCH)
    seed: int = 0
    photographs: tuple[str, ...] = ()
    prepare: Literal["evaluation", "own_size"] = "evaluation"

    @model_validator(mode="after")
    def _noise_or_photographs(self) -> Self:
        of_noise, given = {"batch", "height", "width", "seed"}, self.model_fields_set
        if self.photographs and (stray := sorted(of_noise & given)):
            raise ValueError(f"{', '.join(stray)}: of noise only, not of photographs")
        if not self.photographs and ("prepare" in given or self.height is None or self.width is None):
            raise ValueError("give height and width, or photographs and how to prepare them")
        if self.prepare == "own_size" and len(self.photographs) > 1:
            raise ValueError("photographs of their own size make no batch: one a case")
        if any(name in ("", "..") or Path(name).name != name for name in self.photographs):
            raise ValueError("photographs are names of files in the folder `images`, not paths")
        return self


def read_case(table: Mapping[str, Any], folder: Path, *, as_bytes: bool, strict: bool) -> Case:
    """The case `table` describes; photographs lie in `folder`/images.

    as_bytes: the model takes uint8 (B, H, W, 3) instead of normalised pixels (B, 3, H, W).
    strict: the model refuses sizes that are no multiples of 14, so noise of such a size is a case of refusal.
    """
    entry = parse(CaseTable, table, where=f"case {table.get('name', '?')}")
    if entry.photographs:
        paths = [folder / "images" / name for name in entry.photographs]
        if entry.prepare == "evaluation":
            pictures = np.stack([_prepared(path) for path in paths])
        else:
            pictures = np.asarray(images.load(paths[0]))[np.newaxis]
            if min(pictures.shape[1:3]) < PATCH:
                raise images.ImageError(paths[0], f"smaller than one patch of {PATCH} pixels")
            if strict:
                pictures = cropped(pictures)
        inputs = inputs_of(pictures, as_bytes)
        return Case(name=entry.name, why=entry.why, inputs=inputs, neighbours=len(pictures) > 1, shown=True)
    assert entry.height is not None and entry.width is not None
    refused = strict and bool(entry.height % PATCH or entry.width % PATCH)
    noise = _noise(entry.batch, entry.height, entry.width, entry.seed, as_bytes)
    return Case(name=entry.name, why=entry.why, inputs=noise, expect_refusal=refused)


def workloads(profile: Mapping[str, Range], *, as_bytes: bool) -> tuple[Workload, ...]:
    """Noise images to time: 224 and 518 a side, alone and eight at a time, or what the profile has closest to that."""

    def within(dimension: str, size: int) -> int:
        return min(max(size, profile[dimension].min), profile[dimension].max)

    shapes = {
        (within("batch", batch), within("height", side), within("width", side)): None
        for batch in (1, _BATCH)
        for side in (_EVALUATION_SIDE, GRID * PATCH)
    }
    return tuple(
        Workload(
            name=f"{batch} x {height} x {width}",
            inputs=_noise(batch, height, width, 0, as_bytes),
            items=batch,
            unit="images",
        )
        for batch, height, width in shapes
    )


def from_folder(
    folder: Path, *, as_bytes: bool, progress: Progress, only: Collection[str] | None = None
) -> Iterator[Case | str]:
    """A case for each image directly in `folder` or below, or a line for a file that is none; hidden ones aside.

    Its label is the folder directly in `folder` that it lies in, as torchvision's ImageFolder has it. A link is
    followed to a file within `folder` only. An image is read when it is asked for: however many there are, memory is
    that of the one. only: the cases that are wanted, if not all.
    """
    paths = sorted(path for path in folder.rglob("*") if _is_meant(path, folder))
    if only is not None:
        paths = [path for path in paths if path.relative_to(folder).as_posix() in only]
    for done, path in enumerate(paths, start=1):
        progress("reading images", done, len(paths))
        try:
            if path.is_symlink():
                _check_link(path, folder)
            if path.suffix.lower() not in images.SUFFIXES:
                raise images.ImageError(path, f"not one of {', '.join(images.FORMATS)} by its name")
            picture = _prepared(path)[np.newaxis]
        except images.ImageError as error:
            yield error.message
            continue
        name = path.relative_to(folder)
        yield Case(
            name=name.as_posix(),
            why="a photograph of the user's",
            inputs=inputs_of(picture, as_bytes),
            label=name.parts[0] if len(name.parts) > 1 else "",
        )


def _is_meant(path: Path, folder: Path) -> bool:
    """Whether `path` is a file, or a link to anything, and neither it nor a folder it lies in is hidden."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and (path.is_symlink() or not path.is_dir())


def _check_link(path: Path, folder: Path) -> None:
    """An ImageError for a link to a folder, which is not followed, and for one that leads out of `folder`."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a circle is a RuntimeError
        raise images.ImageError(path, "a link to nothing") from None
    if target.is_dir():
        raise images.ImageError(path, "a link to a folder, which is not followed")
    if not target.is_relative_to(folder.resolve()):
        raise images.ImageError(path, "a link that leads out of the folder")


def _prepared(path: Path) -> Array:
    """The photograph as upstream's evaluation prepares it; an ImageError that names the file otherwise."""
    image = images.load(path)
    try:
        return images.for_evaluation(image)
    except UsageError as error:
        raise images.ImageError(path, error.message.rstrip(".")) from None


def cropped(pictures_BHW3: Array) -> Array:
    """The closest smaller multiple of 14 of each side, top left kept, as the model card says."""
    height, width = (side // PATCH * PATCH for side in pictures_BHW3.shape[1:3])
    return np.ascontiguousarray(pictures_BHW3[:, :height, :width])


def normalised(pictures_BHW3: Array) -> Array:
    """uint8 RGB (B, H, W, 3) to float32 (B, 3, H, W), as torchvision's ToTensor and Normalize."""
    scaled = pictures_BHW3.astype(np.float32) / np.float32(255)
    values = (scaled - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def _noise(batch: int, height: int, width: int, seed: int, as_bytes: bool) -> dict[str, Array]:
    size = (batch, height, width, seed)
    return {"images": synthetic.images(*size)} if as_bytes else {"pixels": synthetic.pixels(*size)}


def inputs_of(pictures_BHW3: Array, as_bytes: bool) -> dict[str, Array]:
    """RGB pictures as the graph's one input, under its name."""
    return {"images": np.ascontiguousarray(pictures_BHW3)} if as_bytes else {"pixels": normalised(pictures_BHW3)}

"""DINOv2's validation cases: noise of a given size, and photographs prepared as upstream's evaluation does."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dinoexport import images
from dinoexport.config.recipe import Frozen, Range, parse
from dinoexport.errors import UsageError
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import synthetic
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.published import PATCH
from dinoexport.spec import Array, Case, Progress, Workload

_BATCH = 8
# Of noise, which is made in float64: eight images of 4096 by 4096 take 3 GB.
_NUMBERS_MAX = 1 << 29
Pixels = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The form of a model's single input, made from pictures or from noise.

    as_bytes: uint8 (B, H, W, C) instead of normalised pixels (B, C, H, W). strict: sizes that are not multiples of the
    patch are refused.
    """

    arch: Architecture
    preprocessing: Preprocessing
    as_bytes: bool
    strict: bool

    def of(self, pictures_BHW3: Array) -> dict[str, Array]:
        """RGB pictures as the input, under its name. Further channels repeat the colours."""
        import numpy as np

        channels = self.arch.in_chans
        if channels != pictures_BHW3.shape[-1]:
            pictures_BHW3 = pictures_BHW3[..., np.arange(channels) % pictures_BHW3.shape[-1]]
        if self.as_bytes:
            return {"images": np.ascontiguousarray(pictures_BHW3)}
        return {"pixels": self.preprocessing.normalised(pictures_BHW3)}

    def noise(self, batch: int, height: int, width: int, seed: int) -> dict[str, Array]:
        """Noise as the input."""
        channels = self.arch.in_chans
        if batch * height * width * channels > _NUMBERS_MAX:
            raise UsageError(
                f"{batch} images of {height}x{width} in {channels} channels are more than memory is taken for.",
                next_step="Give fewer or smaller ones in the case, or a smaller least size in the profile.",
            )
        size = (batch, height, width, seed, channels)
        return {"images": synthetic.images(*size)} if self.as_bytes else {"pixels": synthetic.pixels(*size)}


class CaseTable(Frozen):
    """One `[[cases]]` entry: noise with batch, height and width, or photographs.

    `native` is the side of the image whose grid is that of the position table. patch_size: the patch size for which the
    other sizes were chosen; a model with another patch size gets the same number of patches. Without it: pixels.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    why: str = Field(min_length=10)
    batch: int = Field(default=1, ge=1)
    height: Pixels | Literal["native"] | None = None
    width: Pixels | Literal["native"] | None = None
    patch_size: int | None = Field(default=None, gt=0, le=64)
    seed: int = 0
    photographs: tuple[str, ...] = ()
    prepare: Literal["evaluation", "own_size"] = "evaluation"

    @model_validator(mode="after")
    def _noise_or_photographs(self) -> Self:
        of_noise, given = {"batch", "height", "width", "patch_size", "seed"}, self.model_fields_set
        if self.photographs and (stray := sorted(of_noise & given)):
            raise ValueError(f"{', '.join(stray)}: only for noise, not for photographs")
        if not self.photographs and ("prepare" in given or self.height is None or self.width is None):
            raise ValueError("give height and width, or photographs and how to prepare them")
        if self.prepare == "own_size" and len(self.photographs) > 1:
            raise ValueError("photographs at their own size cannot be batched: give one per case")
        if any(name in ("", "..") or Path(name).name != name for name in self.photographs):
            raise ValueError("photographs are names of files in the folder `images`, not paths")
        return self

    def side(self, length: int | Literal["native"], arch: Architecture) -> int:
        """A side in pixels for `arch`; the remainder after whole patches stays the same."""
        if length == "native":
            return arch.native_size
        if self.patch_size is None or self.patch_size == arch.patch_size:
            return length
        patches, rest = divmod(length, self.patch_size)
        return patches * arch.patch_size + (max(1, rest * arch.patch_size // self.patch_size) if rest else 0)


def read_case(table: Mapping[str, Any], folder: Path, taken: ImageInput) -> Case:
    """The case that `table` describes, for a model that takes images as `taken`; photographs are in `folder`/images.

    If the model refuses sizes that are not multiples of the patch, noise of such a size is a case of refusal.
    """
    import numpy as np

    patch = taken.arch.patch_size
    entry = parse(CaseTable, table, where=f"case {table.get('name', '?')}")
    if entry.photographs:
        paths = [folder / "images" / name for name in entry.photographs]
        if entry.prepare == "evaluation":
            pictures = np.stack([_prepared(path, taken.preprocessing) for path in paths])
        else:
            pictures = np.asarray(images.load(paths[0]))[np.newaxis]
            if min(pictures.shape[1:3]) < patch:
                raise images.ImageError(paths[0], f"smaller than one patch of {patch} pixels")
            if taken.strict:
                pictures = cropped(pictures, patch)
        inputs = taken.of(pictures)
        return Case(name=entry.name, why=entry.why, inputs=inputs, neighbours=len(pictures) > 1, shown=True)
    assert entry.height is not None and entry.width is not None
    height, width = entry.side(entry.height, taken.arch), entry.side(entry.width, taken.arch)
    if min(height, width) < patch:
        raise UsageError(
            f"case {entry.name}: {height}x{width} is smaller than one patch of {patch} pixels.",
            next_step="Give larger sizes.",
        )
    refused = taken.strict and bool(height % patch or width % patch)
    noise = taken.noise(entry.batch, height, width, entry.seed)
    return Case(name=entry.name, why=entry.why, inputs=noise, expect_refusal=refused)


def workloads(profile: Mapping[str, Range], taken: ImageInput) -> tuple[Workload, ...]:
    """Noise images to time: at the size of the evaluation and at the native size, one and eight at a time.

    If the profile does not contain a size, the closest one that it contains.
    """

    def within(dimension: str, size: int) -> int:
        return min(max(size, profile[dimension].min), profile[dimension].max)

    shapes = {
        (within("batch", batch), within("height", height), within("width", width)): None
        for batch in (1, _BATCH)
        for height, width in (taken.preprocessing.crop_size, (taken.arch.native_size, taken.arch.native_size))
    }
    return tuple(
        Workload(
            name=f"{batch} x {height} x {width}",
            inputs=taken.noise(batch, height, width, 0),
            items=batch,
            unit="images",
        )
        for batch, height, width in shapes
    )


def from_folder(
    folder: Path, taken: ImageInput, *, progress: Progress, only: Collection[str] | None = None
) -> Iterator[Case | str]:
    """A case for each image in `folder` and below, or a line for a file that is not an image. Skips hidden files.

    An image's label is its top subfolder of `folder`, as in torchvision's ImageFolder. A link is followed only to a
    file within `folder`. Images are read one at a time, so memory is that of one image. only: the requested cases, if
    not all.
    """
    import numpy as np

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
            picture = _prepared(path, taken.preprocessing)[np.newaxis]
        except images.ImageError as error:
            yield error.message
            continue
        name = path.relative_to(folder)
        yield Case(
            name=name.as_posix(),
            why="a photograph of the user's",
            inputs=taken.of(picture),
            label=name.parts[0] if len(name.parts) > 1 else "",
        )


def _is_meant(path: Path, folder: Path) -> bool:
    """Whether `path` is a file or a link, and neither it nor a folder above it is hidden."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and (path.is_symlink() or not path.is_dir())


def _check_link(path: Path, folder: Path) -> None:
    """Raises ImageError for a link to a folder, which is not followed, and for one that leads out of `folder`."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a circle of links raises RuntimeError
        raise images.ImageError(path, "a link to nothing") from None
    if target.is_dir():
        raise images.ImageError(path, "a link to a folder, which is not followed")
    if not target.is_relative_to(folder.resolve()):
        raise images.ImageError(path, "a link that leads out of the folder")


def _prepared(path: Path, preprocessing: Preprocessing) -> Array:
    """The photograph resized and cropped; raises ImageError that names the file if that is not possible."""
    image = images.load(path)
    try:
        return preprocessing.prepared(image)
    except UsageError as error:
        raise images.ImageError(path, error.message.rstrip(".")) from None


def cropped(pictures_BHW3: Array, patch: int = PATCH) -> Array:
    """The closest smaller multiple of the patch of each side, top left kept, as the model card says."""
    import numpy as np

    height, width = (side // patch * patch for side in pictures_BHW3.shape[1:3])
    return np.ascontiguousarray(pictures_BHW3[:, :height, :width])

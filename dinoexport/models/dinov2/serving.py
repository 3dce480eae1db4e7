"""Serve DINOv2: encoded images in, prepared by the same code as the photographs of the validation.

Two front ends. `images` is the recipe's `[preprocess]`: every image becomes as large as its crop. `sized_images` keeps
images near their own size: each is resized to the nearest of a few legal sizes, because Triton merges only requests of
equal shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log
from pathlib import Path
from typing import Any

from dinoexport import images
from dinoexport.errors import InputRefused, UsageError
from dinoexport.family import FrontEnd
from dinoexport.models.dinov2.cases import ImageInput, cropped
from dinoexport.spec import Array, Dim, Graph, Progress

RGB = 3  # channels
SIZES_MAX = 8  # each additional size splits the traffic into smaller batches
# An additional size must reduce the mean of |log| of the images' resize factors by this much.
_WORTHWHILE = 0.01
_ENCODED = f"an image file: {', '.join(images.FORMATS)}"
Size = tuple[int, int]  # (height, width) in pixels


def front_ends(graph: Graph, taken: ImageInput, samples: Path | None, *, progress: Progress) -> tuple[FrontEnd, ...]:
    """`images` if the graph takes the crop; also `sized_images` if a folder of images shows which sizes occur.

    None for a model with other channels than RGB, because no encoded image has them.
    """
    if taken.arch.in_chans != RGB:
        return ()
    height, width = (next(dim for dim in graph.dims if dim.name == name) for name in ("height", "width"))
    ends = []
    if all(dim.min <= side <= dim.max for dim, side in zip((height, width), _whole(taken), strict=True)):
        ends.append(FrontEnd(name="images", graph=graph.name, meaning=_ENCODED, settings={}))
    if samples is not None:
        sizes = sizes_for(_sizes_in(samples, progress), height, width)
        ends.append(FrontEnd(name="sized_images", graph=graph.name, meaning=_ENCODED, settings={"sizes": sizes}))
    return tuple(ends)


def of_sizes(graph: Graph, sizes: Sequence[Mapping[str, int]]) -> FrontEnd:
    """`sized_images` with sizes that the user names instead of those that occur."""
    named = sorted({(size["height"], size["width"]) for size in sizes})
    return FrontEnd(name="sized_images", graph=graph.name, meaning=_ENCODED, settings={"sizes": named})


def prepare(
    front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes], taken: ImageInput
) -> dict[str, Array]:
    """The images as one batch of the graph's input; raises ImageError or InputRefused that names an unusable image."""
    import numpy as np

    decoded = [images.decode(item, named=f"image {i}") for i, item in enumerate(encoded, start=1)]
    if front_end == "images":
        pictures = [taken.preprocessing.prepared(image) for image in decoded]
    else:
        sizes = [(int(height), int(width)) for height, width in settings["sizes"]]
        pictures = [
            taken.preprocessing.covering(image, nearest((image.height, image.width), sizes)) for image in decoded
        ]
    if len(shapes := {picture.shape for picture in pictures}) > 1:
        listed = ", ".join(f"{height}x{width}" for height, width, _ in sorted(shapes))
        raise InputRefused(
            f"The images of one request go to different sizes: {listed}.", next_step="Send each in its own request."
        )
    batch = np.stack(pictures)
    return taken.of(cropped(batch, taken.arch.patch_size) if taken.strict else batch)


def _whole(taken: ImageInput) -> Size:
    """The crop, reduced to whole patches if the graph takes nothing else."""
    height, width = taken.preprocessing.crop_size
    patch = taken.arch.patch_size
    return (height // patch * patch, width // patch * patch) if taken.strict else (height, width)


def sizes_for(real: Sequence[Size], height: Dim, width: Dim) -> list[Size]:
    """At most eight legal sizes near the sizes of real images, chosen greedily by how much each reduces resizing."""
    legal = [_legal(size, height, width) for size in real]
    chosen: list[Size] = []
    cost = [float("inf")] * len(real)
    while len(chosen) < SIZES_MAX:
        costs = {
            size: [min(old, _factor(one, size)) for old, one in zip(cost, real, strict=True)]
            for size in sorted(set(legal) - set(chosen))
        }
        best = min(costs, key=lambda size: sum(costs[size]), default=None)
        if best is None or (chosen and sum(cost) - sum(costs[best]) < _WORTHWHILE * len(real)):
            break
        chosen.append(best)
        cost = costs[best]
    return sorted(chosen)


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` that needs the least resizing; the smaller one if two are equal."""
    return min(sizes, key=lambda candidate: (_factor(size, candidate), candidate))


def _factor(size: Size, other: Size) -> float:
    """The distance between two sizes: the sum of |log| of the factors of both sides."""
    return abs(log(size[0] / other[0])) + abs(log(size[1] / other[1]))


def _legal(size: Size, height: Dim, width: Dim) -> Size:
    """The size, scaled down until it fits the profile and floored to whole patches."""
    shrink = min(1.0, height.max / size[0], width.max / size[1])

    def side(length: int, dim: Dim) -> int:
        return max(ceil(dim.min / dim.step), int(length * shrink) // dim.step) * dim.step

    return side(size[0], height), side(size[1], width)


def _sizes_in(folder: Path, progress: Progress) -> list[Size]:
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.", next_step="Give a folder of images as --samples.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES and path.is_file())
    sizes = []
    for done, path in enumerate(paths, start=1):
        progress("reading sizes", done, len(paths))
        try:
            sizes.append(images.size_of(path))
        except images.ImageError:
            continue  # an unreadable image will be refused when a client sends it
    if not sizes:
        raise UsageError(f"{folder} holds no image that can be read.", next_step="Give another folder as --samples.")
    return sizes

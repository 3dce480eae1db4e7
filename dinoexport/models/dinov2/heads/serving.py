"""Prepares photographs for a served head, as the head's own evaluation does.

Classifiers get 224x224, as in upstream's evaluation. Depth and labels are outputs for every pixel, so a photograph
keeps its own size and is made smaller only if it is larger than the graph takes. Depth Anything V2 has its own
preparation.
Triton batches only requests of equal shape, so photographs of different sizes must be sent in different requests.
Class names and PNG files are made from the graph's outputs in `finishing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport import images
from dinoexport.errors import InputRefused, UsageError
from dinoexport.family import FrontEnd
from dinoexport.models.dinov2 import serving as of_backbone
from dinoexport.models.dinov2.cases import ImageInput
from dinoexport.models.dinov2.heads import finishing
from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.models.dinov2.published import PATCH
from dinoexport.spec import Array, Arrays, Graph, Progress

if TYPE_CHECKING:
    from PIL import Image

    from dinoexport.models.dinov2.model import Dinov2Model

_IMAGES = "images"
_ANSWERS = "answers"  # the setting that says what the answers are made into
# Depth Anything V2's own preparation (depth_anything_v2/dpt.py, image2tensor, input_size).
_DEPTH_ANYTHING_SIDE = 518
_ENCODED = f"an image file: {', '.join(images.FORMATS)}"


def front_ends(
    head: Head, graph: Graph, taken: ImageInput, samples: Path | None, *, progress: Progress
) -> tuple[FrontEnd, ...]:
    """The backbone's front ends for classifiers; for depth and labels `images`, which keeps the photograph's size."""
    if _classifies(head):
        return of_backbone.front_ends(graph, taken, samples, progress=progress)
    largest = {dim.name: dim.max for dim in graph.dims}
    settings: dict[str, Any] = {"height_max": largest["height"], "width_max": largest["width"]}
    settings["multiple"] = PATCH if head.form == "depth_anything" else 1
    settings["shorter_side"] = _DEPTH_ANYTHING_SIDE if head.form == "depth_anything" else None
    return (FrontEnd(name=_IMAGES, graph=graph.name, meaning=_ENCODED, settings=settings),)


def with_answers(head: Head, end: FrontEnd, form: str) -> FrontEnd:
    """A front end like `end` whose outputs are in `form`, one of `finishing.forms`."""
    return replace(
        end,
        name=f"{end.name}_{form}",
        settings={**end.settings, _ANSWERS: form},
        carried=finishing.carried(form),
        answers=finishing.answers(head, form),
    )


def finish(head: Head, settings: Mapping[str, Any], arrays: Arrays) -> dict[str, Array]:
    """Converts the graph's outputs to the form in the front end's settings."""
    return finishing.finished(head, settings[_ANSWERS], arrays)


def prepare(
    head: Head, backbone: Dinov2Model, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]
) -> dict[str, Array]:
    """The graph's input for encoded images; raises ImageError or InputRefused that names the unusable image."""
    import numpy as np

    form = settings.get(_ANSWERS)
    if _classifies(head):
        return backbone.prepare(front_end.removesuffix(f"_{form}"), settings, encoded)
    decoded = [images.decode(item, named=f"image {i}") for i, item in enumerate(encoded, start=1)]
    pictures = [resized(image, settings) for image in decoded]
    if len(shapes := {picture.shape for picture in pictures}) > 1:
        listed = ", ".join(f"{height}x{width}" for height, width, _ in sorted(shapes))
        raise InputRefused(
            f"The images of one request go to different sizes: {listed}.", next_step="Send each in its own request."
        )
    inputs = backbone.taken.of(np.stack(pictures))
    if form is None:
        return inputs
    sizes = np.array([(image.height, image.width) for image in decoded], np.int32)
    return {**inputs, finishing.PHOTOGRAPH_SIZE: sizes}


def _classifies(head: Head) -> bool:
    return head.form in ("classifier", "fitted_linear", "fitted_knn")


def resized(image: Image.Image, settings: Mapping[str, Any]) -> Array:
    """The image at the graph's input size, cubic, RGB bytes (H, W, 3)."""
    import numpy as np
    from PIL import Image

    height, width = size_of(image.height, image.width, settings)
    if (height, width) == (image.height, image.width):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def size_of(height: int, width: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """The size that the graph gets: the photograph's own, or one with a shorter side of at least `shorter_side`.

    Both sides have the same scale and are rounded to the nearest multiple, or up if the nearest is too short, as in
    upstream's Resize (depth_anything_v2/util/transform.py, lower_bound). An image larger than the graph's largest is
    made smaller. Raises UsageError if the image is so long and thin that its shorter side would have no pixel.
    """
    multiple, shortest = settings["multiple"], settings["shorter_side"]
    scale = 1.0 if shortest is None else shortest / min(height, width)
    fits = min(settings["height_max"] / (height * scale), settings["width_max"] / (width * scale), 1.0)

    def side(length: int) -> int:
        wanted = length * scale * fits
        if fits < 1.0:  # never past what the graph takes
            return int(floor(wanted / multiple + 1e-9) * multiple)
        nearest = int(round(wanted / multiple) * multiple)
        return nearest if shortest is None or nearest >= shortest else int(ceil(wanted / multiple) * multiple)

    sides = (side(height), side(width))
    if min(sides) < multiple:
        raise UsageError(f"An image of {width}x{height} is too long and thin to resize.", next_step="Leave it out.")
    return sides

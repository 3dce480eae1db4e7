"""Converts a served head's outputs to what applications need: class names, PNG files, maps of the photograph's size.

It imports only NumPy and Pillow, because it runs in the server's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

from dinoexport.errors import InputRefused
from dinoexport.models.dinov2.heads import pictures
from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.spec import Array, Arrays, Tensor

Resize = Callable[[Array, int, int], Array]
# What a front end passes on beside the graph's input, so that an answer can be brought to the photograph's size.
PHOTOGRAPH_SIZE = "photograph_size"
_NAMED = 5  # classes
_PNG_LARGEST = 65535  # of 16 bits


def forms(head: Head) -> tuple[str, ...]:
    """The forms in which the head's outputs can be served, besides the graph's own arrays."""
    return ("png", "resized") if head.class_count == 0 or head.form == "segmentation" else ("names",)


def carried(form: str) -> tuple[Tensor, ...]:
    """The tensors that preparation passes on, past the graph, for `form`."""
    if form == "names":
        return ()
    meaning = "height and width of the photograph, upright, pixels"
    return (Tensor(name=PHOTOGRAPH_SIZE, dtype="int32", shape=("batch", 2), meaning=meaning),)


def answers(head: Head, form: str) -> tuple[Tensor, ...]:
    """The outputs of `form`."""
    photograph = ("batch", "photograph_height", "photograph_width")
    labels = head.form == "segmentation"
    if form == "names":
        count = min(_NAMED, head.class_count)
        named = f"of {head.kind.dataset.name}, the most probable first"
        return (
            Tensor(name="class_names", dtype="bytes", shape=("batch", count), meaning=f"names of classes {named}"),
            Tensor(name="class_probabilities", dtype="float32", shape=("batch", count), meaning="their probabilities"),
        )
    if form == "resized" and labels:
        meaning = "class of each pixel of the photograph"
        return (Tensor(name="photograph_labels", dtype="int32", shape=photograph, meaning=meaning),)
    if form == "resized":
        meaning = "depth of each pixel of the photograph, as the graph's"
        return (Tensor(name="photograph_depth", dtype="float32", shape=photograph, meaning=meaning),)
    if labels:
        meaning = "a PNG file as large as the photograph; a pixel's palette index is its class"
        return (Tensor(name="labels_png", dtype="bytes", shape=("batch", 1), meaning=meaning),)
    return (
        Tensor(
            name="depth_png",
            dtype="bytes",
            shape=("batch", 1),
            meaning="a 16-bit grey PNG file as large as the photograph; a pixel times depth_scale is its depth",
        ),
        Tensor(name="depth_scale", dtype="float32", shape=("batch", 1), meaning="depth of one step of depth_png"),
    )


def finished(head: Head, form: str, arrays: Arrays) -> dict[str, Array]:
    """Converts the graph's outputs, and the tensors carried past it, to `form`."""
    import numpy as np

    if form == "names":
        return _named(head, arrays["probabilities"])
    output = "labels" if head.form == "segmentation" else "depth"
    maps, sizes = arrays[output], arrays[PHOTOGRAPH_SIZE]
    resize = nearest if output == "labels" else _bilinear_of(head)
    resized = [resize(one, int(height), int(width)) for one, (height, width) in zip(maps, sizes, strict=True)]
    if form == "resized":
        if len({one.shape for one in resized}) > 1:
            raise InputRefused(
                "The photographs of one request have different sizes.", next_step="Send each in its own request."
            )
        return {f"photograph_{output}": np.stack(resized)}
    if output == "labels":
        return {"labels_png": _column([labels_png(one, head.class_count) for one in resized])}
    encoded = [depth_png(one, _largest(head)) for one in resized]
    scales = np.array([[scale] for _, scale in encoded], np.float32)
    return {"depth_png": _column([data for data, _ in encoded]), "depth_scale": scales}


def nearest(labels_HW: Array, height: int, width: int) -> Array:
    """Resizes labels; each pixel takes the nearest label."""
    import numpy as np

    rows, columns = (
        ((np.arange(to) + 0.5) * size / to).astype(np.int64)
        for size, to in zip(labels_HW.shape, (height, width), strict=True)
    )
    found: Array = labels_HW[rows][:, columns]
    return found


def bilinear(map_HW: Array, height: int, width: int, *, corners: bool) -> Array:
    """Resizes a map as torch's bilinear interpolate does. corners: its align_corners."""
    import numpy as np

    if map_HW.shape == (height, width):
        return map_HW
    found = map_HW.astype(np.float32)
    for axis, to in enumerate((height, width)):
        size = found.shape[axis]
        if corners:
            at = np.arange(to) * ((size - 1) / max(to - 1, 1))
        else:
            at = np.maximum((np.arange(to) + 0.5) * (size / to) - 0.5, 0.0)
        low = at.astype(np.int64)
        share = (at - low).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        before, after = (np.take(found, index, axis=axis) for index in (low, np.minimum(low + 1, size - 1)))
        found = before + (after - before) * share
    return found


def depth_png(depth_HW: Array, largest: float | None) -> tuple[bytes, float]:
    """A 16-bit grey PNG and the depth of one grey step. largest: the depth of white; None: the map's largest depth."""
    import numpy as np
    from PIL import Image

    finite = np.nan_to_num(depth_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    scale = (largest or float(finite.max(initial=0.0)) or 1.0) / _PNG_LARGEST
    steps = np.clip(np.rint(finite / scale), 0, _PNG_LARGEST).astype(np.uint16)
    stored = BytesIO()
    Image.fromarray(steps).save(stored, "PNG")
    return stored.getvalue(), scale


def labels_png(labels_HW: Array, count: int) -> bytes:
    """A PNG whose palette indices are the labels; each class has a colour of its own."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(np.clip(labels_HW, 0, 255).astype(np.uint8))
    image.putpalette(pictures.label_colours(count).tobytes())
    stored = BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


def _bilinear_of(head: Head) -> Resize:
    """Depth Anything's code resizes depth to the photograph with aligned corners (depth_anything_v2/dpt.py)."""
    return _corners if head.form == "depth_anything" else _centres


def _corners(map_HW: Array, height: int, width: int) -> Array:
    return bilinear(map_HW, height, width, corners=True)


def _centres(map_HW: Array, height: int, width: int) -> Array:
    return bilinear(map_HW, height, width, corners=False)


def _largest(head: Head) -> float | None:
    if head.form == "depth_anything":
        return head.table.max_depth
    return head.depth_range[1]


def _named(head: Head, probabilities_BK: Array) -> dict[str, Array]:
    import numpy as np

    count = min(_NAMED, head.class_count)
    best_BC = np.argsort(-probabilities_BK, axis=1, kind="stable")[:, :count]
    names = [name.encode() for name in head.class_names]
    return {
        "class_names": np.array([[names[k] for k in row] for row in best_BC], dtype=object).reshape(-1, count),
        "class_probabilities": np.take_along_axis(probabilities_BK, best_BC, axis=1).astype(np.float32),
    }


def _column(items: list[bytes]) -> Array:
    import numpy as np

    found = np.empty((len(items), 1), dtype=object)
    found[:, 0] = items
    return found

"""Pictures of a head's outputs for the report: depth in colours, label maps, best classes, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO

from dinoexport.images import Preprocessing
from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.models.dinov2.pictures import photograph, viridis
from dinoexport.spec import Array, Arrays, Picture

_SIDE_MAX = 448  # pixels
_CLASSES_SHOWN = 5
_LEGEND = 6  # classes named under a label map


def of_case(
    head: Head, pixels_B3HW: Array, reference: Arrays, candidates: Mapping[str, Arrays], preprocessing: Preprocessing
) -> tuple[tuple[Picture, ...], ...]:
    """A row for each image: the image, PyTorch's output, then each candidate's output and where it differs."""
    rows = []
    for i, pixels_3HW in enumerate(pixels_B3HW):
        row = [photograph(pixels_3HW, preprocessing)]
        of_image = {name: array[i] for name, array in reference.items()}
        others = {
            name: {output: array[i] for output, array in answers.items()}
            for name, answers in candidates.items()
            if all(output in answers and answers[output].shape == array.shape for output, array in reference.items())
        }
        if "depth" in of_image:
            depths = {name: answer["depth"] for name, answer in others.items()}
            row += _depths(of_image["depth"], depths, head.depth_unit)
        elif "labels" in of_image:
            labels = {name: answer["labels"] for name, answer in others.items()}
            row += _label_maps(head, of_image["labels"], labels)
        else:
            row += _best_classes(head, of_image, others)
        rows.append(tuple(row))
    return tuple(rows)


def depth_image(depth_HW: Array, low: float, high: float) -> Array:
    """Depth as viridis bytes (H, W, 3), `low` dark and `high` bright."""
    import numpy as np

    return viridis((np.nan_to_num(depth_HW, nan=high) - low) / max(high - low, 1e-12))


def label_image(labels_HW: Array, count: int) -> Array:
    """Labels as bytes (H, W, 3): each class has a colour of its own, the same in every picture."""
    import numpy as np

    return label_colours(count)[np.clip(labels_HW.astype(np.int64), 0, count - 1)]


def label_colours(count: int) -> Array:
    """(count, 3) bytes. Hues in steps of the golden ratio, so that neighbouring classes differ most."""
    import numpy as np

    hue = np.arange(count) * 0.6180339887498949
    value = 0.55 + 0.4 * ((np.arange(count) // 3) % 3) / 2
    saturation = 0.45 + 0.5 * (np.arange(count) % 3) / 2
    offsets = np.array([5.0, 3.0, 1.0])
    k = (offsets[None, :] + 6 * hue[:, None]) % 6
    channels = value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))
    colours: Array = np.rint(255 * channels).astype(np.uint8)
    return colours


def _depths(reference_HW: Array, others: Mapping[str, Array], unit: str) -> list[Picture]:
    import numpy as np

    low, high = (float(end) for end in np.percentile(reference_HW, (2, 98)))
    row = [_drawn(depth_image(reference_HW, low, high), "PyTorch", f"dark {low:.3g}, bright {high:.3g}{unit}")]
    errors = {name: np.abs(depth.astype(np.float64) - reference_HW) for name, depth in others.items()}
    largest = max((float(e[np.isfinite(e)].max(initial=0.0)) for e in errors.values()), default=0.0)
    for name, depth in others.items():
        row.append(_drawn(depth_image(depth.astype(np.float32), low, high), name, "the same colours"))
        worst = float(errors[name][np.isfinite(errors[name])].max(initial=0.0))
        shown = _most_of_each_block(np.nan_to_num(errors[name], nan=largest))
        colours = viridis(shown / max(largest, 1e-300))
        caption = f"of {name}: dark 0, bright {largest:.1e}{unit}, worst {worst:.1e}{unit}"
        row.append(_drawn(colours, "Difference", caption))
    return row


def _label_maps(head: Head, reference_HW: Array, others: Mapping[str, Array]) -> list[Picture]:
    import numpy as np

    names, count = head.class_names, head.class_count
    found, pixels = np.unique(reference_HW, return_counts=True)
    most = found[np.argsort(-pixels, kind="stable")][:_LEGEND]
    colours = label_colours(count)
    legend = tuple(
        (f"#{bytes(colours[k]).hex()}", f"{names[k]} {_percent(pixels[found == k][0] / reference_HW.size)}")
        for k in most
    )
    rest = len(found) - len(most)
    caption = f"and {rest} more {'class' if rest == 1 else 'classes'}" if rest else ""
    row = [replace(_drawn(label_image(reference_HW, count), "PyTorch", caption), legend=legend)]
    for name, labels in others.items():
        differs = labels.astype(np.int64) != reference_HW
        row.append(_drawn(label_image(labels, count), name, "the same colours"))
        shown = _most_of_each_block(differs)
        drawn = np.where(shown[..., None], np.uint8(255), np.uint8(24)).repeat(3, axis=-1)
        caption = f"of {name}: {int(differs.sum()):,} of {differs.size:,} pixels have another label"
        row.append(_drawn(drawn, "Where they differ", caption))
    return row


def _percent(share: float) -> str:
    return f"{share:.0%}" if share > 0.005 else "<1%"


def _best_classes(head: Head, reference: Arrays, others: Mapping[str, Arrays]) -> list[Picture]:
    row = [_bars(head.class_names, reference["probabilities"], "PyTorch")]
    return row + [_bars(head.class_names, answer["probabilities"], name) for name, answer in others.items()]


def _bars(names: Sequence[str], probabilities_K: Array, title: str) -> Picture:
    """The most probable classes in an SVG, each with its bar below it: text on a bar is hard to read."""
    from xml.sax.saxutils import escape

    import numpy as np

    best = np.argsort(-probabilities_K.astype(np.float64), kind="stable")[:_CLASSES_SHOWN]
    lines = []
    for line, k in enumerate(best):
        share, y = float(probabilities_K[k]), 22 * line
        width = 260 * min(max(share, 0.0), 1.0) if np.isfinite(share) else 0.0
        lines.append(f'<rect x="0" y="{y + 16}" width="{width:.1f}" height="3" fill="#5b8dd9"/>')
        text = escape(f"{names[k]} {share:.1%}")
        lines.append(f'<text x="0" y="{y + 12}" font-size="12" font-family="sans-serif" fill="#777">{text}</text>')
    height = 22 * len(best)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="260" height="{height}" viewBox="0 0 260 {height}">'
    data = (svg + "".join(lines) + "</svg>").encode()
    return Picture(title=title, caption="the most probable classes", data=data, media_type="image/svg+xml")


def _most_of_each_block(map_HW: Array) -> Array:
    """The largest value of each block of pixels that one pixel of the picture shows, so that none is lost."""
    import numpy as np

    height, width = map_HW.shape
    step = -(-max(height, width) // _SIDE_MAX)
    filled = np.pad(map_HW, ((0, -height % step), (0, -width % step)), mode="edge")
    blocks = filled.reshape(filled.shape[0] // step, step, filled.shape[1] // step, step)
    most: Array = blocks.max(axis=(1, 3))
    return most


def _drawn(colours_HW3: Array, title: str, caption: str) -> Picture:
    import numpy as np
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(colours_HW3))
    image.thumbnail((_SIDE_MAX, _SIDE_MAX), Image.Resampling.NEAREST)
    stored = BytesIO()
    image.save(stored, "PNG")
    return Picture(title=title, caption=caption, data=stored.getvalue(), media_type="image/png")

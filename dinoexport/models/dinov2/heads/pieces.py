"""A head and its padding as pieces of the graph: the traced module, its arguments, and example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinoexport.family import Example, Piece
from dinoexport.models.dinov2.heads.kinds import Form, Head
from dinoexport.models.dinov2.published import PATCH
from dinoexport.spec import Tensor

_GRID = (17, 19)  # patches: neither native nor square
# The traced module of each kind of head, in `graph.py`.
_TRACED = "dinoexport.models.dinov2.heads.graph"
_CLASSES: Mapping[Form, str] = {
    "classifier": "Classifier",
    "fitted_linear": "FittedLinear",
    "fitted_knn": "FittedNeighbours",
    "linear_depth": "LinearDepth",
    "segmentation": "Segmentation",
    "dpt_depth": "DptDepth",
    "depth_anything": "DepthAnything",
}


def example(head: Head, from_bytes: bool) -> Example:
    """An image of 17 x 19 patches; a few pixels smaller if the head pads."""
    short = (4, 6) if head.pads else (0, 0)
    height, width = _GRID[0] * PATCH - short[0], _GRID[1] * PATCH - short[1]
    if from_bytes:
        return Example(dtype="uint8", shape=(2, height, width, 3))
    return Example(dtype="float32", shape=(2, 3, height, width))


def padding(image: Tensor, example: Example, normalising: Mapping[str, Any]) -> Piece:
    """The piece that normalises the image and pads it with zeros."""
    return Piece(
        name=f"pad, from {image.name}",
        code=f"{_TRACED}:Pad",
        arguments=normalising,
        example_inputs={image.name: example},
        dynamic={image.name: _dynamic(image)},
    )


def of_head(head: Head, image: Tensor, example: Example, *, residual: str, body: str) -> Piece:
    """The head's piece: from the image, if its size is needed, and the residual stream after each block, to outputs.

    residual: the stream's dtype. body: that of a DPT head's convolutions.
    """
    tokens = 1 + head.arch.register_count + _GRID[0] * _GRID[1]
    needs_image = head.form not in ("classifier", "fitted_linear", "fitted_knn")
    inputs = {image.name: example} if needs_image else {}
    stream = Example(dtype=residual, shape=(2, tokens, head.arch.embed_dim))
    inputs |= {f"tokens_{i}": stream for i in range(len(head.blocks))}
    arguments = _arguments(head, image.name == "images", body)
    return Piece(
        # Two heads of one kind may differ in what they are made with, as a relative and a metric one do.
        name=f"{head.table.kind} of {residual} and {image.name}, {arguments}",
        code=f"{_TRACED}:{_CLASSES[head.form]}",
        arguments=arguments,
        example_inputs=inputs,
        dynamic={name: _dynamic(image) if name == image.name else {0: "batch", 1: "tokens"} for name in inputs},
        least_sizes={} if head.pads else {"height": PATCH, "width": PATCH},
    )


def _dynamic(image: Tensor) -> dict[int, str]:
    return {axis: size for axis, size in enumerate(image.shape) if isinstance(size, str)}


def _arguments(head: Head, from_bytes: bool, body: str) -> dict[str, Any]:
    """The arguments of the head's traced module."""
    shared = {
        "dim": head.arch.embed_dim,
        "prefix_count": 1 + head.arch.register_count,
        "layers": len(head.blocks),
        "after_norm": head.after_norm,
        "pads": head.pads,
        "from_bytes": from_bytes,
    }
    table = head.table
    match head.form:
        case "classifier" | "fitted_linear" | "segmentation":
            return {**shared, "class_count": head.class_count, "width": head.width}
        case "fitted_knn":
            assert table.bank and table.neighbours and table.temperature
            voting = {"bank": table.bank, "neighbours": table.neighbours, "temperature": table.temperature}
            return {**shared, **voting, "class_count": head.class_count}
        case "linear_depth":
            return {**shared, "depth_range": head.depth_range}
        case "dpt_depth":
            return {**shared, "depth_range": head.depth_range, "body": body}
        case "depth_anything":
            assert table.features and table.channels
            sizes = {"features": table.features, "channels": table.channels, "max_depth": table.max_depth}
            return {**shared, **sizes, "body": body}

"""A head and its padding as pieces that are traced once; heads of one form and width share a trace."""

from __future__ import annotations

import torch

from dinoexport.family import Piece
from dinoexport.models.dinov2.config import PATCH
from dinoexport.models.dinov2.heads import graph as traced
from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.spec import Tensor

_GRID = (17, 19)  # patches: neither native nor square


def example(head: Head, from_bytes: bool) -> torch.Tensor:
    """An image of 17 x 19 patches, and short of that where the head pads."""
    import torch

    short = (4, 6) if head.pads else (0, 0)
    height, width = (side * PATCH - less for side, less in zip(_GRID, short, strict=True))
    return torch.zeros(2, height, width, 3, dtype=torch.uint8) if from_bytes else torch.zeros(2, 3, height, width)


def padding(image: Tensor, example: torch.Tensor, **byte_scaling: torch.Tensor) -> Piece:
    """The image to normalised pixels with zeros around them."""
    return Piece(
        name=f"pad, from {image.name}",
        module=traced.Pad(**byte_scaling),
        example_inputs={image.name: example},
        dynamic={image.name: _dynamic(image)},
    )


def of_head(head: Head, image: Tensor, example: torch.Tensor, *, residual: torch.dtype, body: torch.dtype) -> Piece:
    """The image, where its size is asked for, and the residual stream at each block that the head reads, to answers.

    residual: the stream's dtype. body: that of a DPT head's convolutions.
    """
    tokens = torch.zeros(2, 1 + head.arch.register_count + _GRID[0] * _GRID[1], head.arch.embed_dim, dtype=residual)
    needs_image = head.form not in ("classifier", "fitted_linear", "fitted_knn")
    inputs: dict[str, torch.Tensor] = {image.name: example} if needs_image else {}
    # One tensor given twice would be taken for one input.
    inputs |= {f"tokens_{i}": tokens.clone() for i in range(len(head.blocks))}
    table = head.table.model_dump(exclude={"kind", "classes", "depth_range", "tokens"}, exclude_none=True)
    return Piece(
        name=f"{head.form} {table} of {head.width} and {len(head.blocks)} blocks, {head.class_count} classes, "
        f"{body} of {residual} and {image.name}",
        module=_module(head, image.name == "images", body),
        example_inputs=inputs,
        dynamic={name: _dynamic(image) if name == image.name else {0: "batch", 1: "tokens"} for name in inputs},
        least_sizes={} if head.pads else {"height": PATCH, "width": PATCH},
    )


def _dynamic(image: Tensor) -> dict[int, str]:
    return {axis: size for axis, size in enumerate(image.shape) if isinstance(size, str)}


def _module(head: Head, from_bytes: bool, body: torch.dtype) -> torch.nn.Module:
    match head.form:
        case "classifier":
            return traced.Classifier(head, from_bytes=from_bytes)
        case "fitted_linear":
            return traced.FittedLinear(head, from_bytes=from_bytes)
        case "fitted_knn":
            return traced.FittedNeighbours(head, from_bytes=from_bytes)
        case "linear_depth":
            return traced.LinearDepth(head, from_bytes=from_bytes)
        case "segmentation":
            return traced.Segmentation(head, from_bytes=from_bytes)
        case "dpt_depth":
            return traced.DptDepth(head, from_bytes=from_bytes, body=body)
        case "depth_anything":
            return traced.DepthAnything(head, from_bytes=from_bytes, body=body)

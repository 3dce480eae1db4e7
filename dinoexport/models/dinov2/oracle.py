"""PyTorch's tokens for cases, by the plain upstream formulation; see `reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dinoexport.family import Read
from dinoexport.models.dinov2 import reference
from dinoexport.models.dinov2.config import Architecture, dtype_name
from dinoexport.spec import Array, Precision, Progress


def tokens_of(
    arch: Architecture,
    read: Read,
    images_BCHW: Sequence[Array],
    *,
    blocks: Sequence[int],
    stream_names: Sequence[str],
    precision: Precision,
    progress: Progress,
) -> list[tuple[dict[int, Array], dict[str, Array]]]:
    """For each batch of images: tokens by block, and the residual stream under `stream_names`, if there are any."""
    computing = dtype(precision)
    streams: list[dict[str, Array]] = [{} for _ in images_BCHW]

    def keep(j: int, blocks_done: int, stream: torch.Tensor) -> None:
        streams[j][stream_names[blocks_done]] = stream.float().numpy()

    answers = reference.tokens_of(
        arch,
        lambda name: torch.from_numpy(read(name)).to(computing),
        [torch.from_numpy(images) for images in images_BCHW],
        blocks=blocks,
        block_done=lambda done: progress(f"PyTorch {precision}", done, arch.depth),
        keep_stream=keep if stream_names else None,
    )
    return [
        ({i: t.float().numpy() for i, t in tokens.items()}, stream)
        for tokens, stream in zip(answers, streams, strict=True)
    ]


def dtype(precision: Precision) -> torch.dtype:
    """PyTorch's dtype. It has none for int8, which a quantiser makes from an fp32 graph."""
    found: torch.dtype = getattr(torch, dtype_name(precision))
    return found

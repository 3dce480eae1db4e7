"""Upstream's own code as a second judge, where torch.hub already has it (`--reference hub`).

The repository must be in torch.hub's folder beforehand: dinoexport does not download and run code by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinoexport.errors import MissingRequirement
from dinoexport.family import Read
from dinoexport.models.dinov2.config import PATCH, Architecture
from dinoexport.spec import Array, Progress

_FETCH = "python -c \"import torch; torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14', pretrained=False)\""


def _checkout() -> Path:
    found = sorted(Path(torch.hub.get_dir()).glob("facebookresearch_dinov2_*"))
    if not found:
        raise MissingRequirement(
            f"torch.hub has no facebookresearch/dinov2 in {torch.hub.get_dir()}.",
            next_step=f"Fetch it once where there is a network: {_FETCH}",
        )
    return found[0]


@torch.inference_mode()
def tokens_of(
    variant: str,
    arch: Architecture,
    read: Read,
    images_B3HW: Sequence[Array],
    blocks: Sequence[int],
    progress: Progress,
) -> list[dict[int, Array]]:
    """Normalised tokens (B, 1 + R + N, D) after each of `blocks`, by upstream's `dinov2_{variant}`, fp32."""
    entry = f"dinov2_{variant}"
    model: Any = torch.hub.load(str(_checkout()), entry, source="local", pretrained=False)
    model.load_state_dict({name: torch.from_numpy(read(name)) for name in arch.tensors})
    model.eval()
    answers = []
    for done, image in enumerate(images_B3HW, start=1):
        # Upstream's PatchEmbed asserts multiples of 14; the model card's crop is the caller's there.
        height, width = (side // PATCH * PATCH for side in image.shape[-2:])
        pixels = torch.from_numpy(image[..., :height, :width].copy())
        streams = model._get_intermediate_layers_not_chunked(pixels, list(blocks))
        answers.append({i: model.norm(stream).numpy() for i, stream in zip(blocks, streams, strict=True)})
        progress("PyTorch, upstream's code", done, len(images_B3HW))
    return answers

"""Upstream's own code as a second reference, if torch.hub already has it (`--reference hub`).

The repository must be in torch.hub's folder beforehand: dinoexport does not download and run code by itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.family import Read
from dinoexport.models.dinov2.config import Architecture
from dinoexport.spec import Array, Progress

_FETCH = "python -c \"import torch; torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14', pretrained=False)\""


def _checkout() -> Path:
    found = sorted(Path(torch.hub.get_dir()).glob("facebookresearch_dinov2_*/hubconf.py"))
    if not found:
        raise MissingRequirement(
            f"torch.hub has no facebookresearch/dinov2 in {torch.hub.get_dir()}.",
            next_step=f"Fetch it once where there is a network: {_FETCH}",
        )
    return found[0].parent


def _load_model(variant: str) -> Any:
    """Upstream's `dinov2_{variant}` with its own random weights."""
    checkout, entry = _checkout(), f"dinov2_{variant}"
    # Upstream's layers read this when they are imported. If xFormers is installed they would use its attention,
    # which has no kernel for the CPU (facebookresearch/xformers issue 1143).
    os.environ.setdefault("XFORMERS_DISABLED", "1")
    try:
        return torch.hub.load(str(checkout), entry, source="local", pretrained=False)
    except (ImportError, RuntimeError) as error:  # torch.hub's own for an entry or a package it does not find
        raise MissingRequirement(
            f"Upstream's code in {checkout} cannot build {entry}: {error}.",
            next_step="Install what it needs, or use --reference plain.",
        ) from error


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
    model = _load_model(variant)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if unlike := {name for name, _ in theirs.items() ^ arch.tensors.items()}:
        raise UsageError(
            f"Upstream's dinov2_{variant} is not the recipe's [model]; they differ in {', '.join(sorted(unlike))}.",
            next_step="Use --reference plain for an architecture of your own.",
        )
    # mask_token is used only in training, and timm's files have none; by the check above nothing else is missing.
    state = {name: torch.from_numpy(read(name)) for name in arch.tensors if name != "mask_token"}
    model.load_state_dict(state, strict=False)
    model.eval()
    wanted = sorted(set(blocks))  # upstream returns blocks in ascending order, each once
    answers = []
    for done, image in enumerate(images_B3HW, start=1):
        # Upstream's PatchEmbed asserts multiples of the patch; its caller must do the model card's crop.
        height, width = (side // arch.patch_size * arch.patch_size for side in image.shape[-2:])
        pixels = torch.from_numpy(image[..., :height, :width].copy())
        streams = model._get_intermediate_layers_not_chunked(pixels, wanted)
        answers.append({i: model.norm(stream).numpy() for i, stream in zip(wanted, streams, strict=True)})
        progress("PyTorch, upstream's code", done, len(images_B3HW))
    return answers

"""How a small DINOv2 takes images, for tests of what is made of pictures and of noise."""

from __future__ import annotations

from typing import Any

from dinoexport.images import Preprocessing
from dinoexport.models.dinov2.cases import ImageInput
from dinoexport.models.dinov2.config import Architecture


def taken(
    *, as_bytes: bool, strict: bool = False, preprocess: dict[str, Any] | None = None, **model: Any
) -> ImageInput:
    """As the published models take them, but for what is said. model: what differs in the architecture."""
    sizes: dict[str, Any] = {"embed_dim": 8, "depth": 1, "num_heads": 1, "feed_forward": "mlp", "register_count": 0}
    return ImageInput(
        arch=Architecture(**(sizes | model)),
        preprocessing=Preprocessing(**(preprocess or {})),
        as_bytes=as_bytes,
        strict=strict,
    )

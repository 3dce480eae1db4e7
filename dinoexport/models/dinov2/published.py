"""Numbers that all published DINOv2 models and heads share. A traced graph depends on them, so nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping

PATCH = 14  # pixels a side; every published DINOv2 backbone
NORM_EPSILON = 1e-6  # upstream dinov2/models/vision_transformer.py: partial(nn.LayerNorm, eps=1e-6)
BINS = 256  # of the linear depth heads
DPT_CHANNELS = 256  # of the released DPT heads, for every backbone

# The level's own resize layer and its kernel: 4 and 2 are transposed convolutions of that stride, 3 is a convolution of
# stride 2. The third level has none.
RESIZES: Mapping[int, int] = {0: 4, 1: 2, 3: 3}


def dpt_widths(dim: int) -> tuple[int, int, int, int]:
    """Channels of the four reassembled maps of a released DPT head (dinov2/hub/depthers.py, post_process_channels)."""
    return (dim // 8, dim // 4, dim // 2, dim)

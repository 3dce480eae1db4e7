"""Synthetic DINOv2 weights and images, the same on every machine.

Only (seed, tensor name) determine each value, through NumPy's frozen `RandomState`. Magnitudes are those of a trained
model: with LayerScale at its initial 1e-5 every block would have no effect, and every comparison would pass.

Trained large ViTs also have massive activations, which noise does not have: in a few channels of a few tokens, hundreds
of times the median. One block's feed-forward makes them, and they stay in the residual stream (Sun et al. 2024,
arXiv:2402.17762;
tokens of high norm: Darcet et al. 2023, arXiv:2309.16588). `stressed` adds them.
"""

from __future__ import annotations

import zlib

from dinoexport.models.dinov2.config import Architecture
from dinoexport.spec import Array

# The class token and the first register carry this much in one channel, a patch only by chance: what tells them apart.
_MARK = 6.0
# The hidden unit that finds the mark answers 4 (x - 3) to a normed channel of value x: a patch in seven hundred.
_SLOPE, _THRESHOLD = 4.0, 3.0
# What that unit answers to the class token, about: the marked channel has some 5 after the norm.
_ANSWER = 8.0
# Which share of the peak each massive channel gets; published ones differ in sign and size too.
_SHARES = (1.0, -0.6, 0.3)


def _noise(key: str, shape: tuple[int, ...]) -> Array:
    import numpy as np

    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)


def tensor(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """The tensor `name` of checkpoint `seed`, float32. LayerScale is 0.2 or more, tokens have deviation 0.2."""
    import numpy as np

    noise = _noise(f"{seed}:{name}", shape)
    if name.endswith("gamma"):
        values = 0.2 + 0.3 * np.abs(noise)
    elif "norm" in name:
        values = 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
    elif name.endswith("weight"):
        values = noise / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("bias"):
        values = 0.1 * noise
    else:
        values = 0.2 * noise
    return values.astype(np.float32)


def stressed(name: str, shape: tuple[int, ...], seed: int, *, arch: Architecture, peak: float) -> Array:
    """`tensor`, changed so that from block depth/3 on the class token and a few patches reach about `peak`.

    They do so in three channels. Activations elsewhere are about one, so `peak` counts in medians; from some 65,000 on
    fp16 overflows.
    """
    import numpy as np

    values, block = tensor(name, shape, seed), f"blocks.{arch.depth // 3}."
    chosen = np.random.RandomState(seed % 2**32).permutation(arch.embed_dim)
    mark, massive, unit = int(chosen[0]), chosen[1 : 1 + len(_SHARES)], 0
    if name in ("cls_token", "register_tokens"):
        values[0, 0, mark] = _MARK
    elif name in (f"{block}mlp.fc1.weight", f"{block}mlp.w12.weight"):
        # SwiGLU multiplies two halves: the first finds the mark, the second is one.
        values[[unit, unit + shape[0] // 2] if "w12" in name else unit] = 0
        values[unit, mark] = _SLOPE
    elif name in (f"{block}mlp.fc1.bias", f"{block}mlp.w12.bias"):
        values[unit] = -_SLOPE * _THRESHOLD
        if "w12" in name:
            values[unit + shape[0] // 2] = 1
    elif name in (f"{block}mlp.fc2.weight", f"{block}mlp.w3.weight"):
        gamma = tensor(f"{block}ls2.gamma", (arch.embed_dim,), seed)[massive]
        values[massive, unit] = peak / _ANSWER * np.array(_SHARES) / gamma
    return values


def pixels(batch: int, height: int, width: int, seed: int, channels: int = 3) -> Array:
    """Normalised noise images (B, C, H, W), float32, all different from one another."""
    import numpy as np

    return _noise(f"{seed}:{batch}x{height}x{width}", (batch, channels, height, width)).astype(np.float32)


def images(batch: int, height: int, width: int, seed: int, channels: int = 3) -> Array:
    """Noise images as uint8 (B, H, W, C), all different from one another."""
    import numpy as np

    random = np.random.RandomState(zlib.crc32(f"{seed}:{batch}x{height}x{width}".encode()))
    return random.randint(0, 256, (batch, height, width, channels), dtype=np.uint8)

"""Made-up DINOv2 weights and images, the same on every machine.

Each value follows from (seed, tensor name) alone through NumPy's frozen `RandomState`. Magnitudes are those of a
trained model: with LayerScale at its initial 1e-5 every block would vanish, and every comparison would pass.
"""

from __future__ import annotations

import zlib

import numpy as np

from dinoexport.spec import Array


def _noise(key: str, shape: tuple[int, ...]) -> Array:
    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)


def tensor(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """The tensor `name` of checkpoint `seed`, float32. LayerScale is 0.2 or more, tokens have deviation 0.2."""
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


def pixels(batch: int, height: int, width: int, seed: int) -> Array:
    """Normalised noise images (B, 3, H, W), float32, all different from one another."""
    return _noise(f"{seed}:{batch}x{height}x{width}", (batch, 3, height, width)).astype(np.float32)


def images(batch: int, height: int, width: int, seed: int) -> Array:
    """Noise images as uint8 (B, H, W, 3), all different from one another."""
    key = f"{seed}:{batch}x{height}x{width}"
    return np.random.RandomState(zlib.crc32(key.encode())).randint(0, 256, (batch, height, width, 3), dtype=np.uint8)

"""Synthetic weights of heads, the same on every machine: each value follows from (seed, head, tensor name) alone.

Magnitudes are chosen so that a mistake in any rule changes the outputs: depths reach both ends of their range,
BatchNorm's statistics are far from 0 and 1, and the last ReLU of a relative model leaves some depths at zero.
"""

from __future__ import annotations

import zlib

from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.models.dinov2.heads.layouts import published_name
from dinoexport.models.dinov2.published import BINS
from dinoexport.spec import Array

_BINS_ALIKE = 16  # neighbouring bins with like weights: else the mean over 256 of them would be one depth everywhere


def tensor(head: Head, name: str, seed: int) -> Array:
    """The tensor `name` of the synthetic head `seed`, float32."""
    import numpy as np

    shape = head.tensors[name]
    theirs = published_name(name)
    key = f"{seed}:{theirs}" if head.form == "depth_anything" else f"{seed}:{head.table.kind}:{theirs}"
    noise = _noise(key, shape)
    if head.form == "depth_anything":
        values = _depth_anything(name, shape, noise)
    elif head.form == "fitted_knn":
        values = _fitted_neighbours(name, shape, noise, seed)
    else:
        values = _released(head, name, shape, noise, key)
    return values.astype(np.float32)


def _noise(key: str, shape: tuple[int, ...]) -> Array:
    import numpy as np

    noise: Array = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    return noise


def _released(head: Head, name: str, shape: tuple[int, ...], noise: Array, key: str) -> Array:
    import numpy as np

    last = name.rsplit(".", 1)[-1]
    fan_in = int(np.prod(shape[1:]))
    if last == "running_mean":
        return 0.5 * noise
    if last == "running_var":
        return 0.5 + np.abs(noise)
    if ".bn." in name:
        return 1 + 0.2 * noise if last == "weight" else 0.1 * noise
    if name.endswith("conv_depth.weight"):
        coarse = _noise(f"{key}:groups", (BINS // _BINS_ALIKE, fan_in))
        alike = np.repeat(coarse, _BINS_ALIKE, axis=0).reshape(shape)
        bins: Array = (alike + 0.5 * noise) / np.sqrt(fan_in)
        return bins
    if "conv_depth.head.4" in name:  # metres
        assert head.kind.dataset.depth_range is not None
        scale = head.kind.dataset.depth_range[1] / 10
        metres: Array = scale * (1.5 * noise if last == "weight" else np.full(shape, 6.0))
        return metres
    return _layer(name, last, shape, noise)


def _depth_anything(name: str, shape: tuple[int, ...], noise: Array) -> Array:
    if name.endswith("bias"):
        return 0.1 * noise + (0.8 if "output_conv2.2" in name else 0.0)
    return _layer(name, "weight", shape, noise)


def _layer(name: str, last: str, shape: tuple[int, ...], noise: Array) -> Array:
    """Weights that keep the magnitude of the input; a transposed convolution sums over its first axis only."""
    import numpy as np

    fan_in = float(np.prod(shape[1:]))
    if last != "weight":
        scale = 0.1
    elif "res_conv_unit" in name or "resConfUnit" in name:
        scale = 0.5 * np.sqrt(2 / fan_in)
    elif "resize_layers.0" in name or "resize_layers.1" in name:
        scale = 1 / np.sqrt(shape[0])
    else:
        scale = 1 / np.sqrt(fan_in)
    values: Array = scale * noise
    return values


def _fitted_neighbours(name: str, shape: tuple[int, ...], noise: Array, seed: int) -> Array:
    import numpy as np

    if name.endswith("votes"):
        of_class: Array = np.eye(shape[1])[(np.arange(shape[0]) + seed) % shape[1]]
        return of_class
    unit: Array = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return unit.astype(np.float16)

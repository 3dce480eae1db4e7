"""Synthetic weights of heads: each tensor is NumPy's frozen noise of a written key, times a written scale.

The official numbers in `data/goldens` are of these weights, so a changed scale or key would make them worthless.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.heads import synthetic
from dinoexport.models.dinov2.heads.kinds import Head, HeadTable
from dinoexport.spec import Array

SEED = 5
DEPTH_ANYTHING = {"features": 8, "channels": (4, 6, 8, 10)}
KNN = {"classes": ("cat", "dog", "owl"), "bank": 7, "neighbours": 3, "temperature": 0.07}


def head(kind: str, **more: Any) -> Head:
    arch = Architecture(embed_dim=16, depth=4, num_heads=2, feed_forward="mlp", register_count=0)
    return Head(arch=arch, table=HeadTable(kind=kind, **more))


def noise(key: str, *shape: int) -> Array:
    return np.random.RandomState(zlib.crc32(f"{SEED}:{key}".encode())).standard_normal(shape)


@pytest.mark.parametrize(
    ("kind", "name", "shape", "scale", "offset"),
    [
        ("linear", "weight", (1000, 32), 1 / 32**0.5, 0.0),
        ("linear", "bias", (1000,), 0.1, 0.0),
        ("voc2012_linear", "decode_head.conv_seg.weight", (21, 16, 1, 1), 1 / 4, 0.0),
        ("voc2012_linear", "decode_head.conv_seg.bias", (21,), 0.1, 0.0),
        ("voc2012_linear", "decode_head.bn.running_mean", (16,), 0.5, 0.0),
        ("voc2012_linear", "decode_head.bn.weight", (16,), 0.2, 1.0),
        ("voc2012_linear", "decode_head.bn.bias", (16,), 0.1, 0.0),
        ("nyu_linear", "decode_head.conv_depth.bias", (256,), 0.1, 0.0),
        # The last layer's depths are metres: a tenth of the range is the unit.
        ("nyu_dpt", "decode_head.conv_depth.head.4.weight", (1, 32, 1, 1), 1.5, 0.0),
        ("nyu_dpt", "decode_head.conv_depth.head.4.bias", (1,), 0.0, 6.0),
        ("kitti_dpt", "decode_head.conv_depth.head.4.weight", (1, 32, 1, 1), 12.0, 0.0),
        ("kitti_dpt", "decode_head.conv_depth.head.4.bias", (1,), 0.0, 48.0),
        ("nyu_dpt", "decode_head.conv_depth.head.2.bias", (32,), 0.1, 0.0),
        ("nyu_dpt", "decode_head.convs.0.conv.weight", (256, 2, 3, 3), 1 / 18**0.5, 0.0),
        ("nyu_dpt", "decode_head.fusion_blocks.0.res_conv_unit2.conv1.conv.weight", (256, 256, 3, 3), 1 / 4608**0.5, 0),
        # Transposed convolutions of their own stride sum over their input channels only.
        ("nyu_dpt", "decode_head.reassemble_blocks.resize_layers.0.weight", (2, 2, 4, 4), 1 / 2**0.5, 0.0),
        ("nyu_dpt", "decode_head.reassemble_blocks.resize_layers.1.weight", (4, 4, 2, 2), 1 / 2, 0.0),
        ("nyu_dpt", "decode_head.reassemble_blocks.resize_layers.3.weight", (16, 16, 3, 3), 1 / 12, 0.0),
    ],
)
def test_a_released_head(kind: str, name: str, shape: tuple[int, ...], scale: float, offset: float) -> None:
    """A classifier's file has no prefix before its names, and neither has the key."""
    ours = f"linear_head.{name}" if kind == "linear" else name
    found = synthetic.tensor(head(kind), ours, SEED)
    assert found.dtype == np.float32 and found.shape == shape
    np.testing.assert_allclose(found, offset + scale * noise(f"{kind}:{name}", *shape), rtol=1e-6, atol=1e-7)


def test_variances_are_far_from_one() -> None:
    found = synthetic.tensor(head("ade20k_linear"), "decode_head.bn.running_var", SEED)
    expected = 0.5 + np.abs(noise("ade20k_linear:decode_head.bn.running_var", 16))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sixteen_neighbouring_bins_are_alike() -> None:
    """Half of a bin's deviation is its own; the rest it shares with the other fifteen of its group."""
    name = "decode_head.conv_depth.weight"
    found = synthetic.tensor(head("nyu_linear"), name, SEED)
    shared = np.repeat(noise(f"nyu_linear:{name}:groups", 16, 32), 16, axis=0)
    expected = (shared + 0.5 * noise(f"nyu_linear:{name}", 256, 32)) / 32**0.5
    assert found.shape == (256, 32, 1, 1)
    np.testing.assert_allclose(found[:, :, 0, 0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "shape", "scale", "offset"),
    [
        ("projects.1.weight", (6, 16, 1, 1), 1 / 4, 0.0),
        ("projects.1.bias", (6,), 0.1, 0.0),
        ("resize_layers.0.weight", (4, 4, 4, 4), 1 / 2, 0.0),
        ("resize_layers.1.weight", (6, 6, 2, 2), 1 / 6**0.5, 0.0),
        ("scratch.refinenet2.resConfUnit1.conv2.weight", (8, 8, 3, 3), 1 / 12, 0.0),
        ("scratch.output_conv2.0.bias", (32,), 0.1, 0.0),
        ("scratch.output_conv2.2.weight", (1, 32, 1, 1), 1 / 32**0.5, 0.0),
        # Above zero for most pixels: the last ReLU leaves only some depths at zero.
        ("scratch.output_conv2.2.bias", (1,), 0.1, 0.8),
    ],
)
def test_depth_anything(name: str, shape: tuple[int, ...], scale: float, offset: float) -> None:
    """The keys do not name the head: the goldens of all its variants have one rule."""
    found = synthetic.tensor(head("depth_anything", **DEPTH_ANYTHING), f"depth_head.{name}", SEED)
    assert found.dtype == np.float32 and found.shape == shape
    np.testing.assert_allclose(found, offset + scale * noise(f"depth_head.{name}", *shape), rtol=1e-6, atol=1e-7)


def test_a_bank_of_neighbours() -> None:
    """Unit vectors that fp16 holds; the classes of the bank's images take turns, from the seed on."""
    knn = head("knn", **KNN)
    bank = synthetic.tensor(knn, "fitted.bank", SEED)
    drawn = noise("knn:fitted.bank", 7, 16)
    lengths = np.array([np.sqrt(sum(value * value for value in row)) for row in drawn])
    np.testing.assert_array_equal(bank, (drawn / lengths[:, None]).astype(np.float16).astype(np.float32))
    votes = synthetic.tensor(knn, "fitted.votes", SEED)
    assert votes.argmax(axis=1).tolist() == [2, 0, 1, 2, 0, 1, 2]
    assert votes.shape == (7, 3) and np.array_equal(np.sort(votes, axis=1), [[0, 0, 1]] * 7)

"""Synthetic weights of DINOv2: what makes the activations of three channels massive, and where."""

from __future__ import annotations

import numpy as np
import pytest

from dinoexport.models.dinov2 import synthetic
from dinoexport.models.dinov2.config import Architecture
from dinoexport.spec import Array

SEED, PEAK, WIDTH, HIDDEN = 3, 1000.0, 48, 64
SHARES = (1.0, -0.6, 0.3)
# The third of seven blocks, counted from 0.
BLOCK = "blocks.2."


def stressed(name: str, *shape: int) -> tuple[Array, Array]:
    """The tensor, and the indices at which it differs from the plain one."""
    arch = Architecture(embed_dim=WIDTH, depth=7, num_heads=4, feed_forward="mlp", register_count=2)
    values = synthetic.stressed(name, shape, SEED, arch=arch, peak=PEAK)
    return values, np.argwhere(values != synthetic.tensor(name, shape, SEED))


def marked() -> int:
    """The channel by which the class token is known."""
    return int(stressed("cls_token", 1, 1, WIDTH)[1][0, 2])


@pytest.mark.parametrize(("name", "count"), [("cls_token", 1), ("register_tokens", 2)])
def test_the_first_token_is_marked_in_one_channel(name: str, count: int) -> None:
    values, where = stressed(name, 1, count, WIDTH)
    assert where.tolist() == [[0, 0, marked()]] and values[0, 0, marked()] == 6.0


@pytest.mark.parametrize(("first", "rows"), [("mlp.fc1", [0]), ("mlp.w12", [0, HIDDEN // 2])])
def test_one_unit_finds_the_mark(first: str, rows: list[int]) -> None:
    """It answers 4 (x - 3) to the marked channel and to nothing else; the second half of SwiGLU's is one."""
    weight, changed = stressed(f"{BLOCK}{first}.weight", HIDDEN, WIDTH)
    assert sorted({row for row, _ in changed.tolist()}) == rows
    assert np.flatnonzero(weight[0]).tolist() == [marked()] and weight[0, marked()] == 4.0
    assert not weight[rows[1:]].any()
    bias, changed = stressed(f"{BLOCK}{first}.bias", HIDDEN)
    assert changed.ravel().tolist() == rows and bias[rows].tolist() == [-12.0, 1.0][: len(rows)]


@pytest.mark.parametrize("last", ["mlp.fc2", "mlp.w3"])
def test_three_channels_get_their_shares_of_the_peak(last: str) -> None:
    """After LayerScale; none is the marked one."""
    weight, changed = stressed(f"{BLOCK}{last}.weight", WIDTH, HIDDEN)
    channels = changed[:, 0]
    assert len(channels) == 3 and not changed[:, 1].any() and marked() not in channels
    reached = 8.0 * weight[channels, 0] * synthetic.tensor(f"{BLOCK}ls2.gamma", (WIDTH,), SEED)[channels]
    assert sorted(reached.tolist()) == pytest.approx(sorted(PEAK * share for share in SHARES), rel=1e-5)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "blocks.3.mlp.fc2.weight", f"{BLOCK}attn.proj.weight"])
def test_nothing_else_is_changed(name: str) -> None:
    assert not stressed(name, WIDTH, HIDDEN)[1].size


def test_magnitudes_of_plain_weights() -> None:
    """Of a trained model: products keep their input's magnitude, norms scale by about one, LayerScale counts."""
    gamma = synthetic.tensor("blocks.0.ls1.gamma", (5000,), 0)
    assert gamma.min() >= 0.2 and gamma.mean() == pytest.approx(0.2 + 0.3 * np.sqrt(2 / np.pi), rel=0.05)
    for name, shape, mean, deviation in (
        ("norm.weight", (5000,), 1.0, 0.2),
        ("norm.bias", (5000,), 0.0, 0.1),
        ("blocks.0.attn.qkv.weight", (500, 100), 0.0, 0.1),
        ("patch_embed.proj.weight", (50, 4, 10, 10), 0.0, 0.05),
        ("blocks.0.attn.qkv.bias", (5000,), 0.0, 0.1),
        ("pos_embed", (1, 50, 100), 0.0, 0.2),
    ):
        values = synthetic.tensor(name, shape, 0)
        assert values.dtype == np.float32 and values.shape == shape
        assert values.mean() == pytest.approx(mean, abs=0.02) and values.std() == pytest.approx(deviation, rel=0.05)
    assert not np.array_equal(synthetic.tensor("norm.weight", (9,), 0), synthetic.tensor("norm.weight", (9,), 1))


def test_images_of_noise_differ() -> None:
    pixels, encoded = synthetic.pixels(2, 3, 4, 0, channels=5), synthetic.images(2, 30, 40, 0)
    assert pixels.shape == (2, 5, 3, 4) and pixels.dtype == np.float32 and not np.array_equal(*pixels)
    assert encoded.shape == (2, 30, 40, 3) and encoded.dtype == np.uint8 and not np.array_equal(*encoded)
    assert encoded.min() == 0 and encoded.max() == 255
    for make in (synthetic.pixels, synthetic.images):
        first = make(1, 4, 4, 0)
        others = make(1, 4, 4, 1), make(2, 4, 4, 0)[:1], make(1, 4, 5, 0)[..., :4]
        assert not any(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("seed", [2**32 + SEED, 5 * 2**32 + SEED])
def test_a_seed_of_more_than_32_bits_marks_the_same_channel(seed: int) -> None:
    arch = Architecture(embed_dim=WIDTH, depth=7, num_heads=4, feed_forward="mlp", register_count=2)
    values = synthetic.stressed("cls_token", (1, 1, WIDTH), seed, arch=arch, peak=PEAK)
    assert np.argwhere(values == 6.0).tolist() == [[0, 0, marked()]]


def test_noise_has_three_channels_unless_more_are_asked_for() -> None:
    assert synthetic.pixels(2, 4, 5, SEED).shape == (2, 3, 4, 5) == synthetic.pixels(2, 4, 5, SEED, 3).shape
    assert synthetic.images(2, 4, 5, SEED).shape == (2, 4, 5, 3)
    assert synthetic.images(1, 2, 2, SEED, 4).shape == (1, 2, 2, 4)

"""Synthetic weights of a decoder: their values, and what makes the activations of three channels massive."""

from __future__ import annotations

import numpy as np
import pytest

from dinoexport.models.llama import synthetic
from dinoexport.models.llama.config import Architecture
from dinoexport.spec import Array

SEED, PEAK, DIM, HIDDEN = 7, 500.0, 48, 64
ARCH = Architecture(
    dim=DIM, layers=7, heads=4, kv_heads=2, hidden_dim=HIDDEN, vocabulary=9, norm_eps=1e-5, rope_theta=1e4, context=99
)
# The third of seven blocks, counted from 0.
BLOCK = "layers.2.feed_forward."


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("tok_embeddings", [0.0235595703125, -0.05126953125, -0.057373046875]),
        ("output", [-0.349609375, 0.21875, 0.2265625]),
        ("layers.0.attention.wq", [-0.392578125, -0.384765625, -1.1171875]),
        ("layers.0.attention.wk", [-0.0830078125, 0.45703125, -0.259765625]),
        ("layers.0.attention.wv", [0.80078125, 0.033935546875, 0.0693359375]),
        ("layers.0.attention.wo", [-0.0498046875, 0.08642578125, -0.005096435546875]),
        ("layers.0.feed_forward.w1", [-0.46875, 0.4375, 0.126953125]),
        ("layers.0.feed_forward.w2", [-0.02783203125, -0.06298828125, 0.0101318359375]),
    ],
)
def test_values_of_products(name: str, first: list[float]) -> None:
    """The official numbers of the tests were made with these."""
    values = synthetic.tensor(f"{name}.weight", (2, 8), SEED)
    assert values.dtype == np.float32 and values.shape == (2, 8) and values.ravel()[:3].tolist() == first


def test_values_of_norms() -> None:
    """From 0.5 on, and every seventh is negative."""
    first = [-0.64453125, 0.63671875, 0.7109375, 1.390625, 0.72265625, 0.54296875, 0.59765625, -0.84375, 1.46875]
    assert synthetic.tensor("norm.weight", (9,), SEED).tolist() == first
    assert synthetic.tensor("layers.1.attention_norm.weight", (3,), SEED).tolist() == [-0.53515625, 0.95703125, 0.96875]


def test_rounding_to_bfloat16() -> None:
    """To the nearest of 8 bits, ties to the even one; zero where a float16 would have fewer bits."""
    tie, below_tie, least = 2.0**-8, 2.0**-8 - 2.0**-20, 2.0**-17
    given = [1 + tie, 1 + 3 * tie, 1 + below_tie, 1 + tie + 2.0**-20, -1 - 3 * tie, least, -least, least * 0.99, -1e-8]
    wanted = [1.0, 1 + 4 * tie, 1.0, 1 + 2 * tie, -1 - 4 * tie, least, -least, 0.0, 0.0]
    assert synthetic._exact(np.array(given, np.float32)).tolist() == wanted


def test_prompts() -> None:
    assert synthetic.prompt(320, 6, SEED).tolist() == [1, 191, 233, 275, 96, 205]
    assert synthetic.prompt(320, 6, SEED, row=1).tolist() == [1, 141, 34, 101, 299, 59]
    assert synthetic.prompt(4, 5, SEED).tolist() == [1, 3, 3, 3, 3], "ids below 3 are special"


def stressed(name: str, seed: int = SEED) -> tuple[Array, list[list[int]]]:
    """The tensor, and the indices at which it differs from the plain one."""
    values = synthetic.stressed(name, ARCH.tensors[name], seed, arch=ARCH, peak=PEAK)
    return values, np.argwhere(values != synthetic.tensor(name, ARCH.tensors[name], seed)).tolist()


def test_bos_is_marked_in_one_channel() -> None:
    values, changed = stressed("tok_embeddings.weight")
    ((token, channel),) = changed
    assert token == 1 and values[token, channel] == np.float32(3.0), "60 deviations of 0.05"
    assert channel == np.random.RandomState(SEED).permutation(DIM)[0]


@pytest.mark.parametrize("part", ["w1", "w3"])
def test_one_unit_finds_the_mark(part: str) -> None:
    ((_, channel),) = stressed("tok_embeddings.weight")[1]
    values, changed = stressed(f"{BLOCK}{part}.weight")
    assert {row for row, _ in changed} == {0}
    assert np.flatnonzero(values[0]).tolist() == [channel] and values[0, channel] == 2.0


@pytest.mark.parametrize("seed", [SEED, 1, 8])
def test_three_channels_get_their_shares_of_the_peak(seed: int) -> None:
    """The unit's answer, SwiGLU's of twice the normed mark, times what it writes: shares of 500 deviations of 0.05.

    The mark's norm weight is 1.02, 0.51 and -0.59.
    """
    ((_, mark),) = stressed("tok_embeddings.weight", seed)[1]
    values, changed = stressed(f"{BLOCK}w2.weight", seed)
    channels = [row for row, _ in changed]
    assert len(channels) == 3 and {column for _, column in changed} == {0} and mark not in channels
    normed = 0.9 * np.sqrt(DIM) * float(synthetic.tensor("layers.2.ffn_norm.weight", (DIM,), seed)[mark])
    answer = 2 * normed * (2 * normed) / (1 + np.exp(-2 * normed))
    assert sorted((answer * values[channels, 0]).tolist()) == pytest.approx([-15.0, 7.5, 25.0], rel=1e-5)


def test_seeds_beyond_32_bits_choose_channels_too() -> None:
    assert stressed("tok_embeddings.weight", 2**32 + SEED)[1] == stressed("tok_embeddings.weight")[1]
    assert stressed("tok_embeddings.weight", 2**32 - 1)[1]


@pytest.mark.parametrize("name", ["layers.1.feed_forward.w2", "layers.3.feed_forward.w1", "layers.2.attention.wo"])
def test_nothing_else_is_changed(name: str) -> None:
    assert not stressed(f"{name}.weight")[1]

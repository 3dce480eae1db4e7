"""Weights in few bits: what was in four or eight bits stays as it was, and what was not loses least."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from dinoexport.graph.quantised_weights import QuantisedWeight, symmetric, with_offset
from dinoexport.spec import Weight

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
SEEDS = (0, 1)
# The shares of a block's range that are tried, without and with an offset.
SHRINKS, FITTED = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68), (0.94, 0.88, 0.8)


def error(blocks: torch.Tensor, widened: torch.Tensor) -> float:
    return float((widened - blocks).norm() / blocks.norm())


def widened(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    values = codes.float() * scale.unsqueeze(1)
    return values if offset is None else values + offset.unsqueeze(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [16, 13, 9])
def test_four_bits_stay_as_they_were(levels: int, seed: int) -> None:
    """Blocks on a grid of any step and start, as in Q4_1, or on a part of its levels, as most in Q4_0."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, levels, (6, 32, 40), generator=random).float()
    codes[:, 0], codes[:, 1] = 0, levels - 1
    step = torch.rand(6, 1, 40, generator=random) + 0.1
    blocks = codes * step + torch.randn(6, 1, 40, generator=random)
    assert error(blocks, widened(*with_offset(blocks))) < 1e-6


def test_eight_bits_stay_as_they_were() -> None:
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, (6, 32, 40), generator=random).float()
    codes[:, 0] = -127
    blocks = codes * (torch.rand(6, 1, 40, generator=random) + 0.1)
    assert error(blocks, widened(*symmetric(blocks, 8)[:2])) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_of_any_value_lose_less_than_with_nearest_rounding(seed: int) -> None:
    """Nearest rounding, written here: over the range of a block around zero, and from its least to its largest."""
    blocks = torch.randn(50, 32, 40, generator=torch.Generator().manual_seed(seed))
    step = (blocks.abs().amax(dim=1) / 7).unsqueeze(1)
    around_zero = error(blocks, (blocks / step).round() * step)
    least, most = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    step = (most - least) / 15
    whole_range = error(blocks, ((blocks - least) / step).round() * step + least)
    assert error(blocks, widened(*symmetric(blocks, 4)[:2])) < 0.95 * around_zero
    assert error(blocks, widened(*with_offset(blocks))) < 0.95 * whole_range < 0.95 * around_zero


@pytest.mark.parametrize("seed", SEEDS)
def test_no_grid_that_is_tried_loses_less(seed: int) -> None:
    """All of them in NumPy: the whole range in 8 to 15 steps, and shrunk ranges in 15, each fitted by least squares."""
    blocks = torch.randn(20, 32, 6, generator=torch.Generator().manual_seed(seed)).double()
    values = blocks.numpy()
    least, span = values.min(axis=1, keepdims=True), np.ptp(values, axis=1, keepdims=True)
    errors = []
    for share, steps in [(1.0, steps) for steps in range(8, 16)] + [(share, 15) for share in FITTED]:
        codes = ((values - least - span * (1 - share) / 2) / (span * share / steps)).round().clip(0, 15)
        spread = codes - codes.mean(axis=1, keepdims=True)
        slope = (spread * values).sum(axis=1, keepdims=True) / (spread**2).sum(axis=1, keepdims=True)
        lost = values - values.mean(axis=1, keepdims=True) - slope * spread
        errors.append((lost**2).sum(axis=1))
    made = (widened(*(part.double() for part in with_offset(blocks))) - blocks).square().sum(dim=1).numpy()
    assert np.allclose(made, np.min(errors, axis=0), rtol=1e-6)
    assert len(set(np.argmin(errors, axis=0).ravel())) > len(FITTED) / 2, "none is there in vain"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_no_scale_that_is_tried_loses_less(bits: int, seed: int) -> None:
    blocks = torch.randn(20, 32, 6, generator=torch.Generator().manual_seed(seed)).double()
    values, high = blocks.numpy(), 2 ** (bits - 1) - 1
    whole = np.abs(values).max(axis=1, keepdims=True) / high
    errors = [
        (((values / (whole * shrink)).round().clip(-high, high) * whole * shrink - values) ** 2).sum(axis=1)
        for shrink in SHRINKS
    ]
    codes, scale, _ = symmetric(blocks, bits)
    made = (widened(codes.double(), scale) - blocks).square().sum(dim=1).numpy()
    assert np.allclose(made, np.min(errors, axis=0), rtol=1e-6)


def test_a_block_of_one_value_is_kept_and_no_scale_is_zero() -> None:
    values = np.zeros((64, 3), np.float32)
    values[:, 1] = 0.25
    weight = Weight(shape=values.shape, read=lambda: values, bits=4, block=32)
    parts = QuantisedWeight(weight, "w", number_dtype=FLOAT16, offsets_name="o")
    scales, offsets = parts.scales.numpy(), parts.offsets.numpy()
    assert (scales > 0).all()
    codes = parts.codes.numpy().astype(np.float32).reshape(2, 32, 3)
    assert np.array_equal((codes * scales[:, None] + offsets[:, None]).reshape(64, 3), values)

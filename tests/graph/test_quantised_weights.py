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


def test_a_block_of_one_value_is_kept_and_no_scale_is_zero() -> None:
    values = np.zeros((64, 3), np.float32)
    values[:, 1] = 0.25
    weight = Weight(shape=values.shape, read=lambda: values, bits=4, block=32)
    parts = QuantisedWeight(weight, "w", number_dtype=FLOAT16, offsets_name="o")
    scales, offsets = parts.scales.numpy(), parts.offsets.numpy()
    assert (scales > 0).all()
    codes = parts.codes.numpy().astype(np.float32).reshape(2, 32, 3)
    assert np.array_equal((codes * scales[:, None] + offsets[:, None]).reshape(64, 3), values)

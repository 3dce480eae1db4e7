"""Weights in few bits: what was in four or eight bits stays as it was, and what was not loses least."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from dinoexport.errors import ValidationFailed
from dinoexport.graph import quantised_weights
from dinoexport.graph.quantised_weights import QuantisedWeight, symmetric, with_offset
from dinoexport.spec import Array, Weight

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


def test_each_share_is_for_blocks_whose_grid_it_fits() -> None:
    """Whole numbers from -7 to 7, or 0 to 15, and what lies beyond the ends of so large a share of the range."""
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(-7, 8, (1, 512, len(SHRINKS)), generator=random).double()
    blocks[0, 0] = 7 / torch.tensor(SHRINKS)
    assert np.allclose(symmetric(blocks, 4)[1], 1)
    blocks = torch.randint(0, 16, (1, 4096, len(FITTED)), generator=random).double()
    beyond = 7.5 / torch.tensor(FITTED) - 7.5
    blocks[0, 0], blocks[0, 1] = -beyond, 15 + beyond
    codes, scale, _ = with_offset(blocks)
    assert np.allclose(scale, 1, atol=2e-3) and np.array_equal(codes[0, 2:], blocks[0, 2:] - 8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [32, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_scale_that_is_tried_loses_less(bits: int, rows: int, seed: int) -> None:
    blocks = torch.randn(20, rows, 6, generator=torch.Generator().manual_seed(seed)).double()
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


def test_of_equal_candidates_the_first_is_kept() -> None:
    """Beside a block that none fits: zeros fit every scale, and two levels any number of steps."""
    blocks = torch.randn(1, 32, 3, generator=torch.Generator().manual_seed(0))
    blocks[:, :, 0], blocks[:, :, 1], blocks[:, ::2, 1] = 0, 0, 15
    codes, scale, none = symmetric(blocks, 4)
    assert scale[0, 0] == np.float32(1e-30) and not codes[0, :, 0].any() and none.shape == (0,)
    assert symmetric(blocks, 8)[1][0, 1] == np.float32(15 / 127)
    codes, scale, offset = with_offset(blocks)
    assert (scale > 0).all() and scale[0, 0] == np.float32(1e-30) and offset[0, 0] == 0 and not codes[0, :, 0].any()
    assert scale[0, 1] == 1 and offset[0, 1] == 8 and codes[0, :4, 1].tolist() == [7, -8, 7, -8]
    assert codes.min() == -8 and codes.max() == 7


def test_four_bits_far_from_zero_stay_as_they_were() -> None:
    """Thirteen levels, a sixteenth apart, around 1000: what is fitted are distances from the mean."""
    blocks = torch.randint(0, 13, (4, 32, 5), generator=torch.Generator().manual_seed(0)) / 16 + 1000
    blocks[:, 0], blocks[:, 1] = 1000, 1000.75
    codes, scale, offset = with_offset(blocks)
    assert np.allclose(scale, 1 / 16, rtol=1e-5) and (widened(codes, scale, offset) - blocks).abs().max() < 1e-3


@pytest.mark.parametrize("step", [1e-3, 1.0, 1e3])
def test_what_was_in_eight_bits_is_tried_once(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any step: the first scale fits, and so do zeros; a weight of any value is tried with all ten."""
    tried: list[float] = []
    plain = quantised_weights._rounded

    def rounded(blocks: torch.Tensor, scale: torch.Tensor, high: int) -> torch.Tensor:
        tried.append(float(scale[0, 0]))
        return plain(blocks, scale, high)

    monkeypatch.setattr(quantised_weights, "_rounded", rounded)
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, (2, 32, 4), generator=random).float()
    codes[:, 0] = 127
    for blocks, times in ((codes * step, 1), (codes * 0, 1), (torch.randn(2, 32, 4, generator=random) * step, 10)):
        tried.clear()
        symmetric(blocks, 8)
        assert len(tried) == times + 1, "and once for the codes"


def quantised(values: Array, bits: int, offsets: str = "", *, number_dtype: int = FLOAT) -> QuantisedWeight:
    weight = Weight(shape=values.shape, read=lambda: values, bits=bits, block=32)
    return QuantisedWeight(weight, "w", number_dtype=number_dtype, offsets_name=offsets)


@pytest.mark.parametrize(
    ("bits", "offsets", "dtype", "stored"),
    [(8, "", onnx.TensorProto.INT8, 1), (4, "", onnx.TensorProto.INT4, 0.5), (4, "o", onnx.TensorProto.INT4, 0.5)],
)
def test_the_tensors_of_a_weight(bits: int, offsets: str, dtype: int, stored: float) -> None:
    """Their names, kinds, shapes and bytes, and how many bytes are held while each is made."""
    values = np.random.RandomState(0).standard_normal((96, 5)).astype(np.float32)
    parts = quantised(values, bits, offsets)
    facts = [(t.name, int(t.dtype), tuple(t.shape), t.nbytes) for t in (parts.codes, parts.scales, parts.offsets)]
    assert facts == [
        ("w_codes", dtype, (96, 5), 480 * stored),
        ("w_scales", FLOAT, (3, 5), 60),
        (offsets, FLOAT, (3, 5), 60),
    ]
    assert parts.codes.working_bytes == parts.scales.working_bytes == 6 * 480
    codes = parts.codes.numpy().astype(np.float32)
    assert parts.scales.working_bytes == 60, "the codes have been made"
    scales = np.repeat(parts.scales.numpy(), 32, axis=0)
    offset = np.repeat(parts.offsets.numpy(), 32, axis=0) if offsets else 0
    assert np.abs(codes * scales + offset - values).max() < scales.max() * 1.5


@pytest.mark.parametrize(("bits", "offsets"), [(8, "o"), (16, ""), (9, ""), (5, "o")])
def test_bits_that_no_weight_has(bits: int, offsets: str) -> None:
    with pytest.raises(AssertionError, match="'w'"):
        quantised(np.zeros((32, 1), np.float32), bits, offsets)


def test_rows_that_fill_no_blocks() -> None:
    with pytest.raises(AssertionError, match="'w'"):
        quantised(np.zeros((33, 1), np.float32), 8)


def test_two_codes_share_a_byte(tmp_path: Path) -> None:
    """The first is its lower half."""
    values = np.zeros((32, 1), np.float32)
    values[:4, 0] = -7, 7, 1, -1
    path = tmp_path / "codes"
    with path.open("wb") as file:
        quantised(values, 4).codes.tofile(file)
    assert path.read_bytes() == bytes([0x79, 0xF1]) + bytes(14)
    assert quantised(values, 4).codes.numpy().dtype == ml_dtypes.int4


@pytest.mark.parametrize(("numbers", "parts"), [(1, [1] * 5), (200, [2, 2, 1]), (288, [3, 2]), (1 << 20, [5])])
def test_a_weight_is_quantised_in_parts(numbers: int, parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks of 32 rows and three columns, as many as take so many numbers, at least one; with the same codes."""
    values = np.random.RandomState(0).standard_normal((160, 3)).astype(np.float32)
    whole = quantised(values, 8).codes.numpy()
    seen: list[int] = []
    monkeypatch.setattr(quantised_weights, "_PART_NUMBERS", numbers)
    monkeypatch.setattr(
        quantised_weights, "symmetric", lambda blocks, bits: seen.append(len(blocks)) or symmetric(blocks, bits)
    )
    made = quantised(values, 8)
    assert np.array_equal(made.codes.numpy(), whole) and seen == parts
    assert made.scales.numpy().shape == (5, 3)


def test_a_part_has_a_million_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def zeros(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
        seen.append(tuple(blocks.shape))
        return blocks.to(torch.int8), blocks[:, 0], torch.zeros(0)

    monkeypatch.setattr(quantised_weights, "symmetric", zeros)
    assert quantised(np.zeros((33 * 32, 1024), np.float32), 8).scales.numpy().shape == (33, 1024)
    assert seen == [(32, 32, 1024), (1, 32, 1024)]


def test_numbers_that_are_none_are_named() -> None:
    values = np.zeros((64, 2), np.float32)
    values[40, 1] = np.nan
    with pytest.raises(ValidationFailed, match="The weight w holds NaN or Inf"):
        quantised(values, 8).scales.numpy()

"""What may be drawn, against transformers' own processors; and that values which mean nothing are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.errors import InputRefused
from dinoexport.text.sampling import Sampling, choose, nucleus
from tests.properties import examples


def test_greedy_takes_the_likeliest_whatever_the_seed() -> None:
    logits = np.array([0.1, 3.0, 2.9, -1.0], np.float32)
    for seed in range(5):
        sampling = Sampling(seed=seed)
        assert choose(logits, sampling, sampling.generator()) == 1


@pytest.mark.parametrize("temperature", [0.2, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95, 1.0])
def test_the_nucleus_is_transformers(temperature: float, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    for seed in range(8):
        logits = np.random.RandomState(seed).standard_normal(300).astype(np.float32) * 4
        scores = logits_process.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None].double())
        if top_p < 1:
            scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
        wanted = torch.softmax(scores, dim=-1)[0].numpy()
        ids, shares = nucleus(logits, temperature, top_p)
        assert set(ids) == set(np.flatnonzero(np.isfinite(scores[0].numpy())))
        np.testing.assert_allclose(shares, wanted[ids], rtol=1e-9)


def test_draws_have_the_shares() -> None:
    """4000 draws; three standard deviations."""
    logits, sampling = np.log(np.array([0.5, 0.3, 0.15, 0.05])), Sampling(temperature=1.0, top_p=0.9, seed=3)
    generator = sampling.generator()
    drawn = np.bincount([choose(logits, sampling, generator) for _ in range(4000)], minlength=4) / 4000
    wanted = np.array([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert drawn[3] == 0
    assert (np.abs(drawn - wanted) < 3 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-12).all()


@given(seed=st.integers(0, 2**63 - 1))
@examples(20)
def test_a_seed_is_the_same_answer(seed: int) -> None:
    logits = np.random.RandomState(1).standard_normal((20, 50)).astype(np.float32)
    sampling = Sampling(temperature=1.0, seed=seed)
    once, again = sampling.generator(), sampling.generator()
    assert [choose(row, sampling, once) for row in logits] == [choose(row, sampling, again) for row in logits]


def test_no_seed_differs() -> None:
    sampling = Sampling(temperature=1.0)
    assert sampling.generator().integers(2**62) != sampling.generator().integers(2**62)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"seed": -1}, {"seed": 2**63},
        {"stop": ("",)}, {"stop": ("x" * 257,)}, {"stop": ("x",) * 17},
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(InputRefused, match="means nothing"):
        Sampling(**wrong)

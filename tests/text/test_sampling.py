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


def test_what_a_request_without_wishes_gets() -> None:
    assert Sampling() == Sampling(max_tokens=256, temperature=0.0, top_p=1.0, seed=None, stop=())


def test_what_is_just_within_the_limits() -> None:
    Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=0, stop=("x", "x" * 256, *"abcdefghijklmn"))
    assert Sampling(seed=2**63 - 1).generator().integers(10) in range(10)
    assert Sampling(temperature=0.0).greedy and not Sampling(temperature=1e-9).greedy


def test_a_seed_of_its_own_has_63_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: bits)
    assert Sampling().generator().integers(2**62) == Sampling(seed=63).generator().integers(2**62)


def test_the_nucleus_by_hand() -> None:
    """Halves and quarters: what comes before the second is exactly 0.5, before the third 0.75."""
    logits = np.log(np.array([0.25, 0.5, 0.25]))
    for top_p, ids, shares in (
        (0.49, [1], [1.0]),
        (0.5, [1, 0], [2 / 3, 1 / 3]),
        (0.74, [1, 0], [2 / 3, 1 / 3]),
        (0.75, [1, 0, 2], [0.5, 0.25, 0.25]),
        (1.0, [1, 0, 2], [0.5, 0.25, 0.25]),
    ):
        found, chances = nucleus(logits, 1.0, top_p)
        assert found.tolist() == ids and np.allclose(chances, shares, rtol=1e-12), top_p
    found, chances = nucleus(np.array([1000.0, 1000.0 - np.log(3)]), 1.0, 0.9)
    assert found.tolist() == [0, 1] and np.allclose(chances, [0.75, 0.25])
    assert np.allclose(nucleus(np.array([0.0, 2 * np.log(3)]), 2.0, 1.0)[1], [0.75, 0.25])


def test_nothing_is_dropped_by_rounding() -> None:
    """With a share of 1 every id may be drawn, also where the shares before the last ones sum to more than 1."""
    logits = np.concatenate([np.random.RandomState(0).standard_normal(3000), np.full(5, -60.0)])
    shares = np.sort(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[::-1]
    assert (np.cumsum(shares) - shares).max() > 1
    assert sorted(nucleus(logits, 1.0, 1.0)[0].tolist()) == list(range(3005))

"""Choose the next token: the most likely one, or a sample by temperature and top-p, the same for the same seed.

As in Meta's code: probabilities of logits / temperature, sorted; a token is dropped if the sum of those before it is
already above top_p (so the first stays, and the one that crosses it); one of the others is drawn by probability.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dinoexport.errors import InputRefused
from dinoexport.spec import Array

if TYPE_CHECKING:
    import numpy as np

STOPS_MAX, STOP_CHARACTERS_MAX = 16, 256
SEED_MAX = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and where an answer ends.

    max_tokens: the most tokens of an answer. temperature: 0 takes the likeliest token. top_p: the share of probability
    that is drawn from. seed: None uses a random seed. stop: strings that end the answer and are not part
    of it. Raises InputRefused for values that mean nothing.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _refuse_unless(self.max_tokens >= 1, f"max_tokens {self.max_tokens}", "Use 1 or more.")
        _refuse_unless(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature {self.temperature}",
            "Use 0 for the likeliest tokens, or up to about 1.",
        )
        _refuse_unless(0 < self.top_p <= 1, f"top_p {self.top_p}", "Use more than 0, at most 1.")
        _refuse_unless(self.seed is None or 0 <= self.seed <= SEED_MAX, f"seed {self.seed}", "Use 0 or more.")
        _refuse_unless(len(self.stop) <= STOPS_MAX, f"{len(self.stop)} stop strings", f"Use at most {STOPS_MAX}.")
        for stop in self.stop:
            _refuse_unless(
                0 < len(stop) <= STOP_CHARACTERS_MAX,
                f"a stop string of {len(stop)} characters",
                f"Use 1 to {STOP_CHARACTERS_MAX}.",
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that no seed matters."""
        return self.temperature == 0

    def generator(self) -> np.random.Generator:
        """The random numbers of one answer; one per answer, so that no other request changes it."""
        import numpy as np

        return np.random.default_rng(secrets.randbits(63) if self.seed is None else self.seed)


def choose(logits_V: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token's id from its logits."""
    if sampling.greedy:
        return int(logits_V.argmax())
    ids, shares = nucleus(logits_V, sampling.temperature, sampling.top_p)
    return int(ids[generator.choice(len(ids), p=shares)])


def nucleus(logits_V: Array, temperature: float, top_p: float) -> tuple[Array, Array]:
    """The ids that are drawn from, likeliest first, and their shares, which sum to 1."""
    import numpy as np

    scaled = logits_V.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    ordered = shares[order]
    if top_p == 1:  # rounding would drop unlikely tokens
        return order, ordered
    kept = np.cumsum(ordered) - ordered <= top_p
    ids, ordered = order[kept], ordered[kept]
    return ids, ordered / ordered.sum()


def _refuse_unless(right: bool, what: str, next_step: str) -> None:
    if not right:
        raise InputRefused(f"{what} means nothing.", next_step=next_step)

"""Sides of noise: chosen for one patch size, and kept in patches for another."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport.models.dinov2.cases import CaseTable
from dinoexport.models.dinov2.config import Architecture


def arch(patch: int) -> Architecture:
    return Architecture(
        embed_dim=8, depth=1, num_heads=1, feed_forward="mlp", register_count=0, patch_size=patch, position_side=5
    )


@pytest.mark.parametrize(
    ("length", "chosen_for", "patch", "side"),
    [
        (28, None, 8, 28), (28, 14, 14, 28), (29, 14, 14, 29),  # pixels
        (28, 14, 8, 16), (14, 14, 16, 16),  # whole patches
        (29, 14, 8, 16 + 1), (41, 14, 8, 16 + 7), (35, 14, 8, 16 + 4), (29, 14, 16, 32 + 1), (41, 14, 16, 32 + 14),
        ("native", 14, 8, 40), ("native", None, 14, 70),
    ],
)  # fmt: skip
def test_a_side(length: Any, chosen_for: int | None, patch: int, side: int) -> None:
    """What is left beside whole patches keeps its share of one, and is never lost."""
    table: dict[str, Any] = {"name": "one", "why": "a case of the tests", "height": length, "width": 14}
    entry = CaseTable(**table, **({} if chosen_for is None else {"patch_size": chosen_for}))
    assert entry.side(entry.height, arch(patch)) == side  # type: ignore[arg-type]

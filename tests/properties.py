"""How many examples a property is tried on: all of them in `make test`, a fifth in `make quick`."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

FULL = 100


def examples(count: int, **others: Any) -> settings:
    """For a test that needs more or fewer than the usual 100. In `make quick` it gets a fifth of them, too."""
    return settings(max_examples=max(1, count * settings().max_examples // FULL), **others)

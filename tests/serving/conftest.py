"""The endpoint of a file's tests; each resets it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.endpoints import Endpoint


@pytest.fixture(scope="module")
def started() -> Iterator[Endpoint]:
    running = Endpoint()
    yield running
    running.close()

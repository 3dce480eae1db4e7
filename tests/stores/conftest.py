"""A real S3 server, and a bundle to put there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.s3_server import S3Server, missing


@pytest.fixture(scope="session")
def running(tiny: Path) -> Iterator[S3Server]:
    """One server for all tests here. All need the bundle, so `make quick`, which builds none, starts no server."""
    if reason := missing():
        pytest.skip(reason)
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The server, as the environment names it; what is taken from it lies in the test's own cache."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Path) -> Path:
    """A small bundle that passed."""
    return tiny_bundle

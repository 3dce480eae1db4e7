"""What all tests share: where the data is, hypothesis profiles, and a cache of each test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests import triton_server

# CI repeats the same examples every time, so that a red run is about the change; everywhere else new ones are sought.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("seek", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "seek")

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "cache"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        metavar="NAME",
        help="Fail, not skip, the tests with this marker where what they need is missing; may be repeated.",
    )


# Marker -> why its tests cannot run here, or nothing.
MISSING = {"triton": triton_server.missing}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A hardware marker's test is skipped with its reason, or fails where CI asked for it with --require."""
    for name, missing in MISSING.items():
        if item.get_closest_marker(name) and (why := missing()):
            (pytest.fail if name in item.config.getoption("--require") else pytest.skip)(why)


def pytest_configure(config: pytest.Config) -> None:
    if unknown := set(config.getoption("--require")) - MISSING.keys():
        raise pytest.UsageError(f"--require {', '.join(sorted(unknown))}: known are {', '.join(MISSING)}")

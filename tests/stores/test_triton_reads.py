"""The real tritonserver with a model repository in an S3 server: what was deployed there is what it serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dinoexport.serving import check
from dinoexport.serving.triton import store_repository
from tests import triton_server
from tests.stores.s3_server import S3Server
from tests.stores.test_bundles import url

pytestmark = pytest.mark.triton


def test_serves_from_the_bucket_and_rolls_back(
    server: S3Server, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    there = url(request)
    ours = triton_server.environment()
    credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    monkeypatch.setattr(
        triton_server, "environment", lambda: {**ours, **credentials, "AWS_DEFAULT_REGION": "us-east-1"}
    )
    assert store_repository.deploy(tiny, there, name="tiny", backend="python").version == 1
    repository: Any = there.replace("s3://", f"s3://{server.url}/")
    running = triton_server.Server(
        repository, tmp_path, "--model-control-mode=explicit", "--load-model=tiny", "--log-verbose=0"
    )
    try:
        assert check.check(running.http, tiny, model="tiny").report.passed
        assert running.ask("GET", "/v2/models/tiny")[1]["versions"] == ["1"]
        changes: tuple[Any, ...] = (
            lambda: store_repository.deploy(tiny, there, name="tiny", backend="python"),
            lambda: store_repository.rollback(there, "tiny"),
        )
        for change in changes:
            deployed = change()
            assert running.load("tiny")[0] == 200
            assert running.ask("GET", "/v2/models/tiny")[1]["versions"] == [str(deployed.version)]
        assert check.check(running.http, tiny, model="tiny", quick=True).report.passed
    finally:
        running.kill()

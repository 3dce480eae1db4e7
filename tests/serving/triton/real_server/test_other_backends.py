"""What the real server says of configurations that no CPU server can load, and of its metrics."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.serving.triton import model_repository
from dinoexport.spec import Runtime
from tests.serving.test_serving_files import GPU_METRICS, metrics_asked_for
from tests.serving.triton.plans import with_plans
from tests.serving.triton.real_server.server_requests import infer, pixels
from tests.triton_server import Server

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_other_backends_pass_the_servers_own_checks(
    server: Server, bundles: dict[str, Path], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real server reads the configuration and the version's files, and stops at the backend it does not have."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["bytes"], folder)
    if backend == "tensorrt":
        with_plans(monkeypatch, folder, *map(_plan, ("8.0", "9.0")))
    deployed = model_repository.deploy(folder, server.repository, name=f"for_{backend}")
    try:
        assert deployed.backend == ("tensorrt_plan" if backend == "tensorrt" else "onnxruntime")
        status, told = server.load(deployed.name)
        assert status == 400 and f"unable to find backend library for backend '{backend}'" in told["error"], told
    finally:
        for model in deployed.models:
            shutil.rmtree(server.repository / model)


def _plan(compute_capability: str) -> Any:
    """A manifest's facts of a classic plan with two profiles; no machine of ours can build one."""
    smallest, largest = (1, 14, 14, 3), (8, 14, 14, 3)
    profiles = {f"tuned for {opt}": {"images": (smallest, (opt, 14, 14, 3), largest)} for opt in (1, 8)}
    return SimpleNamespace(
        file=f"model.sm{compute_capability.replace('.', '')}.plan",
        graph="model",
        runtime=Runtime.TENSORRT,
        version_compatible=False,
        stripped=False,
        runtime_version="11.2.1",
        compute_capabilities=(compute_capability,),
        profiles=profiles,
    )


def test_dashboard_and_alerts_ask_for_metrics_there_are(server: Server) -> None:
    infer(server, "bytes", pixels([1, 14, 14, 3]))
    there = set(re.findall(r"^# TYPE (\w+)", server.metrics(), re.MULTILINE))
    assert metrics_asked_for() - GPU_METRICS <= there
    assert "nv_inference_pending_request_count" in there  # what the autoscaler goes by
    reasons = set(re.findall(r'nv_inference_request_failure{[^}]*reason="(\w+)"', server.metrics()))
    assert {"BACKEND", "OTHER", "REJECTED"} <= reasons

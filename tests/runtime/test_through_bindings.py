"""The runtime's tests once more for every TensorRT, with NVIDIA's own bindings in the place of the stand-in's face."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinoexport.pipeline import build as pipeline
from tests.conftest import DATA
from tests.standin import bindings


@pytest.mark.bindings
@pytest.mark.parametrize("version", bindings.VERSIONS)
def test_the_runtime_runs_through_the_bindings(version: str, built: Path) -> None:
    """All of `runtime/test_trt.py` again, with NVIDIA's classes where the stand-in's face was."""
    environment = {**os.environ, **bindings.environment(version), "STANDIN_BINDINGS": version}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/runtime/test_trt.py"]
    shown = subprocess.run(
        command,
        env={**environment, "STANDIN_BUNDLE": str(built)},
        cwd=bindings.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout[-3000:] + shown.stderr[-1000:]
    assert int(re.findall(r"(\d+) passed", shown.stdout)[0]) >= 30 and "skipped" not in shown.stdout


@pytest.mark.bindings
def test_the_gpu_check_runs_through_the_newest_bindings() -> None:
    """`make gpu` rehearsed with NVIDIA's classes: each step, the table as it grows, a full device, a crash."""
    version = bindings.VERSIONS[-1]
    environment = {**os.environ, **bindings.environment(version), "STANDIN_BINDINGS": version}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu_check.py"]
    shown = subprocess.run(command, env=environment, cwd=bindings.ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout[-3000:] + shown.stderr[-1000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny recipe, for all versions."""
    out = tmp_path_factory.mktemp("published") / "bundle"
    pipeline.build(
        pipeline.build_request(str(DATA / "tiny_swiglu_reg.toml"), weights="synthetic:0", target="cpu", out=out)
    )
    return out

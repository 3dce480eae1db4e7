"""On a Ray cluster of two local nodes, one of which is killed: the same bytes as from our own processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dinoexport.embed import run
from tests.embed.runs import hashes

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv-ray" / "bin" / "python"


def test_two_nodes_one_killed(tiny: Path, photos: Path, tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("no Ray here: make .venv-ray/.ready installs it")
    script = ROOT / "tests" / "interop" / "ray_two_nodes.py"
    ran = subprocess.run(
        [str(PYTHON), str(script), str(tiny), str(photos), str(tmp_path / "ray")],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # Ray alone takes a minute to start on a loaded machine
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "killed a node" in ran.stdout and "rows 60 complete True" in ran.stdout, ran.stdout
    run.embed(tiny, str(photos), str(tmp_path / "own"), shards=24, max_failed=0.2, workers=1)
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "own")

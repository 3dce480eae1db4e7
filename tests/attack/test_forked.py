"""Runs `attacks.py` and `last_words.py`, each in a new process.

Their tests fork. PyTorch's threads, which other tests of this process have used, do not live on in a fork: a build
there crashes or waits for ever.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow("kills verbs at their file operations, and runs hostile command lines")
@pytest.mark.parametrize("name", ["attacks", "last_words"])
def test_in_a_process_of_its_own(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"tests/attack/{name}.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-4000:]

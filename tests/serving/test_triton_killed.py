"""Requests to a real tritonserver while deployments of another release are killed half-way, and finished by the next.

The two releases differ in weights and in how photographs are prepared, so an answer that mixes them is a third one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dinoexport import bundle, images
from dinoexport.errors import DinoexportError
from dinoexport.images import Preprocessing
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import ort
from dinoexport.serving.client import DinoClient
from dinoexport.serving.triton import model_repository
from tests.conftest import DATA
from tests.triton_server import Server

pytestmark = pytest.mark.triton
ROOT = DATA.parent.parent
PHOTOGRAPH = (ROOT / "validate" / "images" / "rocket.jpg").read_bytes()
# Each way of preparing: (seed of the weights, what the recipe adds).
RELEASES = {"old": (0, ""), "new": (1, "\n[preprocess]\nmean = [0.1, 0.2, 0.3]\nstd = [0.5, 0.4, 0.3]\n")}
# The deployment of a bundle, killed after so many steps of its change.
KILLED = """
import os, signal, sys
from pathlib import Path
from dinoexport.serving.triton import batching, model_repository
from dinoexport.system import changes
batching.measure = lambda *_, **__: {1: 10.0, 2: 18.0, 4: 36.0}
left = int(sys.argv[3])
def counted(step):
    def run(*words):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        step(*words)
    return run
for kind, step in list(changes.STEPS.items()):
    changes.STEPS[kind] = counted(step)
model_repository.deploy(Path(sys.argv[1]), Path(sys.argv[2]), name="tiny", backend="python")
"""


def built(folder: Path, kind: str) -> Path:
    seed, addition = RELEASES[kind]
    recipe = folder / f"{kind}.toml"
    recipe.write_text((DATA / "tiny_swiglu.toml").read_text() + addition)
    (folder / "tiny_cases.toml").write_text((DATA / "tiny_cases.toml").read_text())
    pipeline.build(pipeline.build_request(str(recipe), weights=f"synthetic:{seed}", out=folder / kind, target="cpu"))
    return folder / kind


def answer_of(folder: Path) -> np.ndarray:
    """What the bundle gives for the photograph, without a server."""
    manifest = bundle.read_manifest(folder)
    prepares = Preprocessing(**manifest.recipe.get("preprocess", {}))
    pixels = prepares.normalised(prepares.prepared(images.decode(PHOTOGRAPH, named="rocket"))[np.newaxis])
    return np.asarray(
        ort.open_graph(folder / "model.onnx", manifest.graphs[0].graph())({"pixels": pixels})["class_token"]
    )


def killed(folder: Path, models: Path, steps: int) -> bool:
    """Whether the deployment was killed; if not, it had fewer steps."""
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, folder, models, str(steps)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in (0, -9), ran.stderr
    return ran.returncode == -9


def test_every_answer_is_from_one_release(tmp_path: Path) -> None:
    bundles = {kind: built(tmp_path, kind) for kind in RELEASES}
    expected = {kind: answer_of(folder) for kind, folder in bundles.items()}
    assert np.abs(expected["old"] - expected["new"]).max() > 0.1
    models = tmp_path / "models"
    assert not killed(bundles["old"], models, 1000)
    server = Server(models, tmp_path, "--model-control-mode=poll", "--repository-poll-secs=1")
    seen: Counter[str] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                found = DinoClient(server.http, model="tiny", timeout_s=10).encoded([PHOTOGRAPH])["class_token"]
            except DinoexportError as error:
                seen[f"refused: {type(error).__name__}"] += 1
                continue
            near = [kind for kind, array in expected.items() if np.abs(found - array).max() < 1e-4]
            seen[near[0] if near else "mixed"] += 1

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        turns = 0
        for steps in range(0, 1000, 2):
            kind = "new" if turns % 2 == 0 else "old"
            if not killed(bundles[kind], models, steps):
                break
            time.sleep(1.5)  # the server looks into what is half done
            assert not killed(bundles[kind], models, 1000), "the next deployment finishes it, and then does its own"
            deadline, before = time.monotonic() + 30, seen[kind]
            while seen[kind] == before and time.monotonic() < deadline:
                time.sleep(0.1)
            assert seen[kind] > before, f"{kind} is served after the repair: {seen}"
            turns += 1
            if turns == 3:
                break
        assert turns == 3
        model_repository.rollback(models, "tiny")
    finally:
        stop.set()
        asking.join(60)
        server.kill(gently=True)
    assert seen["mixed"] == 0 and seen["old"] and seen["new"], seen

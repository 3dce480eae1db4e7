"""One tritonserver for all tests of this folder: `bytes` takes uint8 and refuses sizes, `floats` pixels, and crops.

One worker runs the whole folder (`tests/conftest.py`), so there is one server however many workers there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dinoexport.pipeline import build as pipeline
from dinoexport.serving.triton import batching, model_repository
from tests.conftest import DATA
from tests.serving.triton.real_server.server_requests import IMAGES
from tests.triton_server import Server


@pytest.fixture(scope="package")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny bundles, by the name they are served under."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, recipe in (("bytes", "tiny_served"), ("floats", "tiny_swiglu")):
        pipeline.build(pipeline.build_request(str(DATA / f"{recipe}.toml"), weights="synthetic:0", out=folder / name))
    return {name: folder / name for name in ("bytes", "floats")}


@pytest.fixture(scope="package")
def server(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both bundles, on the Python backend; as measured, merging pays the first, and the second two at a time."""
    scratch = tmp_path_factory.mktemp("server")
    for name, samples, latency_ms in (
        ("bytes", IMAGES, {1: 10.0, 2: 18.0, 4: 30.0}),
        ("floats", None, {1: 10.0, 2: 18.0, 4: 60.0}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batching, "measure", lambda *_, found=latency_ms, **__: found)
            patch.setattr(batching, "_LEAST_LARGEST", 1)  # the largest batch of these is four
            model_repository.deploy(bundles[name], scratch / "models", name=name, backend="python", samples=samples)
    running = Server(scratch / "models", scratch, "--model-control-mode=explicit", "--load-model=*")
    try:
        yield running
    finally:
        running.kill(gently=True)

"""A model that is written down here, and `embed` with it in this process: no bundle, no other process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport import bundle, images
from dinoexport.bundle import reference_file
from dinoexport.config.limits import load_validation
from dinoexport.embed import embedder, local, opening, run
from dinoexport.family import FrontEnd
from dinoexport.spec import Dim, Graph, Precision, Tensor

GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning="RGB"),),
    outputs=(
        Tensor(name="patch_tokens", dtype="float32", shape=("batch", "patches", 3), meaning=""),
        Tensor(name="class_token", dtype="float32", shape=("batch", 4), meaning=""),
    ),
    dims=(
        Dim(name="batch", min=1, opt=1, max=5),
        *(Dim(name=name, min=2, opt=8, max=64, multiple_of=2, step=2) for name in ("height", "width")),
    ),
)
LIMITS = load_validation("dinov2", beside=None)[0].limits[Precision.FP32]


def answers(pixels: Any) -> dict[str, Any]:
    """Means of colours and the largest value; means of patches of 2 x 2. A picture that is all white gives NaN."""
    batch, _, height, width = pixels.shape
    patches = pixels.reshape(batch, 3, height // 2, 2, width // 2, 2).mean(axis=(3, 5)).reshape(batch, 3, -1)
    largest = pixels.max(axis=(1, 2, 3))[:, None]
    largest[pixels.min(axis=(1, 2, 3)) == 255] = np.nan
    class_token = np.concatenate([pixels.mean(axis=(2, 3)), largest], axis=1)
    return {"patch_tokens": patches.transpose(0, 2, 1).astype(np.float32), "class_token": class_token}


class Model:
    """Takes images as they are, or at sizes that are named. batches: the shapes it was asked with."""

    text = None
    graphs = (GRAPH,)

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.samples: list[Path] = []

    def front_ends(self, samples: Path | None, *, progress: Any) -> tuple[FrontEnd, ...]:
        default = FrontEnd(name="images", graph="model", meaning="", settings={"size": "default"})
        if samples is None:
            return (default,)
        self.samples.append(samples)
        nearest = FrontEnd(name="nearest", graph="model", meaning="", settings={"learnt": len(self.samples)})
        return (default, nearest)

    def of_sizes(self, sizes: Sequence[Mapping[str, int]]) -> FrontEnd:
        return FrontEnd(name="images", graph="model", meaning="", settings={"sizes": [dict(s) for s in sizes]})

    def prepare(self, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]) -> dict[str, Any]:
        (one,) = encoded
        pixels = np.asarray(images.decode(one, named="image 1"), np.float32)
        return {"pixels": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.batches.append(inputs["pixels"].shape)
        return answers(inputs["pixels"])


def manifest(**changed: Any) -> Any:
    files = tuple(
        SimpleNamespace(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), size_bytes=1)
        for name in ("report.json", "model.onnx.data", "model.onnx")
    )
    facts = {
        "verdict": "passed", "target": "cpu", "engines": (), "graphs": (SimpleNamespace(file="model.onnx"),),
        "files": files, "recipe": {"b": 1, "a": 2}, "variant": "tiny", "precision": "fp32",
    }  # fmt: skip
    return SimpleNamespace(**(facts | changed))


def installed(monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model of every bundle, which is intact and passes; workers do their shards in this process."""
    made = Model()
    monkeypatch.setattr(bundle, "read_manifest", lambda _folder: manifest())
    monkeypatch.setattr(bundle, "checked", lambda _folder, **_: nullcontext())
    for module in (run, embedder):
        monkeypatch.setattr(module, "model_of", lambda _manifest: made)
    monkeypatch.setattr(opening, "opened", lambda *_: (made, "written down"))
    monkeypatch.setattr(opening, "prove", lambda *_: None)
    monkeypatch.setattr(reference_file, "read", lambda _path: SimpleNamespace(limits=LIMITS))

    def here(job: Any, tasks: Any, *, finished: Any, ticked: Any, **_: Any) -> None:
        worker = embedder.Embedder(job)
        for task in tasks:
            do = worker.again if task.again else worker.embed
            finished(do(task.plan, task.shard, tick=ticked))

    monkeypatch.setattr(local, "run", here)
    return made


def fill(folder: Path, count: int = 12) -> dict[str, Any]:
    """Pictures in two sizes: name -> its pixels (1, 3, height, width); None for the fourth, which is no picture.

    The ninth is white.
    """
    folder.mkdir(exist_ok=True)
    found: dict[str, Any] = {}
    for i in range(count):
        name = f"{i:02}.png"
        height, width = (4, 6) if i % 3 else (8, 2)
        picture = np.random.RandomState(i).randint(0, 255, (height, width, 3)).astype(np.uint8)
        if i == 8:
            picture[:] = 255
        Image.fromarray(picture).save(folder / name)
        found[name] = picture.transpose(2, 0, 1)[None].astype(np.float32)
        if i == 3:
            (folder / name).write_bytes(b"no picture")
            found[name] = None
    return found

"""What a build will take, before it begins: of the disk, of memory, and in words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import MissingRequirement
from dinoexport.pipeline import preflight
from dinoexport.runtime.carried_memory import CarriedMemory
from dinoexport.spec import Case, Precision

GB = 10**9
WEIGHTS = {"a": (1000, 1000, 100), "b": (5, 1000, 1000, 20)}  # 2e8 numbers
CASE = Case(name="one", why="", inputs={"x": np.zeros(1000, np.float32), "y": np.zeros(500, np.uint8)})


def request_of(tmp_path: Path, **changes: Any) -> Any:
    chosen = {"target": SimpleNamespace(name="a100", memory_gb=40), "on_cpu": False, "traced": Precision.FP32}
    of_choice = {key: changes.pop(key) for key in list(changes) if key in chosen}
    facts = {
        "model": SimpleNamespace(tensors=WEIGHTS, graphs=(SimpleNamespace(name="model"),)), "engine": None,
        "cases": (CASE, CASE),
        "out": tmp_path / "not" / "yet" / "there", "precision": Precision.FP32, "runtime": "tensorrt",
        "cpu_runtimes": ("onnxruntime", "openvino"), "chosen": SimpleNamespace(**chosen | of_choice),
    }  # fmt: skip
    return SimpleNamespace(**facts | changes)


@pytest.mark.parametrize(
    ("traced", "size"), [(Precision.FP32, 0.8e9), (Precision.FP16, 0.4e9), (Precision.BF16, 0.4e9)]
)
def test_weights_in_their_files(traced: Precision, size: float, tmp_path: Path) -> None:
    assert preflight.stored_bytes(request_of(tmp_path, traced=traced)) == size


def test_a_model_that_knows_its_size_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SizedWeights", SimpleNamespace)
    assert preflight.stored_bytes(request_of(tmp_path, model=SimpleNamespace(stored_bytes=77))) == 77


@pytest.mark.parametrize(("engine", "times"), [(None, 1), ("an engine", 2)])
def test_a_bundle_holds_weights_and_three_times_its_inputs(engine: Any, times: int, tmp_path: Path) -> None:
    assert preflight.disk_bytes(request_of(tmp_path, engine=engine)) == times * 0.8e9 + 3 * 2 * 4500


def test_a_build_that_does_not_fit_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of the first folder above that there is."""
    asked: list[Path] = []
    free = [0]

    def usage(place: Path) -> Any:
        asked.append(place)
        return SimpleNamespace(free=free[0])

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    request = request_of(tmp_path)
    needed = preflight.disk_bytes(request)
    for free[0], fits in ((needed, True), (needed - 1, False)):
        if fits:
            preflight.disk(request)
        else:
            with pytest.raises(MissingRequirement, match=r"needs about 0\.8 GB; .*yet has 0\.8 GB free"):
                preflight.disk(request)
    assert set(asked) == {tmp_path}


def test_weights_that_do_not_fit_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total: list[int | None] = [None]
    monkeypatch.setattr(preflight.memory_here, "total_bytes", lambda: total[0])
    for total[0] in (None, 800_000_000):
        preflight.weights_fit(request_of(tmp_path))
    total[0] = 799_999_999
    with pytest.raises(MissingRequirement, match=r"take 0\.8 GB in fp32; this machine has 0\.8 GB of memory"):
        preflight.weights_fit(request_of(tmp_path))


@pytest.mark.parametrize(
    ("engine", "memory_gb", "memory"), [(None, 40, 3 * GB), ("an engine", 40, 40 * GB), ("an engine", None, None)]
)
def test_a_plan_in_words(
    engine: Any, memory_gb: int | None, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context is counted in the memory of the target for an engine, of this machine for a CPU."""
    carried = CarriedMemory(a_token=1000, context=4096)
    monkeypatch.setattr(preflight.carried_memory, "of", lambda _graph: carried)
    monkeypatch.setattr(preflight.memory_here, "available_bytes", lambda: 3 * GB)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _place: SimpleNamespace(free=12_340_000_000))
    request = request_of(
        tmp_path, engine=engine, on_cpu=engine is None, target=SimpleNamespace(name="a100", memory_gb=memory_gb)
    )
    assert preflight.plan(request) == {
        "bundle": str(request.out), "precision": "fp32", "target": "a100",
        "runtime": "tensorrt" if engine else "onnxruntime or openvino",
        "disk": f"about {'1.60' if engine else '0.80'} GB; 12.3 GB are free", **carried.facts(800_000_000, memory),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("memory_gb", "gpu", "checked"),
    [
        (None, SimpleNamespace(memory_bytes=81, name="A100"), []), (40, None, (30 * GB, "the smallest a100")),
        (40, SimpleNamespace(memory_bytes=80, name="A100"), (60, "A100")),
    ],
)  # fmt: skip
def test_an_engine_must_fit_the_card_or_the_smallest_one(
    memory_gb: int | None, gpu: Any, checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graph with its own profiles, in three quarters of a memory that the CPU shares."""
    asked: list[Any] = []
    monkeypatch.setattr(preflight.builder, "check_memory", lambda *given, **how: asked.append((*given, how)))
    target = SimpleNamespace(name="a100", memory_gb=memory_gb, memory_for_engine=lambda size: size * 3 // 4)
    graphs = tuple(SimpleNamespace(name=name) for name in ("first", "second"))
    profiles = {"first": "profiles of the first", "second": "profiles of the second"}
    request: Any = SimpleNamespace(target=target, gpu=gpu, graphs=graphs, profiles=profiles, choices="choices")
    preflight.memory(request, Path("made"))
    assert asked == [
        (Path(f"made/{graph.name}.onnx"), graph, profiles[graph.name],
         {"memory_bytes": checked[0], "where": checked[1], "choices": "choices"})
        for graph in (graphs if checked else ())
    ]  # fmt: skip

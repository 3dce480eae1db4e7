"""How many workers a machine gets, and how many threads each: by processors, memory and GPUs, all faked."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.embed import layout

MB = 1 << 20
# Besides its weights, twice: what a session takes.
SESSION = 500 * MB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fake(*, cpus: int, free: int = 1 << 50, gpus: int = 0, runs: bool = True) -> None:
        monkeypatch.setattr(layout.cpu, "usable_cpus", lambda: cpus)
        cards = tuple(SimpleNamespace(uuid=f"GPU-{i}") for i in range(gpus))
        monkeypatch.setattr(layout.hardware, "gpus", lambda: cards)
        monkeypatch.setattr(layout.runners, "runs_on_gpu_here", lambda _manifest: runs and gpus > 0)
        pages = {"SC_AVPHYS_PAGES": free // 4096, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__)

    return fake


def manifest(*, weights: int = 100 * MB) -> Any:
    """A third of the weights in the graph; a file that is no graph does not count."""
    sizes = {"model.onnx": weights // 3, "model.onnx.data": weights - weights // 3, "model.plan": 1 << 40}
    files = [SimpleNamespace(name=name, size_bytes=size) for name, size in sizes.items()]
    return SimpleNamespace(files=files)


@pytest.mark.parametrize(
    ("cpus", "asked", "workers", "threads"),
    [
        (1, None, 1, 1), (2, None, 2, 1), (3, None, 2, 1), (4, None, 2, 2), (8, None, 2, 4), (12, None, 3, 4),
        (64, None, 16, 4), (8, 3, 3, 2), (2, 5, 5, 1),
    ],
)  # fmt: skip
def test_processes_of_four_threads(cpus: int, asked: int | None, workers: int, threads: int, machine: Any) -> None:
    machine(cpus=cpus)
    found = layout.layout_of(manifest(), asked)
    assert (found.workers, found.threads, found.decoders) == (workers, threads, threads)
    assert found.environments == ({},) and found.why == f"{cpus} CPUs"


@pytest.mark.parametrize(
    ("free", "workers", "why"),
    [
        (4 * (200 * MB + SESSION), 4, "16 CPUs"),
        (4 * (200 * MB + SESSION) - 4096, 3, "16 CPUs, memory for 3"),
        (200 * MB, 1, "16 CPUs, memory for 1"),
    ],
)
def test_no_more_than_memory_holds(free: int, workers: int, why: str, machine: Any) -> None:
    """Weights are twice in memory while a session is opened."""
    machine(cpus=16, free=free)
    found = layout.layout_of(manifest(), None)
    assert (found.workers, found.threads, found.why) == (workers, 16 // workers, why)


@pytest.mark.parametrize(("sessions", "why"), [(2, "8 CPUs"), (1, "8 CPUs, memory for 1")])
def test_memory_is_told_where_it_is_the_limit(sessions: int, why: str, machine: Any) -> None:
    """Eight processors are two workers anyway."""
    machine(cpus=8, free=sessions * (200 * MB + SESSION))
    found = layout.layout_of(manifest(), None)
    assert (found.workers, found.why) == (sessions, why)


@pytest.mark.parametrize(("asked", "workers", "decoders"), [(None, 2, 8), (1, 1, 16), (20, 20, 1)])
def test_a_worker_for_each_gpu(asked: int | None, workers: int, decoders: int, machine: Any) -> None:
    machine(cpus=16, gpus=2)
    found = layout.layout_of(manifest(), asked)
    assert (found.workers, found.threads, found.decoders) == (workers, 1, decoders)
    assert found.environments == ({"CUDA_VISIBLE_DEVICES": "GPU-0"}, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert found.why == "2 GPUs, 16 CPUs that decode for them"


def test_gpus_that_run_nothing_of_the_bundle_are_left_alone(machine: Any) -> None:
    machine(cpus=8, gpus=2, runs=False)
    assert layout.layout_of(manifest(), None).why == "8 CPUs"

"""How workers share this machine's processors and GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dinoexport.bundle import Manifest
from dinoexport.runtime import cpu, runners
from dinoexport.system import hardware

# Memory of a session: weights, buffers, the interpreter and its packages.
_WORKER_BYTES = 500 << 20


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How workers share this machine's processors. environments: one per worker, which names its GPU, if any."""

    workers: int
    threads: int
    decoders: int
    environments: tuple[dict[str, str], ...]
    why: str


def layout_of(manifest: Manifest, workers: int | None) -> Layout:
    """The number of workers on this machine, and the threads of each.

    With something that runs on the GPUs here: a worker for each GPU, whose decoders share the processors. Without:
    processes of four threads at most: threads of one session wait for each other, processes do not.
    """
    cpus = cpu.usable_cpus()
    if runners.runs_on_gpu_here(manifest):
        gpus = hardware.gpus()
        count = workers or len(gpus)
        environments = tuple({"CUDA_VISIBLE_DEVICES": gpu.uuid} for gpu in gpus)
        decoders = max(1, cpus // count)
        return Layout(
            workers=count, threads=1, decoders=decoders, environments=environments,
            why=f"{len(gpus)} GPUs, {cpus} CPUs that decode for them",
        )  # fmt: skip
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = sum(file.size_bytes for file in manifest.files if file.name.endswith((".onnx", ".data")))
    by_memory = max(1, free // (2 * weights + _WORKER_BYTES))
    count = workers or max(1, min(cpus, max(2, cpus // 4), by_memory))
    threads = max(1, cpus // count)
    why = f"{cpus} CPUs" + (f", memory for {by_memory}" if by_memory < max(2, cpus // 4) else "")
    return Layout(workers=count, threads=threads, decoders=threads, environments=({},), why=why)

"""Check this machine before a build starts: packages, disk space, GPU memory."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from dinoexport.bundle import sbom
from dinoexport.engines import builder
from dinoexport.errors import MissingRequirement, require
from dinoexport.family import SizedWeights
from dinoexport.graph.onnx_writer import PACKAGES
from dinoexport.pipeline.request import BuildRequest, EngineRequest
from dinoexport.report import html_report
from dinoexport.runtime import autotune, carried_memory, runners
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Precision, Runtime
from dinoexport.system import hardware
from dinoexport.system import memory as memory_here


def packages(request: BuildRequest) -> None:
    """Raises MissingRequirement for the first package that the build will need and that is not installed."""
    require("export", *PACKAGES, *html_report.PACKAGES, *sbom.PACKAGES)
    require("cpu", "onnxruntime")
    if request.chosen.on_cpu:
        autotune.ways(request.precision, request.cpu_runtimes)
    elif request.engine or not runners.has_gpu_for_graphs():
        facts = TABLE[runners.graph_way(request.precision).runtime]
        require(facts.extra, *facts.modules)
    if request.engine:
        compiler(request.engine)


def compiler(request: EngineRequest) -> None:
    """Raises MissingRequirement if the engine compiler is not installed, or is known to build wrong engines."""
    facts = TABLE[request.runtime]
    system = hardware.system_tensorrt() if request.runtime is Runtime.TENSORRT else None
    if system and not system.visible and facts.installed_version() is None:
        raise MissingRequirement(
            f"TensorRT {system.version} is in {system.folder}, which this Python environment does not see.",
            next_step="Make the environment with python3 -m venv --system-site-packages, and install dinoexport in it.",
        )
    require(facts.extra, *facts.build_modules)
    version = facts.installed_version() or ""
    if request.runtime is Runtime.TENSORRT and (why := request.target.why_bad(version)):
        raise MissingRequirement(
            f"TensorRT {version} is not used for {request.target.name}: {why}.",
            next_step="Install a newer TensorRT (a newer JetPack brings one), or serve the ONNX with ONNX Runtime.",
        )


def stored_bytes(request: BuildRequest) -> int:
    """The size of the graphs' weights in their files."""
    if isinstance(request.model, SizedWeights):
        return request.model.stored_bytes
    width = 2 if request.chosen.traced in (Precision.FP16, Precision.BF16) else 4
    return sum(math.prod(shape) for shape in request.model.tensors.values()) * width


def disk_bytes(request: BuildRequest) -> int:
    """The size of the bundle on the disk."""
    needed = stored_bytes(request) * (2 if request.engine else 1)  # an engine holds them once more
    return needed + 3 * sum(array.nbytes for case in request.cases for array in case.inputs.values())


def free_bytes(request: BuildRequest) -> int:
    """The free space of the disk that will hold the bundle."""
    place = request.out.absolute().parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def disk(request: BuildRequest) -> None:
    """Refuses a build that does not fit on the disk."""
    needed, free = disk_bytes(request), free_bytes(request)
    if free < needed:
        raise MissingRequirement(
            f"The bundle needs about {needed / 1e9:.1f} GB; {request.out.parent} has {free / 1e9:.1f} GB free.",
            next_step="Free some space, or choose another --out.",
        )


def weights_fit(request: BuildRequest) -> None:
    """Refuses a build if this machine does not have the memory to open its graphs for validation."""
    needed, total = stored_bytes(request), memory_here.total_bytes()
    if total is not None and needed > total:
        raise MissingRequirement(
            f"The weights take {needed / 1e9:.1f} GB in {request.precision}; this machine has {total / 1e9:.1f} GB of "
            "memory, so it cannot run what it would build.",
            next_step="Choose a --precision of fewer bytes, build on a larger machine, or use dinoexport export, which "
            "measures nothing.",
        )


def plan(request: BuildRequest) -> dict[str, str]:
    """What a build and its result will need, in words; nothing is done."""
    facts = {
        "bundle": str(request.out),
        "precision": str(request.precision),
        "target": request.chosen.target.name,
        "runtime": " or ".join(request.cpu_runtimes) if request.chosen.on_cpu else str(request.runtime),
        "disk": f"about {disk_bytes(request) / 1e9:.2f} GB; {free_bytes(request) / 1e9:.1f} GB are free",
    }
    free, of_target = memory_here.available_bytes(), request.chosen.target.memory_gb
    if request.engine:
        free = None if of_target is None else of_target * 10**9
    for graph in request.model.graphs:
        carried = carried_memory.of(graph)
        if carried is not None:
            facts |= carried.facts(stored_bytes(request), free)
    return facts


def memory(request: EngineRequest, onnx_folder: Path) -> None:
    """Refuses an engine that does not fit into the GPU's memory, before the long stages start."""
    if request.target.memory_gb is None:
        return
    for graph in request.graphs:
        builder.check_memory(
            onnx_folder / f"{graph.name}.onnx",
            graph,
            request.profiles[graph.name],
            memory_bytes=request.target.memory_for_engine(
                request.gpu.memory_bytes if request.gpu else request.target.memory_gb * 10**9
            ),
            where=request.gpu.name if request.gpu else f"the smallest {request.target.name}",
            choices=request.choices,
        )

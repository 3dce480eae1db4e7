"""Check this machine before a build starts: packages, disk space, GPU memory."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from dinoexport.bundle import sbom
from dinoexport.engines import builder
from dinoexport.errors import MissingRequirement, require
from dinoexport.graph.onnx_writer import PACKAGES
from dinoexport.pipeline.request import BuildRequest, EngineRequest
from dinoexport.report import html_report
from dinoexport.runtime import autotune, runners
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Precision, Runtime
from dinoexport.system import hardware


def packages(request: BuildRequest) -> None:
    """Raises MissingRequirement for the first package that the build will need and that is not installed."""
    require("export", *PACKAGES, *html_report.PACKAGES, *sbom.PACKAGES)
    require("cpu", "onnxruntime")
    if request.chosen.on_cpu:
        autotune.ways(request.precision, request.cpu_runtimes)
    else:
        facts = TABLE[runners.graph_way(request.precision).runtime]
        require(facts.extra, *facts.modules)
    if request.engine:
        compiler(request.engine)


def compiler(request: EngineRequest) -> None:
    """Raises MissingRequirement where what compiles engines is not installed, or is known to compile wrong ones."""
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


def disk(request: BuildRequest) -> None:
    """Refuses a build that does not fit on the disk."""
    width = 2 if request.chosen.traced in (Precision.FP16, Precision.BF16) else 4
    weights = sum(math.prod(shape) for shape in request.model.tensors.values()) * width
    needed = weights * (2 if request.engine else 1)  # an engine holds them once more
    needed += 3 * sum(array.nbytes for case in request.cases for array in case.inputs.values())
    free = shutil.disk_usage(request.out.absolute().parent).free
    if free < needed:
        raise MissingRequirement(
            f"The bundle needs about {needed / 1e9:.1f} GB; {request.out.parent} has {free / 1e9:.1f} GB free.",
            next_step="Free some space, or choose another --out.",
        )


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

"""What a build needs of this machine, asked before its first minute is spent: packages, disk, a card's memory."""

from __future__ import annotations

import math
import shutil

from dinoexport import candidates, engine, page, plan, sbom, tuning
from dinoexport.errors import MissingRequirement, require
from dinoexport.export import PACKAGES
from dinoexport.order import Order
from dinoexport.spec import Precision
from dinoexport.workspace import Stage


def packages(order: Order) -> None:
    """Everything a build will need, asked for before its first minute is spent."""
    require("export", *PACKAGES, *page.PACKAGES, *sbom.PACKAGES)
    require("cpu", "onnxruntime")
    if order.chosen.on_cpu:
        tuning.ways(order.precision, order.cpu_runtimes)
    else:
        runtime = candidates.graph_way(order.precision).runtime
        require("openvino" if runtime == "openvino" else "cpu", runtime)
    if order.runtime.has_engine:
        require(plan.EXTRA[order.runtime], *engine.PACKAGES[order.runtime])


def disk(order: Order) -> None:
    """Refuses a build the disk cannot hold, before it is begun."""
    width = 2 if order.chosen.traced in (Precision.FP16, Precision.BF16) else 4
    weights = sum(math.prod(shape) for shape in order.model.tensors.values()) * width
    needed = weights * (2 if order.runtime.has_engine else 1)  # an engine holds them once more
    needed += 3 * sum(array.nbytes for case in order.cases for array in case.inputs.values())
    free = shutil.disk_usage(order.out.absolute().parent).free
    if free < needed:
        raise MissingRequirement(
            f"The bundle needs about {needed / 1e9:.1f} GB; {order.out.parent} has {free / 1e9:.1f} GB free.",
            next_step="Free some space, or choose another --out.",
        )


def memory(order: Order, exported: Stage) -> None:
    """Refuses an engine its card has no memory for, before the long stages are begun."""
    memory_gb = order.chosen.target.memory_gb
    if not order.runtime.has_engine or memory_gb is None:
        return
    builder = order.builder_gpu
    for graph in order.model.graphs:
        onnx = exported.folder / f"{graph.name}.onnx"
        engine.check_memory(
            onnx,
            graph,
            order.profiles[graph.name],
            memory_bytes=builder.memory_bytes if builder else memory_gb * 10**9,
            where=builder.name if builder else f"the smallest {order.chosen.target.name}",
        )

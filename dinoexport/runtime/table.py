"""Every runtime in one table: its name, its packages, its precisions on a CPU, and how it opens a graph.

An empty cell means that the runtime cannot do it, so that no caller falls through to another runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dinoexport.runtime import Opened, openvino, ort
from dinoexport.runtime.sizes import InputShapes
from dinoexport.spec import Graph, Precision, Runtime, Way
from dinoexport.system import hardware

# Opens the ONNX file at a path in the requested way, for inputs of all shapes or of these alone.
OpenGraph = Callable[[Path, Graph, Way, InputShapes | None], Opened]


@dataclass(frozen=True, kw_only=True)
class RuntimeFacts:
    """One row of the table.

    title: the name for people. does: its purpose. extra: the extra of this package that installs it.
    distributions: names on PyPI that provide it; any one suffices. modules: imported to run; build_modules: imported to
    compile an engine, empty if the ONNX itself is run. cpu_precisions: the precisions it supports on CPUs; `computes`
    checks this machine's CPU. rest: see `Way`; asked with the precision, and whether the graph carries state.
    engine_suffix: of the engines it compiles.
    """

    title: str
    does: str
    extra: str
    distributions: tuple[str, ...]
    modules: tuple[str, ...]
    build_modules: tuple[str, ...] = ()
    cpu_precisions: tuple[Precision, ...] = ()
    computes: Callable[[Precision], bool] = lambda _precision: True
    rest: Callable[[Precision, bool], Precision | None] = lambda _precision, _carried: None
    open_graph: OpenGraph | None = None
    engine_suffix: str = ""

    def installed_version(self) -> str | None:
        """The installed version; None if it is not installed."""
        found = next(filter(None, map(hardware.installed, self.distributions)), None)
        if found is None and self.distributions == hardware.ENGINE_DISTRIBUTIONS[Runtime.TENSORRT]:
            return hardware.installed_engine_runtime(Runtime.TENSORRT)
        return found


TABLE: Mapping[Runtime, RuntimeFacts] = {
    Runtime.ONNXRUNTIME: RuntimeFacts(
        title="ONNX Runtime",
        does="runs and validates graphs",
        extra="cpu",
        distributions=("onnxruntime", "onnxruntime-gpu"),
        modules=("onnxruntime",),
        # fp16 on a CPU checks the graph: every product is computed in fp32 between casts.
        cpu_precisions=(Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4),
        open_graph=lambda path, graph, way, shapes: ort.open_graph(path, graph, threads=way.threads, shapes=shapes),
    ),
    Runtime.OPENVINO: RuntimeFacts(
        title="OpenVINO",
        does="runs graphs on CPUs, also in bf16 if the CPU has it",
        extra="openvino",
        distributions=("openvino",),
        modules=("openvino",),
        # bf16 is its arithmetic over the fp32 graph.
        cpu_precisions=(Precision.FP32, Precision.BF16, Precision.INT8, Precision.INT4),
        computes=openvino.computes,
        rest=openvino.rest,
        open_graph=lambda path, graph, way, shapes: openvino.open_graph(
            path, graph, precision=way.precision, rest_in=way.rest, threads=way.threads, shapes=shapes
        ),
    ),
    Runtime.TENSORRT: RuntimeFacts(
        title="TensorRT",
        does="builds and runs plans",
        extra="tensorrt",
        distributions=hardware.ENGINE_DISTRIBUTIONS[Runtime.TENSORRT],
        modules=("tensorrt", "cuda.bindings"),
        build_modules=("tensorrt", "polygraphy"),
        engine_suffix=".plan",
    ),
    Runtime.TENSORRT_RTX: RuntimeFacts(
        title="TensorRT-RTX",
        does="compiles engines, also without a GPU",
        extra="rtx",
        distributions=hardware.ENGINE_DISTRIBUTIONS[Runtime.TENSORRT_RTX],
        modules=("tensorrt_rtx", "cuda.bindings"),
        build_modules=("tensorrt_rtx", "polygraphy"),
        engine_suffix=".rtx",
    ),
}


def installed(among: Collection[Runtime] = tuple(TABLE)) -> tuple[Runtime, ...]:
    """The installed runtimes of `among` that run an ONNX graph on a CPU, in the table's order."""
    return tuple(
        runtime
        for runtime, facts in TABLE.items()
        if runtime in among and facts.open_graph is not None and all(map(_is_installed, facts.modules))
    )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # find_spec raises it for a module that was disabled
        return False

"""Open a model's graphs (CPU) or engines (GPU) as functions of a case's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from dinoexport.bundle import EngineFacts, Manifest
from dinoexport.errors import MissingRequirement, UsageError, require
from dinoexport.family import Runnable
from dinoexport.runtime import Arithmetic, cpu, engine_header, ort, trt
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Array, Arrays, Candidate, Graph, Precision, Profile, Runner, Runtime, Way
from dinoexport.system import hardware


def open_candidate(model: Runnable, graphs: Mapping[Path, Graph], way: Way = cpu.PLAIN) -> Candidate:
    """The exported graphs opened in `way`, as the function from a case's inputs to its outputs."""
    return driven(model, cpu.open_graphs(graphs, way))


def with_one_thread(model: Runnable, graphs: Mapping[Path, Graph], way: Way) -> Callable[[], Candidate] | None:
    """A function that opens the graphs in `way` with one thread; None if `way` has only one."""
    if way.threads == 1 or cpu.usable_cpus() == 1:
        return None
    return lambda: open_candidate(model, graphs, replace(way, threads=1))


def driven(model: Runnable, runners: Mapping[str, Runner]) -> Candidate:
    """The graphs' or engines' runners, driven by the model."""

    def answer(inputs: Arrays) -> dict[str, Array]:
        return model.drive(runners, inputs)

    return answer


def candidate_name(precision: Precision, way: Way, arithmetic: Arithmetic, *, device: str = "the CPU") -> str:
    """The candidate's name, with the arithmetic that was really used, never the one that was only requested."""
    widened = "" if precision is way.precision else f" widened to {way.precision}"
    ran = " and ".join(f"{count} products in {kind}" for kind, count in arithmetic.items())
    return f"{cpu.title(way.runtime)} on {device}, {precision}{widened}{ran and f' ({ran})'}"


@dataclass(frozen=True, kw_only=True)
class OnGpu:
    """What runs on a GPU of this machine, whose name is `device`, with its name as a candidate."""

    candidate: Candidate
    name: str
    device: str


def is_for_gpu(manifest: Manifest) -> bool:
    """Whether the bundle has something for a GPU: engines, or graphs whose target is one."""
    return bool(manifest.engines) or manifest.target != "cpu"


def runs_on_gpu_here(manifest: Manifest) -> bool:
    """Whether this machine has a GPU that can run the bundle's engines, or if it has none, its graphs."""
    if not manifest.engines:
        return is_for_gpu(manifest) and has_gpu_for_graphs()
    try:
        return bool(engine_header.for_this_machine(manifest.engines, hardware.gpus()))
    except MissingRequirement:
        return False


def open_on_gpu(
    model: Runnable, folder: Path, manifest: Manifest, *, trusted: bool, named_by: Arrays | None = None
) -> OnGpu:
    """The bundle's engines; if it has none, its graphs in ONNX Runtime.

    trusted, named_by: as for `open_engines` and `open_graphs_on_gpu`, which say what they raise.
    """
    graphs = {folder / facts.file: facts.graph() for facts in manifest.graphs}
    if not manifest.engines:
        return open_graphs_on_gpu(model, graphs, manifest.precision, named_by=named_by)
    engines = {folder / facts.file: facts for facts in manifest.engines}
    return open_engines(model, engines, graphs, trusted=trusted)


def has_gpu_for_graphs() -> bool:
    """Whether this machine has a GPU, and an ONNX Runtime for it."""
    return bool(hardware.gpus() and find_spec("onnxruntime") and ort.has_cuda())


def open_graphs_on_gpu(
    model: Runnable, graphs: Mapping[Path, Graph], precision: Precision, *, named_by: Arrays | None = None
) -> OnGpu:
    """The graphs of a GPU's bundle in ONNX Runtime, on this machine's first GPU.

    named_by: a case's inputs. They are run once, so that the name says the arithmetic that was really used.

    Raises MissingRequirement without a GPU, or if ONNX Runtime cannot use it.
    """
    gpus = hardware.gpus()
    if not gpus:
        raise MissingRequirement(
            "This machine has no GPU, or no driver for it.",
            next_step="Run it on a machine with the target's GPU; `nvidia-smi` shows whether the driver is there.",
        )
    require("gpu", "onnxruntime")
    opened = {graph.name: ort.open_graph(path, graph, cuda=True) for path, graph in graphs.items()}
    ran = {} if named_by is None else cpu.arithmetic(model, opened, named_by)
    way = Way(runtime=Runtime.ONNXRUNTIME, precision=precision)
    name = candidate_name(precision, way, ran, device=gpus[0].name)
    return OnGpu(candidate=driven(model, opened), name=name, device=gpus[0].name)


def graph_way(precision: Precision) -> Way:
    """How the graph of a GPU's bundle runs on a CPU. ONNX Runtime has no bf16 there; OpenVINO widens it to fp32."""
    if precision is Precision.BF16:
        return Way(runtime=Runtime.OPENVINO, precision=Precision.FP32)
    return Way(runtime=Runtime.ONNXRUNTIME, precision=precision)


def built_way(manifest: Manifest) -> Way:
    """How a bundle's graphs ran on the CPU that built it."""
    return manifest.cpu.chosen if manifest.cpu else graph_way(manifest.precision)


def way_of(manifest: Manifest, runtime: Runtime | None = None) -> Way:
    """How this machine runs a bundle's graphs: like the machine that built it, if possible.

    runtime: runs them in this runtime instead, in the same precision; raises UsageError if it lacks that precision.
    """
    built = built_way(manifest)
    if runtime is None or runtime is built.runtime:
        return cpu.way_here(built)
    if built.precision not in TABLE[runtime].cpu_precisions or built.precision is Precision.INT8:
        raise UsageError(
            f"{TABLE[runtime].title} does not run this bundle's {built.precision} graph.",
            next_step=f"It was built for {TABLE[built.runtime].title}: --runtime {built.runtime}.",
        )
    return Way(runtime=runtime, precision=built.precision)


def open_engines(
    model: Runnable, engines: Mapping[Path, EngineFacts], graphs: Mapping[Path, Graph], *, trusted: bool
) -> OnGpu:
    """The engines as a function from a case's inputs to its outputs.

    Where there are several of a graph, for several cards, this machine's is opened.
    trusted: whether the author is known, so that code in an engine may run on this machine: a version-compatible plan
    holds code. Raises MissingRequirement, before any is opened, if one is for another device or version, or holds
    code and is not trusted.
    """
    gpus = hardware.gpus()
    here = engine_header.for_this_machine(tuple(engines.values()), gpus)
    engines = {path: facts for path, facts in engines.items() if facts in here}
    devices = [engine_header.check_runs_here(facts, gpus).name for facts in engines.values()]
    for facts in engines.values():
        if facts.version_compatible and not trusted:
            raise MissingRequirement(
                f"{facts.file} was not run: it is version-compatible, so it holds code that would run on this machine, "
                "and its author is unknown.",
                next_step="dinoexport validate BUNDLE --verify KEY checks who signed it; --trust-plan runs it anyway.",
            )
    signatures = {graph.name: graph for graph in graphs.values()}
    weights = {graph.name: path for path, graph in graphs.items()}
    runners: dict[str, Runner] = {
        facts.graph: trt.open_engine(
            path,
            signatures[facts.graph],
            runtime=facts.runtime,
            profiles=[Profile(name=name, shapes=shapes) for name, shapes in facts.profiles.items()],
            weights_from=weights[facts.graph] if facts.stripped else None,
            host_code=facts.version_compatible,
        )
        for path, facts in engines.items()
    }
    first = next(iter(engines.values()))
    name = f"{first.runtime} {first.runtime_version} on {devices[0]}, {first.precision}"
    return OnGpu(candidate=driven(model, runners), name=name, device=devices[0])


def engines_here(engines: tuple[EngineFacts, ...]) -> tuple[EngineFacts, ...]:
    """The engines that `open_engines` opens of these: all of them, unless a graph has several."""
    if len({facts.graph for facts in engines}) == len(engines):
        return engines
    return engine_header.for_this_machine(engines, hardware.gpus())

"""Derive the Triton models of a bundle, and the configuration of each, from the bundle's own facts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from dinoexport import bundle
from dinoexport.bundle import GraphFacts, Manifest, ShapeRange
from dinoexport.bundle.reference_file import Reference
from dinoexport.errors import InputRefused, MissingRequirement, UsageError
from dinoexport.family import FrontEnd
from dinoexport.runtime import check_inputs, cpu, runners
from dinoexport.serving.triton import batching
from dinoexport.serving.triton.batching import Batching
from dinoexport.serving.triton.config import DATA_TYPES, Entry, Word, parameter, to_text
from dinoexport.serving.triton.signature import ENCODED, PARAMETER, Served
from dinoexport.spec import Array, Arrays, Graph, Progress, Runtime, Tensor, Way

Backend = Literal["tensorrt_plan", "onnxruntime", "python"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_QUEUE_TIMEOUT_US = int(1e6 * batching.QUEUE_TIMEOUT_S)


@dataclass(frozen=True, kw_only=True)
class TensorRTPlan:
    """A classic TensorRT plan in a bundle. profiles: for each, the batch it is tuned for and the largest it takes.

    version_compatible: it holds its own runtime, for servers started with
    `--backend-config=tensorrt,version-compatible=true`. stripped: it has no weights.
    """

    file: str
    graph: str
    tensorrt_version: str
    compute_capability: str
    version_compatible: bool
    stripped: bool
    profiles: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """A folder of the repository. files: path in the version's folder -> name in the bundle; warmup: file -> array."""

    name: str
    config: str
    files: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    warmup: Mapping[str, Array] = field(default_factory=dict)


def plans_of(manifest: Manifest) -> tuple[TensorRTPlan, ...]:
    """The bundle's classic plans. Only this function knows how a manifest describes an engine."""
    return tuple(
        TensorRTPlan(
            file=engine.file,
            graph=engine.graph,
            tensorrt_version=engine.runtime_version,
            compute_capability=engine.compute_capabilities[0],
            version_compatible=engine.version_compatible,
            stripped=engine.stripped,
            profiles=tuple(_batches(profile) for profile in engine.profiles.values()),
        )
        for engine in manifest.engines
        if engine.runtime is Runtime.TENSORRT
    )


def _batches(profile: Mapping[str, ShapeRange]) -> tuple[int, int]:
    """(most likely, largest) batch of a profile: the first dimension of every input."""
    _, likely, largest = next(iter(profile.values()))
    return likely[0], largest[0]


def of_bundle(
    folder: Path,
    manifest: Manifest,
    reference: Reference,
    *,
    name: str,
    version: int,
    backend: Backend,
    queue_limits: bool,
    front_ends: Sequence[FrontEnd],
    progress: Progress,
) -> tuple[TritonModel, ...]:
    """A model for each graph, and two for each front end: the decoder, and the ensemble of decoder and graph."""
    single = len(manifest.graphs) == 1
    found: list[TritonModel] = []
    for facts in manifest.graphs:
        graph = facts.graph()
        _refuse_unbatched(graph)
        served = Served(
            name=name,
            version=version,
            role="graph",
            variant=manifest.variant,
            family=manifest.family,
            precision=manifest.precision,
            recipe=manifest.recipe,
            graph=facts,
            way=dataclasses.replace(runners.built_way(manifest), threads=0),
        )
        own = name if single else f"{name}_{graph.name}"
        items = judged_items(graph, reference)
        if backend == "tensorrt_plan":
            plans = tuple(plan for plan in plans_of(manifest) if plan.graph == graph.name)
            if not plans:
                raise UsageError(f"The bundle has no plan of its graph {graph.name}.", next_step="Build it again.")
            batches, chosen = _plan_batching(plans, max_batch(graph))
            entries, in_version = _plan_entries(plans)
        else:
            batches = max_batch(graph)
            way = cpu.way_here(served.way) if backend == "python" else cpu.PLAIN
            chosen = _measured(folder / facts.file, graph, way, items, batches, progress)
            entries, in_version = _onnx_entries(backend, manifest, facts)
        entries += _batching_entries(batches, chosen, queue_limits=queue_limits)
        found.append(_graph_model(own, served, version, entries, in_version, items, python=backend == "python"))
        for end in front_ends:
            if end.graph == graph.name:
                found += _front_end_models(own, served, end, version)
    return tuple(found)


def deployed_name(config: str) -> str | None:
    """The name under which this configuration's model was deployed; None if dinoexport did not deploy it."""
    found = re.match(r"# dinoexport deployed this as (\S{1,64})\n", config)
    return found[1] if found else None


def _refuse_unbatched(graph: Graph) -> None:
    firsts = {tensor.shape[0] if tensor.shape else None for tensor in (*graph.inputs, *graph.outputs)}
    if len(firsts) != 1 or not isinstance(next(iter(firsts)), str):
        raise UsageError(
            f"The graph {graph.name} has no batch: its tensors do not all begin with the same dynamic dimension.",
            next_step="Triton's batcher needs one; give the graph a batch dimension.",
        )


def max_batch(graph: Graph) -> int:
    """The largest batch in the graph's profile."""
    return next(dim.max for dim in graph.dims if dim.name == graph.inputs[0].shape[0])


def judged_items(graph: Graph, reference: Reference) -> tuple[Arrays, ...]:
    """Inputs of the graph from passed cases of the bundle, as batches of 1, smallest first."""
    wanted = {tensor.name for tensor in graph.inputs}
    items: list[Arrays] = []
    for expectation in reference.expectations:
        case = expectation.case
        if case.inputs.keys() != wanted:
            continue  # a case that drives several graphs has no inputs of a single graph
        item = {name: array[:1] for name, array in case.inputs.items()}
        try:
            check_inputs(graph, item)
        except InputRefused:
            continue
        items.append(item)
    return tuple(sorted(items, key=_size))


def _size(item: Arrays) -> int:
    return sum(array.size for array in item.values())


def _most_likely(graph: Graph, items: Sequence[Arrays]) -> Arrays:
    """The one of `items` whose size is nearest to the profile's most likely size."""
    likely = {dim.name: dim.opt for dim in graph.dims}
    wanted = sum(
        math.prod(size if isinstance(size, int) else likely.get(size, 1) for size in tensor.shape[1:])
        for tensor in graph.inputs
    )
    return min(items, key=lambda item: abs(math.log(_size(item) / wanted)))


def _plan_batching(plans: Sequence[TensorRTPlan], largest: int) -> tuple[int, Batching]:
    """The largest batch that every plan takes, at most `largest`, and the sizes their profiles are tuned for."""
    largest = min(largest, *(max(most for _, most in plan.profiles) for plan in plans))
    tuned = tuple(sorted({opt for plan in plans for opt, _ in plan.profiles}))
    why = "the batches the plan's profiles are tuned for; latency was not measured on this GPU"
    return largest, batching.unmeasured(tuned, why, largest)


def _plan_entries(plans: Sequence[TensorRTPlan]) -> tuple[list[Entry], dict[str, str]]:
    """Backend and instances for plans, one for each compute capability."""
    flag = "the server needs --backend-config=tensorrt,version-compatible=true"
    why = flag if any(plan.version_compatible for plan in plans) else ""
    entries = [Entry("backend", "tensorrt", why), Entry("platform", "tensorrt_plan")]
    if len(plans) == 1:
        entries.append(Entry("default_model_filename", plans[0].file))
    entries += [
        Entry(
            "cc_model_filenames",
            (Entry("key", plan.compute_capability), Entry("value", plan.file)),
            f"TensorRT {plan.tensorrt_version}",
        )
        for plan in plans
        if len(plans) > 1
    ]
    count = min(len(plan.profiles) for plan in plans)
    indices = tuple(Entry("profile", str(i)) for i in range(count))
    instance = (Entry("count", 1), Entry("kind", Word("KIND_GPU")), *(indices if count > 1 else ()))
    entries.append(Entry("instance_group", instance, f"every profile the plan has: {count}" if count > 1 else ""))
    if count > 1:
        # triton-inference-server/tensorrt_backend, README: the default keeps memory for every profile at once.
        strategy = parameter("execution_context_allocation_strategy", "ON_PROFILE_CHANGE")
        entries.append(dataclasses.replace(strategy, why="scratch memory for the largest profile, not for their sum"))
    return entries, {plan.file: plan.file for plan in plans}


def _onnx_entries(backend: Backend, manifest: Manifest, facts: GraphFacts) -> tuple[list[Entry], dict[str, str]]:
    """Backend and instances for the ONNX file, run by Triton's ONNX Runtime or in the Python backend."""
    entries = [Entry("backend", backend)]
    if backend == "onnxruntime":
        entries += [Entry("platform", "onnxruntime_onnx"), Entry("default_model_filename", facts.file)]
    on_cpu = backend == "python" or manifest.target == "cpu"
    group = (Entry("count", 1), Entry("kind", Word("KIND_CPU" if on_cpu else "KIND_AUTO")))
    entries.append(Entry("instance_group", group, "one: the runtime uses every core for each batch" if on_cpu else ""))
    return entries, onnx_files(manifest, facts)


def onnx_files(manifest: Manifest, facts: GraphFacts) -> dict[str, str]:
    """A graph's files by their path in a version's folder: Triton expects external data in a folder of its name."""
    of_graph = [file.name for file in manifest.files if file.name in (facts.file, f"{facts.file}.data")]
    return {f"{facts.file}/{name}": name for name in of_graph}


def _measured(
    onnx: Path, graph: Graph, way: Way, items: Sequence[Arrays], largest: int, progress: Progress
) -> Batching:
    """Batching from latencies on this machine, if it has the runtime and the bundle has an input to measure with."""
    if not items:
        return batching.unmeasured((), "", largest)
    try:
        (opened,) = cpu.open_graphs({onnx: graph}, way).values()
    except MissingRequirement:
        return batching.unmeasured((), "", largest)
    item = _most_likely(graph, items)
    shapes = ", ".join("x".join(map(str, item[tensor.name].shape[1:])) for tensor in graph.inputs)
    latency_ms = batching.measure(opened, item, largest, progress=progress)
    return batching.from_latency(latency_ms, largest, of=shapes)


def _batching_entries(largest: int, chosen: Batching, *, queue_limits: bool) -> list[Entry]:
    limits = (
        Entry("timeout_action", Word("REJECT")),
        Entry("default_timeout_microseconds", _QUEUE_TIMEOUT_US, "a client has given up by then"),
        Entry("allow_timeout_override", True),
        Entry("max_queue_size", chosen.queue_size, "more would only time out; the client is told 503 at once"),
    )
    preferred = (Entry("preferred_batch_size", chosen.preferred, chosen.preferred_why),) if chosen.preferred else ()
    delay = Entry("max_queue_delay_microseconds", chosen.queue_delay_us, chosen.queue_delay_why)
    policy = (Entry("default_queue_policy", limits),) if queue_limits else ()
    why = "" if queue_limits else "no limits to the queue: by any this Triton's batcher would stall"
    return [
        Entry("max_batch_size", largest, "the largest batch of the profile"),
        Entry("dynamic_batching", (*preferred, delay, *policy), why),
    ]


def _graph_model(
    name: str,
    served: Served,
    version: int,
    entries: Sequence[Entry],
    in_version: Mapping[str, str],
    items: Sequence[Arrays],
    *,
    python: bool,
) -> TritonModel:
    graph = served.graph.graph()
    warmup: dict[str, Array] = {}
    samples = []
    # The smallest and the largest. A failing warm-up can stop the server, so only inputs that passed are used.
    for i, item in enumerate(items if len(items) < 2 else (items[0], items[-1])):
        inputs = []
        for j, tensor in enumerate(graph.inputs):
            file = f"{version}-{i}-{j}"  # names in a bundle are not file names
            warmup[file] = item[tensor.name]
            value = (
                Entry("data_type", Word(DATA_TYPES[tensor.dtype])),
                Entry("dims", item[tensor.name].shape[1:]),
                Entry("input_data_file", file),
            )
            inputs.append(Entry("inputs", (Entry("key", tensor.name), Entry("value", value))))
        sample = (Entry("name", f"judged-{i}"), Entry("batch_size", 1), *inputs)
        samples.append(Entry("model_warmup", sample, "an input the bundle passed on"))
    content = [
        *identity(name, version),
        *entries,
        *(_tensor("input", tensor, graph) for tensor in graph.inputs),
        *(_tensor("output", tensor, graph) for tensor in graph.outputs),
        *samples,
        Entry("response_cache", (Entry("enable", False),)),
        parameter(PARAMETER, served.model_dump_json(), "what clients check their inputs by"),
    ]
    return TritonModel(
        name=name,
        config=config_text(served, content),
        files={**in_version, bundle.REFERENCE: bundle.REFERENCE},
        code=backend_code("GraphModel") if python else "",
        warmup=warmup,
    )


def _front_end_models(graph_model: str, served: Served, end: FrontEnd, version: int) -> tuple[TritonModel, ...]:
    """The models that turn encoded files into the graph's inputs and finish its outputs, and the ensemble of all."""
    graph, name = served.graph.graph(), f"{graph_model}_{end.name}"
    largest = max_batch(graph)
    answering = dataclasses.replace(graph, outputs=end.answers or graph.outputs)
    served = served.changed(
        front_end=end.name,
        settings=dict(end.settings),
        answers=GraphFacts.of(answering, served.graph.file) if end.answers else None,
    )
    encoded = Tensor(name=ENCODED, dtype="bytes", shape=("batch", 1), meaning=end.meaning)

    def model(
        name: str, role: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], last: Entry, code: str
    ) -> TritonModel:
        facts = served.changed(role=role)
        entries = [
            *identity(name, version),
            Entry("platform", "ensemble") if not code else Entry("backend", "python"),
            *(_tensor("output", tensor, graph, ensemble=not code) for tensor in outputs),
            last,
            Entry("max_batch_size", largest, "the graph's"),
            *(_tensor("input", tensor, graph, ensemble=not code) for tensor in inputs),
            parameter(PARAMETER, facts.model_dump_json(), "what clients check their inputs by"),
        ]
        return TritonModel(name=name, config=config_text(served, entries), code=code)

    on_cpu = Entry("instance_group", (Entry("count", 2), Entry("kind", Word("KIND_CPU"))))
    prepared = (*graph.inputs, *end.carried)
    parts = [model(f"{name}_prepare", "prepare", [encoded], prepared, on_cpu, backend_code("PrepareModel"))]
    steps = [
        _step(parts[0].name, version, [encoded], prepared),
        _step(graph_model, version, graph.inputs, graph.outputs),
    ]
    if end.answers:
        given = (*graph.outputs, *end.carried)
        parts.append(model(f"{name}_finish", "finish", given, end.answers, on_cpu, backend_code("FinishModel")))
        steps.append(_step(parts[1].name, version, given, end.answers))
    scheduling = Entry("ensemble_scheduling", tuple(steps))
    return (*parts, model(name, "front_end", [encoded], answering.outputs, scheduling, ""))


def _step(model: str, version: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Entry:
    """A step of an ensemble, in which a value has the name that the model has for it."""
    maps = [
        Entry(f"{side}_map", (Entry("key", tensor.name), Entry("value", tensor.name)))
        for side, tensors in (("input", inputs), ("output", outputs))
        for tensor in tensors
    ]
    # By its number, so that an answer comes from one release, whatever else is loaded.
    return Entry("step", (Entry("model_name", model), Entry("model_version", version), *maps))


def identity(name: str, version: int) -> list[Entry]:
    """The model's name and the one version that is served."""
    policy = (Entry("specific", (Entry("versions", (version,)),)),)
    return [Entry("name", name), Entry("version_policy", policy, "the version this configuration was made for")]


def _tensor(side: str, tensor: Tensor, graph: Graph, *, ensemble: bool = False) -> Entry:
    """An input or output without its batch dimension; a comment gives the range of each dynamic one."""
    dims = {dim.name: dim for dim in graph.dims}
    dynamic = [word for word in tensor.shape[1:] if isinstance(word, str)]
    ranges = [f"{w} {dims[w].min} to {dims[w].max}" if w in dims else f"{w} follows from the inputs" for w in dynamic]
    sizes = tuple(-1 if isinstance(size, str) else size for size in tensor.shape[1:])
    content: tuple[Entry, ...] = (
        Entry("name", tensor.name),
        Entry("data_type", Word(DATA_TYPES[tensor.dtype])),
        Entry("dims", sizes or (1,), ", ".join(ranges)),
    )
    if not tensor.shape[1:] and not ensemble:  # Triton refuses empty dims; an ensemble passes on what its models give
        content += (Entry("reshape", (Entry("shape", ()),), "one number for each item"),)
    return Entry(side, content, tensor.meaning)


def config_text(served: Served, entries: Sequence[Entry]) -> str:
    """A config.pbtxt with a line that names its deployment."""
    return f"# dinoexport deployed this as {served.name}\n" + to_text(entries)


def backend_code(name: str, module: str = "backend") -> str:
    """The model.py of a model that the Python backend runs."""
    return (
        '"""Served by dinoexport, which must be installed in this interpreter, with NumPy 1."""\n\n'
        f"from dinoexport.serving.triton.{module} import {name} as TritonPythonModel  # noqa: F401\n"
    )

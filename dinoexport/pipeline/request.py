"""Resolve a recipe, a target and this machine's GPUs to a BuildRequest, or refuse them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dinoexport import family
from dinoexport.config import target as targets
from dinoexport.config.limits import Limits, load_validation
from dinoexport.config.recipe import EngineChoices, Recipe, load, parse
from dinoexport.config.target import Chosen, Target
from dinoexport.engines import profiles
from dinoexport.errors import UsageError
from dinoexport.family import Exportable, HasEngineForm, Model
from dinoexport.runtime import sizes
from dinoexport.runtime.table import TABLE
from dinoexport.spec import CPU_RUNTIMES, Case, Graph, Precision, Profile, Progress, Runtime, silent
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu
from dinoexport.validation import evaluate
from dinoexport.weights.settle import Settled, settle


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """Where the engines will run, and how they are compiled.

    code: hash of the code that made the graphs and will compile them. profiles: graph name -> its engine's profiles.
    gpu: the one whose kernels are measured; None if the runtime compiles without a GPU.
    """

    graphs: tuple[Graph, ...]
    code: str
    target: Target
    runtime: Runtime
    precision: Precision
    choices: EngineChoices
    profiles: Mapping[str, tuple[Profile, ...]]
    gpu: Gpu | None


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A resolved build request: every decision is made, and impossible ones are refused.

    engine: what to compile from the graphs; None if the ONNX itself runs. cpu_runtimes: the candidates for a CPU's
    bundle. auto: whether parts of the graph return to fp32 until the limits hold. prefix: of the model's tensor names
    in the weight file. settled: how recipe and weights were reconciled.
    """

    recipe: Recipe
    model: Model
    chosen: Chosen
    engine: EngineRequest | None
    limits: Limits
    cases: tuple[Case, ...]
    weights: str | None
    head_weights: str | None
    judge_code: evaluate.Judge
    out: Path
    cpu_runtimes: tuple[Runtime, ...]
    prefix: str | None
    settled: Settled
    auto: bool

    @property
    def precision(self) -> Precision:
        """The arithmetic of the graph's body."""
        return self.chosen.precision

    @property
    def runtime(self) -> Runtime:
        """The runtime that will run the bundle."""
        return self.chosen.runtime

    def graph_files(self, folder: Path) -> dict[Path, Graph]:
        """The model's graphs by their files in `folder`."""
        return {folder / f"{graph.name}.onnx": graph for graph in self.model.graphs}


def build_request(
    variant_or_path: str | None,
    *,
    weights: str | None = None,
    head: str | None = None,
    head_weights: str | None = None,
    prefix: str | None = None,
    precision: Precision | Literal["auto"] | None = None,
    target: str | None = None,
    runtime: Runtime | None = None,
    engine_choices: Mapping[str, Any] = MappingProxyType({}),
    out: Path | None = None,
    judge_code: evaluate.Judge = "plain",
    progress: Progress = silent,
) -> BuildRequest:
    """Reads recipe, target and validation; refuses impossible requests before any work is done.

    variant_or_path: None if `weights` and the files beside them give the recipe. target: None means this machine's
    GPU, else the CPU. engine_choices: changes to the recipe's `[engine]`. head: turns the
    model's outputs into answers; head_weights: its file, if it is not the published one.
    """
    settled = settle(
        None if variant_or_path is None else load(variant_or_path), weights, prefix=prefix, progress=progress
    )
    recipe, gpus = settled.recipe if head is None else settled.recipe.with_head(head), hardware.gpus()
    recipe = recipe.changed(
        engine=parse(EngineChoices, {**dict(recipe.engine), **engine_choices}, where="the command line")
    )
    auto = precision == "auto"
    wanted = Precision.FP16 if precision == "auto" else precision
    chosen = targets.choose(recipe, target=target, runtime=runtime, precision=wanted, gpus=gpus)
    recipe = recipe.changed(precision=chosen.precision)
    model = family.find(recipe.family).model(recipe.changed(precision=chosen.traced))
    if chosen.runtime.has_engine and isinstance(model, HasEngineForm):
        recipe = recipe.changed(graph=model.engine_form())
        model = family.find(recipe.family).model(recipe.changed(precision=chosen.traced))
    own_file = variant_or_path is not None and variant_or_path.endswith(".toml")
    beside = Path(str(variant_or_path)).parent if own_file else None
    validation, folder = load_validation(recipe.judged_by, beside=beside)
    cases = evaluate.cases_of(model, validation, folder)
    return BuildRequest(
        recipe=recipe,
        model=model,
        chosen=chosen,
        engine=engine_request(recipe, model, chosen, gpus),
        limits=evaluate.limits_for(validation, chosen.precision),
        cases=(*cases, *_size_cases(recipe, model, cases, folder)),
        weights=weights,
        head_weights=head_weights,
        judge_code=judge_code,
        cpu_runtimes=(runtime,) if runtime in CPU_RUNTIMES else CPU_RUNTIMES,
        out=out or Path("bundles") / f"{recipe.title}-{'auto' if auto else chosen.precision}-{chosen.target.name}",
        prefix=prefix,
        settled=settled,
        auto=auto,
    )


def _size_cases(recipe: Recipe, model: Model, cases: Sequence[Case], folder: Path) -> tuple[Case, ...]:
    """A case for each size that the recipe names and no case has: a form of that size is judged like any other."""
    had = [{name: array.shape for name, array in case.inputs.items()} for case in cases]
    found: list[Case] = []
    for graph in model.graphs:
        for size in () if graph.carried else recipe.sizes:
            shapes = sizes.shapes_of(size, graph)
            if shapes not in had:
                had.append(dict(shapes))
                table = {"name": f"size-{size}", "why": "a size that gets a form of its own"}
                found.append(model.case({**table, **sizes.dims_of(size, graph)}, folder))
    return tuple(found)


def engine_request(recipe: Recipe, model: Exportable, chosen: Chosen, gpus: Sequence[Gpu]) -> EngineRequest | None:
    """The engines of `recipe` for the chosen target; None if its runtime runs the ONNX itself.

    A classic plan consists of kernels measured on the first of `gpus`; TensorRT-RTX compiles without a GPU.
    """
    if not chosen.runtime.has_engine:
        return None
    for graph in model.graphs:
        if any(tensor.name in graph.carried and tensor.dtype == "float32" for tensor in graph.inputs):
            raise UsageError(
                f"{TABLE[chosen.runtime].title}'s compiler has no kernel for attention over a cache in fp32.",
                next_step="Build it with --precision fp16, bf16 or int4.",
            )
    return EngineRequest(
        graphs=model.graphs,
        code=family.code_of(model),
        target=chosen.target,
        runtime=chosen.runtime,
        precision=chosen.precision,
        choices=recipe.engine,
        profiles={graph.name: profiles.of(recipe, graph) for graph in model.graphs},
        gpu=gpus[0] if gpus and chosen.runtime is Runtime.TENSORRT else None,
    )

"""What to build, with every decision made: a recipe, a target and this machine's GPUs become an Order, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dinoexport import family
from dinoexport.config import target as targets
from dinoexport.config.recipe import Limits, Recipe, load, load_validation
from dinoexport.config.target import Chosen
from dinoexport.engines import profiles
from dinoexport.family import Model
from dinoexport.spec import CPU_RUNTIMES, Case, CpuRuntime, Precision, Profile, Runtime
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu
from dinoexport.validation import evaluate


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build, with every decision made and every impossible one already refused.

    profiles: graph name -> its engine's profiles. gpu: the one an engine is built or run on, where there is one.
    cpu_runtimes: those a CPU's bundle may be for.
    """

    recipe: Recipe
    model: Model
    chosen: Chosen
    profiles: Mapping[str, tuple[Profile, ...]]
    gpu: Gpu | None
    limits: Limits
    cases: tuple[Case, ...]
    weights: str | None
    head_weights: str | None
    judge_code: evaluate.Judge
    out: Path
    cpu_runtimes: tuple[CpuRuntime, ...]
    auto: bool = False  # parts of the graph go back to fp32 until the limits hold

    @property
    def precision(self) -> Precision:
        """The arithmetic of the graph's body."""
        return self.chosen.precision

    @property
    def runtime(self) -> Runtime:
        """What will run the product."""
        return self.chosen.runtime

    @property
    def builder_gpu(self) -> Gpu | None:
        """A classic plan is made of kernels measured on this GPU; TensorRT-RTX compiles without looking at it."""
        return self.gpu if self.runtime is Runtime.TENSORRT else None


def build_request(
    variant_or_path: str,
    *,
    weights: str | None = None,
    head: str | None = None,
    head_weights: str | None = None,
    precision: Precision | Literal["auto"] | None = None,
    target: str | None = None,
    runtime: Runtime | None = None,
    engine_choices: Mapping[str, Any] = MappingProxyType({}),
    out: Path | None = None,
    judge_code: evaluate.Judge = "plain",
) -> BuildRequest:
    """Reads recipe, target and validation, and refuses what cannot be built before any work is done.

    target: the GPU that is here, else the CPU, when it is None. engine_choices: what to change in the recipe's
    `[engine]`. head: what turns the model's outputs into answers; head_weights: its file, where it is not the published
    one.
    """
    recipe, gpus = load(variant_or_path), hardware.gpus()
    recipe = recipe if head is None else recipe.with_head(head)
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine_choices)})
    auto = precision == "auto"
    wanted = Precision.FP16 if precision == "auto" else precision
    chosen = targets.choose(recipe, target=target, runtime=runtime, precision=wanted, gpus=gpus)
    recipe = recipe.model_copy(update={"precision": chosen.precision})
    model = family.find(recipe.family).model(recipe.model_copy(update={"precision": chosen.traced}))
    beside = Path(variant_or_path).parent if variant_or_path.endswith(".toml") else None
    validation, folder = load_validation(recipe.judged_by, beside=beside)
    return BuildRequest(
        recipe=recipe,
        model=model,
        chosen=chosen,
        profiles={graph.name: profiles.of(recipe, graph) for graph in model.graphs if chosen.runtime.has_engine},
        gpu=gpus[0] if gpus else None,
        limits=evaluate.limits_for(validation, chosen.precision),
        cases=evaluate.cases_of(model, validation, folder),
        weights=weights,
        head_weights=head_weights,
        judge_code=judge_code,
        cpu_runtimes=("onnxruntime",) if runtime is Runtime.ONNXRUNTIME else CPU_RUNTIMES,
        out=out or Path("bundles") / f"{recipe.title}-{'auto' if auto else chosen.precision}-{chosen.target.name}",
        auto=auto,
    )

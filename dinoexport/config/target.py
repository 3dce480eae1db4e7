"""Resolve a target's name to a machine, a runtime and a precision, or refuse it with the reason.

A target is written `a100`, or `a100,triton:26.08` for an engine that a given Triton image must load. The default is
this machine's GPU, else the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dinoexport.config import resources
from dinoexport.config.recipe import EngineChoices, Frozen, Name, Recipe, parse, read_toml
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.spec import Precision, Runtime, closest
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu

_VERSION = re.compile(r"^\d+\.\d+\.\d+$")


class Target(Frozen):
    """A kind of machine that a bundle is built for.

    runtimes: the runtimes for this machine, the preferred first, with the use of each. cautions: what a user must know
    before relying on one. precisions: what the machine has, the recommended one first, with its reason; lacks:
    what it does not have, and why. gpus: parts of the names its driver gives. memory_gb: of the smallest such card.
    known_bad: versions of TensorRT, by their beginning, that are refused there, and why. unified_memory: CPU and GPU
    share one memory, so an engine cannot have all of it.
    """

    name: Name
    description: str
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d+$")], ...] = ()
    gpus: tuple[str, ...] = ()
    memory_gb: int | None = Field(default=None, gt=0)
    unified_memory: bool = False
    known_bad: dict[Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")], str] = Field(default_factory=dict)
    runtimes: dict[Runtime, str] = Field(min_length=1)
    cautions: dict[Runtime, str] = Field(default_factory=dict)
    precisions: dict[Precision, str] = Field(min_length=1)
    lacks: dict[Precision, str] = Field(default_factory=dict)

    def why_bad(self, tensorrt: str) -> str:
        """Why this version of TensorRT is refused here; empty when it is not."""
        parts = tensorrt.split(".")
        return next((why for bad, why in self.known_bad.items() if parts[: bad.count(".") + 1] == bad.split(".")), "")

    def memory_for_engine(self, memory_bytes: int) -> int:
        """The bytes of device memory that an engine may use: three quarters, an assumption, if the CPU shares it."""
        return memory_bytes * 3 // 4 if self.unified_memory else memory_bytes


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The resolved target and runtime. triton: the image tag and its TensorRT, if the target names one."""

    target: Target
    runtime: Runtime
    precision: Precision
    triton: Triton | None = None
    quantised: Literal["activations", "weights"] = "activations"

    @property
    def on_cpu(self) -> bool:
        """Whether the bundle runs on a CPU. If so, the fastest runtime and number of threads are measured."""
        return not self.target.compute_capabilities

    @property
    def traced(self) -> Precision:
        """The precision of the graph itself.

        On a CPU, bf16 is the arithmetic of a runtime, and the quantiser makes int8 unless only the weights are int8.
        """
        if self.on_cpu and self.precision is Precision.BF16:
            return Precision.FP32
        later = self.on_cpu and self.precision is Precision.INT8 and self.quantised == "activations"
        return Precision.FP32 if later else self.precision

    @property
    def name(self) -> str:
        """The target as the manifest calls it."""
        return self.target.name + (f",triton:{self.triton.tag}" if self.triton else "")


@dataclass(frozen=True, kw_only=True)
class Triton:
    """A Triton image. A plan loads only in the TensorRT that built it."""

    tag: str
    tensorrt: str


def load_target(name: str) -> Target:
    """The shipped target of that name."""
    known = resources.names("recipes/targets")
    if name not in known:
        raise UsageError(
            f"There is no target {name!r}.{closest(name, known)}", next_step="dinoexport list shows all targets."
        )
    path = resources.folder("recipes/targets") / f"{name}.toml"
    return parse(Target, read_toml(path), where=path.name)


def choose(
    recipe: Recipe, *, target: str | None, runtime: Runtime | None, precision: Precision | None, gpus: Sequence[Gpu]
) -> Chosen:
    """The decision from the request, the recipe and this machine's `gpus`; a UsageError for an impossible request."""
    name, _, modifier = (target or _of_gpus(gpus)).partition(",")
    machine_kind = load_target(name)
    precision = _precision(machine_kind, precision or recipe.precision)
    triton = _triton(modifier) if modifier else None
    runtime = _runtime(machine_kind, Runtime.TENSORRT if triton and not runtime else runtime, recipe, gpus)
    if triton and runtime is not Runtime.TENSORRT:
        raise UsageError(
            f"triton:{triton.tag} concerns TensorRT plans, and {runtime} builds none.", next_step="Leave it out."
        )
    check_choices(recipe.engine, runtime)
    if precision is Precision.INT4 and recipe.quantised == "activations":
        raise UsageError(
            f"recipe {recipe.name} has no int4: only weights are stored in four bits.",
            next_step="Use another precision.",
        )
    return Chosen(target=machine_kind, runtime=runtime, precision=precision, triton=triton, quantised=recipe.quantised)


def _of_gpus(gpus: Sequence[Gpu]) -> str:
    """The target of the first GPU: by its name, else by its compute capability; the CPU without a GPU."""
    if not gpus:
        return "cpu"
    known = [load_target(name) for name in resources.names("recipes/targets")]
    words = " " + re.sub(r"[^A-Za-z0-9]+", " ", gpus[0].name) + " "
    named = [t.name for t in known if any(f" {part} " in words for part in t.gpus)]
    alike = [t.name for t in known if t.compute_capabilities == (gpus[0].compute_capability,)]
    for name in (*named, *alike):
        return name
    raise UsageError(
        f"No target fits {gpus[0].name} (SM {gpus[0].compute_capability}).",
        next_step="Name one with --target; cpu makes the ONNX alone.",
    )


def _precision(target: Target, wanted: Precision | None) -> Precision:
    chosen = wanted or next(iter(target.precisions))
    if chosen not in target.precisions:
        why = f": {target.lacks[chosen]}" if chosen in target.lacks else ""
        raise UsageError(f"{target.name} has no {chosen}{why}.", next_step=f"It has: {', '.join(target.precisions)}.")
    return chosen


def _runtime(target: Target, wanted: Runtime | None, recipe: Recipe, gpus: Sequence[Gpu]) -> Runtime:
    """The requested runtime, or the first of the target's that this machine can build for."""
    if wanted and wanted not in target.runtimes:
        raise UsageError(
            f"{target.name} is not built with {wanted}.", next_step=f"It has: {', '.join(target.runtimes)}."
        )
    possible = [r for r in target.runtimes if can_build(target, r, recipe.engine, gpus)]
    if wanted and wanted not in possible:
        here = ", ".join(f"{gpu.name} (SM {gpu.compute_capability})" for gpu in gpus) or "no GPU"
        others = " or ".join(f"--runtime {r}" for r in possible)
        raise MissingRequirement(
            f"A tensorrt plan for {target.name} is built on that card itself; this machine has {here}.",
            next_step="Build there" + (f", or here with {others}." if others else "."),
        )
    return wanted or possible[0]


def can_build(target: Target, runtime: Runtime, choices: EngineChoices, gpus: Sequence[Gpu]) -> bool:
    """Whether a machine with `gpus` can build for `runtime` on `target`.

    TensorRT measures kernels on the GPU it builds for; `ampere+` plans may be built on any Ampere or newer. The others
    need no GPU.
    """
    if runtime is not Runtime.TENSORRT:
        return True
    if not gpus:
        return False
    here = gpus[0].compute_capability
    if choices.compatibility == "ampere+":
        return _at_least_ampere(here) and all(map(_at_least_ampere, target.compute_capabilities))
    return here in target.compute_capabilities


def _at_least_ampere(capability: str) -> bool:
    return int(capability.partition(".")[0]) >= 8


def check_choices(choices: EngineChoices, runtime: Runtime) -> None:
    """Raises UsageError for settings that `runtime` does not have or cannot combine.

    Only classic TensorRT has these: TensorRT-RTX 1.7 ignores levels and refuses version-compatible plans. A
    version-compatible plan runs in the lean runtime it carries, which cannot refit one
    (https://developer.nvidia.com/blog/tensorrt-hardware-version-compatibility/), so the plan must hold its weights.
    """
    if choices.version_compatible and choices.strip_weights:
        raise UsageError(
            "A version-compatible plan must hold its weights: its lean runtime cannot refit them.",
            next_step="Take strip_weights or version_compatible out of [engine].",
        )
    chosen = choices.model_dump(exclude_defaults=True, exclude={"profiles"})
    if chosen and runtime is not Runtime.TENSORRT:
        raise UsageError(
            f"{runtime} has no {', '.join(chosen)}: only tensorrt has.",
            next_step="Take it out of [engine], or choose --runtime tensorrt.",
        )


class _Tags(Frozen):
    """`recipes/triton/tensorrt.toml`."""

    tags: dict[str, str]


def triton_tags() -> dict[str, str]:
    """Triton image tag -> the TensorRT in it, where that is known."""
    path = resources.folder("recipes/triton") / "tensorrt.toml"
    return parse(_Tags, read_toml(path), where=path.name).tags


class Reads(Frozen):
    """The newest ONNX that a runtime reads: operator set, and version of the file format."""

    opset: int
    ir: int


class _Since(Frozen):
    since: dict[str, Reads]


def triton_reads(tag: str) -> Reads | None:
    """What ONNX Runtime in the Triton image `tag` (year and month) reads; None for tags older than the known."""
    path = resources.folder("recipes/triton") / "onnxruntime.toml"
    since = parse(_Since, read_toml(path), where=path.name).since
    return since[max(known)] if (known := [first for first in since if first <= tag]) else None


def _triton(modifier: str) -> Triton:
    """`triton:TAG` of a known tag, or `triton:TAG=VERSION`; the TensorRT here must be the image's."""
    kind, _, word = modifier.partition(":")
    tag, _, said = word.partition("=")
    known = triton_tags()
    if kind != "triton" or not tag or (said and not _VERSION.match(said)):
        raise UsageError(
            f"{modifier!r} is not a modifier of a target.",
            next_step="Write a100,triton:26.08 or a100,triton:TAG=11.2.1.",
        )
    if not said and tag not in known:
        raise UsageError(
            f"dinoexport does not know the TensorRT version in the Triton image {tag}.{closest(tag, list(known))}",
            next_step=f"Known: {', '.join(known)}. For another tag, run dpkg -l 'libnvinfer*' inside the image "
            f"and give triton:{tag}=VERSION.",
        )
    wanted = said or known[tag]
    here = hardware.installed_engine_runtime(Runtime.TENSORRT)
    if here is None or here.split(".")[:3] != wanted.split("."):
        raise MissingRequirement(
            f"Triton {tag} loads only plans of its own TensorRT {wanted}; this machine has {here or 'none'}.",
            next_step=f"pip install 'tensorrt=={wanted}.*', or build inside nvcr.io/nvidia/tensorrt:{tag}-py3.",
        )
    return Triton(tag=tag, tensorrt=wanted)

"""Read the header of an engine file and check whether the engine can run here. Needs no GPU and no TensorRT."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoexport.bundle import EngineFacts
from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Runtime
from dinoexport.system.hardware import Gpu

# Compute capabilities in the order of the bits of an RTX engine's target mask, found from engines built for each.
RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The version that built an engine; for a TensorRT-RTX engine also its size, its GPUs and its weights' size."""

    runtime: Runtime
    version: str
    size_bytes: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    weight_bytes: int | None = None


def read_header(path: Path) -> Header:
    """The header of the engine at `path`; raises BuildError if it is not an engine or is truncated.

    TensorRT: magic `ftrt`, serialisation version 0 at 4, version at 24, as NVIDIA's trtexec reads it
    (samples/common/sampleEngines.cpp, printPlanVersion). TensorRT-RTX 1.7: the layout was found from its engines: magic
    `vtrt`, size at 16, version at 24, targets as a bit mask at 32, the weights' size at 56.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if len(start) < 64 or start[:4] not in (b"ftrt", b"vtrt"):
        raise BuildError(f"{path.name} is not a TensorRT engine.", next_step="Build it again.")
    version = ".".join(map(str, start[24:28]))
    if start[:4] == b"ftrt":
        if start[4:8] != bytes(4):
            raise BuildError(
                f"{path.name} has a plan format that is not known here.", next_step="Use a newer dinoexport."
            )
        return Header(runtime=Runtime.TENSORRT, version=version)
    (size_bytes,), (mask,), (weight_bytes,) = (
        struct.unpack_from(form, start, at) for form, at in (("<Q", 16), ("<I", 32), ("<Q", 56))
    )
    if size_bytes != path.stat().st_size:
        raise BuildError(
            f"{path.name} is cut short: it declares {size_bytes} bytes and has {path.stat().st_size}.",
            next_step="Copy it again, or build it again.",
        )
    return Header(
        runtime=Runtime.TENSORRT_RTX,
        version=version,
        size_bytes=size_bytes,
        compute_capabilities=tuple(cc for bit, cc in enumerate(RTX_TARGETS) if mask >> bit & 1),
        weight_bytes=weight_bytes,
    )


def for_this_machine(engines: Sequence[EngineFacts], gpus: Sequence[Gpu]) -> tuple[EngineFacts, ...]:
    """For each graph, the engine that runs here, if a bundle has engines for several cards.

    Raises MissingRequirement, with the reason for each engine, if none of a graph's engines runs here.
    """
    chosen: list[EngineFacts] = []
    for graph in dict.fromkeys(engine.graph for engine in engines):
        problems: list[MissingRequirement] = []
        for engine in (engine for engine in engines if engine.graph == graph):
            try:
                check_runs_here(engine, gpus)
            except MissingRequirement as problem:
                problems.append(problem)
            else:
                chosen.append(engine)
                break
        else:
            if len(problems) == 1 or not gpus:
                raise problems[0]
            raise MissingRequirement(
                " ".join(problem.message for problem in problems), next_step="Compile the bundle on this card too."
            )
    return tuple(chosen)


def check_runs_here(engine: EngineFacts, gpus: Sequence[Gpu]) -> Gpu:
    """The GPU that can run `engine`; raises MissingRequirement with the reason, before TensorRT would crash."""
    capabilities = ", ".join(engine.compute_capabilities)
    if not gpus:
        raise MissingRequirement(
            f"{engine.file} was not run: no GPU here.", next_step=f"Validate it on a GPU of SM {capabilities}."
        )
    gpu = gpus[0]
    if engine.compatibility == "ampere+":
        fits = float(gpu.compute_capability) >= 8.0
    else:
        fits = gpu.compute_capability in engine.compute_capabilities
    if not fits:
        raise MissingRequirement(
            f"{engine.file} is for SM {capabilities}; this machine has {gpu.name}, SM {gpu.compute_capability}.",
            next_step="Build a bundle for this GPU.",
        )
    if engine.compatibility == "this-gpu" and engine.device not in ("", gpu.name):
        raise MissingRequirement(
            f"{engine.file} was built on {engine.device} and runs only on that model; this machine has {gpu.name}.",
            next_step='Build it here, or there with [engine] compatibility = "same-cc".',
        )
    _check_version(engine)
    return gpu


def _check_version(engine: EngineFacts) -> None:
    """A plan loads only in the version that built it; a version-compatible one in that and newer ones."""
    extra = TABLE[engine.runtime].extra
    found = TABLE[engine.runtime].installed_version()
    if found is None:
        raise MissingRequirement(
            f"{engine.file} needs {engine.runtime} {engine.runtime_version}, which is not installed.",
            next_step=f"pip install 'dinoexport[{extra}]'",
        )
    here, built = (tuple(map(int, version.split(".")[:3])) for version in (found, engine.runtime_version))
    if here != built and not (engine.version_compatible and here > built):
        raise MissingRequirement(
            f"{engine.file} was built by {engine.runtime} {engine.runtime_version}; this machine has {found}.",
            next_step=f"Install {engine.runtime_version} here, or build the bundle with {found}.",
        )

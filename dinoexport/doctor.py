"""Report what this machine has, what it can build and run, and what is wrong: each finding with its fix."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import dinoexport
from dinoexport.config import resources
from dinoexport.config.recipe import EngineChoices
from dinoexport.config.target import Target, can_build, load_target
from dinoexport.errors import DinoexportError
from dinoexport.runtime import telemetry
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Runtime
from dinoexport.system import hardware
from dinoexport.system.cache import cache_folder
from dinoexport.system.hardware import Gpu

# CUDA 13 wants driver 580 or newer, CUDA 12 525 (CUDA compatibility guide, minor version compatibility).
_DRIVER_FOR_CUDA = {"13": 580, "12": 525}
# The largest variant's checkpoint, graph and engine side by side.
_DISK_WANTED = 16 * 10**9
FindingState = Literal["ok", "missing", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding. `missing` is not a fault: something is not possible here. `wrong` needs the fix."""

    subject: str
    found: str
    state: FindingState = "ok"
    fix: str = ""


def findings() -> tuple[Finding, ...]:
    """Everything a build or a run depends on, from the interpreter to each target."""
    gpus = hardware.gpus()
    return (
        Finding(subject="dinoexport", found=f"{dinoexport.__version__} on Python {platform.python_version()}"),
        _package("torch", "torch", "export", "exports and validates"),
        _onnxruntime(gpus),
        *(_runtime(runtime) for runtime in Runtime if runtime is not Runtime.ONNXRUNTIME),
        *_gpus(gpus),
        *_cuda_mix(),
        *(
            Finding(subject=f"privacy of {runtime}", found=found)
            for runtime, found in telemetry.findings().items()
            if TABLE[runtime].installed_version()
        ),
        *(_target(load_target(name), gpus) for name in resources.names("recipes/targets")),
        *(_disk(place, folder) for place, folder in (("here", Path()), ("cache", cache_folder()))),
    )


def _package(subject: str, package: str, extra: str, does: str) -> Finding:
    version = hardware.installed(package)
    if version is None:
        return Finding(
            subject=subject, found=f"not installed; {does}", state="missing", fix=f"pip install 'dinoexport[{extra}]'"
        )
    return Finding(subject=subject, found=version)


def _onnxruntime(gpus: Sequence[Gpu]) -> Finding:
    facts = TABLE[Runtime.ONNXRUNTIME]
    both = [name for name in facts.distributions if hardware.installed(name)]
    if len(both) > 1:
        return Finding(
            subject=facts.title,
            found=f"{' and '.join(both)} are both installed and overwrite each other's files",
            state="wrong",
            fix=f"pip uninstall {' '.join(both)}, then install the one you want",
        )
    if not both:
        return _runtime(Runtime.ONNXRUNTIME)
    onnxruntime = telemetry.onnxruntime()
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    found = f"{onnxruntime.__version__} with {', '.join(providers)}"
    if gpus and "CUDA" not in providers:
        return Finding(
            subject=facts.title, found=found + "; no CUDA, though a GPU is here", state="missing",
            fix="pip uninstall onnxruntime && pip install 'dinoexport[gpu]'",
        )  # fmt: skip
    return Finding(subject=facts.title, found=found)


def _runtime(runtime: Runtime) -> Finding:
    facts = TABLE[runtime]
    version = facts.installed_version()
    if version is None:
        fix = f"pip install 'dinoexport[{facts.extra}]'"
        return Finding(subject=facts.title, found=f"not installed; {facts.does}", state="missing", fix=fix)
    return Finding(subject=facts.title, found=version)


def _gpus(gpus: Sequence[Gpu]) -> list[Finding]:
    if not gpus:
        return [
            Finding(
                subject="GPU",
                found="none, or no driver",
                state="missing",
                fix="Without a GPU, engines are compiled ahead of time, not run. With a GPU: install its driver, and "
                "give containers --gpus all.",
            )
        ]
    return [
        Finding(
            subject=f"GPU {gpu.index}",
            found=f"{gpu.name}, SM {gpu.compute_capability}, {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver}",
        )
        for gpu in gpus
    ] + [finding for gpu in gpus[:1] for finding in _driver(gpu)]


def _driver(gpu: Gpu) -> list[Finding]:
    major = int(re.match(r"\d*", gpu.driver).group() or 0)  # type: ignore[union-attr]
    wanted = max((_DRIVER_FOR_CUDA[cuda] for cuda in _cuda_majors()), default=0)
    if major >= wanted:
        return []
    return [
        Finding(
            subject="driver",
            found=f"{gpu.driver}; the CUDA packages installed here want {wanted} or newer",
            state="wrong",
            fix="Update NVIDIA's driver, or install the cu12 packages instead of the cu13 ones",
        )
    ]


def _cuda_majors() -> dict[str, list[str]]:
    """CUDA major version -> installed packages made for it."""
    majors: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if found := re.search(r"[-_]cu(12|13)\b", name):
            majors.setdefault(found[1], []).append(name)
    return majors


def _cuda_mix() -> list[Finding]:
    majors = _cuda_majors()
    if len(majors) < 2:
        return []
    named = "; ".join(f"CUDA {cuda}: {', '.join(sorted(names)[:3])}" for cuda, names in sorted(majors.items()))
    return [
        Finding(
            subject="CUDA packages",
            found=f"a mix ({named})",
            state="wrong",
            fix="Use one CUDA in one environment: make a new one and install the extras of one kind",
        )
    ]


def _target(target: Target, gpus: Sequence[Gpu]) -> Finding:
    """What this machine can build for a target, and whether it can run the result."""
    ways, blocked = [], []
    for runtime in target.runtimes:
        if not can_build(target, runtime, EngineChoices(), gpus):
            blocked.append(f"{runtime}: only on that card")
        elif runtime.has_engine and TABLE[runtime].installed_version() is None:
            blocked.append(f"{runtime}: pip install 'dinoexport[{TABLE[runtime].extra}]'")
        else:
            here = any(gpu.compute_capability in target.compute_capabilities for gpu in gpus[:1])
            how = "" if not runtime.has_engine else " (built and run)" if here else " (compiled ahead, not run)"
            ways.append(f"{runtime}{how}")
    return Finding(
        subject=f"target {target.name}",
        found=", ".join(ways) or "nothing",
        state="ok" if ways else "missing",
        fix="; ".join(blocked),
    )


def _disk(place: str, folder: Path) -> Finding:
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        free = shutil.disk_usage(nearest).free
    except (OSError, DinoexportError) as error:
        return Finding(subject=f"disk, {place}", found=f"{folder}: {error}", state="wrong", fix="Check the folder")
    found = f"{free / 1e9:.0f} GB free in {folder.absolute()}"
    if free < _DISK_WANTED:
        return Finding(
            subject=f"disk, {place}",
            found=found,
            state="missing",
            fix=f"The largest variant needs {_DISK_WANTED / 1e9:.0f} GB: free some, or set DINOEXPORT_CACHE or --out",
        )
    return Finding(subject=f"disk, {place}", found=found)

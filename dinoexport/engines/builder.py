"""Build an engine from ONNX: a classic TensorRT plan, on its own GPU, or a TensorRT-RTX engine, without a GPU.

One function builds both; only the builder's configuration differs, which `worker` sets. The result is verified: its
header, its weights, and whether attention is fused. The build needs only a bundle's ONNX, its graph and these
settings: neither torch nor the checkpoint.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.bundle import onnx_file
from dinoexport.config.recipe import EngineChoices
from dinoexport.engines import profiles
from dinoexport.errors import BuildError, MissingRequirement, require
from dinoexport.runtime import engine_header
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Graph, Profile, Progress, Runtime, silent
from dinoexport.system import subprocess_job
from dinoexport.system.cache import cache_folder
from dinoexport.system.hardware import Gpu

TIMEOUT_S = 3 * 3600
INSPECTION_TIMEOUT_S = 600
# The order in which the driver lists GPUs. And Polygraphy installs nothing, whatever the user's environment asks of it.
_ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
DEFAULT = EngineChoices()
# An engine holds the graph's weights plus folded constants: 0.14 % measured. A silent upcast would double them.
_WEIGHTS_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """A built engine and the facts found in it.

    weight_bytes: None if TensorRT does not report it. attentions: how many the graph has. fused_attentions: how many
    of them the engine computes in fused kernels. scratch_bytes: device memory in addition to weights, inputs and
    outputs.
    not_looked_at: why a classic plan could not be opened after it was built. Such a plan is kept, and the facts that
    need an opened plan (fused_attentions, perhaps scratch_bytes) are None.
    """

    path: Path
    log: Path
    runtime_version: str
    compute_capabilities: tuple[str, ...]
    size_bytes: int
    weight_bytes: int | None
    scratch_bytes: int | None
    attentions: int
    fused_attentions: int | None
    build_s: float
    peak_memory_bytes: int
    not_looked_at: str = ""


def _folded_bytes(profile: Profile) -> int:
    """The constants that a compiler may compute for a profile of one size alone, such as positions of its patches.

    At most the numbers of one input item, as float32, which is 3.8 MB for 224 and 518 pixels a side together: with
    these profiles an engine of ViT-S in fp16 held 145 kB more than the graph. Nothing is folded for a range.
    """
    if any(smallest != largest for smallest, _, largest in profile.shapes.values()):
        return 0
    return sum(4 * math.prod(shape[1:]) for shape, _, _ in profile.shapes.values())


def build(
    onnx: Path,
    graph: Graph,
    folder: Path,
    *,
    runtime: Runtime,
    profiles: Sequence[Profile],
    compute_capabilities: Sequence[str],
    choices: EngineChoices = DEFAULT,
    gpu: Gpu | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = silent,
) -> BuiltEngine:
    """Builds an engine of `onnx` with these profiles into `folder` and checks it.

    `gpu`: the GPU on which a classic plan is built; TensorRT-RTX needs none. Raises MissingRequirement without the
    packages or the memory, BuildError with the relevant lines of the log if the compiler fails, dies or takes too
    long, or if the engine is not the requested one.
    """
    require(TABLE[runtime].extra, *TABLE[runtime].build_modules)
    path = folder / f"{graph.name}{TABLE[runtime].engine_suffix}"
    log = path.with_name(f"{path.name}.log")
    wanted = tuple(sorted(compute_capabilities, key=float))
    timing_cache = None if gpu is None else _timing_cache(gpu, TABLE[runtime].installed_version())
    job = {
        "onnx": str(onnx),
        "engine": str(path),
        "runtime": runtime.value,
        "profiles": [dict(profile.shapes) for profile in profiles],
        "compute_capabilities": [[int(part) for part in cc.split(".")] for cc in wanted],
        "choices": choices.model_dump(mode="json"),
        "timing_cache": None if timing_cache is None else str(timing_cache),
    }
    started = time.monotonic()
    finished = subprocess_job.run(
        "dinoexport.engines.worker",
        job,
        log,
        environment={**_ENVIRONMENT, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if runtime is Runtime.TENSORRT_RTX else "0"},
        doing="compiling the engine",
        timeout_s=timeout_s,
        progress=progress,
    )
    header = engine_header.read_header(path)
    if header.runtime is not runtime or (header.compute_capabilities and header.compute_capabilities != wanted):
        raise BuildError(
            f"The engine is {header.runtime} for SM {', '.join(header.compute_capabilities)}, not {runtime} for "
            f"{', '.join(wanted)}.",
            next_step=f"Read {log.name}.",
        )
    said, not_looked_at = finished.said, ""
    if runtime is Runtime.TENSORRT:
        said, not_looked_at = _looked_at(path, log, choices, progress)
    weight_bytes = header.weight_bytes if header.weight_bytes is not None else said.get("weight_bytes")
    stored = onnx.with_name(f"{onnx.name}.data").stat().st_size
    most = stored + _WEIGHTS_TOLERANCE * stored + sum(map(_folded_bytes, profiles))
    if (
        weight_bytes is not None
        and not choices.strip_weights
        and not stored - _WEIGHTS_TOLERANCE * stored <= weight_bytes <= most
    ):
        raise BuildError(
            f"The engine holds {weight_bytes} bytes of weights, the graph {stored}: it is not the same model.",
            next_step="Report it.",
        )
    return BuiltEngine(
        path=path,
        log=log,
        runtime_version=header.version,
        compute_capabilities=wanted,
        size_bytes=path.stat().st_size,
        weight_bytes=weight_bytes,
        scratch_bytes=said["scratch_bytes"] if "scratch_bytes" in said else _scratch_in(log),
        attentions=onnx_file.attention_count(onnx),
        fused_attentions=None if not_looked_at else len(_fused_layers(path, header, said.get("layers", ()))),
        build_s=time.monotonic() - started,
        peak_memory_bytes=finished.peak_memory_bytes,
        not_looked_at=not_looked_at,
    )


def _looked_at(path: Path, log: Path, choices: EngineChoices, progress: Progress) -> tuple[Mapping[str, Any], str]:
    """The facts of an opened classic plan, or why it could not be opened; its messages go to the builder's log."""
    own_log = path.with_name(f"{path.name}.inspector.log")
    try:
        job = {"engine": str(path), "host_code": choices.version_compatible}
        finished = subprocess_job.run(
            "dinoexport.engines.inspector",
            job,
            own_log,
            environment=_ENVIRONMENT,
            doing="opening the engine",
            timeout_s=INSPECTION_TIMEOUT_S,
            progress=progress,
        )
    except (BuildError, MissingRequirement) as error:
        return {}, f"It could not be opened after it was built, so it was not inspected: {error.message}"
    finally:
        if own_log.exists():
            with log.open("ab") as whole:
                whole.write(own_log.read_bytes())
            own_log.unlink()
    return finished.said, ""


def check_memory(
    onnx: Path,
    graph: Graph,
    wanted: Sequence[Profile],
    *,
    memory_bytes: int,
    where: str,
    choices: EngineChoices = DEFAULT,
) -> None:
    """Refuses profiles whose engine does not fit into the memory of `where`, by an estimate, before the build starts.

    The largest profile counts, because all profiles share one scratch buffer. With weight streaming only twice the
    largest weight has to be on the device. Raises MissingRequirement with the size of each dimension that would fit if
    the others stay the same.
    """
    if choices.weight_streaming:
        weight_bytes = 2 * profiles.largest_weight_bytes(onnx)
    else:
        weight_bytes = onnx.with_name(f"{onnx.name}.data").stat().st_size
    for profile in wanted:
        scratch = profiles.scratch_bytes(onnx, profile)
        if weight_bytes + scratch <= memory_bytes:
            continue
        fitting = profiles.fitting(onnx, graph, profile, memory_bytes - weight_bytes)
        raise MissingRequirement(
            f"Profile {profile.name} needs about {(weight_bytes + scratch) / 1e9:.1f} GB on the device "
            f"({scratch / 1e9:.1f} GB beside the weights); {where} has {memory_bytes / 1e9:.1f} GB.",
            next_step=" or ".join(f"{dim} up to {size}" for dim, size in fitting.items()) + " would fit: give that as "
            "the profile's max."
            if fitting
            else "No part of the range fits; choose a larger card.",
        )


def _timing_cache(gpu: Gpu, version: str | None) -> Path:
    """The timing cache for this GPU, driver and TensorRT version; all builds on this machine share it."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu.name}-{gpu.driver}-tensorrt-{version}")
    folder = cache_folder() / "timing"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.cache"


def _scratch_in(log: Path) -> int | None:
    """The largest profile's device memory as the compiler logged it; None if it logged none."""
    found = re.findall(r"Total Activation Memory: (\d+) bytes", log.read_text(errors="replace"))
    return max(map(int, found), default=None)


def _fused_layers(path: Path, header: engine_header.Header, layers: Sequence[Any]) -> set[str]:
    """The layers that are fused-attention kernels.

    A TensorRT-RTX engine names the graph's layers next to the kernel; its weights come last and are not read. For a
    classic plan the inspector gives each layer's name and tactic; layers of further profiles have a suffix.
    """
    if header.runtime is Runtime.TENSORRT:
        named = [layer for layer in layers if isinstance(layer, dict) and "mha" in json.dumps(layer).lower()]
        return {re.sub(r"\s*\[profile \d+\]$", "", layer.get("Name", "")) for layer in named}
    with path.open("rb") as file:
        code = file.read((header.size_bytes or 0) - (header.weight_bytes or 0))
    return {name.decode() for name in re.findall(rb'\[ONNX Layer: ([^\]"]+)\]" fmha_batch', code)}

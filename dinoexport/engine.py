"""ONNX to a TensorRT-RTX engine, compiled ahead of time: no GPU is needed, and none proves that it runs.

Each build is a child process with a log, a time limit and a memory reading of its own, for two reasons: Polygraphy
reads POLYGRAPHY_USE_TENSORRT_RTX at import, and a compiler that dies must not take the build with it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoexport.errors import BuildError, MissingRequirement, require
from dinoexport.spec import Graph, Progress, silent

PACKAGES = ("tensorrt_rtx", "polygraphy")
TIMEOUT_S = 3600
_POLL_S = 0.1
# Compute capabilities in the order of the bits of an engine's target mask, as read off engines built for each.
_TARGET_BITS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# An engine's weights are the graph's plus constants it folds: 0.14 % measured. A silent upcast would double them.
_WEIGHTS_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A compiled engine and what was found in it.

    attentions: softmaxes in the graph. fused_attentions: how many of them the engine computes in fused kernels.
    """

    path: Path
    log: Path
    runtime_version: str
    compute_capabilities: tuple[str, ...]
    size_bytes: int
    weight_bytes: int
    attentions: int
    fused_attentions: int
    build_s: float
    peak_memory_bytes: int


def build(
    onnx: Path,
    graph: Graph,
    folder: Path,
    *,
    compute_capabilities: Sequence[str],
    timeout_s: float = TIMEOUT_S,
    progress: Progress = silent,
) -> Engine:
    """Compiles `onnx` over the whole range of `graph.dims` into `folder`, and checks the engine's own header.

    Raises MissingRequirement without the packages, BuildError with the log's useful lines when the compiler fails, dies
    or takes too long, or when the engine is not the one asked for.
    """
    require("rtx", *PACKAGES)
    path, log = (folder / f"{graph.name}.rtx{suffix}" for suffix in ("", ".log"))
    job = {
        "onnx": str(onnx),
        "engine": str(path),
        "profile": profile_shapes(graph),
        "compute_capabilities": [[int(part) for part in cc.split(".")] for cc in compute_capabilities],
    }
    started = time.monotonic()
    peak_memory_bytes = _run(job, log, timeout_s, progress)
    header = read_header(path)
    wanted = tuple(sorted(compute_capabilities, key=_TARGET_BITS.index))
    if header.compute_capabilities != wanted:
        raise BuildError(
            f"The engine is for SM {', '.join(header.compute_capabilities)}, not {', '.join(wanted)}.",
            next_step=f"Read {log.name}.",
        )
    stored = onnx.with_name(f"{onnx.name}.data").stat().st_size
    if abs(header.weight_bytes - stored) > _WEIGHTS_TOLERANCE * stored:
        raise BuildError(
            f"The engine holds {header.weight_bytes} bytes of weights, the graph {stored}: it is not the same model.",
            next_step="Report it.",
        )
    return Engine(
        path=path,
        log=log,
        runtime_version=header.version,
        compute_capabilities=header.compute_capabilities,
        size_bytes=header.size_bytes,
        weight_bytes=header.weight_bytes,
        attentions=_softmaxes(onnx),
        fused_attentions=len(_fused_layers(path, header)),
        build_s=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes,
    )


def profile_shapes(graph: Graph) -> dict[str, tuple[tuple[int, ...], ...]]:
    """(min, opt, max) shapes of every input. Without a profile TensorRT silently takes 1 for each dynamic dimension."""
    dims = {dim.name: (dim.min, dim.opt, dim.max) for dim in graph.dims}
    return {
        tensor.name: tuple(
            tuple(size if isinstance(size, int) else dims[size][end] for size in tensor.shape) for end in range(3)
        )
        for tensor in graph.inputs
    }


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a TensorRT-RTX engine says of itself in its first bytes; readable without a GPU or the runtime."""

    size_bytes: int
    version: str
    compute_capabilities: tuple[str, ...]
    weight_bytes: int


def read_header(path: Path) -> Header:
    """The header of the engine at `path`; a BuildError when it is none, or cut short.

    The layout is read off engines of TensorRT-RTX 1.7: magic `vtrt`, size at 16, version at 24, targets as a bit mask
    at 32, the weights' size at 56.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if len(start) < 64 or start[:4] != b"vtrt":
        raise BuildError(f"{path.name} is no TensorRT-RTX engine.", next_step="Build it again.")
    (size_bytes,), (mask,), (weight_bytes,) = (
        struct.unpack_from(form, start, at) for form, at in (("<Q", 16), ("<I", 32), ("<Q", 56))
    )
    if size_bytes != path.stat().st_size:
        raise BuildError(
            f"{path.name} is cut short: it says {size_bytes} bytes and has {path.stat().st_size}.",
            next_step="Copy it again, or build it again.",
        )
    return Header(
        size_bytes=size_bytes,
        version=".".join(str(number) for number in start[24:28]),
        compute_capabilities=tuple(cc for bit, cc in enumerate(_TARGET_BITS) if mask >> bit & 1),
        weight_bytes=weight_bytes,
    )


def _softmaxes(onnx: Path) -> int:
    import onnx as onnx_package

    nodes = onnx_package.load(onnx, load_external_data=False).graph.node
    return sum(node.op_type == "Softmax" for node in nodes)


def _fused_layers(path: Path, header: Header) -> set[bytes]:
    """The graph's layers that the engine names beside a fused-attention kernel; weights come last and are not read."""
    with path.open("rb") as file:
        code = file.read(header.size_bytes - header.weight_bytes)
    return set(re.findall(rb'\[ONNX Layer: ([^\]"]+)\]" fmha_batch', code))


def _run(job: Mapping[str, object], log: Path, timeout_s: float, progress: Progress) -> int:
    """Runs the compiler's process to its end; returns its peak memory in bytes. It never outlives us."""
    command = [sys.executable, "-m", "dinoexport.engine_worker", json.dumps(job)]
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        started = time.monotonic()
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                elapsed_s = time.monotonic() - started
                if elapsed_s > timeout_s:
                    raise BuildError(
                        f"Compiling took more than {timeout_s:.0f} s and was stopped.", next_step="Narrow the profile."
                    )
                progress("compiling the engine", int(elapsed_s), 0)
                time.sleep(_POLL_S)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise _failure(process.returncode, log)
    return int(usage.ru_maxrss * 1024)


def _failure(code: int, log: Path) -> BuildError | MissingRequirement:
    """One error for a compiler that failed or died, with what its log says."""
    lines = log.read_text(errors="replace").splitlines()
    useful = [line.strip() for line in lines if line.startswith(("[E]", "[!]"))] or lines[-1:]
    said = " ".join(useful[:3])[:600] or "Its log is empty."
    if code == -signal.SIGKILL:
        return MissingRequirement(
            f"The engine's compiler was killed, most likely for want of memory. {said}",
            next_step="Give it more memory: 1.1 billion weights in fp16 want 8 GB.",
        )
    cause = f"died of {signal.Signals(-code).name}" if code < 0 else "failed"
    return BuildError(f"The engine's compiler {cause}: {said}", next_step="Report it with the recipe.")

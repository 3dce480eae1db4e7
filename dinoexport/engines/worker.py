"""The child process of `builder.build`: `python -m dinoexport.engines.worker JOB`, with JOB as JSON.

Networks are strongly typed: each tensor has the precision of the graph, and no builder flag changes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoexport.spec import Runtime
from dinoexport.system import subprocess_job

_LEVELS = {"fast": 1, "balanced": 3, "max": 5}


def main(job: dict[str, Any]) -> None:
    """Compiles job["onnx"] into job["engine"], which appears by rename."""
    from polygraphy.backend.trt import PostprocessConfig, Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.VERBOSE  # some forty lines, among them the memory that the engine needs
    classic = Runtime(job["runtime"]) is Runtime.TENSORRT
    profiles = []
    for shapes in job["profiles"]:
        profile = Profile()
        for name, (smallest, likely, largest) in shapes.items():
            profile.add(name, min=tuple(smallest), opt=tuple(likely), max=tuple(largest))
        profiles.append(profile)
    config = (_classic if classic else _rtx)(job, profiles)
    with os.fdopen(int(os.environ[subprocess_job.REPORT]), "w", buffering=1) as report:
        monitor = _monitor(report)

        def finish(_builder: Any, _network: Any, made: Any) -> None:
            """Settings that Polygraphy's loaders have no argument for.

            TensorRT-RTX leaves TF32 on; here it is off, so fp32 in the graph means fp32. Its engines are captured
            as CUDA graphs and use memory from the caller; both must be set when they are built.
            """
            flags = _trt().BuilderFlag
            made.clear_flag(flags.TF32)
            if not classic:
                made.set_flag(flags.REQUIRE_USER_ALLOCATION)
            elif job["choices"]["strip_weights"]:
                made.set_flag(flags.REFIT_IDENTICAL)  # refitted weights are the graph's own
            made.progress_monitor = monitor

        engine = engine_bytes_from_network(
            network_from_onnx_path(job["onnx"], strongly_typed=True),
            config=PostprocessConfig(config, finish),
            save_timing_cache=job["timing_cache"],
        )
        path = Path(job["engine"])
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(engine)
        os.replace(partial, path)


def _trt() -> Any:
    """The flavour of TensorRT that POLYGRAPHY_USE_TENSORRT_RTX names."""
    from polygraphy.mod.trt_importer import lazy_import_trt

    return lazy_import_trt()


def _classic(job: dict[str, Any], profiles: list[Any]) -> Any:
    """TensorRT 10.13 and 11. Uses nothing that 11 removed: precision flags, calibrators, EXPLICIT_BATCH."""
    from polygraphy.backend.trt import CreateConfig

    trt, choices = _trt(), job["choices"]
    levels = {
        "this-gpu": trt.HardwareCompatibilityLevel.NONE,
        "same-cc": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    return CreateConfig(
        profiles=profiles,
        builder_optimization_level=_LEVELS[choices["preset"]],
        hardware_compatibility_level=levels[choices["compatibility"]],
        version_compatible=choices["version_compatible"],
        strip_plan=choices["strip_weights"],
        weight_streaming=choices["weight_streaming"],
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # the inspector then names each layer's kernel
        load_timing_cache=job["timing_cache"] if job["timing_cache"] and Path(job["timing_cache"]).exists() else None,
    )


def _rtx(job: dict[str, Any], profiles: list[Any]) -> Any:
    """TensorRT-RTX, ahead of time."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    return CreateConfigRTX(
        profiles=profiles, compute_capabilities=[(major, minor) for major, minor in job["compute_capabilities"]]
    )


def _monitor(report: Any) -> Any:
    """An IProgressMonitor that writes the progress of each outermost phase."""
    base: Any = _trt().IProgressMonitor
    phases = _Phases(report)

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.heard(phases.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.heard(phases.step, phase_name, step)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            phases.heard(phases.finish, phase_name)

    return Monitor()


class _Phases:
    """The builder's nested phases. Some overlap and some name themselves as parent, so progress never decreases."""

    def __init__(self, report: Any) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._running: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps done, steps in all
        self._reached: dict[str, int] = {}

    def heard(self, what: Callable[..., None], *args: Any) -> None:
        """Calls `what` for one of TensorRT's threads at a time; an error in it must not stop the build."""
        with self._lock, contextlib.suppress(Exception):
            what(*args)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._running[name] = (parent if parent in self._running and parent != name else None, 0, max(steps, 1))
        self._say(name)

    def step(self, name: str, step: int) -> None:
        if name in self._running:
            parent, _, steps = self._running[name]
            self._running[name] = (parent, step + 1, steps)
            self._say(name)

    def finish(self, name: str) -> None:
        parent, _, _ = self._running.pop(name, ("", 0, 0))
        if parent is None:
            self._reach(name, 1000)

    def _say(self, name: str) -> None:
        """The progress of the outermost phase: its finished steps, plus the part of the current step that is done."""
        part = 0.0
        while True:
            parent, done, steps = self._running[name]
            part = min(1.0, (done + part) / steps)
            if parent is None or parent not in self._running:
                break
            name = parent
        self._reach(name, round(1000 * part))

    def _reach(self, name: str, permille: int) -> None:
        if permille > self._reached.get(name, -1):  # thousands of kernels are timed, but each value is written once
            self._reached[name] = permille
            self._report.write(json.dumps({"phase": name, "done": permille, "total": 1000}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

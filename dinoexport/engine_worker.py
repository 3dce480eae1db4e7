"""The child process of `engine.build`: `python -m dinoexport.engine_worker JOB`, with JOB as JSON.

Strongly typed: each tensor has the precision the graph gives it, and no builder flag says otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from dinoexport import child

_LEVELS = {"fast": 1, "balanced": 3, "max": 5}


def main(job: dict[str, Any]) -> None:
    """Compiles job["onnx"] into job["engine"], which appears by rename."""
    from polygraphy.backend.trt import PostprocessConfig, Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.VERBOSE  # some forty lines; the memory the engine needs is among them
    classic = job["runtime"] == "tensorrt"
    profiles = []
    for shapes in job["profiles"]:
        profile = Profile()
        for name, (smallest, likely, largest) in shapes.items():
            profile.add(name, min=tuple(smallest), opt=tuple(likely), max=tuple(largest))
        profiles.append(profile)
    config = (_classic if classic else _rtx)(job, profiles)
    with os.fdopen(int(os.environ[child.REPORT]), "w", buffering=1) as report:
        monitor = _monitor(report)

        def finish(_builder: Any, _network: Any, made: Any) -> None:
            """Without TF32, which TensorRT-RTX's loader leaves on: fp32 in the graph means fp32, not ten bits of it."""
            made.clear_flag(_trt().BuilderFlag.TF32)
            made.progress_monitor = monitor

        engine = engine_bytes_from_network(
            network_from_onnx_path(job["onnx"], strongly_typed=True),
            config=PostprocessConfig(config, finish),
            save_timing_cache=job["timing_cache"],
        )
        path = Path(job["engine"])
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(engine)
        if classic:
            report.write(json.dumps({"said": _looked_at(engine)}) + "\n")
        os.replace(partial, path)


def _trt() -> Any:
    """The flavour of TensorRT that POLYGRAPHY_USE_TENSORRT_RTX names."""
    from polygraphy.mod.trt_importer import lazy_import_trt

    return lazy_import_trt()


def _classic(job: dict[str, Any], profiles: list[Any]) -> Any:
    """TensorRT 10.13 and 11. Nothing that 11 removed: precision flags, calibrators, EXPLICIT_BATCH."""
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


def _looked_at(engine: Any) -> dict[str, Any]:
    """What a classic plan says once it is opened, which takes the GPU that has just built it."""
    trt = _trt()
    opened = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(engine)
    inspected = json.loads(opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return {
        "scratch_bytes": opened.device_memory_size_v2,
        # TensorRT 11 only.
        "weight_bytes": opened.get_engine_stat() if hasattr(opened, "get_engine_stat") else None,
        "layers": inspected.get("Layers", []),
    }


def _monitor(report: Any) -> Any:
    """An IProgressMonitor that writes how far the outermost phase is: its own steps, and those of the phases inside."""
    base: Any = _trt().IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.phases: dict[str, list[Any]] = {}  # name -> [parent, steps done, steps in all]
            self.furthest: dict[str, int] = {}  # phases overlap: what was reached is not taken back

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [parent_phase, 0, max(num_steps, 1)]
            self.say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][1] = step + 1
                self.say(phase_name)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def say(self, phase_name: str) -> None:
            part, name = 0.0, phase_name
            while True:
                parent, done, steps = self.phases[name]
                part = min(1.0, (done + part) / steps)
                if parent not in self.phases or parent == name:
                    break
                name = parent
            done_permille = round(1000 * part)
            if done_permille > self.furthest.get(name, -1):  # kernels are timed by the thousand, and said once
                self.furthest[name] = done_permille
                report.write(json.dumps({"phase": name, "done": done_permille, "total": 1000}) + "\n")

    return Monitor()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

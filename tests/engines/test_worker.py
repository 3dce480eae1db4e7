"""What the compiling process asks TensorRT for and tells its parent, with stand-ins of TensorRT and Polygraphy."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.config.recipe import EngineChoices
from dinoexport.engines import worker
from dinoexport.system import subprocess_job


def told(said: io.StringIO) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert {line["total"] for line in lines} == {1000}
    return [(line["phase"], line["done"]) for line in lines]


def test_progress_is_in_thousandths_and_never_more_than_all() -> None:
    said = io.StringIO()
    phases = worker._Phases(said)
    phases.start("One", None, 1)
    phases.step("One", 0)
    phases.start("None", None, 0)
    phases.step("None", 0)
    phases.start("Four", None, 4)
    phases.step("Four", 1)
    phases.step("Four", 5)
    assert told(said) == [
        ("One", 0),
        ("One", 1000),
        ("None", 0),
        ("None", 1000),
        ("Four", 0),
        ("Four", 500),
        ("Four", 1000),
    ]


def test_a_phase_that_outlives_its_parent_goes_on_alone() -> None:
    said = io.StringIO()
    phases = worker._Phases(said)
    phases.start("Building", None, 2)
    phases.start("Timing", "Building", 4)
    phases.finish("Building")
    phases.step("Timing", 0)
    assert told(said) == [("Building", 0), ("Building", 1000), ("Timing", 250)]


class TensorRT:
    """Names instead of settings, and the builder's configuration that they are set in."""

    HardwareCompatibilityLevel = SimpleNamespace(
        NONE="none", SAME_COMPUTE_CAPABILITY="same capability", AMPERE_PLUS="Ampere and newer"
    )
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    BuilderFlag = SimpleNamespace(TF32="TF32", REQUIRE_USER_ALLOCATION="the caller's memory", REFIT_IDENTICAL="refit")
    IProgressMonitor = object

    def __init__(self) -> None:
        self.progress_monitor: Any = None
        self.flags = {"TF32"}
        self.set_flag, self.clear_flag = self.flags.add, self.flags.remove


class Profile(dict[str, Any]):
    def add(self, name: str, **ends: Any) -> None:
        self[name] = ends


class Polygraphy:
    """Its loaders, which keep what they were given; a build is told of one phase, and hears of it at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        self.config = TensorRT()
        self.heard = b""
        self._reports, written = os.pipe()
        os.set_blocking(self._reports, False)
        monkeypatch.setenv(subprocess_job.REPORT, str(written))
        monkeypatch.setattr(worker, "_trt", lambda: TensorRT)
        trt = SimpleNamespace(
            Profile=Profile,
            CreateConfig=self._keep,
            PostprocessConfig=lambda config, finish: (config, finish),
            network_from_onnx_path=lambda path, **settings: self.asked.update(onnx=path, **settings),
            engine_bytes_from_network=self._build,
        )
        modules = {
            "polygraphy": SimpleNamespace(),
            "polygraphy.backend": SimpleNamespace(),
            "polygraphy.backend.trt": trt,
            "polygraphy.backend.tensorrt_rtx": SimpleNamespace(CreateConfigRTX=self._keep),
            "polygraphy.logger": SimpleNamespace(G_LOGGER=SimpleNamespace(VERBOSE="verbose")),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def close(self) -> None:
        os.close(self._reports)

    def _keep(self, **settings: Any) -> str:
        self.asked |= settings
        return "the configuration"

    def _build(self, _network: Any, *, config: tuple[str, Any], save_timing_cache: Any) -> bytes:
        self.asked["save_timing_cache"] = save_timing_cache
        config[1](None, None, self.config)
        self.config.progress_monitor.phase_start("Building", None, 2)
        self.heard = os.read(self._reports, 1000)
        return b"engine"


@pytest.fixture
def polygraphy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Polygraphy]:
    stand_in = Polygraphy(monkeypatch)
    yield stand_in
    stand_in.close()


def job(folder: Path, runtime: str, timing_cache: Path | None = None, **choices: Any) -> dict[str, Any]:
    return {
        "onnx": "model.onnx",
        "engine": str(folder / "model.plan"),
        "runtime": runtime,
        "profiles": [{"pixels": [[1, 3], [2, 3], [4, 3]]}],
        "compute_capabilities": [[8, 0], [12, 1]],
        "choices": EngineChoices(**choices).model_dump(mode="json"),
        "timing_cache": None if timing_cache is None else str(timing_cache),
    }


PROFILES = [{"pixels": {"min": (1, 3), "opt": (2, 3), "max": (4, 3)}}]


def test_an_rtx_engine_is_asked_for_its_cards_without_tf32_and_in_the_callers_memory(
    polygraphy: Polygraphy, tmp_path: Path
) -> None:
    worker.main(job(tmp_path, "tensorrt_rtx"))
    assert polygraphy.asked == {
        "onnx": "model.onnx",
        "strongly_typed": True,
        "profiles": PROFILES,
        "compute_capabilities": [(8, 0), (12, 1)],
        "save_timing_cache": None,
    }
    assert polygraphy.config.flags == {"the caller's memory"}
    assert polygraphy.heard == b'{"phase": "Building", "done": 0, "total": 1000}\n'
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.plan", b"engine")]


@pytest.mark.parametrize(
    ("choices", "settings", "flags"),
    [
        ({"preset": "fast"}, {"builder_optimization_level": 1}, set()),
        ({"preset": "balanced"}, {"builder_optimization_level": 3}, set()),
        ({"preset": "max"}, {"builder_optimization_level": 5}, set()),
        ({"compatibility": "same-cc"}, {"hardware_compatibility_level": "same capability"}, set()),
        ({"compatibility": "ampere+"}, {"hardware_compatibility_level": "Ampere and newer"}, set()),
        ({"version_compatible": True}, {"version_compatible": True}, set()),
        ({"strip_weights": True}, {"strip_plan": True}, {"refit"}),
        ({"weight_streaming": True}, {"weight_streaming": True}, set()),
    ],
)
def test_a_classic_plan_is_asked_for_as_it_was_chosen(
    choices: dict[str, Any], settings: dict[str, Any], flags: set[str], polygraphy: Polygraphy, tmp_path: Path
) -> None:
    asked = {
        "onnx": "model.onnx",
        "strongly_typed": True,
        "profiles": PROFILES,
        "builder_optimization_level": 3,
        "hardware_compatibility_level": "none",
        "version_compatible": False,
        "strip_plan": False,
        "weight_streaming": False,
        "profiling_verbosity": "detailed",
        "load_timing_cache": None,
        "save_timing_cache": str(tmp_path / "cache"),
    }
    worker.main(job(tmp_path, "tensorrt", tmp_path / "cache", **choices))
    assert polygraphy.asked == asked | settings and polygraphy.config.flags == flags


def test_a_timing_cache_is_read_where_there_is_one(polygraphy: Polygraphy, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"timings")
    worker.main(job(tmp_path, "tensorrt", tmp_path / "cache"))
    assert polygraphy.asked["load_timing_cache"] == str(tmp_path / "cache")

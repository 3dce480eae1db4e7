"""`make gpu` rehearsed: every step of it, against the stand-in for GPU and TensorRT in host memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from dinoexport.engines import builder
from dinoexport.runtime import ort
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Precision, Runtime
from dinoexport.system import hardware
from scripts import gpu_wheels
from tests.conftest import DATA
from tests.engines.test_builder import A100
from tests.runtime.test_trt import stand_in
from tests.standin import bindings, face, gpu

ROOT = DATA.parent.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> gpu_check.Variant:
    """The first step, once for all tests."""
    recipe = str(DATA / "tiny_swiglu_reg.toml")
    return gpu_check.exported(recipe, Precision.FP16, tmp_path_factory.mktemp("exported"), 2, [28])


@pytest.fixture
def on_a_gpu(exported: gpu_check.Variant, monkeypatch: pytest.MonkeyPatch) -> gpu.Device:
    """An A100 that is a stand-in: PyTorch runs on the CPU in its place, and nothing is compiled."""

    def build(onnx: Path, graph: Any, folder: Path, **settings: Any) -> Any:
        path = folder / "model.plan"
        path.write_bytes(gpu.plan(onnx, settings["profiles"]))
        return type("Engine", (), {"path": path})

    monkeypatch.setattr(gpu_check, "exported", lambda *_: exported)
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "COPIED_ITEMS", 1 << 10)
    monkeypatch.setattr(gpu_check, "SECONDS", 0.0)
    monkeypatch.setattr(gpu_check, "WARM_UPS", 0)
    monkeypatch.setattr(gpu_check.torch, "compile", lambda function: function)
    monkeypatch.setattr(gpu_check, "peak_flops", lambda _gpu: 1e12)
    monkeypatch.setattr(hardware, "gpus", lambda: (A100,))
    monkeypatch.setattr(
        RuntimeFacts, "installed_version", lambda facts: "11.4.0" if facts.title == "TensorRT" else None
    )
    monkeypatch.setattr(builder, "build", build)
    monkeypatch.setattr(ort, "has_cuda", lambda: False)
    return stand_in(face.VERSIONS[-1], monkeypatch)


def table_of(out: Path) -> list[list[str]]:
    lines = [line for line in out.read_text().splitlines() if "tiny" in line and line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    recipe = str(DATA / "tiny_swiglu_reg.toml")
    command = ["gpu_check", "--variants", recipe, "--sizes", "28", "--batches", "1", "2", "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    return int(ended.value.code or 0)


def test_every_step_runs_and_each_row_is_written_as_it_is_known(
    on_a_gpu: gpu.Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.md"
    assert run(monkeypatch, out) == 0
    rows = table_of(out)
    assert [(row[2], row[3]) for row in rows] == [
        (batch, runtime)
        for runtime in ("PyTorch eager", "PyTorch compiled", Runtime.TENSORRT.value)
        for batch in ("1", "2")
    ]
    assert {row[-1] for row in rows} == {"right"} and len(rows[0]) == len(gpu_check.HEADER)
    assert "ONNX Runtime CUDA, which is not installed" in out.read_text()
    assert not on_a_gpu.buffers, "closed"


def test_what_breaks_later_loses_no_row(on_a_gpu: gpu.Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A full device is noted and the next shape goes on; a crash of the last row leaves the file with all others."""
    out = tmp_path / "gpu.md"
    on_a_gpu.memory_bytes = 1 << 10
    assert run(monkeypatch, out) == 0
    assert {row[3] for row in table_of(out)} == {"PyTorch eager", "PyTorch compiled"}
    assert "cudaErrorMemoryAllocation" in out.read_text()
    on_a_gpu.memory_bytes = 1 << 40

    def crashes(_run: Any) -> list[float]:
        if on_a_gpu.calls.count("run") > before:
            raise AssertionError("the device is gone")
        return [1.0] * 5

    before = on_a_gpu.calls.count("run")
    monkeypatch.setattr(gpu_check, "timed", crashes)
    monkeypatch.setattr(gpu_check, "peak_bytes_per_s", lambda _gpu: 1e9)
    with pytest.raises(AssertionError, match="the device is gone"):
        gpu_check_main(monkeypatch, out)
    assert len(table_of(out)) == 4 and "Left out:" in out.read_text()


def gpu_check_main(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """`main` where it ends in no exit code."""
    recipe = str(DATA / "tiny_swiglu_reg.toml")
    command = ["gpu_check", "--variants", recipe, "--sizes", "28", "--batches", "1", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    gpu_check.main()


def test_time_that_is_over_is_said(on_a_gpu: gpu.Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    monkeypatch.setattr(gpu_check, "peak_bytes_per_s", lambda _gpu: 1e9)
    assert run(monkeypatch, out, "--minutes", "0") == 0
    assert not table_of(out) and "0.0 minutes were over" in out.read_text()


def test_an_index_without_a_wheel_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_wheels, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(1)"])
    monkeypatch.setattr(sys, "argv", ["gpu_wheels", "--to", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_wheels.main()
    assert ended.value.code == 1
    assert "pypi.nvidia.com" in capsys.readouterr().err


def test_the_wheels_of_a_gpu_run_are_listed_by_one_command() -> None:
    """No shell, no source builds, and the versions that the tests have seen."""
    words = gpu_wheels.command(("download", "--dest", "x"), "3.12")
    assert "--only-binary=:all:" in words and words[words.index("--python-version") + 1] == "3.12"
    lines = [line for line in gpu_wheels.REQUIREMENTS.read_text().splitlines() if line[:1] not in ("#", "-", "")]
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert pinned["tensorrt-cu13"] == bindings.VERSIONS[-1], "the newest whose bindings were driven"
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert all(version == constraints[name] for name, version in pinned.items() if name in constraints)
    report = {"install": [{"metadata": {"name": n, "version": "1"}, "download_info": {"url": n}} for n in ("b", "A")]}
    assert [name for name, _, _ in gpu_wheels.listed(report)] == ["A", "b"]


# What a step may take, in seconds: assumptions for the plan, no measurements. No GPU has run it.
PARAMETERS = {"vits14": 22e6, "vitb14": 87e6, "vitl14": 304e6, "vitg14": 1136e6}
EXPORTED_S = 4.0, 40e-9  # for each variant, and for each of its parameters: weights made, written, PyTorch's answers
OPENED_S = {
    "PyTorch eager": (1.0, 5e-9), "PyTorch compiled": (20.0, 20e-9), "ONNX Runtime CUDA": (5.0, 10e-9),
    Runtime.TENSORRT.value: (15.0, 60e-9),
}  # fmt: skip
RUN_S = 0.05


class Clock:
    """Time that passes only in the steps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    perf_counter = monotonic

    def spend(self, costs: tuple[float, float], parameters: float) -> None:
        self.now_s += costs[0] + costs[1] * parameters


@pytest.fixture
def whole_plan(exported: gpu_check.Variant, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every step of the whole plan is walked, with nothing heavy in it: the answers are the reference's own."""
    clock = Clock()
    (expectation,) = exported.reference.expectations

    def at(size: int) -> Any:
        return replace(expectation, case=replace(expectation.case, name=str(size)))

    def made(name: str, precision: Precision, folder: Path, batch: int, sizes: list[int]) -> gpu_check.Variant:
        assert precision is Precision.FP16 and batch == 32 and folder.is_dir()
        clock.spend(EXPORTED_S, PARAMETERS[name])
        request = gpu_check.pipeline.build_request(name, weights="synthetic:0", precision=precision, target="cpu")
        reference = replace(exported.reference, expectations=tuple(map(at, sizes)))
        return replace(exported, name=name, request=request, reference=reference)

    def opened(runtime: str, variant: gpu_check.Variant) -> Any:
        clock.spend(OPENED_S[runtime], PARAMETERS[variant.name])

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            clock.now_s += RUN_S
            return gpu_check.in_turn(expectation.outputs, len(inputs["pixels"]))

        return run

    names = iter(("PyTorch eager", "PyTorch compiled") * len(PARAMETERS))
    monkeypatch.setattr(gpu_check, "time", clock)
    monkeypatch.setattr(gpu_check, "exported", made)
    monkeypatch.setattr(gpu_check, "in_torch", lambda variant, *_: opened(next(names), variant))
    monkeypatch.setattr(gpu_check, "built", lambda variant, runtime, *_: opened(runtime.value, variant))
    monkeypatch.setattr(gpu_check, "peak_flops", lambda _gpu: 1e15)
    monkeypatch.setattr(gpu_check, "peak_bytes_per_s", lambda _gpu: 1e12)
    monkeypatch.setattr(hardware, "gpus", lambda: (A100,))
    monkeypatch.setattr(ort, "has_cuda", lambda: True)
    variants = iter(PARAMETERS)
    monkeypatch.setattr(
        ort, "open_graph", lambda *_, **__: opened("ONNX Runtime CUDA", replace(exported, name=next(variants)))
    )
    monkeypatch.setattr(
        RuntimeFacts, "installed_version", lambda facts: "11.4.0" if facts.title == "TensorRT" else None
    )
    return clock


def whole(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[list[str]]:
    """The rows of the plan as `make gpu` calls it."""
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(out), *words])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert not ended.value.code
    lines = [line for line in out.read_text().splitlines() if line.startswith("| vit")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_whole_plan_fits_ten_minutes(whole_plan: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """S, B, L and g, 224 and 518, batches 1, 8 and 32, in every runtime: each row once, the small models first."""
    rows = whole(monkeypatch, tmp_path / "gpu.md")
    wanted = [
        [variant, str(size), str(batch), runtime]
        for variant in PARAMETERS
        for runtime in OPENED_S
        for size in (224, 518)
        for batch in (1, 8, 32)
    ]
    assert [[row[0], row[1], row[2], row[3]] for row in rows] == wanted
    assert {row[-1] for row in rows} == {"right"} and all(row[7].endswith("%") and row[8].endswith("%") for row in rows)
    assert whole_plan.now_s < 600, f"{whole_plan.now_s:.0f} s by the assumptions"


def test_a_plan_that_takes_longer_is_cut_and_says_what_is_missing(
    whole_plan: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three times the time: nothing is begun after nine minutes, and every row that is missing is named."""
    monkeypatch.setitem(OPENED_S, Runtime.TENSORRT.value, (45.0, 180e-9))
    monkeypatch.setitem(OPENED_S, "PyTorch compiled", (60.0, 60e-9))
    rows = whole(monkeypatch, tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert {row[0] for row in rows} >= {"vits14", "vitb14", "vitl14"} and len(rows) < 96
    assert "Left out:" in text and "over" in text
    assert whole_plan.now_s < 540 + 45 + 180e-9 * PARAMETERS["vitg14"] + 10, "at most one step more than the limit"

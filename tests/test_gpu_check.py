"""`make gpu` rehearsed: every step of it, against the stand-in for GPU and TensorRT in host memory."""

from __future__ import annotations

import sys
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

"""What the doctor says of machines: this one, and ones that are put together here."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dinoexport import cli, doctor
from dinoexport.config import resources
from dinoexport.config.target import load_target
from dinoexport.runtime import telemetry
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Runtime
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu

A100 = Gpu(
    index=0, name="NVIDIA A100-SXM4", uuid="GPU-1", compute_capability="8.0", memory_bytes=4 * 10**10, driver="580.65"
)


def by_subject() -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.findings()}


def having(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    """These packages are installed, and no others."""
    named = {name.replace("_", "-"): version for name, version in packages.items()}

    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    monkeypatch.setattr(hardware, "installed", lambda package: named.get(package.replace("_", "-")))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: map(Distribution, named))


def test_this_machine_is_told_as_it_is() -> None:
    found = by_subject()
    assert found["torch"].state == "ok" and found["torch"].found == importlib.metadata.version("torch")
    assert "CPU" in found["ONNX Runtime"].found
    assert found["GPU"].state == "missing" and "--gpus" in found["GPU"].fix
    assert found["target a100"].found == "tensorrt_rtx (compiled ahead, not run), onnxruntime"
    assert found["target a100"].fix == "tensorrt: only on that card"
    assert {f"target {name}" for name in resources.names("recipes/targets")} <= found.keys()
    assert found["disk, here"].found.endswith("GB free in " + str(__import__("pathlib").Path.cwd()))
    assert all(finding.fix for finding in found.values() if finding.state != "ok")


def test_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: (A100,))
    having(monkeypatch, torch="2.13.0", onnxruntime_gpu="1.32.0", tensorrt="11.2.1.2", tensorrt_cu13="11.2.1.2")
    found = by_subject()
    assert found["GPU 0"].found == "NVIDIA A100-SXM4, SM 8.0, 40 GB, driver 580.65"
    assert found["target a100"].found == "tensorrt (built and run), onnxruntime"
    assert found["target a100"].fix == "tensorrt_rtx: pip install 'dinoexport[rtx]'"
    assert "driver" not in found and "CUDA packages" not in found
    assert "telemetry off" in found["privacy of onnxruntime"].found, "its GPU package has another name"
    assert found["ONNX Runtime"].state == "missing", "a GPU, but no CUDA provider in the ONNX Runtime that is here"


@pytest.mark.parametrize(
    ("packages", "driver", "subject", "words"),
    [
        (
            {"tensorrt_cu13": "11", "nvidia_cudnn_cu12": "9"},
            "580.65",
            "CUDA packages",
            "CUDA 12: nvidia-cudnn-cu12; CUDA 13",
        ),
        ({"tensorrt_cu13": "11"}, "535.1", "driver", "want 580 or newer"),
        ({"tensorrt_cu12": "11"}, "470.1", "driver", "want 525 or newer"),
        ({"onnxruntime": "1", "onnxruntime_gpu": "1"}, "580.65", "ONNX Runtime", "overwrite each other"),
    ],
)
def test_what_is_wrong_comes_with_its_fix_and_fails(
    packages: dict[str, str], driver: str, subject: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: (replace(A100, driver=driver),))
    having(monkeypatch, **packages)
    finding = by_subject()[subject]
    assert finding.state == "wrong" and words in finding.found and finding.fix
    shown = CliRunner().invoke(cli.app, ["doctor", "--json"])
    answer: dict[str, Any] = json.loads(shown.stdout)
    assert shown.exit_code == 4 == answer["exit_code"] and finding.fix == answer["next_step"]
    assert subject in {row["subject"] for row in answer["findings"] if row["state"] == "wrong"}


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DISK_WANTED", 10**18)
    assert "DINOEXPORT_CACHE" in by_subject()["disk, cache"].fix


def test_brackets_survive_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dinoexport[tensorrt]` is an extra, not markup."""
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _: None)
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == 0 and "dinoexport[tensorrt]" in shown.stdout


L4 = Gpu(index=1, name="NVIDIA L4", uuid="GPU-2", compute_capability="8.9", memory_bytes=23_500_000_001, driver="470.1")
DISK_BYTES = 16 * 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[str, str, str]]]:
    """What is found on a machine with these GPUs, packages, providers of ONNX Runtime and free bytes on its disk."""

    def found(
        gpus: tuple[Gpu, ...] = (),
        packages: dict[str, str] | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        free_bytes: int = DISK_BYTES,
    ) -> dict[str, tuple[str, str, str]]:
        having(monkeypatch, **(packages or {}))
        ort = SimpleNamespace(__version__="1.32.0", get_available_providers=lambda: list(providers))
        monkeypatch.setattr(telemetry, "onnxruntime", lambda: ort)
        monkeypatch.setattr(hardware, "gpus", lambda: gpus)
        monkeypatch.setattr(hardware, "installed_engine_runtime", lambda _runtime: None)
        monkeypatch.setattr(shutil, "disk_usage", lambda _place: SimpleNamespace(free=free_bytes))
        return {subject: (f.found, f.state, f.fix) for subject, f in by_subject().items()}

    return found


def test_a_machine_with_nothing_is_told_how_to_get_it(machine: Any) -> None:
    found = machine()
    assert {subject: found[subject] for subject in ("torch", "ONNX Runtime", "OpenVINO", "TensorRT")} == {
        "torch": ("not installed; exports and validates", "missing", "pip install 'dinoexport[export]'"),
        "ONNX Runtime": ("not installed; runs and validates graphs", "missing", "pip install 'dinoexport[cpu]'"),
        "OpenVINO": (
            "not installed; runs graphs on CPUs, also in bf16 if the CPU has it",
            "missing",
            "pip install 'dinoexport[openvino]'",
        ),
        "TensorRT": ("not installed; builds and runs plans", "missing", "pip install 'dinoexport[tensorrt]'"),
    }
    assert found["GPU"][:2] == ("none, or no driver", "missing")
    assert not {"driver", "CUDA packages", "privacy of onnxruntime", "privacy of openvino"} & found.keys()
    assert {place: found[f"disk, {place}"][1] for place in ("here", "cache")} == {"here": "ok", "cache": "ok"}


def test_a_machine_with_everything_has_nothing_to_fix(machine: Any) -> None:
    found = machine(
        (A100,),
        {
            "torch": "2.13.0",
            "onnxruntime_gpu": "1.32.0",
            "openvino": "2026.1",
            "tensorrt": "11.2",
            "tensorrt_rtx": "1.7",
        },
        ("CUDAExecutionProvider", "CPUExecutionProvider"),
    )
    told = {"torch", "ONNX Runtime", "OpenVINO", "TensorRT", "TensorRT-RTX", "GPU 0", "target a100", "target cpu"}
    assert {subject: found[subject] for subject in told} == {
        "torch": ("2.13.0", "ok", ""),
        "ONNX Runtime": ("1.32.0 with CUDA, CPU", "ok", ""),
        "OpenVINO": ("2026.1", "ok", ""),
        "TensorRT": ("11.2", "ok", ""),
        "TensorRT-RTX": ("1.7", "ok", ""),
        "GPU 0": ("NVIDIA A100-SXM4, SM 8.0, 40 GB, driver 580.65", "ok", ""),
        "target a100": ("tensorrt (built and run), tensorrt_rtx (built and run), onnxruntime", "ok", ""),
        "target cpu": ("onnxruntime, openvino", "ok", ""),
    }
    assert found["privacy of onnxruntime"][0].startswith("telemetry off")
    assert found["target l4"] == (
        "tensorrt_rtx (compiled ahead, not run), onnxruntime", "ok", "tensorrt: only on that card"
    )  # fmt: skip


def test_a_gpu_without_its_provider_and_two_onnxruntimes_are_told(machine: Any) -> None:
    assert machine((A100,), {"onnxruntime": "1.32.0"})["ONNX Runtime"] == (
        "1.32.0 with CPU; no CUDA, though a GPU is here",
        "missing",
        "pip uninstall onnxruntime && pip install 'dinoexport[gpu]'",
    )
    assert machine((), {"onnxruntime": "1.32.0"})["ONNX Runtime"] == ("1.32.0 with CPU", "ok", "")
    assert machine((), {"onnxruntime": "1", "onnxruntime_gpu": "1"})["ONNX Runtime"] == (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
        "wrong",
        "pip uninstall onnxruntime onnxruntime-gpu, then install the one you want",
    )


def test_the_first_gpu_is_the_one_that_counts(machine: Any) -> None:
    """Its driver is all GPUs' driver; engines are built and run on it."""
    packages = {"tensorrt": "11.2", "tensorrt_rtx": "1.7", "a_cu13": "1", "b_cu13": "1", "c_cu13": "1", "d_cu13": "1"}
    found = machine((A100, L4), packages)
    assert found["GPU 1"] == ("NVIDIA L4, SM 8.9, 24 GB, driver 470.1", "ok", "")
    assert "driver" not in found and "CUDA packages" not in found
    assert found["target l4"][0] == "tensorrt_rtx (compiled ahead, not run), onnxruntime"
    found = machine((L4, A100), packages | {"e_cu12": "1"})
    assert found["driver"][0] == "470.1; the CUDA packages installed here want 580 or newer"
    assert found["CUDA packages"][0] == "a mix (CUDA 12: e-cu12; CUDA 13: a-cu13, b-cu13, c-cu13)"
    assert found["target l4"][0] == "tensorrt (built and run), tensorrt_rtx (built and run), onnxruntime"
    assert "driver" not in machine((replace(A100, driver=""),)), "where no package wants one, any driver will do"


def test_a_target_that_nothing_here_can_build_for_says_so(machine: Any) -> None:
    machine()
    target = load_target("jetson-orin").model_copy(update={"runtimes": {Runtime.TENSORRT: "runs it"}})
    assert doctor._target(target, ()) == doctor.Finding(
        subject="target jetson-orin", found="nothing", state="missing", fix="tensorrt: only on that card"
    )


def test_a_byte_less_than_the_largest_variant_needs_is_too_little(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, state, fix = machine(free_bytes=DISK_BYTES - 1)["disk, cache"]
    assert found.startswith("16 GB free in ") and state == "missing"
    assert fix == "The largest variant needs 16 GB: free some, or set DINOEXPORT_CACHE or --out"
    monkeypatch.setattr(doctor, "_DISK_WANTED", 2_500_000_001)
    fix = machine(free_bytes=2_500_000_000)["disk, cache"][2]
    assert fix.startswith("The largest variant needs 3 GB: ")
    assert machine(free_bytes=2_500_000_001)["disk, here"][0].startswith("3 GB free in ")

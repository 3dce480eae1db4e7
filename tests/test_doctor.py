"""What the doctor says of machines: this one, and ones that are put together here."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from dinoexport import cli, doctor
from dinoexport.config import resources
from dinoexport.runtime.table import RuntimeFacts
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
    from dataclasses import replace

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

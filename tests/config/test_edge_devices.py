"""Jetson and the system's own TensorRT: found, told apart, and refused where it is known to be wrong."""

from __future__ import annotations

import configparser
import dataclasses
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.config.target import load_target
from dinoexport.errors import MissingRequirement
from dinoexport.pipeline import preflight
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Runtime
from dinoexport.system import hardware

SERVICE = Path(__file__).parents[2] / "serving" / "systemd" / "tritonserver.service"


@pytest.mark.parametrize(
    ("target", "version", "bad"),
    [
        ("jetson-orin", "10.3.0.30", True),
        ("jetson-orin", "10.3.0", True),
        ("jetson-orin", "10.30.0", False),
        ("jetson-orin", "10.13.3.9", False),
        ("jetson-orin", "11.4.1", False),
        ("a100", "10.3.0", False),
    ],
)
def test_known_bad_versions_are_refused_with_the_reason(
    target: str, version: str, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _: version)
    monkeypatch.setattr(preflight, "require", lambda *_: None)
    request: Any = SimpleNamespace(runtime=Runtime.TENSORRT, target=load_target(target))
    if not bad:
        preflight.compiler(request)
        return
    with pytest.raises(MissingRequirement, match=rf"TensorRT {version} is not used .*reported to give wrong outputs"):
        preflight.compiler(request)


def test_a_shared_memory_is_not_the_engines_alone() -> None:
    assert load_target("jetson-orin").memory_for_engine(8 << 30) == 6 << 30
    assert load_target("a100").memory_for_engine(8 << 30) == 8 << 30


def test_tensorrt_of_the_system_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As python3-libnvinfer lays it: a package, without what pip would know of it. Nothing of it is run."""
    folder = tmp_path / "python3" / "dist-packages"
    (folder / "tensorrt").mkdir(parents=True)
    (folder / "tensorrt" / "__init__.py").write_text("raise OSError('loaded')\n__version__ = \"10.13.3.9\"\n")
    pattern = f"{tmp_path}/python3*/dist-packages"
    found = hardware.system_tensorrt([pattern])
    assert found == hardware.SystemTensorRT(folder=folder, version="10.13.3.9", visible=False)
    assert hardware.system_tensorrt([f"{tmp_path}/none*"]) is None
    monkeypatch.setattr(hardware, "system_tensorrt", lambda: found)
    monkeypatch.setattr(hardware, "installed", lambda _: None)
    assert hardware.installed_engine_runtime(Runtime.TENSORRT) is None
    request: Any = SimpleNamespace(runtime=Runtime.TENSORRT, target=load_target("jetson-orin"))
    with pytest.raises(MissingRequirement, match=r"TensorRT 10.13.3.9 is in .*does not see") as refused:
        preflight.compiler(request)
    assert "--system-site-packages" in str(refused.value.next_step)
    seen = dataclasses.replace(found, visible=True)
    monkeypatch.setattr(hardware, "system_tensorrt", lambda: seen)
    assert hardware.installed_engine_runtime(Runtime.TENSORRT) == "10.13.3.9"
    assert hardware.installed_engine_runtime(Runtime.TENSORRT_RTX) is None


class _NotSupported(Exception):
    pass


def test_a_driver_that_knows_neither_memory_nor_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson's: its GPU is there all the same, with the machine's memory."""

    def refuse(_handle: object) -> Any:
        raise _NotSupported

    jetson = SimpleNamespace(
        NVMLError=_NotSupported, NVMLError_NotSupported=_NotSupported, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "540.4.0", nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda _: "Orin (nvgpu)",
        nvmlDeviceGetCudaComputeCapability=lambda _: (8, 7), nvmlDeviceGetUUID=refuse, nvmlDeviceGetMemoryInfo=refuse,
    )  # fmt: skip
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setitem(sys.modules, "pynvml", jetson)
        (gpu,) = hardware.gpus()
        assert (gpu.name, gpu.compute_capability, gpu.uuid) == ("Orin (nvgpu)", "8.7", "")
        assert gpu.memory_bytes == hardware._machine_memory() > 1 << 28
        for words, count in (("0", 1), ("1", 0), ("GPU-1", 0)):
            patch.setenv("CUDA_VISIBLE_DEVICES", words)
            assert len(hardware.gpus()) == count


def test_the_service_file() -> None:
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(SERVICE)
    service = parsed["Service"]
    assert set(parsed) - {"DEFAULT"} == {"Unit", "Service", "Install"}
    words = shlex.split(service["ExecStart"])
    assert words[0].startswith("/") and "--model-repository=/srv/dinoexport/models" in words
    assert "dinoexport check" in service["ExecStartPost"] and service["Restart"] == "on-failure"
    assert service["NoNewPrivileges"] == "yes" and service["ProtectSystem"] == "strict"

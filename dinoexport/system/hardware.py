"""This machine's GPUs, as NVIDIA's driver names them, and its installed packages."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.spec import Runtime

# The packages with each engine's runtime, by their names on PyPI: one for each CUDA, and one that selects one.
ENGINE_DISTRIBUTIONS = {
    Runtime.TENSORRT: ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
    Runtime.TENSORRT_RTX: ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx"),
}
# Debian's, and with it JetPack's and NVIDIA's images': python3-libnvinfer puts the module there, outside of pip.
_SYSTEM_FOLDERS = ("/usr/lib/python3*/dist-packages", "/usr/local/lib/python3*/dist-packages")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that CUDA may use. index: its place in the driver's order, which is that of the PCI bus."""

    index: int
    name: str
    uuid: str
    compute_capability: str
    memory_bytes: int
    driver: str


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA may use, after CUDA_VISIBLE_DEVICES; empty without a GPU or a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        found = [_gpu(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # a driver that was just replaced does not answer until it is loaded again
        return ()
    finally:
        pynvml.nvmlShutdown()
    return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _gpu(index: int, driver: str) -> Gpu:
    """A GPU's facts. A Jetson's driver knows neither its memory, which is the machine's own, nor a UUID."""
    import pynvml

    def told(ask: Callable[[Any], Any], instead: Any) -> Any:
        try:
            return ask(handle)
        except pynvml.NVMLError_NotSupported:
            return instead

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        uuid=told(pynvml.nvmlDeviceGetUUID, ""),
        compute_capability=f"{major}.{minor}",
        memory_bytes=told(lambda of: int(pynvml.nvmlDeviceGetMemoryInfo(of).total), _machine_memory()),
        driver=driver,
    )


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _visible(found: Sequence[Gpu], wanted: str | None) -> tuple[Gpu, ...]:
    """CUDA's own rule: indices or the beginnings of UUIDs, in the order given, up to the first that is not there."""
    if wanted is None:
        return tuple(found)
    visible: list[Gpu] = []
    for word in filter(None, map(str.strip, wanted.split(","))):
        match = [gpu for gpu in found if str(gpu.index) == word or gpu.uuid.startswith(word)]
        if len(match) != 1:
            break
        visible += match
    return tuple(visible)


def installed(package: str) -> str | None:
    """The version of an installed package, by its name on PyPI; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_engine_runtime(runtime: Runtime) -> str | None:
    """The installed version of the runtime of such engines, from any of its packages; None if it is not installed."""
    found = next(filter(None, map(installed, ENGINE_DISTRIBUTIONS[runtime])), None)
    if found is None and runtime is Runtime.TENSORRT and (system := system_tensorrt()) and system.visible:
        return system.version
    return found


@dataclass(frozen=True, kw_only=True)
class SystemTensorRT:
    """TensorRT's Python module as JetPack or an image brings it. visible: whether this environment sees its folder."""

    folder: Path
    version: str
    visible: bool


def system_tensorrt(folders: Sequence[str] = _SYSTEM_FOLDERS) -> SystemTensorRT | None:
    """TensorRT in the system's own Python folders; None when there is none. Nothing of it is loaded."""
    for pattern in folders:
        for name in sorted(glob.glob(f"{pattern}/tensorrt/__init__.py")):  # noqa: PTH207 (the pattern is absolute)
            path = Path(name)
            said = re.search(r"^__version__ = ['\"](\d[\w.]*)['\"]", path.read_text(errors="replace"), re.MULTILINE)
            if said:
                folder = path.parent.parent
                return SystemTensorRT(folder=folder, version=said[1], visible=str(folder) in sys.path)
    return None

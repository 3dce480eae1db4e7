"""The package versions that a stage's bytes depend on."""

from __future__ import annotations

import platform

import dinoexport
from dinoexport.pipeline.request import BuildRequest
from dinoexport.report import html_report
from dinoexport.runtime.table import TABLE
from dinoexport.spec import CPU_RUNTIMES, Runtime
from dinoexport.system import hardware

TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
RUNTIMES = (*(name for runtime in CPU_RUNTIMES for name in TABLE[runtime].distributions), "numpy")
QUANTISERS = (*TABLE[Runtime.ONNXRUNTIME].distributions, "onnx", "onnx-ir")
_ABSENT = "not installed"


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of `packages`, and our own."""
    found = {package: hardware.installed(package) or _ABSENT for package in packages}
    return {"dinoexport": dinoexport.__version__} | found


def versions_in(request: BuildRequest) -> dict[str, str]:
    """The versions of all installed packages that a bundle's content may depend on."""
    compilers = (*TABLE[request.runtime].distributions, "polygraphy") if request.engine else ()
    found = versions_of((*TRACERS, *RUNTIMES, "safetensors", "pillow", *html_report.PACKAGES, *compilers)) | {
        "python": platform.python_version()
    }
    return {package: version for package, version in found.items() if version != _ABSENT}

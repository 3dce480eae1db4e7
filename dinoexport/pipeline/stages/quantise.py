"""Stage `quantise`: the exported graphs in the form that each CPU runtime needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dinoexport.graph import quantise
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.versions import QUANTISERS, versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.runtime import autotune
from dinoexport.spec import Precision, Runtime
from dinoexport.system import files

# The same graphs as stages, by runtime.
Forms = Mapping[Runtime, Stage]
# Writes the int8 form that a runtime is fastest with.
_INT8: Mapping[Runtime, Callable[[Path, Path], object]] = {
    Runtime.ONNXRUNTIME: quantise.to_int8,
    Runtime.OPENVINO: quantise.to_wide_int8,
}


def forms_of(work: Workspace, request: BuildRequest, plain: Stage) -> Forms:
    """The graphs by CPU runtime: the export itself, or for int8 a copy quantised for each that is installed."""
    if request.precision is not Precision.INT8 or request.chosen.traced is Precision.INT8:
        return dict.fromkeys(request.cpu_runtimes, plain)
    usable = autotune.runtimes(request.precision, request.cpu_runtimes) or request.cpu_runtimes[:1]
    return {runtime: _quantised(work, plain, _INT8[runtime]) for runtime in usable}


def _quantised(work: Workspace, source: Stage, form: Callable[[Path, Path], object]) -> Stage:
    def make(folder: Path) -> None:
        onnx_files = [file.name for file in source.files if file.name.endswith(".onnx")]
        for done, name in enumerate(onnx_files, start=1):
            form(source.folder / name, folder)
            work.progress("quantising", done, len(onnx_files))
        for file in source.files:  # files beside the graphs for other tools
            if not file.name.endswith((".onnx", ".onnx.data")):
                files.copy(
                    source.folder / file.name, folder / file.name, sha256=file.sha256, size_bytes=file.size_bytes
                )

    return work.stage(
        "quantise", key_of(source=source.key, form=form.__name__, versions=versions_of(QUANTISERS)), make, costly=True
    )

"""ONNX Runtime, on the CPU or through CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinoexport.errors import BuildError, require
from dinoexport.runtime import check_inputs
from dinoexport.spec import Array, Arrays, Graph, Runner


def version() -> str:
    """ONNX Runtime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def has_cuda() -> bool:
    """Whether the ONNX Runtime that is installed has a CUDA provider."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def open_graph(path: Path, graph: Graph, *, cuda: bool = False) -> Runner:
    """A runner of the ONNX file at `path`, on the GPU with `cuda`. fp32 is fp32 there too: TF32 is off.

    Raises BuildError when ONNX Runtime refuses the file, InputRefused from the runner for inputs outside the signature.
    """
    require("cpu", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle threads of several sessions in one process otherwise spin against each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [("CUDAExecutionProvider", {"use_tf32": 0})] if cuda else []
    providers.append("CPUExecutionProvider")  # small integer work on shapes is done there in any case
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its exception classes share no public base but Exception
        raise BuildError(
            f"ONNX Runtime refuses {path.name}: {error}", next_step="dinoexport inspect shows what is in it."
        ) from error
    names = [tensor.name for tensor in graph.outputs]

    def run(arrays: Arrays) -> dict[str, Array]:
        check_inputs(graph, arrays)
        try:
            return dict(zip(names, session.run(names, dict(arrays)), strict=True))
        except Exception as error:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise BuildError(f"ONNX Runtime failed on {shapes}: {error}", next_step="Report it.") from error

    return run

"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path

from dinoexport.errors import BuildError, require
from dinoexport.runtime import check_inputs
from dinoexport.spec import Array, Arrays, Graph, Runner


def version() -> str:
    """ONNX Runtime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def open_graph(path: Path, graph: Graph) -> Runner:
    """A runner of the ONNX file at `path`.

    Raises BuildError when ONNX Runtime refuses the file, InputRefused from the runner for inputs outside the signature.
    """
    require("cpu", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle threads of several sessions in one process otherwise spin against each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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

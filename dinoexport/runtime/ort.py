"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
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
    return _runner(path, path.name, graph, [tensor.name for tensor in graph.outputs])


def open_edited(model: bytes, path: Path, graph: Graph, *, more_outputs: Sequence[str]) -> Runner:
    """A runner of `model`, the file at `path` with `more_outputs`; its weights stay where that file has them."""
    names = [*(tensor.name for tensor in graph.outputs), *more_outputs]
    return _runner(model, path.name, graph, names, weights=path.parent)


def _runner(
    model: Path | bytes, shown: str, graph: Graph, names: Sequence[str], *, weights: Path | None = None
) -> Runner:
    require("cpu", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle threads of several sessions in one process otherwise spin against each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes share no public base but Exception
        raise BuildError(
            f"ONNX Runtime refuses {shown}: {error}", next_step="dinoexport inspect shows what is in it."
        ) from error

    def run(arrays: Arrays) -> dict[str, Array]:
        check_inputs(graph, arrays)
        try:
            return dict(zip(names, session.run(list(names), dict(arrays)), strict=True))
        except Exception as error:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise BuildError(f"ONNX Runtime failed on {shapes}: {error}", next_step="Report it.") from error

    return run

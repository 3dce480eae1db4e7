"""GGUF files, whose tensors are mapped and widened to float32 one at a time when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinoexport.errors import WeightsError, require
from dinoexport.family import Read, Shapes
from dinoexport.spec import Array
from dinoexport.system import untrusted

START = b"GGUF"
# What is widened without loss beyond the file's own; others would need a kernel of their own to be judged against.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def is_gguf(path: Path) -> bool:
    """Whether `path` is a regular file that begins as a GGUF file does."""
    if not untrusted.is_regular(path):
        return False
    with untrusted.opened(path) as file:
        return file.read(len(START)) == START


def metadata(path: Path) -> dict[str, Any]:
    """The file's metadata by key, as plain values. Raises WeightsError for a damaged file."""
    require("export", "gguf")
    from gguf import GGUFReader

    with untrusted.opened(path):
        pass  # a regular file; the reader maps it
    try:
        return {str(name): field.contents() for name, field in GGUFReader(path).fields.items()}
    except Exception as error:  # whatever its parser meets in a damaged file
        raise WeightsError(f"{path} cannot be read as GGUF: {error}.", next_step="Get the file again.") from None


def open_gguf(path: Path) -> tuple[Shapes, Read]:
    """Shapes of the tensors of `path`, outermost first as everywhere here, and what reads one.

    Raises WeightsError for a damaged file and for tensors of a type that is not in `TYPES`.
    """
    require("export", "gguf")
    import gguf

    try:
        tensors: dict[str, Any] = {str(tensor.name): tensor for tensor in gguf.GGUFReader(path, "r").tensors}
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        raise WeightsError(
            f"{path} is damaged or no GGUF file ({type(error).__name__}: {error}).", next_step="Get the file again."
        ) from None
    for name, tensor in tensors.items():
        if tensor.tensor_type.name not in TYPES:
            raise WeightsError(
                f"The tensor {name} of {path} is {tensor.tensor_type.name}.",
                next_step=f"Give a file of {', '.join(TYPES)} tensors.",
            )

    def read(name: str) -> Array:
        import numpy as np

        tensor = tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            widened: Array = np.array(values, np.float32).reshape(shapes[name])  # a copy: the map cannot be written
        except Exception as error:
            raise WeightsError(
                f"The tensor {name} of {path} cannot be read ({error}).", next_step="Get the file again."
            ) from None
        return widened

    return shapes, read

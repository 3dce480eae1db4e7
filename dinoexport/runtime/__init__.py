"""Runtimes: each opens a graph or an engine as a function from named arrays to named arrays.

A runner first checks its inputs against the signature of the graph, so that every runtime refuses the same inputs with
the same message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dinoexport.errors import InputRefused
from dinoexport.spec import Array, Arrays, Dim, Graph, Runner

if TYPE_CHECKING:
    from dinoexport.runtime.decoding import Decoder

# The number of a graph's products (matrix products and convolutions) by arithmetic: {"bf16": 73}.
Arithmetic = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A graph opened by a runtime; a `Runner` itself.

    arithmetic: reads from the runtime which arithmetic it really uses for given inputs. The requested precision proves
    nothing: OpenVINO computes fp32 in bf16 by default, and ONNX Runtime casts fp16 to fp32 around every product. begin:
    starts sequences whose carried values the runtime keeps itself, if the graph has some and the runtime can.
    """

    run: Runner
    arithmetic: Callable[[Arrays], Arithmetic]
    begin: Callable[[], Decoder] | None = None

    def __call__(self, arrays: Arrays) -> dict[str, Array]:
        """The graph's outputs, by name."""
        return self.run(arrays)


def check_inputs(graph: Graph, arrays: Arrays) -> None:
    """Raises InputRefused if names, dtypes, ranks or dimensions are not the graph's, or a value is NaN or Inf."""
    wanted = {t.name: t for t in graph.inputs if t.default is None or t.name in arrays}
    if wanted.keys() != arrays.keys():
        raise InputRefused(
            f"Inputs are {sorted(arrays)}, the graph {graph.name} takes {sorted(wanted)}.", next_step="Rename them."
        )
    seen: dict[str, int] = {}
    dims = {dim.name: dim for dim in graph.dims}
    for name, tensor in wanted.items():
        array = arrays[name]
        if _name_of(array.dtype) != tensor.dtype or array.ndim != len(tensor.shape):
            raise InputRefused(
                f"{name} is {array.dtype} with {array.ndim} axes, needs {tensor.dtype} {tensor.shape}.",
                next_step=f"{name} is: {tensor.meaning}.",
            )
        for size, expected in zip(array.shape, tensor.shape, strict=True):
            if isinstance(expected, int) and size != expected:
                raise InputRefused(f"{name} has shape {array.shape}, needs {tensor.shape}.", next_step="Reshape it.")
            if isinstance(expected, str):
                if seen.setdefault(expected, size) != size:
                    raise InputRefused(
                        f"The inputs disagree on {expected}: {seen[expected]} and {size}.", next_step="Make them agree."
                    )
                _check_dim(expected, size, dims)
    import numpy as np

    # Carried values come from the graph itself, and checking a whole cache would take longer than a step.
    for name, array in arrays.items():
        if name not in graph.carried and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputRefused(f"{name} holds NaN or Inf.", next_step="Check how it was computed.")


@lru_cache
def _name_of(dtype: object) -> str:
    """The type's name, which numpy composes each time: half of this check for a decoder's step, 67 to 35 µs."""
    return str(dtype)


def _check_dim(name: str, size: int, dims: Mapping[str, Dim]) -> None:
    dim = dims.get(name)
    if dim is None:
        return
    if not dim.min <= size <= dim.max:
        raise InputRefused(f"{name} {size} is outside {dim.min} to {dim.max}.", next_step="Resize or split the input.")
    if size % dim.multiple_of:
        below = size // dim.multiple_of * dim.multiple_of
        nearest = [s for s in (below, below + dim.multiple_of) if dim.min <= s <= dim.max]
        raise InputRefused(
            f"{name} {size} is not a multiple of {dim.multiple_of}.",
            next_step=f"The nearest legal sizes are {' and '.join(map(str, nearest))}.",
        )

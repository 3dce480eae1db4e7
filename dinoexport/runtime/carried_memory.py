"""What a graph that carries state needs of memory: for each token, for a context, and how long one may get here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dinoexport.spec import Graph

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class CarriedMemory:
    """Bytes that a sequence's state takes. a_token: more for each token; context: the most tokens it may have.

    whole: for a sequence of that many.
    """

    a_token: int
    context: int

    @property
    def whole(self) -> int:
        """For the longest sequence there may be."""
        return self.a_token * self.context

    def longest(self, memory_bytes: int) -> int:
        """How many tokens so much memory holds, up to the context."""
        return max(0, min(self.context, memory_bytes // self.a_token))

    def facts(self, weight_bytes: int, memory_bytes: int | None) -> Mapping[str, str]:
        """The same in words, on a machine with so much memory for weights and state."""
        shown = {
            "memory of the weights": f"{weight_bytes / 1e9:.2f} GB",
            "cache": f"{self.a_token / 1e3:.1f} kB a token, {self.whole / 1e9:.2f} GB for {self.context} tokens",
        }
        if memory_bytes is not None:
            longest = self.longest(memory_bytes - weight_bytes)
            shown["largest context here"] = (
                f"{longest} tokens of one sequence in the {memory_bytes / 1e9:.1f} GB that are free"
                if longest
                else f"none: the weights do not fit the {memory_bytes / 1e9:.1f} GB that are free"
            )
        return shown


def of(graph: Graph) -> CarriedMemory | None:
    """What a sequence of `graph` takes; None for a graph that carries nothing."""
    tensors = [tensor for tensor in graph.inputs if tensor.name in graph.carried]
    if not tensors:
        return None
    growing = {size for tensor in tensors for size in tensor.shape if isinstance(size, str)} - {_BATCH}
    (past,) = growing
    total = sum(
        _BYTES[tensor.dtype] * math.prod(size for size in tensor.shape if isinstance(size, int)) for tensor in tensors
    )
    totals = [dim.max for dim in graph.dims if dim.name == "total"]
    pasts = [dim.max for dim in graph.dims if dim.name == past]
    return CarriedMemory(a_token=total, context=(totals or pasts)[0])

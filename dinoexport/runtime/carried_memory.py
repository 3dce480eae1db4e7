"""Memory for a graph that carries state: for each token, for a whole context, and the longest context that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dinoexport.spec import Graph

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class CarriedMemory:
    """Bytes of a sequence's state. a_token: bytes for each token; context: the largest number of tokens."""

    a_token: int
    context: int

    @property
    def whole(self) -> int:
        """For the longest sequence."""
        return self.a_token * self.context

    def longest(self, memory_bytes: int) -> int:
        """The number of tokens whose state fits this much memory, at most the context."""
        return max(0, min(self.context, memory_bytes // self.a_token))

    def facts(self, weight_bytes: int, memory_bytes: int | None) -> Mapping[str, str]:
        """The same in words, for a machine with this much memory for weights and state."""
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

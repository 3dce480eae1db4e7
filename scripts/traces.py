"""Trace the pieces of shipped recipes and pack the traces into the package: `python -m scripts.traces [--check]`.

An export that finds its pieces there needs no torch. They are found by the hash of the code that traces them and of the
tracer's packages, so a change of either leaves them unused until this is run again; `make traces` does. With --check
nothing is written: it ends with 1 where the package holds other traces than those made now.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from dinoexport.config import recipe
from dinoexport.family import Piece, find
from dinoexport.graph import tracer, traces
from dinoexport.spec import Precision

# Whose traces the package brings; an export of anybody's own recipe traces once and keeps that in the cache.
VARIANTS = recipe.variants()
# What graphs are traced in: int8 and int4 are made of these, and so is bf16 on a CPU.
PRECISIONS = (Precision.FP32, Precision.FP16)


def pieces(*names: str) -> Iterator[Piece]:
    """Every piece of the recipes with these names."""
    for name in names:
        loaded = recipe.load(name)
        for precision in PRECISIONS:
            model = find(loaded.family).model(loaded.changed(precision=precision))
            for graph in model.graphs:
                yield from {call.piece.name: call.piece for call in model.calls(graph, _unread)}.values()


def _unread(name: str) -> object:
    raise AssertionError(f"tracing read the weight {name}")


def _said(piece: Piece) -> bytes:
    print(piece.name, flush=True)
    return tracer.trace(piece)


def main() -> int:
    """Writes the traces, or compares them."""
    content = traces.packed(pieces(*VARIANTS), _said)
    if "--check" not in sys.argv[1:]:
        traces.SHIPPED.write_bytes(content)
        print(f"{traces.SHIPPED}: {len(content):,} bytes")
        return 0
    if traces.SHIPPED.read_bytes() == content:
        return 0
    print(f"{traces.SHIPPED} does not hold what is traced now: make traces", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Trace the pieces of shipped recipes and their heads and pack the traces into the package.

    python -m scripts.traces [--check]

An export that finds its pieces there needs no torch. They are found by the hash of the code that traces them and of the
tracer's packages, so a change of either leaves them unused until this is run again; `make traces` does. With --check
nothing is written: it ends with 1 where the package holds other traces than those made now.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from dinoexport.config import recipe
from dinoexport.family import Piece, find
from dinoexport.graph import tracer, traces
from dinoexport.spec import Precision

# Whose traces the package brings; an export of anybody's own recipe traces once and keeps that in the cache.
VARIANTS = recipe.variants()
# What graphs are traced in: int8 and int4 are made of these, and so is bf16 on a CPU.
PRECISIONS = (Precision.FP32, Precision.FP16)


def pieces(*names: str) -> Iterator[Piece]:
    """Every piece of the recipes with these names, alone and with each of their published heads."""
    for name in names:
        loaded = recipe.load(name)
        for built in (loaded, *map(loaded.with_head, loaded.heads)):
            for precision in PRECISIONS:
                model = find(built.family).model(built.changed(precision=precision))
                for graph in model.graphs:
                    yield from {call.piece.name: call.piece for call in model.calls(graph, _unread)}.values()


def _unread(name: str) -> object:
    raise AssertionError(f"tracing read the weight {name}")


def traced(wanted: dict[str | None, Piece]) -> dict[str | None, bytes]:
    """The trace of each piece by its key, several at once: all take 20 minutes of CPU time."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        made = {}
        for (key, piece), content in zip(wanted.items(), pool.map(tracer.trace, wanted.values()), strict=True):
            print(piece.name, flush=True)
            made[key] = content
    return made


def main() -> int:
    """Writes the traces, or compares them."""
    wanted = {traces.key_of(piece): piece for piece in pieces(*VARIANTS)}
    made = traced(wanted)
    content = traces.packed(wanted.values(), lambda piece: made[traces.key_of(piece)])
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

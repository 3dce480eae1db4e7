"""A classic plan's header and nothing more, where a test compiles without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinoexport.engines import builder


def written(graph: Any, folder: Path, *, capabilities: tuple[str, ...], content: bytes) -> builder.BuiltEngine:
    """The facts of a plan of `graph` that is written into `folder`, with `content` behind its header."""
    path, log = folder / f"{graph.name}.plan", folder / f"{graph.name}.plan.log"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([11, 2, 1, 2]) + content)
    log.write_text("compiled")
    return builder.BuiltEngine(
        path=path, log=log, runtime_version="11.2.1.2", compute_capabilities=capabilities,
        size_bytes=path.stat().st_size, weight_bytes=None, scratch_bytes=1, attentions=3, fused_attentions=3,
        build_s=1.0, peak_memory_bytes=1,
    )  # fmt: skip

"""Every variant compiled to an fp16 TensorRT-RTX engine for SM 8.0, one at a time: `make engines`.

Prints seconds, peak memory of the compiler's process, sizes and fused attention. No GPU is needed, and nothing is run
on one. Needs 8 GB of memory and 8 GB of disk for ViT-g.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from dinoexport.config import recipe
from dinoexport.engines import builder
from dinoexport.graph.onnx_writer import export
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Precision, Runtime, silent
from dinoexport.weights.checkpoint import open_checkpoint

HEADER = ("variant", "compile s", "peak MB", "engine MB", "weights MB", "scratch MB", "fused attention")


def row(variant: str) -> tuple[object, ...]:
    """One line of the table."""
    request = pipeline.build_request(
        variant, weights="synthetic:0", precision=Precision.FP16, target="a100", runtime=Runtime.TENSORRT_RTX
    )
    checkpoint = open_checkpoint(request.model, request.recipe, request.weights, progress=silent)
    with tempfile.TemporaryDirectory() as name:
        folder, (graph,) = Path(name), request.model.graphs
        onnx, _ = export(graph, request.model.calls(graph, checkpoint.read), folder, metadata={})
        made = builder.build(
            onnx,
            graph,
            folder,
            runtime=request.runtime,
            profiles=request.engine.profiles[graph.name],
            compute_capabilities=request.chosen.target.compute_capabilities,
        )
    return (
        variant,
        f"{made.build_s:.1f}",
        made.peak_memory_bytes // 10**6,
        f"{made.size_bytes / 1e6:.1f}",
        f"{(made.weight_bytes or 0) / 1e6:.1f}",
        f"{made.scratch_bytes / 1e6:.0f}",
        f"{made.fused_attentions} of {made.attentions}",
    )


def main(variants: tuple[str, ...]) -> None:
    """Prints a Markdown table, line by line as it grows."""
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for variant in variants:
        print("| " + " | ".join(map(str, row(variant))) + " |", flush=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or recipe.variants())

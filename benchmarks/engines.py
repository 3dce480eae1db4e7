"""Every variant, and every head of some, compiled to TensorRT-RTX engines for SM 8.0, one at a time: `make engines`.

Prints seconds, peak memory of the compiler's process, sizes and fused attention. No GPU is needed, and nothing is run
on one. Needs 8 GB of memory and 8 GB of disk for ViT-g. Models can be named: `VARIANT` or `VARIANT:HEAD`.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from dinoexport.config import recipe
from dinoexport.engines import builder
from dinoexport.graph import onnx_writer, traces
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline import preflight
from dinoexport.spec import Precision, Runtime

HEADER = ("model", "compile s", "peak MB", "engine MB", "weights MB", "scratch MB", "fused attention")
# What fits the compiler's memory here; a language model's engines have caches, and are measured in its own tests.
_LARGEST_BYTES = 3 * 10**9
_ALL_HEADS_OF = ("vits14", "vitb14")


def models() -> tuple[str, ...]:
    """Every variant that fits, and the heads of two of them, as `VARIANT` and `VARIANT:HEAD`."""
    fitting = [name for name in recipe.variants() if preflight.stored_bytes(_request(name)) <= _LARGEST_BYTES]
    return (*fitting, *(f"{name}:{head}" for name in _ALL_HEADS_OF for head in recipe.load(name).heads))


def _request(model: str, precision: Precision = Precision.FP16) -> pipeline.BuildRequest:
    variant, _, head = model.partition(":")
    return pipeline.build_request(
        variant,
        weights="synthetic:0",
        head=head or None,
        head_weights="synthetic:0" if head else None,
        precision=precision,
        target="a100",
        runtime=Runtime.TENSORRT_RTX,
    )


def row(model: str, precision: Precision) -> tuple[object, ...]:
    """One line of the table."""
    request = _request(model, precision)
    trace = partial(onnx_writer.traced, trace=traces.of)
    with tempfile.TemporaryDirectory() as name:
        folder, (graph,) = Path(name), request.model.graphs
        calls = request.model.calls(graph, lambda name: request.model.synthetic(name, 0))
        onnx = onnx_writer.export(graph, calls, folder, metadata={}, trace=trace).onnx
        made = builder.build(
            onnx,
            graph,
            folder,
            runtime=request.runtime,
            profiles=request.engine.profiles[graph.name],
            compute_capabilities=request.chosen.target.compute_capabilities,
        )
    return (
        model,
        f"{made.build_s:.1f}",
        made.peak_memory_bytes // 10**6,
        f"{made.size_bytes / 1e6:.1f}",
        f"{(made.weight_bytes or 0) / 1e6:.1f}",
        f"{made.scratch_bytes / 1e6:.0f}",
        f"{made.fused_attentions} of {made.attentions}",
    )


def main() -> None:
    """Prints a Markdown table, line by line as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="VARIANT[:HEAD]")
    parser.add_argument("--precision", type=Precision, default=Precision.FP16)
    given = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for model in given.models or models():
        print("| " + " | ".join(map(str, row(model, given.precision))) + " |", flush=True)


if __name__ == "__main__":
    main()

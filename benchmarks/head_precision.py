"""What heads lose in lower precisions: `python -m benchmarks.head_precision [--head HEAD] [--precision fp16]`.

Builds ViT-S with a head of each form, and Depth Anything V2 Small, in each precision a CPU can judge, and prints the
worst of each figure over all cases: the limits in `validate/dinov2_heads.toml` come from here. DPT heads read tokens
before the final norm, where trained models have massive activations, so they are built with `synthetic-stress` too.
Speed plays no part: int8 and bf16 that are slower here than fp32 are measured all the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Precision, Runtime
from dinoexport.validation.judge import Report

MODELS = ("vits14:linear4", "vits14:nyu_linear4", "vits14:ade20k_ms", "vits14:nyu_dpt", "depth-anything-v2-vits")
STRESSED = ("vits14:nyu_dpt", "depth-anything-v2-vits")
# How each precision is judged on a CPU: fp16 by ONNX Runtime, which rounds as a GPU does; bf16 by OpenVINO's own.
RUNTIMES = {
    Precision.FP16: (Runtime.ONNXRUNTIME,),
    Precision.BF16: (Runtime.OPENVINO,),
    Precision.INT8: (Runtime.ONNXRUNTIME, Runtime.OPENVINO),
}
HEADER = ("model", "weights", "precision", "runtime", "output", "worst figures", "verdict")
LARGEST = ("relative_l2", "worst_l2", "largest_difference")


def judged(model: str, weights: str, precision: Precision, runtime: Runtime, folder: Path) -> Report:
    """The report of one build, whether it passed or not."""
    variant, _, head = model.partition(":")
    request = pipeline.build_request(
        variant,
        weights=weights,
        head=head or None,
        head_weights="synthetic:0" if head else None,
        precision=precision,
        target="cpu",
        runtime=runtime,
        out=folder,
    )
    try:
        made = pipeline.build(request)
    except pipeline.Rejected as rejected:
        return rejected.report
    assert made.report is not None
    return made.report


def rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """(output, its worst figures and the times PyTorch's own error, what failed) over all cases."""
    for output in sorted({row.output for row in report.rows if row.output != "(refusal)"}):
        worst: dict[str, float] = {}
        times = 0.0
        of_output = [row for row in report.rows if row.output == output]
        for row in of_output:
            figures = {bound.figure: bound.value for bound in row.bounds} | dict(row.figures)
            for name, value in figures.items():
                worst[name] = (max if name in LARGEST else min)(worst.get(name, value), value)
            own = [b for b in row.bounds if b.figure == "relative_l2"][1:]  # the second is twice PyTorch's own error
            times = max([times, *(2 * b.value / b.limit for b in own if b.limit)])
        said = [f"{name} {value:.3g}" for name, value in worst.items()]
        failed = sorted({f"{row.case}: {b.figure}" for row in of_output for b in row.bounds if not b.holds})
        if times:
            said.append(f"{times:.2f} of PyTorch's own")
        yield output, ", ".join(said), "passed" if not failed else "; ".join(failed[:3])


def main() -> None:
    """Prints a Markdown table, line by line as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--precision", action="append", type=Precision, choices=list(RUNTIMES))
    given = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for model in given.model or MODELS:
        for weights in ("synthetic:0", "synthetic-stress:0")[: 1 + (model in STRESSED)]:
            for precision in given.precision or RUNTIMES:
                for runtime in RUNTIMES[precision]:
                    with tempfile.TemporaryDirectory() as scratch:
                        report = judged(model, weights, precision, runtime, Path(scratch) / "bundle")
                    for row in rows(report):
                        cells = (model, weights, precision, runtime, *row)
                        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

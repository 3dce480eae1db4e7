"""What heads lose in lower precisions: `python -m benchmarks.head_precision`.

ViT-S with a head of each form, and Depth Anything V2 Small, in each precision that a CPU runs, against PyTorch fp32 on
the cases of `validate/dinov2_heads.toml`; prints the worst of each figure. The limits in that file come from here. DPT
heads read the residual stream, where trained models have massive activations, so they are run with `synthetic-stress`
weights too. Nothing is timed, so a busy machine changes no figure.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from dinoexport.family import Model, Read
from dinoexport.graph import onnx_writer, quantise, traces
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import runners
from dinoexport.spec import Array, Arrays, Candidate, Precision, Runtime, Way, silent
from dinoexport.validation import evaluate
from dinoexport.validation.judge import Report
from dinoexport.weights.checkpoint import open_checkpoint

MODELS = ("vits14:linear4", "vits14:nyu_linear4", "vits14:ade20k_ms", "vits14:nyu_dpt", "depth-anything-v2-vits")
STRESSED = ("vits14:nyu_dpt", "depth-anything-v2-vits")
# fp16 graphs run in ONNX Runtime; int8 has a form for each runtime. Few CPUs have bf16, but PyTorch computes in it on
# all: the plain formulation with every value of the backbone, and of a DPT head, in bf16.
WAYS: tuple[tuple[Precision, Runtime | None], ...] = (
    (Precision.FP16, Runtime.ONNXRUNTIME),
    (Precision.INT8, Runtime.ONNXRUNTIME),
    (Precision.INT8, Runtime.OPENVINO),
    (Precision.BF16, None),
)
LARGE = ("native", "photograph_own_size")
HEADER = ("model", "weights", "precision", "in", "output", "worst figures", "verdict")
LARGEST = ("relative_l2", "worst_l2", "largest_difference")


def reports(
    model: str, weights: str, precisions: Collection[Precision], *, without: Collection[str]
) -> Iterator[tuple[Precision, str, Report]]:
    """(precision, what ran, its report) for each way to run the model; the reference is computed once."""
    variant, _, head = model.partition(":")
    reference = None
    for precision, runtime in ((p, r) for p, r in WAYS if p in precisions):
        request = pipeline.build_request(
            variant,
            weights=weights,
            head=head or None,
            head_weights="synthetic:0" if head else None,
            precision=precision,
            target="cpu",
            runtime=runtime,
        )
        built = request.model
        checkpoint = open_checkpoint(built, request.recipe, weights, head_source=request.head_weights, progress=silent)
        limits = request.limits.changed(times_own_error_max=None)
        if reference is None:
            reference = evaluate.compute_reference(
                built,
                checkpoint,
                [case for case in request.cases if case.name not in without],
                limits,
                precision=Precision.FP32,
                judge_code="plain",
                kinds=evaluate.kinds_of(built.graphs),
            )
        with tempfile.TemporaryDirectory() as name:
            candidate = _candidate(built, checkpoint.read, precision, runtime, Path(name))
            yield (
                precision,
                "PyTorch" if runtime is None else str(runtime),
                evaluate.judged(candidate, replace(reference, limits=limits), model),
            )


def _candidate(model: Model, read: Read, precision: Precision, runtime: Runtime | None, folder: Path) -> Candidate:
    """The model in `runtime` from files in `folder`; without a runtime, PyTorch's plain formulation."""
    if runtime is None:

        def plain(inputs: Arrays) -> dict[str, Array]:
            (answer,) = model.reference(read, [inputs], precision=precision, progress=silent)
            return {name: array for name, array in answer.items() if "/" not in name}

        return plain
    (graph,) = model.graphs
    trace = partial(onnx_writer.traced, trace=traces.of)
    path = onnx_writer.export(graph, model.calls(graph, read), folder, metadata={}, trace=trace).onnx
    if precision is Precision.INT8:
        (folder / "int8").mkdir()
        form = quantise.to_wide_int8 if runtime is Runtime.OPENVINO else quantise.to_int8
        path, _ = form(path, folder / "int8")
    return runners.open_candidate(model, {path: graph}, Way(runtime=runtime, precision=precision))


def rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """(output, its worst figures, what failed) over all cases."""
    for output in sorted({row.output for row in report.rows if row.output != "(refusal)"}):
        worst: dict[str, float] = {}
        of_output = [row for row in report.rows if row.output == output]
        for row in of_output:
            for name, value in ({bound.figure: bound.value for bound in row.bounds} | dict(row.figures)).items():
                worst[name] = (max if name in LARGEST else min)(worst.get(name, value), value)
        failed = sorted({f"{row.case}: {b.figure}" for row in of_output for b in row.bounds if not b.holds})
        problems = [row.problem for row in of_output if row.problem]
        said = ", ".join(f"{name} {value:.6g}" for name, value in worst.items())
        yield output, said, "; ".join([*failed, *problems][:3]) or "passed"


def main() -> None:
    """Prints a Markdown table, line by line as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--weights", action="append", help="synthetic:SEED or synthetic-stress:SEED")
    parser.add_argument("--precision", action="append", type=Precision)
    parser.add_argument("--quick", action="store_true", help=f"leave out the large cases: {', '.join(LARGE)}")
    parser.add_argument("--without", action="append", default=[], help="a case to leave out, repeatable")
    given = parser.parse_args()
    without = (*given.without, *(LARGE if given.quick else ()))
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for model in given.model or MODELS:
        for weights in given.weights or ("synthetic:0", "synthetic-stress:0")[: 1 + (model in STRESSED)]:
            precisions = given.precision or list(Precision)
            for precision, ran, report in reports(model, weights, precisions, without=without):
                for row in rows(report):
                    cells = (model, weights, precision, ran, *row)
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

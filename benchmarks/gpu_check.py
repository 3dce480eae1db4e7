"""Everything about speed and truth that wants a GPU, in one command and one table: `python benchmarks/gpu_check.py`.

For each variant, size and batch: PyTorch eager and compiled, ONNX Runtime, TensorRT and TensorRT-RTX where they are
present, in fp16 on the GPU. Each is timed from host memory to host memory, as a server would be. Every image of every
batch is judged as a bundle is, by a reference.npz with PyTorch's fp32 outputs and the bundle's limits, but for the one
that PyTorch's own fp16 sets, which a CPU takes too long for. A fast wrong answer is marked wrong. Without a GPU it runs
the CPU's rows in fp32, and says what it left out. `--out FILE` has each row as soon as it is known: what breaks later
loses none. After `--minutes` nothing new is begun, and what is left is listed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.recipe import Range
from dinoexport.engines import builder, profiles
from dinoexport.errors import DinoexportError
from dinoexport.graph.onnx_writer import export
from dinoexport.models.dinov2 import reference
from dinoexport.models.dinov2.synthetic import pixels
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import ort, trt
from dinoexport.runtime.table import TABLE
from dinoexport.spec import Arrays, Case, Expectation, Graph, Precision, Runtime, silent
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu
from dinoexport.validation import evaluate
from dinoexport.validation.judge import judge
from dinoexport.weights.checkpoint import open_checkpoint

HEADER = (
    "variant", "size", "batch", "runtime", "ms", "spread", "images/s", "share of peak", "of memory speed",
    "clock, power", "relative L2", "tokens",
)  # fmt: skip
# The small ones first: what the time does not reach is of the largest.
VARIANTS = ["vits14", "vitb14", "vitl14", "vitg14"]
WARM_UPS, SECONDS = 3, 1.0
# What one runtime's failure may be; the others' rows are wanted all the same.
FAILURES = (DinoexportError, RuntimeError, OSError, ValueError)
DEVICE = "cuda"
COPIED_ITEMS = 1 << 26
DISTINCT = 2  # images of each size that PyTorch answers; a batch holds them in turn
Runs = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One variant, exported, with the reference that judges it: a case for each size."""

    name: str
    request: pipeline.BuildRequest
    read: Callable[[str], Any]
    onnx: Path
    graph: Graph
    reference: Reference


def exported(name: str, precision: Precision, folder: Path, largest_batch: int, sizes: Sequence[int]) -> Variant:
    """The variant's ONNX with synthetic weights, for batches up to `largest_batch`, and its reference at `sizes`."""
    request = pipeline.build_request(name, weights="synthetic:0", precision=precision, target="cpu")
    ranges = {**request.recipe.profile, "batch": Range(min=1, opt=min(8, largest_batch), max=largest_batch)}
    model: Any = request.model
    model = replace(model, recipe=request.recipe.model_copy(update={"profile": ranges}))
    checkpoint = open_checkpoint(model, request.recipe, request.weights, progress=silent)
    (graph,) = model.graphs
    onnx = export(graph, model.calls(graph, checkpoint.read), folder, metadata={}).onnx
    cases = [
        Case(name=str(size), why=f"{DISTINCT} noise images", inputs={"pixels": pixels(DISTINCT, size, size, size)})
        for size in sizes
    ]
    limits = request.limits.model_copy(update={"times_own_error_max": None})
    made = evaluate.compute_reference(
        request.model,
        checkpoint,
        cases,
        limits,
        precision=precision,
        judge_code="plain",
        kinds=evaluate.kinds_of((graph,)),
    )
    reference_file.write(folder / bundle.REFERENCE, made)
    read = reference_file.read(folder / bundle.REFERENCE)
    return Variant(name=name, request=request, read=checkpoint.read, onnx=onnx, graph=graph, reference=read)


def contenders(
    variant: Variant, gpu: Gpu | None, folder: Path, notes: list[str], until: float, wanted: Sequence[str]
) -> Iterator[tuple[str, Runs]]:
    """Each runtime that is present and in `wanted`, opened only when it is its turn; one that cannot be is noted.

    `wanted`: words that its name holds; empty for all. None is opened after `until`, on the monotonic clock: to compile
    a large model takes minutes.
    """
    device, dtype = (DEVICE, torch.float16) if gpu else ("cpu", torch.float32)
    openers: dict[str, Callable[[], Runs]] = {
        "PyTorch eager": lambda: in_torch(variant, device, dtype, lambda function: function)
    }
    if gpu:
        openers["PyTorch compiled"] = lambda: in_torch(variant, device, dtype, torch.compile)
    if gpu and not ort.has_cuda():
        notes.append(f"{variant.name}: ONNX Runtime CUDA, which is not installed")
    else:
        openers[f"ONNX Runtime {'CUDA' if gpu else 'CPU'}"] = lambda: ort.open_graph(
            variant.onnx, variant.graph, cuda=bool(gpu)
        )
    for runtime in (runtime for runtime in Runtime if runtime.has_engine):
        if gpu is None or TABLE[runtime].installed_version() is None:
            notes.append(f"{variant.name}: {runtime}, for {'it is not installed' if gpu else 'there is no GPU'}")
            continue
        openers[runtime.value] = lambda runtime=runtime, gpu=gpu: built(variant, runtime, gpu, folder)  # type: ignore[misc]
    for name, opened in openers.items():
        if wanted and not any(word in name for word in wanted):
            notes.append(f"{variant.name}: {name}: not asked for")
            continue
        if time.monotonic() > until:
            notes.append(f"{variant.name}: {name}: the time was over")
            continue
        try:
            run = opened()
        except FAILURES as error:
            notes.append(f"{variant.name}: {name}: {first_line(error)}")
            continue
        yield name, run


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    return (str(error).splitlines() or [repr(error)])[0]


def silent_block(_index: int) -> None:
    """Reports no block as done."""


def in_torch(variant: Variant, device: str, dtype: torch.dtype, prepare: Callable[..., Any]) -> Runs:
    """The plain formulation, its weights on the device."""
    arch: Any = variant.request.model.arch  # type: ignore[attr-defined]
    weights = {name: torch.from_numpy(variant.read(name)).to(device, dtype) for name in arch.tensors}
    last = arch.depth - 1
    tokens_of = reference.tokens_of.__wrapped__  # type: ignore[attr-defined]

    blocks = [last]

    # torch.compile follows functions that stay the same. A method of a dictionary and a lambda of each call's own made
    # torch 2.11 break the graph, compile it again at each call, and after eight times leave it to eager.
    def load(name: str) -> torch.Tensor:
        return weights[name]

    def tokens_of_batch(pixels: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = tokens_of(arch, load, [pixels], blocks=blocks, block_done=silent_block)[0][last]
        return tokens

    function = prepare(tokens_of_batch)
    registers = arch.register_count

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            pixels = torch.from_numpy(inputs["pixels"]).to(device).to(dtype)  # rounded on the GPU, not before the copy
            tokens = function(pixels).float().cpu().numpy()
        named = {"class_token": tokens[:, 0], "patch_tokens": tokens[:, 1 + registers :]}
        return named | ({"register_tokens": tokens[:, 1 : 1 + registers]} if registers else {})

    return run


def built(variant: Variant, runtime: Runtime, gpu: Gpu, folder: Path) -> Runs:
    """An engine for this GPU, over the whole range."""
    whole = profiles.profile(profiles.WHOLE, variant.graph, {})
    made = builder.build(
        variant.onnx,
        variant.graph,
        folder,
        runtime=runtime,
        profiles=[whole],
        compute_capabilities=[gpu.compute_capability],
        gpu=gpu if runtime is Runtime.TENSORRT else None,
    )
    return trt.open_engine(made.path, variant.graph, runtime=runtime, profiles=[whole])


def timed(run: Callable[[], Any]) -> list[float]:
    """Milliseconds of one run after another, after a few to warm up, for a while."""
    for _ in range(WARM_UPS):
        run()
    samples_ms: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(samples_ms) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        run()
        samples_ms.append(1000 * (time.perf_counter() - started))
    return samples_ms


def peak_flops(gpu: Gpu | None) -> float:
    """What this machine reaches in a large matrix product, in the arithmetic that is timed."""
    device, dtype, side = (DEVICE, torch.float16, 8192) if gpu else ("cpu", torch.float32, 2048)
    left = torch.randn(side, side).to(device, dtype)

    def product() -> None:
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / (min(timed(product)) / 1000)


def peak_bytes_per_s(gpu: Gpu | None) -> float:
    """How fast this machine copies memory, counting what is read and what is written."""
    device = DEVICE if gpu else "cpu"
    source = torch.ones(COPIED_ITEMS, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * source.nbytes / (min(timed(copy)) / 1000)


def clock_and_power(gpu: Gpu | None) -> str:
    """The GPU's clock and draw right now, just after it was kept busy."""
    if gpu is None:
        return ""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.index)
        clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        return f"{clock} MHz, {pynvml.nvmlDeviceGetPowerUsage(handle) / 1000:.0f} W"
    except pynvml.NVMLError:
        return "not told"


def flops_per_image(variant: Variant, size: int) -> float:
    """Twice the multiply-adds of one image: patch embedding, projections, attention, feed-forward."""
    arch: Any = variant.request.model.arch  # type: ignore[attr-defined]
    patches = (size // arch.patch_size) ** 2
    tokens = patches + 1 + arch.register_count
    feed_forward = (3 if arch.feed_forward == "swiglu" else 2) * arch.embed_dim * arch.hidden_dim
    block = tokens * (4 * arch.embed_dim**2 + feed_forward) + 2 * tokens**2 * arch.embed_dim
    return 2.0 * (patches * 3 * arch.patch_size**2 * arch.embed_dim + arch.depth * block)


def in_turn(arrays: Arrays, batch: int) -> dict[str, Any]:
    """A batch with the images, or the outputs, of a case in turn."""
    return {name: array[np.arange(batch) % DISTINCT] for name, array in arrays.items()}


def judged(variant: Variant, answer: dict[str, Any], expectation: Expectation, batch: int) -> tuple[str, str]:
    """(the largest relative L2 of an output, verdict) of a whole batch, by the reference."""
    case = replace(expectation.case, inputs={})
    report = judge(
        lambda _: answer,
        [Expectation(case=case, outputs=in_turn(expectation.outputs, batch))],
        [],
        variant.reference.limits,
        candidate_name="candidate",
        reference_name=variant.reference.name,
        kinds=variant.reference.kinds,
    )
    errors = [row.distance.relative_l2 for row in report.rows if row.distance]
    return (f"{max(errors):.1e}" if errors else "", "right" if report.passed else "WRONG")


def rows(arguments: argparse.Namespace, gpu: Gpu | None, notes: list[str]) -> Iterator[tuple[str, ...]]:
    """The table, line by line as it grows."""
    until = time.monotonic() + 60 * arguments.minutes
    peak, memory_speed = peak_flops(gpu), peak_bytes_per_s(gpu)
    precision = Precision.FP16 if gpu else Precision.FP32
    for name in arguments.variants:
        if time.monotonic() > until:
            notes.append(f"{name}: {arguments.minutes} minutes were over")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            variant = exported(name, precision, Path(temporary), max(arguments.batches), arguments.sizes)
            weight_bytes = variant.onnx.with_name(f"{variant.onnx.name}.data").stat().st_size
            shapes = [(e, batch) for e in variant.reference.expectations for batch in arguments.batches]
            for runtime, run in contenders(variant, gpu, Path(temporary), notes, until, arguments.runtimes):
                for expectation, batch in shapes:
                    size = int(expectation.case.name)
                    images = in_turn(expectation.case.inputs, batch)
                    if time.monotonic() > until:
                        notes.append(f"{name} {size} batch {batch}, {runtime}: {arguments.minutes} minutes were over")
                        continue
                    try:
                        answer = run(images)
                        samples_ms = timed(lambda run=run, images=images: run(images))  # type: ignore[misc]
                    except FAILURES as error:
                        notes.append(f"{name} {size} batch {batch}, {runtime}: {first_line(error)}")
                        continue
                    ms = statistics.median(samples_ms)
                    spread = f"{np.percentile(samples_ms, 10):.2f} to {np.percentile(samples_ms, 90):.2f}"
                    rate = 1000 * batch / ms
                    share = rate * flops_per_image(variant, size) / peak
                    of_memory = weight_bytes / (ms / 1000) / memory_speed
                    yield (
                        name, str(size), str(batch), runtime, f"{ms:.2f}", spread, f"{rate:.1f}", f"{share:.0%}",
                        f"{of_memory:.0%}", clock_and_power(gpu), *judged(variant, answer, expectation, batch),
                    )  # fmt: skip
                if hasattr(run, "close"):
                    try:
                        run.close()
                    except FAILURES as error:
                        notes.append(f"{name}, {runtime}: closing it: {first_line(error)}")


def machine_line(gpu: Gpu | None) -> str:
    """What this was measured on."""
    versions = [f"torch {torch.__version__}", f"ONNX Runtime {ort.version()}"]
    engines = {runtime: TABLE[runtime].installed_version() for runtime in Runtime if runtime.has_engine}
    versions += [f"{runtime} {version}" for runtime, version in engines.items() if version]
    where = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU, no GPU"
    if gpu:
        where = f"{gpu.name}, SM {gpu.compute_capability}, driver {gpu.driver}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {where}; {', '.join(versions)}."


def main() -> None:
    """Prints the table and what was left out of it; ends in 1 when any tokens are wrong."""
    gpu = next(iter(hardware.gpus()), None)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=VARIANTS if gpu else VARIANTS[:1])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 518])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32] if gpu else [1])
    parser.add_argument("--runtimes", nargs="+", default=(), help="words of their names; without, all there are")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing new is begun after that")
    arguments = parser.parse_args()
    notes: list[str] = (
        [] if gpu else ["everything that wants a GPU, batches above 1 and the larger variants, unless asked for"]
    )
    out = arguments.out.open("w", buffering=1) if arguments.out else None

    def say(line: str) -> None:
        """On the screen, and in the file at once."""
        print(line, flush=True)
        if out:
            print(line, file=out, flush=True)

    for line in (machine_line(gpu), "", "| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)):
        say(line)
    wrong = False
    try:
        for row in rows(arguments, gpu, notes):
            wrong |= row[-1] == "WRONG"
            say("| " + " | ".join(row) + " |")
    finally:
        for line in ("", "Left out:", *(f"- {note}" for note in notes)) if notes else ():
            say(line)
        if out:
            out.close()
    sys.exit(wrong)


if __name__ == "__main__":
    main()

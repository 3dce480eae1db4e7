"""Heads in time and memory, and whole models beside transformers': `python -m benchmarks.heads`.

It runs in the environment of the peers, as `make bench` starts it. Each graph answers for one 518x518 image in ONNX
Runtime, one sample of each in turn; ratios are medians of the samples'. A head's memory is what its operators write,
counted by ONNX Runtime's profile. transformers' models have the widths of the released ones and random weights; optimum
exports them, and Depth Anything, which optimum does not know, torch.onnx's TorchScript exporter, which optimum uses
too. Writes results/heads.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dinoexport import family
from dinoexport.config import recipe
from dinoexport.graph import onnx_writer, traces
from dinoexport.models.dinov2 import synthetic
from dinoexport.runtime import ort, telemetry
from dinoexport.system import timing

RESULTS = Path(__file__).parent / "results" / "heads.md"
NATIVE = 518
HEADS = ("linear", "linear4", "nyu_linear", "nyu_linear4", "nyu_dpt", "ade20k_linear", "ade20k_ms")
BACKBONE = "vits14, tokens"
DEPTH_ANYTHING = "depth-anything-v2-vits"
# Ours -> the class of transformers that is the same model.
PEERS = {
    "vits14, linear": "Dinov2ForImageClassification",
    "vits14, nyu_dpt": "DPTForDepthEstimation",
    DEPTH_ANYTHING: "DepthAnythingForDepthEstimation",
}


# Class of transformers -> optimum's name of the task.
OPTIMUM = {"Dinov2ForImageClassification": "image-classification", "DPTForDepthEstimation": "depth-estimation"}


def ours(variant: str, head: str | None, folder: Path) -> Path:
    """The variant with the head, or as it is, as ONNX with synthetic weights."""
    loaded = recipe.load(variant)
    model = family.find(loaded.family).model(loaded if head is None else loaded.with_head(head))
    (graph,) = model.graphs
    folder.mkdir()
    calls = model.calls(graph, lambda name: model.synthetic(name, 0))
    trace = partial(onnx_writer.traced, trace=traces.of)
    onnx_writer.export(graph, calls, folder, metadata={}, trace=trace)
    return folder / f"{graph.name}.onnx"


def theirs(of: str, side: int, folder: Path) -> Path:
    """A model of transformers on ViT-S, as facebook/dpt-dinov2-small-nyu is configured, as ONNX. of: its class."""
    import torch
    import transformers

    small = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": NATIVE,
        "patch_size": 14,
    }
    spread = {"out_indices": [3, 6, 9, 12], "reshape_hidden_states": False}
    widths = [48, 96, 192, 384]
    if of == "Dinov2ForImageClassification":
        config: Any = transformers.Dinov2Config(**small, num_labels=1000)
    elif of == "DPTForDepthEstimation":
        config = transformers.DPTConfig(
            backbone_config=transformers.Dinov2Config(**small, **spread, apply_layernorm=False),
            use_pretrained_backbone=False, is_hybrid=False, hidden_size=384, neck_hidden_sizes=widths,
            fusion_hidden_size=256, readout_type="project", reassemble_factors=[4, 2, 1, 0.5],
            use_batch_norm_in_fusion_residual=False, use_bias_in_fusion_residual=False, add_projection=True,
        )  # fmt: skip
    else:
        config = transformers.DepthAnythingConfig(
            backbone_config=transformers.Dinov2Config(**small, **spread, apply_layernorm=True),
            reassemble_hidden_size=384, neck_hidden_sizes=widths, fusion_hidden_size=64, head_hidden_size=32,
        )  # fmt: skip
    model = getattr(transformers, of)(config).eval()
    folder.mkdir()
    path = folder / "model.onnx"
    if of in OPTIMUM:
        from optimum.exporters.onnx import main_export

        model.save_pretrained(folder / "checkpoint")
        transformers.BitImageProcessor().save_pretrained(folder / "checkpoint")  # optimum's exporter looks for one
        where = str(folder / "checkpoint")
        main_export(where, output=folder, task=OPTIMUM[of], do_validation=False, height=side, width=side)
        return path
    with torch.inference_mode():
        torch.onnx.export(
            model, (torch.zeros(1, 3, side, side),), path, input_names=["pixels"], dynamo=False, opset_version=17
        )
    return path


def session(path: Path, side: int) -> Callable[[], object]:
    """What runs the file once."""
    opened = telemetry.onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = synthetic.pixels(1, side, side, seed=0)
    return lambda: opened.run(None, {opened.get_inputs()[0].name: pixels})


def measured(paths: dict[str, Path], rounds: int, side: int) -> dict[str, dict[str, Any]]:
    """For each graph its samples, and what its operators compute and write."""
    taken = timing.in_turn({name: session(path, side) for name, path in paths.items()}, rounds=rounds, budget_s=240.0)
    pixels = synthetic.pixels(1, side, side, seed=0)
    rows = {}
    for name, path in paths.items():
        ran = ort.executed(path, {ort_input(path): pixels})
        rows[name] = {
            "samples": np.array(taken[name].samples_ms),
            "cpu_ms": float(np.median(taken[name].cpu_samples_ms)),
            "written_mb": sum(operator.written_bytes for operator in ran) / 1e6,
            "gflop": sum(operator.flops for operator in ran) / 1e9,
        }
    return rows


def ort_input(path: Path) -> str:
    """The name of the file's one input."""
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


def line(name: str, row: dict[str, Any], base: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """A row of the table: the model against its backbone, and transformers' against the model."""
    samples = row["samples"]
    share = 1 - base["cpu_ms"] / row["cpu_ms"]
    ratio = "" if peer is None else f"{np.median(peer['samples'] / samples):.2f}"
    cpu = "" if peer is None else f"{peer['cpu_ms'] / row['cpu_ms']:.2f}"
    written = "" if peer is None else f"{peer['written_mb'] / row['written_mb']:.2f}"
    return (
        f"| {name} | {np.median(samples):.0f} | {row['cpu_ms']:.0f} | {np.median(samples / base['samples']):.2f} "
        f"| {share:.0%} | {row['written_mb'] - base['written_mb']:.0f} | {row['gflop']:.0f} "
        f"| {ratio} | {cpu} | {written} |"
    )


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=NATIVE, help="height and width of the image; 224 is soon done")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    others = timing.Neighbours()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        paths = {BACKBONE: ours("vits14", None, work / "tokens")}
        paths |= {f"vits14, {head}": ours("vits14", head, work / head) for head in HEADS}
        paths[DEPTH_ANYTHING] = ours(DEPTH_ANYTHING, None, work / "depth_anything")
        paths |= {of: theirs(of, given.side, work / of) for of in PEERS.values()}
        rows = measured(paths, given.rounds, given.side)
    base = rows[BACKBONE]
    shown = [name for name in rows if name not in PEERS.values()]
    lines = [
        "# Heads: time and memory",
        "",
        (
            f"`python -m benchmarks.heads`: ViT-S, one {given.side}x{given.side} image, fp32, ONNX Runtime on "
            f"{os.cpu_count()} CPUs, synthetic weights, {len(base['samples'])} samples of each graph in turn. Other "
            f"processes took {others.share():.0%} of the machine meanwhile. Ratios are medians of the samples' ratios."
        ),
        "",
        (
            "The last three columns: time, CPU time and bytes written of the same model of transformers, exported by "
            "optimum, as multiples of ours. optimum does not export Depth Anything: torch.onnx does, for this one size."
        ),
        "",
        (
            "| model | median ms | CPU ms | times the backbone | head's share of CPU time | head writes, MB | GFLOP "
            "| transformers' time | its CPU time | its bytes |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(line(name, rows[name], base, rows.get(PEERS.get(name, ""))) for name in shown),
    ]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Heads in time and memory, and ViT-S with a DPT head beside transformers': `python -m benchmarks.heads`.

Each graph answers for one 518x518 image in ONNX Runtime, one sample of each in turn; ratios are medians of the
samples'. A head's memory is what its operators write, counted by ONNX Runtime's profile. transformers' DPT on a DINOv2
backbone has the widths of the released NYU head and random weights; torch.onnx's TorchScript exporter exports it,
as optimum does. Writes results/heads.md beside this file.
"""

from __future__ import annotations

import argparse
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
SIDE = 518
HEADS = ("linear4", "nyu_linear", "nyu_linear4", "nyu_dpt", "ade20k_linear", "ade20k_ms")
BACKBONE, THEIRS = "vits14, tokens", "transformers' DPT, torch.onnx"


def ours(head: str | None, folder: Path) -> Path:
    """ViT-S with the head, or with none, as ONNX with synthetic weights."""
    loaded = recipe.load("vits14")
    model = family.find("dinov2").model(loaded if head is None else loaded.with_head(head))
    (graph,) = model.graphs
    folder.mkdir()
    calls = model.calls(graph, lambda name: model.synthetic(name, 0))
    trace = partial(onnx_writer.traced, trace=traces.of)
    onnx_writer.export(graph, calls, folder, metadata={}, trace=trace)
    return folder / f"{graph.name}.onnx"


def theirs(folder: Path) -> Path:
    """Transformers' DPTForDepthEstimation on DINOv2, as facebook/dpt-dinov2-small-nyu is configured, for one size."""
    import torch
    import transformers

    backbone = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=SIDE, patch_size=14,
        out_indices=[3, 6, 9, 12], apply_layernorm=False, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DPTConfig(
        backbone_config=backbone, use_pretrained_backbone=False, is_hybrid=False, hidden_size=384,
        neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=256, readout_type="project",
        reassemble_factors=[4, 2, 1, 0.5], use_batch_norm_in_fusion_residual=False, use_bias_in_fusion_residual=False,
        add_projection=True,
    )  # fmt: skip
    model = transformers.DPTForDepthEstimation(config).eval()
    folder.mkdir()
    path = folder / "model.onnx"
    with torch.inference_mode():
        torch.onnx.export(
            model, (torch.zeros(1, 3, SIDE, SIDE),), path, input_names=["pixels"], dynamo=False, opset_version=17
        )
    return path


def session(path: Path) -> Callable[[], object]:
    """What runs the file once."""
    opened = telemetry.onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = synthetic.pixels(1, SIDE, SIDE, seed=0)
    return lambda: opened.run(None, {opened.get_inputs()[0].name: pixels})


def measured(paths: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """A row for each: its time as a ratio to the backbone's, and what is written beside the backbone."""
    taken = timing.in_turn({name: session(path) for name, path in paths.items()}, rounds=rounds, budget_s=600.0)
    base = np.array(taken[BACKBONE].samples_ms)
    arrays = {"pixels": synthetic.pixels(1, SIDE, SIDE, seed=0)}
    written, gflop = {}, {}
    for name, path in paths.items():
        named = arrays if name != THEIRS else {ort_input(path): arrays["pixels"]}
        ran = ort.executed(path, named)
        written[name] = sum(operator.written_bytes for operator in ran) / 1e6
        gflop[name] = sum(operator.flops for operator in ran) / 1e9
    rows = []
    for name in paths:
        samples = np.array(taken[name].samples_ms)
        rows.append(
            {
                "graph": name,
                "median_ms": float(np.median(samples)),
                "to_backbone": float(np.median(samples / base)),
                "share": float(np.median(1 - base / samples)),
                "written_mb": written[name],
                "head_mb": written[name] - written[BACKBONE],
                "gflop": gflop[name],
                "samples": samples,
            }
        )
    return rows


def ort_input(path: Path) -> str:
    """The name of the file's one input."""
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        paths = {BACKBONE: ours(None, work / "tokens")}
        paths |= {f"vits14, {head}": ours(head, work / head) for head in HEADS}
        paths[THEIRS] = theirs(work / "theirs")
        rows = measured(paths, given.rounds)
    by_name = {row["graph"]: row for row in rows}
    against = float(np.median(by_name[THEIRS]["samples"] / by_name["vits14, nyu_dpt"]["samples"]))
    lines = [
        "# Heads: time and memory",
        "",
        (
            f"`python -m benchmarks.heads`, ViT-S, one {SIDE}x{SIDE} image, fp32, ONNX Runtime, synthetic weights, "
            f"{given.rounds} samples of each in turn."
        ),
        "",
        f"transformers' DPT takes {against:.2f} times as long as ours (median of the samples' ratios).",
        "",
        "| graph | median ms | times the backbone | head's share of time | head writes, MB | GFLOP |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['graph']} | {row['median_ms']:.0f} | {row['to_backbone']:.2f} | {row['share']:.0%} "
            f"| {row['head_mb']:.0f} | {row['gflop']:.0f} |"
            for row in rows
        ),
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

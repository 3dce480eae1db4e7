"""The same weights through other people's ways: each contender is a function from images to patch tokens.

The weights are transformers' `Dinov2Model` filled with random numbers and saved as one safetensors file, which every
contender starts from, dinoexport included. `python benchmarks/peers.py export CONTENDER CHECKPOINT OUT PRECISION` makes
one contender's ONNX in a process of its own, so that its time and memory are its own too.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dinoexport import family
from dinoexport.config import recipe
from dinoexport.graph import quantise
from dinoexport.models.dinov2 import synthetic
from dinoexport.runtime import openvino as runtime
from dinoexport.spec import Precision

Run = Callable[[np.ndarray], np.ndarray]
THREADS = 2
# What a contender's name ends with that knows its image's size when it is opened, as torch compiled does.
ONE_SIZE = ", one size"
# Whose ONNX is measured, the product's own first.
EXPORTERS = ("dinoexport", "optimum", "torch.onnx", "torch.onnx, TorchScript")
# Nobody's other file was faster by more than the noise on ViT-S and ViT-B.
LEADING = ("dinoexport", "torch.onnx, TorchScript")


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a process of its own: what this one holds counts as its children's peak memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_checkpoint(variant: str, folder: Path) -> None:
    """Transformers' model of a shipped variant with synthetic weights of trained size, as `model.safetensors`."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    model = recipe.load(variant).model
    config = Dinov2Config(
        hidden_size=model["embed_dim"],
        num_hidden_layers=model["depth"],
        num_attention_heads=model["num_heads"],
        use_swiglu_ffn=model["feed_forward"] == "swiglu",
        image_size=518,
        patch_size=14,
    )
    filled = Dinov2Model(config).eval()
    with torch.no_grad():
        for name, parameter in filled.named_parameters():
            values = synthetic.tensor(name.replace("lambda1", "gamma"), tuple(parameter.shape), 0)
            parameter.copy_(torch.from_numpy(values))
    filled.save_pretrained(folder)
    BitImageProcessor().save_pretrained(folder)  # optimum's exporter looks for one


def pytorch(checkpoint: Path, dtype: str = "float32") -> Any:
    """Transformers' model with the checkpoint's weights."""
    import torch
    from transformers import Dinov2Model

    torch.set_num_threads(THREADS)
    return Dinov2Model.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()


def export(contender: str, checkpoint: Path, out: Path, precision: str) -> None:
    """Writes the contender's ONNX of the checkpoint in `checkpoint` below `out`."""
    warnings.simplefilter("ignore")
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    if contender == "optimum":
        from optimum.exporters.onnx import main_export

        main_export(str(checkpoint), output=out, task="feature-extraction", do_validation=False)
        return
    import torch

    out.mkdir(exist_ok=True)
    pixels = torch.zeros(2, 3, 238, 266, dtype=getattr(torch, dtype))
    axes = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    # Both exporters of PyTorch: its default, and TorchScript's, which it keeps for those who ask for it.
    dynamo = contender == "torch.onnx"
    assert dynamo or contender == "torch.onnx, TorchScript"
    torch.onnx.export(
        pytorch(checkpoint, dtype), (pixels,), str(out / "model.onnx"), dynamo=dynamo, opset_version=20,
        input_names=["pixel_values"], output_names=["last_hidden_state"],
        **({"dynamic_shapes": axes} if dynamo else {"dynamic_axes": axes}),
    )  # fmt: skip


def export_command(contender: str, variant: str, checkpoint: Path, out: Path, precision: str) -> list[str]:
    """The process that exports as `contender`."""
    if contender == "dinoexport":
        weights = str(checkpoint / "model.safetensors")
        options = ["--weights", weights, "--precision", precision, "--out", str(out)]
        return [sys.executable, "-m", "dinoexport", "export", variant, *options]
    return [sys.executable, __file__, "export", contender, str(checkpoint), str(out), precision]


def contenders(
    variant: str, checkpoint: Path, work: Path, exporters: Sequence[str] = EXPORTERS
) -> dict[str, Callable[[], Run]]:
    """How to open every contender that comes from `exporters`, and PyTorch itself, by what it is called in the table.

    Nothing is open yet, so that models too large to lie beside each other can be opened two at a time. Who fails to
    export is named on stderr.
    """
    files = {}
    for name in exporters:
        command = export_command(name, variant, checkpoint, work / name, "fp32")
        if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            files[name] = work / name / "model.onnx"
        else:
            print(f"{name} does not export {variant}", file=sys.stderr)
    found: dict[str, Callable[[], Run]] = {}
    for name, path in files.items():
        found[f"{name}, ONNX Runtime"] = partial(onnx_runtime, path)
        found[f"{name}, OpenVINO f32"] = partial(openvino, path, "f32")
        found[f"{name}, ONNX Runtime{ONE_SIZE}"] = partial(of_one_size, path, onnx_runtime)
        found[f"{name}, OpenVINO f32{ONE_SIZE}"] = partial(of_one_size, path, partial(openvino, precision="f32"))
    found["dinoexport, OpenVINO bf16"] = partial(openvino, files["dinoexport"], "bf16")
    integer, wide = apart(_int8, files["dinoexport"], work)
    found["dinoexport int8, ONNX Runtime"] = partial(onnx_runtime, integer)
    found["dinoexport int8, OpenVINO"] = partial(_own, variant, wide, Precision.INT8)
    found["torch eager"] = partial(_torch, checkpoint, compiled=False)
    found["torch compiled"] = partial(_torch, checkpoint, compiled=True)
    return found


def open_those_that_run(makers: Mapping[str, Callable[[], Run]]) -> dict[str, Run]:
    """Every contender that answers a small image; those that do not are named on stderr."""
    found = {}
    for name, make in makers.items():
        try:
            run = make()
            run(np.zeros((1, 3, 28, 42), np.float32))
        except Exception as error:
            print(f"{name} does not run: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        else:
            found[name] = run
    return found


def _int8(path: Path, work: Path) -> tuple[Path, Path]:
    """The int8 twins of the file at `path`, for ONNX Runtime and for OpenVINO."""
    for name in ("integer", "wide"):
        (work / name).mkdir()
    integer, _ = quantise.to_int8(path, work / "integer")
    return integer, quantise.with_wide_products(integer, work / "wide")[0]


def _own(variant: str, path: Path, precision: Precision) -> Run:
    """The file as dinoexport opens it in OpenVINO."""
    loaded = recipe.load(variant)
    (graph,) = family.find(loaded.family).model(loaded).graphs
    opened = runtime.open_graph(path, graph, precision=precision, threads=THREADS)
    return lambda pixels: opened({"pixels": pixels})["patch_tokens"]


def onnx_runtime(path: Path, *, shape: tuple[int, ...] = ()) -> Run:
    """The file in ONNX Runtime, its idle threads asleep so that they do not slow the others down.

    shape: the pixels' one and only, where there is one; so in `openvino`.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if shape:
        pixels = onnx.load(path, load_external_data=False).graph.input[0]
        for axis, size in zip(pixels.type.tensor_type.shape.dim, shape, strict=True):
            if axis.dim_param:
                options.add_free_dimension_override_by_name(axis.dim_param, size)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, outputs = session.get_inputs()[0].name, [output.name for output in session.get_outputs()]
    return lambda pixels: _patches(dict(zip(outputs, session.run(outputs, {name: pixels}), strict=True)))


def openvino(path: Path, precision: str, *, shape: tuple[int, ...] = ()) -> Run:
    """The file in OpenVINO, which is told its precision."""
    import openvino as package

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    core = package.Core()
    model = core.read_model(path)
    if shape:
        model.reshape(list(shape))
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    names = [output.get_any_name() for output in compiled.outputs]

    def run(pixels: np.ndarray) -> np.ndarray:
        request.infer([pixels], share_inputs=True)
        return _patches({name: request.get_tensor(name).data for name in names}).copy()

    return run


def of_one_size(path: Path, make: Callable[..., Run]) -> Run:
    """The file made for one size; made again for another size."""
    runs: dict[tuple[int, ...], Run] = {}

    def run(pixels: np.ndarray) -> np.ndarray:
        if pixels.shape not in runs:
            runs.clear()
            runs[pixels.shape] = make(path, shape=pixels.shape)
        return runs[pixels.shape](pixels)

    return run


def _torch(checkpoint: Path, *, compiled: bool) -> Run:
    import torch

    model = pytorch(checkpoint)
    call = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        return call(torch.from_numpy(pixels)).last_hidden_state[:, 1:].numpy()

    return run


def _patches(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """Patch tokens, whether a contender gives them apart or after the class token."""
    return outputs["patch_tokens"] if "patch_tokens" in outputs else outputs["last_hidden_state"][:, 1:]


if __name__ == "__main__":
    _, verb, contender, checkpoint, out, precision = sys.argv
    assert verb == "export"
    export(contender, Path(checkpoint), Path(out), precision)

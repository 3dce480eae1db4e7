"""What a model costs, counted and not timed: operators, arithmetic and bytes, which no busy machine can blur.

A figure that goes up here is a regression even where no clock shows it. One that goes down is good news: write the new
number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from dinoexport import family
from dinoexport.config import recipe
from dinoexport.graph.onnx_writer import export
from dinoexport.models.dinov2 import synthetic
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import ort
from dinoexport.spec import Tensor
from tests.conformance import export_to
from tests.conftest import DATA

DEPTH, WIDTH, TABLE = 3, 96, 41 * 41
# Operators of one block with SwiGLU as the file has them; each one more costs a TensorRT layer and a kernel on a CPU.
BLOCK = Counter(
    Add=6, MatMul=6, Reshape=4, Transpose=4, LayerNormalization=2, Split=2, Softmax=1, Sigmoid=1, Mul=2
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    model = pipeline.build_request(str(DATA / "tiny_swiglu.toml")).model
    export_to(folder, model, lambda name: model.synthetic(name, 0))
    return folder / "model.onnx"


def test_operators_of_a_block(path: Path) -> None:
    nodes = onnx.load(path, load_external_data=False).graph.node
    for i in range(DEPTH):
        assert Counter(node.op_type for node in nodes if node.name.startswith(f"blocks.{i}/")) == BLOCK
    assert len(nodes) == 172


def test_weights_are_stored_once(path: Path) -> None:
    """The checkpoint's numbers without LayerScale and mask token, and the position table with its border."""
    model = pipeline.build_request(str(DATA / "tiny_swiglu.toml")).model
    folded = ("gamma", "mask_token", "pos_embed")
    sizes = {name: 4 * shape[0] * (len(shape) < 2 or shape[1]) for name, shape in model.tensors.items()}
    del sizes["patch_embed.proj.weight"], sizes["cls_token"]
    expected = sum(size for name, size in sizes.items() if not name.endswith(folded))
    expected += 4 * (WIDTH * 3 * 14 * 14 + WIDTH + TABLE * WIDTH)
    assert path.with_name("model.onnx.data").stat().st_size == pytest.approx(expected, rel=0.01)


def test_what_onnx_runtime_does_for_an_answer(path: Path) -> None:
    """Two images of 98 x 126: 63 patches each."""
    ran = ort.executed(path, {"pixels": synthetic.pixels(2, 98, 126, seed=0)})
    assert len(ran) == 170
    assert sum(operator.is_product for operator in ran) == 1 + 2 + 6 * DEPTH  # patches, positions, blocks
    assert sum(operator.flops for operator in ran) == 111_351_936
    assert sum(operator.written_bytes for operator in ran) <= 8_331_192


def test_linear_depth_is_convolved_before_it_is_upsampled(tmp_path: Path) -> None:
    """ViT-g at 518: 256 bins are resized, 22 MB, and not 12,288 features, 1.08 GB and 69 GMAC."""
    model = family.find("dinov2").model(recipe.load("vitg14").with_head("nyu_linear4"))
    (graph,) = model.graphs
    *_, head = model.calls(graph, lambda name: model.synthetic(name, 0))
    bins, patches, width, upsampled = 256, 37 * 37, 1536, (4 * 37) ** 2
    assert head.inputs == ("pixels", *(f"blocks.{i}_tokens" for i in (9, 19, 29, 39)))
    streams = [
        Tensor(name=name, dtype="float32", shape=("batch", "tokens", width), meaning="residual stream")
        for name in head.inputs[1:]
    ]
    export(replace(graph, inputs=(*graph.inputs, *streams)), [head], tmp_path, metadata={})
    random = np.random.RandomState(0)
    tokens = {tensor.name: random.randn(1, 1 + patches, width).astype(np.float32) for tensor in streams}
    arrays = {"pixels": synthetic.pixels(1, 518, 518, seed=0)} | tokens
    # Of the file: ONNX Runtime's own layout pads two channels to eight or sixteen, as the machine has it.
    ran = ort.executed(tmp_path / "model.onnx", arrays, optimised=False)
    resized = [operator.written_bytes for operator in ran if operator.kind == "Resize"]
    assert resized == [4 * bins * upsampled, 4 * 518 * 518]
    assert max(operator.written_bytes for operator in ran) == 4 * 4 * width * patches  # the four maps side by side
    products = 4 * width * bins * (patches + 1) + 2 * bins * upsampled  # of patches, of class tokens, of bins
    assert sum(operator.flops for operator in ran) == pytest.approx(2 * products, rel=1e-3)

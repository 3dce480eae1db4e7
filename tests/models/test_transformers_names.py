"""A graph with transformers' names: the files beside it, its tokens, and what the report takes them apart into."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport import family
from dinoexport.config.recipe import Range, Recipe
from dinoexport.spec import Case, Tensor

MODEL: dict[str, Any] = {"embed_dim": 8, "depth": 2, "num_heads": 2, "feed_forward": "mlp", "register_count": 0}


def model_of(model: dict[str, Any] | None = None, **tables: Any) -> Any:
    side = Range(min=14, opt=28, max=70)
    recipe = Recipe(
        name="tiny", family="dinov2", validation="tiny_cases", model=MODEL | (model or {}),
        profile={"batch": Range(min=1, opt=1, max=2), "height": side, "width": side},
        graph={"interface": "transformers"}, **tables,
    )  # fmt: skip
    return family.find("dinov2").model(recipe)


CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "mlp_ratio": 4, "use_swiglu_ffn": False, "hidden_act": "gelu", "qkv_bias": True,
    "layer_norm_eps": 1e-6, "image_size": 518, "patch_size": 14, "num_channels": 3, "torch_dtype": "float32",
}  # fmt: skip
WITH_REGISTERS = {
    "architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers", "num_register_tokens": 1,
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        ({}, {}),
        ({"register_count": 1}, WITH_REGISTERS),
        ({"feed_forward": "swiglu"}, {"use_swiglu_ffn": True}),
        ({"activation": "gelu_tanh", "qkv_bias": False}, {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False}),
        ({"patch_size": 14, "position_side": 16, "layer_norm_eps": 1e-5}, {"image_size": 224, "layer_norm_eps": 1e-5}),
    ],
)
def test_config_json(model: dict[str, Any], changed: dict[str, Any]) -> None:
    files = model_of(model).companion_files
    assert set(files) == {"config.json", "preprocessor_config.json"}
    assert json.loads(files["config.json"]) == CONFIG | changed
    lines = files["config.json"].decode().split("\n")
    assert lines[0] == "{" and lines[1] == '  "architectures": [' and lines[-2:] == ["}", ""]


@pytest.mark.parametrize(
    ("preprocess", "changed"),
    [
        ({}, {}),
        ({"interpolation": "nearest"}, {"resample": 0}),
        ({"interpolation": "lanczos", "resize": 300}, {"resample": 1, "size": {"shortest_edge": 300}}),
        (
            {"interpolation": "bilinear", "resize": (28, 42), "crop": (14, 28)},
            {"resample": 2, "size": {"height": 28, "width": 42}, "crop_size": {"height": 14, "width": 28}},
        ),
        ({"mean": [0.5] * 3, "std": [0.25] * 3}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
    ],
)
def test_preprocessor_config_json(preprocess: dict[str, Any], changed: dict[str, Any]) -> None:
    files = model_of(preprocess=preprocess).companion_files
    assert json.loads(files["preprocessor_config.json"]) == PROCESSOR | changed


@pytest.mark.parametrize(("count", "registers"), [(0, ""), (4, ", 4 register tokens")])
def test_tokens_in_one_output(count: int, registers: str) -> None:
    model = model_of({"register_count": count})
    (graph,) = model.graphs
    assert graph.outputs == (
        Tensor(
            name="last_hidden_state", dtype="float32", shape=("batch", "tokens", 8),
            meaning=f"class token{registers} and patch tokens, row by row, of the last block, after the final norm",
        ),
        Tensor(
            name="pooler_output", dtype="float32", shape=("batch", 8), meaning="class token, after the final norm"
        ),
    )  # fmt: skip
    assert [tensor.name for tensor in graph.inputs] == ["pixel_values"]
    stream = np.random.RandomState(0).rand(2, 9, 8).astype(np.float32)
    named = model.named({1: stream})
    assert set(named) == {"last_hidden_state", "pooler_output"}
    assert np.array_equal(named["last_hidden_state"], stream)
    assert np.array_equal(named["pooler_output"], stream[:, 0])
    features = model.uses.features(named)
    np.testing.assert_allclose(features["class_token"], stream[0, 0])
    np.testing.assert_allclose(features["mean_patch_token"], stream[0, 1 + count :].mean(axis=0), rtol=1e-6)


def test_the_input_has_their_name_everywhere(tmp_path: Any) -> None:
    model = model_of()
    stored = BytesIO()
    Image.new("RGB", (30, 20), (124, 116, 104)).save(stored, "PNG")
    assert set(model.prepare("images", {}, [stored.getvalue()])) == {"pixel_values"}
    case = model.case({"name": "noise", "why": "noise of the tests", "height": 28, "width": 42}, tmp_path)
    assert case.inputs["pixel_values"].shape == (1, 3, 28, 42)
    assert all(set(work.inputs) == {"pixel_values"} for work in model.workloads)
    image = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    assert model.uses.second_view({"pixel_values": image})["pixel_values"].tolist() == [[[[2, 1, 0], [5, 4, 3]]]]


def test_pictures_of_patch_tokens_alone() -> None:
    """A candidate without them, or of another size, has none."""
    tokens = np.random.RandomState(1).rand(1, 7 + 2, 8).astype(np.float32)
    case = Case(name="a", why="", inputs={"pixel_values": np.zeros((1, 3, 28, 42), np.float32)})
    candidates = {
        "ours": {"last_hidden_state": tokens},
        "pooled": {"pooler_output": tokens[:, 0]},
        "fewer": {"last_hidden_state": tokens[:, :5]},
    }
    (row,) = model_of({"register_count": 2}).pictures(case, {"last_hidden_state": tokens}, candidates)
    assert [picture.title for picture in row] == ["Photograph", "PyTorch", "ours", "Cosine error"]
    assert np.asarray(Image.open(BytesIO(row[1].data))).shape == (2, 3, 3)

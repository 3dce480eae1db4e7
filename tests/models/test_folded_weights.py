"""What the traced graphs compute with, against the published tensors it is made of: layer by layer, in NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.fold import Folded
from dinoexport.models.dinov2.heads.fold import FoldedHead
from dinoexport.models.dinov2.heads.kinds import Head, HeadTable
from dinoexport.spec import Array, Weight

DIM = 12
MODEL = {"embed_dim": DIM, "depth": 4, "num_heads": 3, "feed_forward": "mlp", "register_count": 0, "position_side": 3}


def values_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    random = np.random.RandomState(3)
    return {name: random.uniform(0.5, 2, shape).astype(np.float32) for name, shape in shapes.items()}


def computed(weights: Mapping[str, Weight]) -> dict[str, Array]:
    """Every weight, as large as it promises."""
    found = {name: weight.read() for name, weight in weights.items()}
    assert {name: array.shape for name, array in found.items()} == {name: w.shape for name, w in weights.items()}
    return found


def backbone(**model: Any) -> tuple[Folded, dict[str, Array]]:
    arch = Architecture.model_validate(MODEL | model)
    tensors = values_of(arch.tensors)
    return Folded(arch=arch, read=tensors.__getitem__), tensors


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
def test_a_block(feed_forward: str) -> None:
    """Three heads of four channels: q is halved. LayerScale is in the projections before it."""
    folded, tensors = backbone(feed_forward=feed_forward)
    first, last, hidden = ("fc1", "fc2", 48) if feed_forward == "mlp" else ("w12", "w3", 32)
    found = computed(folded.block(2))
    of = {name.removeprefix("blocks.2."): array for name, array in tensors.items() if name.startswith("blocks.2.")}
    half = np.array([0.5] * DIM + [1.0] * (2 * DIM), np.float32)
    expected = {
        "norm1_weight_D": of["norm1.weight"],
        "norm1_bias_D": of["norm1.bias"],
        "qkv_weight_IO": np.transpose(of["attn.qkv.weight"]) * half,
        "qkv_bias_O": of["attn.qkv.bias"] * half,
        "proj_weight_IO": np.transpose(of["attn.proj.weight"]) * of["ls1.gamma"],
        "proj_bias_O": of["attn.proj.bias"] * of["ls1.gamma"],
        "norm2_weight_D": of["norm2.weight"],
        "norm2_bias_D": of["norm2.bias"],
        "first_weight_IO": np.transpose(of[f"mlp.{first}.weight"]),
        "first_bias_O": of[f"mlp.{first}.bias"],
        "last_weight_IO": np.transpose(of[f"mlp.{last}.weight"]) * of["ls2.gamma"],
        "last_bias_O": of[f"mlp.{last}.bias"] * of["ls2.gamma"],
    }
    assert set(found) == set(expected) and found["last_weight_IO"].shape == (hidden, DIM)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)


def test_a_block_without_a_bias_of_q_and_without_layer_scale() -> None:
    folded, tensors = backbone(qkv_bias=False, layer_scale=False)
    found = computed(folded.block(0))
    assert "qkv_bias_O" not in found
    np.testing.assert_array_equal(found["proj_weight_IO"], tensors["blocks.0.attn.proj.weight"].T)
    np.testing.assert_array_equal(found["last_bias_O"], tensors["blocks.0.mlp.fc2.bias"])


@pytest.mark.parametrize("registers", [0, 2])
def test_the_stem(registers: int) -> None:
    """The class token has its position; registers have none. With antialiasing the table has no border."""
    folded, tensors = backbone(register_count=registers, interpolate_antialias=True)
    found = computed(folded.stem())
    assert set(found) == {"kernel_OIHW", "bias_O", "prefix_1RD", "table_hwD"}
    np.testing.assert_array_equal(found["prefix_1RD"][0, 0], tensors["cls_token"][0, 0] + tensors["pos_embed"][0, 0])
    if registers:
        np.testing.assert_array_equal(found["prefix_1RD"][:, 1:], tensors["register_tokens"])
    np.testing.assert_array_equal(found["table_hwD"].reshape(9, DIM), tensors["pos_embed"][0, 1:])
    np.testing.assert_array_equal(found["kernel_OIHW"], tensors["patch_embed.proj.weight"])
    bordered = computed(backbone(register_count=registers, interpolate_antialias=False)[0].stem())["table_hwD"]
    border = (len(bordered) - 3) // 2
    grid = bordered.reshape(3 + 2 * border, -1, DIM)
    assert border > 0
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_array_equal(grid[row, column], tensors["pos_embed"][0, 1:].reshape(3, 3, DIM)[row, column])


def head_of(kind: str, **more: Any) -> tuple[Head, FoldedHead, dict[str, Array]]:
    head = Head(arch=Architecture.model_validate(MODEL), table=HeadTable(kind=kind, **more))
    tensors = values_of(head.tensors)
    norm = {"norm.weight": np.ones(DIM, np.float32), "norm.bias": np.zeros(DIM, np.float32)}
    return head, FoldedHead(head=head, read=(tensors | norm).__getitem__), tensors


@pytest.mark.parametrize("kind", ["voc2012_linear", "voc2012_ms"])
def test_segmentation_is_batch_norm_and_then_a_convolution(kind: str) -> None:
    """Of a variance that is small beside BatchNorm's epsilon too."""
    head, folded, tensors = head_of(kind)
    tensors["decode_head.bn.running_var"][:] = np.linspace(0, 4e-5, head.width)
    found = computed(folded.weights())
    pixel = np.random.RandomState(5).uniform(0.5, 2, head.width)
    bn = {name: tensors[f"decode_head.bn.{name}"].astype(np.float64) for name in ("weight", "bias")}
    deviation = np.sqrt(tensors["decode_head.bn.running_var"].astype(np.float64) + 1e-5)
    normed = (pixel - tensors["decode_head.bn.running_mean"]) / deviation * bn["weight"] + bn["bias"]
    kernel = tensors["decode_head.conv_seg.weight"][:, :, 0, 0].astype(np.float64)
    expected = kernel @ normed + tensors["decode_head.conv_seg.bias"]
    assert set(found) == {"norm_weight_D", "norm_bias_D", "weight_KC11", "bias_K"}
    np.testing.assert_allclose(found["weight_KC11"][:, :, 0, 0] @ pixel + found["bias_K"], expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "layers"), [("nyu_linear", 1), ("nyu_linear4", 4)])
def test_columns_of_patches_and_of_class_tokens_alternate(kind: str, layers: int) -> None:
    """The published layer reads patch tokens and then the class token of each block; depths are a mean over bins."""
    _, folded, tensors = head_of(kind)
    found = computed(folded.weights())
    columns = np.split(tensors["decode_head.conv_depth.weight"][:, :, 0, 0], 2 * layers, axis=1)
    np.testing.assert_array_equal(found["patch_KC11"][:, :, 0, 0], np.concatenate(columns[0::2], axis=1))
    np.testing.assert_array_equal(found["class_KC"], np.concatenate(columns[1::2], axis=1))
    np.testing.assert_array_equal(found["bias_K"], tensors["decode_head.conv_depth.bias"])
    weigh = found["weigh_2K11"][:, :, 0, 0]
    assert (weigh[0, 0], weigh[0, -1]) == (np.float32(0.001), np.float32(10)) and (weigh[1] == 1).all()
    np.testing.assert_allclose(np.diff(weigh[0]), 9.999 / 255, rtol=1e-3)


def sources(kind: str, **more: Any) -> tuple[Head, dict[str, str]]:
    """Our weight -> the published tensor that it reads."""
    head = Head(arch=Architecture.model_validate(MODEL), table=HeadTable(kind=kind, **more))
    asked: list[str] = []

    def read(name: str) -> Array:
        asked.append(name)
        return np.zeros(head.tensors[name], np.float32)

    found = {}
    for name, weight in FoldedHead(head=head, read=read).weights().items():
        if not name.startswith("norm_"):
            assert weight.read().shape == weight.shape
            (found[name],) = set(asked)
            asked.clear()
    return head, found


def test_layers_of_a_released_dpt_head() -> None:
    """All tensors are read: each by one weight, but the readouts', which are split into patches and class token."""
    head, found = sources("nyu_dpt")
    used = Counter(found.values())
    assert set(used) == set(head.tensors)
    assert {name for name, count in used.items() if count != 1} == {
        f"decode_head.reassemble_blocks.readout_projects.{i}.0.weight" for i in range(4)
    }
    expected = {
        "project.kernel": "project.conv.weight",
        "project.bias": "project.conv.bias",
        "projects.3.bias": "reassemble_blocks.projects.3.conv.bias",
        "levels.0.kernel": "convs.0.conv.weight",
        "fusing.2.kernel": "fusion_blocks.2.project.conv.weight",
        "units.0.first.kernel": "fusion_blocks.0.res_conv_unit2.conv1.conv.weight",
        "units.3.second.kernel": "fusion_blocks.3.res_conv_unit2.conv2.conv.weight",
        "joining.0.first.kernel": "fusion_blocks.1.res_conv_unit1.conv1.conv.weight",
        "joining.2.second.kernel": "fusion_blocks.3.res_conv_unit1.conv2.conv.weight",
        "resizes.1.kernel": "reassemble_blocks.resize_layers.1.weight",
        "resizes.3.bias": "reassemble_blocks.resize_layers.3.bias",
        "last.0.kernel": "conv_depth.head.0.weight",
        "last.2.bias": "conv_depth.head.4.bias",
        "readouts.1.kernel": "reassemble_blocks.readout_projects.1.0.weight",
        "class_weight_1": "reassemble_blocks.readout_projects.1.0.weight",
        "class_bias_1": "reassemble_blocks.readout_projects.1.0.bias",
    }
    assert {name: found[name].removeprefix("decode_head.") for name in expected} == expected


def test_a_readouts_columns() -> None:
    """The first half reads patch tokens, as a 1x1 convolution; the second the class token."""
    _, folded, tensors = head_of("nyu_dpt")
    weight = tensors["decode_head.reassemble_blocks.readout_projects.2.0.weight"]
    weights = folded.weights()
    np.testing.assert_array_equal(weights["readouts.2.kernel"].read()[:, :, 0, 0], weight[:, :DIM])
    np.testing.assert_array_equal(weights["class_weight_2"].read(), weight[:, DIM:])


def test_layers_of_depth_anything() -> None:
    """All tensors are read once, but for a unit of the coarsest fusion, which has one input only."""
    head, found = sources("depth_anything", features=8, channels=(2, 3, 4, 5))
    assert len(set(found.values())) == len(found)
    left = {name for name in head.tensors if name not in found.values()}
    assert left == {
        f"depth_head.scratch.refinenet4.resConfUnit1.conv{conv}.{part}"
        for conv in (1, 2)
        for part in ("weight", "bias")
    }
    expected = {
        "projects.3.kernel": "projects.3.weight",
        "levels.0.kernel": "scratch.layer1_rn.weight",
        "levels.3.kernel": "scratch.layer4_rn.weight",
        "fusing.0.bias": "scratch.refinenet4.out_conv.bias",
        "fusing.3.kernel": "scratch.refinenet1.out_conv.weight",
        "units.0.first.kernel": "scratch.refinenet4.resConfUnit2.conv1.weight",
        "units.3.second.bias": "scratch.refinenet1.resConfUnit2.conv2.bias",
        "joining.0.first.kernel": "scratch.refinenet3.resConfUnit1.conv1.weight",
        "joining.2.second.kernel": "scratch.refinenet1.resConfUnit1.conv2.weight",
        "resizes.0.kernel": "resize_layers.0.weight",
        "last.0.kernel": "scratch.output_conv1.weight",
        "last.1.bias": "scratch.output_conv2.0.bias",
        "last.2.kernel": "scratch.output_conv2.2.weight",
    }
    assert {name: found[name].removeprefix("depth_head.") for name in expected} == expected

"""Names of head files: the released heads', Depth Anything V2's and Hugging Face's of Depth Anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dinoexport.family import Read, Shapes
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.heads import layouts
from dinoexport.models.dinov2.heads.kinds import Head, HeadTable

HUGGING_FACE = {
    "neck.reassemble_stage.layers.0.projection.weight": "projects.0.weight",
    "neck.reassemble_stage.layers.3.projection.bias": "projects.3.bias",
    "neck.reassemble_stage.layers.1.resize.weight": "resize_layers.1.weight",
    "neck.reassemble_stage.layers.3.resize.bias": "resize_layers.3.bias",
    "neck.convs.0.weight": "scratch.layer1_rn.weight",
    "neck.convs.3.weight": "scratch.layer4_rn.weight",
    # The coarsest fusion comes first there, and is the fourth here.
    "neck.fusion_stage.layers.0.projection.weight": "scratch.refinenet4.out_conv.weight",
    "neck.fusion_stage.layers.3.projection.bias": "scratch.refinenet1.out_conv.bias",
    "neck.fusion_stage.layers.0.residual_layer2.convolution1.weight": "scratch.refinenet4.resConfUnit2.conv1.weight",
    "neck.fusion_stage.layers.1.residual_layer1.convolution2.bias": "scratch.refinenet3.resConfUnit1.conv2.bias",
    "head.conv1.weight": "scratch.output_conv1.weight",
    "head.conv2.bias": "scratch.output_conv2.0.bias",
    "head.conv3.weight": "scratch.output_conv2.2.weight",
}


def numbered(names: Any) -> tuple[dict[str, tuple[int, ...]], Read]:
    """Tensors of one element: that at place i holds i."""
    listed = list(names)
    return dict.fromkeys(listed, (1,)), lambda name: np.array([listed.index(name)])


def of_backbone(found: Shapes, read: Read) -> tuple[Shapes, Read]:
    """As if the backbone's layout only called every tensor otherwise."""
    return {f"ours.{name}": shape for name, shape in found.items()}, lambda name: read(name.removeprefix("ours."))


def values(shapes: Shapes, read: Read) -> dict[str, int]:
    return {name: int(read(name)[0]) for name in shapes}


@pytest.mark.parametrize("prefix", ["", "state_dict.", "model.module."])
def test_depth_anything_in_hugging_faces_layout(prefix: str) -> None:
    """Everything that is not of the neck or the head is the backbone's."""
    names = [*HUGGING_FACE, "backbone.embeddings.cls_token", "neck.convs.0.bias"]
    found = values(*layouts.adapt_whole(of_backbone, *numbered(prefix + name for name in names)))
    expected = {f"depth_head.{ours}": i for i, ours in enumerate(HUGGING_FACE.values())}
    assert found == expected | {"ours.backbone.embeddings.cls_token": 13, "ours.neck.convs.0.bias": 14}


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.model."])
def test_depth_anything_in_its_own_layout(prefix: str) -> None:
    names = ("pretrained.cls_token", "depth_head.projects.0.weight", "pos_embed")
    found = values(*layouts.adapt_whole(of_backbone, *numbered(prefix + name for name in names)))
    assert found == {"ours.cls_token": 0, "depth_head.projects.0.weight": 1, "ours.pos_embed": 2}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("weight", "bias"), {"linear_head.weight": 0, "linear_head.bias": 1}),
        (("state_dict.weight", "meta.x", "state_dict.bias"), {"linear_head.weight": 0, "linear_head.bias": 2}),
        (
            ("state_dict.decode_head.conv_seg.weight", "state_dict.decode_head.bn.num_batches_tracked", "optimizer.a"),
            {"decode_head.conv_seg.weight": 0},
        ),
        (("decode_head.conv_seg.weight", "other"), {"decode_head.conv_seg.weight": 0, "other": 1}),
        (("weight", "bias", "other"), {"weight": 0, "bias": 1, "other": 2}),
    ],
)
def test_a_separate_file_of_a_head(theirs: tuple[str, ...], ours: dict[str, int]) -> None:
    """Of mmcv's file only the state counts, and of that no counter of training steps."""
    assert values(*layouts.adapt(*numbered(theirs))) == ours


def head(kind: str, dim: int = 384, depth: int = 12, **more: Any) -> Head:
    arch = Architecture(embed_dim=dim, depth=depth, num_heads=2, feed_forward="mlp", register_count=0)
    return Head(arch=arch, table=HeadTable(kind=kind, **more))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (head("linear4"), "linear4"),
        (head("nyu_linear"), "nyu_linear or kitti_linear"),
        (head("ade20k_ms"), "ade20k_ms"),
        (head("linear", 768), "linear of vitb14"),
        (head("kitti_dpt", 1024), "nyu_dpt or kitti_dpt of vitl14"),
        (head("linear", 96), ""),
        (head("depth_anything", features=64, channels=(48, 96, 192, 384)), ""),
    ],
)
def test_a_file_is_recognised(file: Head, words: str) -> None:
    """As another head of the requested backbone, or as one of another shipped backbone."""
    assert layouts.recognised(head("voc2012_linear"), file.tensors) == words


def test_a_unit_that_no_one_uses() -> None:
    unused = layouts.unused(head("depth_anything", features=8, channels=(4, 6, 8, 10)))
    assert unused == {
        f"depth_head.scratch.refinenet4.resConfUnit1.conv{conv}.{part}"
        for conv in (1, 2)
        for part in ("weight", "bias")
    }
    assert layouts.unused(head("nyu_dpt")) == frozenset()

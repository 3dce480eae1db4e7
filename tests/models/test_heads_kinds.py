"""The known heads: what `[head]` takes, the blocks and widths of each kind, and the tensors of its file."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dinoexport.models.dinov2 import published
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.heads import signature
from dinoexport.models.dinov2.heads.kinds import KINDS, Head, HeadTable
from dinoexport.spec import HeadFacts

CLASSES = ("cat", "dog", "owl")
KNN: dict[str, Any] = {"classes": CLASSES, "bank": 7, "neighbours": 3, "temperature": 0.07}
DEPTH_ANYTHING: dict[str, Any] = {"features": 8, "channels": (4, 6, 8, 10)}


def head(kind: str, *, depth: int = 12, **more: Any) -> Head:
    arch = Architecture(embed_dim=64, depth=depth, num_heads=2, feed_forward="mlp", register_count=0)
    return Head(arch=arch, table=HeadTable(kind=kind, **more))


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("nyu_linear", {"depth_range": (0.0, 0.5)}),
        ("nyu_dpt", {"depth_range": (0.001, 80.0)}),
        ("depth_anything", DEPTH_ANYTHING | {"channels": (1, 8192, 1, 1), "features": 8192, "max_depth": 0.1}),
        ("depth_anything", DEPTH_ANYTHING | {"features": 1}),
        ("knn", KNN | {"bank": 1, "neighbours": 1, "temperature": 0.01}),
        ("knn", KNN | {"bank": 10_000_000}),
        ("logreg", {"classes": CLASSES}),
    ],
)
def test_values_at_their_limits(kind: str, table: dict[str, Any]) -> None:
    read = HeadTable(kind=kind, **table)
    assert {key: getattr(read, key) for key in table} == table and not read.tokens


@pytest.mark.parametrize(
    ("kind", "table", "words"),
    [
        ("nyu_linear", {"depth_range": (-0.001, 10.0)}, "the least depth comes first, and neither is negative"),
        ("nyu_linear", {"depth_range": (5.0, 5.0)}, "the least depth comes first, and neither is negative"),
        ("nyu_linear", {"depth_range": (5.0, 4.0)}, "the least depth comes first, and neither is negative"),
        ("depth_anything", DEPTH_ANYTHING | {"channels": (0, 1, 1, 1)}, "greater than 0"),
        ("depth_anything", DEPTH_ANYTHING | {"channels": (8193, 1, 1, 1)}, "less than or equal to 8192"),
        ("depth_anything", DEPTH_ANYTHING | {"features": 8193}, "less than or equal to 8192"),
        ("depth_anything", DEPTH_ANYTHING | {"max_depth": 0.0}, "greater than 0"),
        ("knn", KNN | {"bank": 10_000_001}, "less than or equal to 10000000"),
        ("knn", KNN | {"neighbours": 0}, "greater than 0"),
        ("knn", KNN | {"temperature": 0.0}, "greater than 0"),
        ("linear", {"depth_range": (0.0, 1.0)}, "depth_range: a linear head has none"),
        ("logreg", KNN, "bank: a logreg head has none"),
        ("nyu_dpt", {"features": 8}, "features: a nyu_dpt head has none"),
        ("depth_anything", {"features": 8}, "a depth_anything head needs channels"),
        ("knn", {"classes": CLASSES, "bank": 7}, "needs neighbours, temperature; dinoexport fit makes such a head"),
    ],
)
def test_values_that_no_head_has(kind: str, table: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        HeadTable(kind=kind, **table)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "depth", "blocks", "width"),
    [
        ("linear", 12, (11,), 128),
        ("linear4", 12, (8, 9, 10, 11), 320),
        ("nyu_linear", 12, (11,), 128),
        ("nyu_linear4", 12, (2, 5, 8, 11), 512),
        ("kitti_dpt", 24, (4, 11, 17, 23), 64),
        ("kitti_linear4", 40, (9, 19, 29, 39), 512),
        ("nyu_linear4", 6, (0, 2, 3, 5), 512),
        ("ade20k_linear", 24, (23,), 64),
        ("voc2012_ms", 24, (20, 21, 22, 23), 256),
    ],
)
def test_blocks_and_width(kind: str, depth: int, blocks: tuple[int, ...], width: int) -> None:
    """A classifier reads the mean patch token of the last block too; a linear depth head each block's class token."""
    assert (head(kind, depth=depth).blocks, head(kind, depth=depth).width) == (blocks, width)


def test_width_of_fitted_heads() -> None:
    """A probe reads class token and mean patch token; the others the class token alone."""
    widths = {kind: head(kind, classes=CLASSES).width for kind in ("logreg", "probe")} | {
        "knn": head("knn", **KNN).width
    }
    assert widths == {"logreg": 64, "probe": 128, "knn": 64}
    assert head("knn", **KNN).class_names == CLASSES and head("knn", **KNN).class_count == 3


@pytest.mark.parametrize(
    ("kind", "count", "first", "last"),
    [
        ("linear4", 1000, "tench", "toilet tissue"),
        ("ade20k_linear", 150, "wall", "flag"),
        ("voc2012_ms", 21, "background", "tvmonitor"),
        ("nyu_dpt", 0, None, None),
    ],
)
def test_class_names(kind: str, count: int, first: str | None, last: str | None) -> None:
    names = head(kind).class_names
    assert len(names) == head(kind).class_count == count
    if names:
        assert first is not None and last is not None
        assert names[0].startswith(first) and names[-1].startswith(last)


def test_tensors_of_each_file() -> None:
    """Sizes of what upstream's authors publish, for a backbone of 64 channels."""
    assert head("linear").tensors == {"linear_head.weight": (1000, 128), "linear_head.bias": (1000,)}
    assert head("knn", **KNN).tensors == {"fitted.bank": (7, 64), "fitted.votes": (7, 3)}
    assert head("probe", classes=CLASSES).tensors == {"fitted.weight": (3, 128), "fitted.bias": (3,)}
    assert head("nyu_linear4").tensors == {
        "decode_head.conv_depth.weight": (256, 512, 1, 1), "decode_head.conv_depth.bias": (256,),
    }  # fmt: skip
    assert head("voc2012_ms").tensors == {
        "decode_head.conv_seg.weight": (21, 256, 1, 1), "decode_head.conv_seg.bias": (21,),
        **{f"decode_head.bn.{name}": (256,) for name in ("weight", "bias", "running_mean", "running_var")},
    }  # fmt: skip


def test_tensors_of_a_dpt_head() -> None:
    tensors = {name.removeprefix("decode_head."): shape for name, shape in head("nyu_dpt").tensors.items()}
    without_bias = {name for name in tensors if name.endswith("weight")} - {
        name.replace("bias", "weight") for name in tensors if name.endswith("bias")
    }
    assert without_bias == {
        *(f"convs.{i}.conv.weight" for i in range(4)),
        *(f"fusion_blocks.{i}.res_conv_unit2.conv{conv}.conv.weight" for i in range(4) for conv in (1, 2)),
        *(f"fusion_blocks.{i}.res_conv_unit1.conv{conv}.conv.weight" for i in range(1, 4) for conv in (1, 2)),
    }
    assert len(tensors) == 18 + 2 * 19
    expected = {
        "conv_depth.head.0.weight": (128, 256, 3, 3),
        "conv_depth.head.2.weight": (32, 128, 3, 3),
        "conv_depth.head.4.weight": (1, 32, 1, 1),
        "conv_depth.head.4.bias": (1,),
        "reassemble_blocks.projects.0.conv.weight": (8, 64, 1, 1),
        "reassemble_blocks.projects.3.conv.bias": (64,),
        "reassemble_blocks.readout_projects.2.0.weight": (64, 128),
        "reassemble_blocks.readout_projects.2.0.bias": (64,),
        "reassemble_blocks.resize_layers.0.weight": (8, 8, 4, 4),
        "reassemble_blocks.resize_layers.1.weight": (16, 16, 2, 2),
        "reassemble_blocks.resize_layers.3.weight": (64, 64, 3, 3),
        "convs.1.conv.weight": (256, 16, 3, 3),
        "project.conv.weight": (256, 256, 3, 3),
    }
    assert {name: tensors[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("of", "unit", "value_range"),
    [
        (head("nyu_linear"), " m", (0.001, 10.0)),
        (head("kitti_dpt"), " m", (0.001, 80.0)),
        (head("kitti_linear4", depth_range=(0.0, 20.0)), " m", (0.0, 20.0)),
        (head("depth_anything", **DEPTH_ANYTHING), "", None),
        (head("depth_anything", max_depth=20.0, **DEPTH_ANYTHING), " m", (0.0, 20.0)),
    ],
)
def test_depths_have_a_range_and_a_unit(of: Head, unit: str, value_range: tuple[float, float] | None) -> None:
    assert of.depth_unit == unit
    assert signature.facts(of) == HeadFacts(
        kind=of.table.kind, dataset=of.kind.dataset.name, terms=of.kind.dataset.terms, value_range=value_range,
        classes=(),
    )  # fmt: skip


def test_what_is_read_before_the_final_norm_and_what_is_padded() -> None:
    tables = {
        "depth_anything": DEPTH_ANYTHING,
        "knn": KNN,
        "logreg": {"classes": CLASSES},
        "probe": {"classes": CLASSES},
    }
    heads = [head(kind, **tables.get(kind, {})) for kind in KINDS]
    depth = {"nyu_linear", "nyu_linear4", "nyu_dpt", "kitti_linear", "kitti_linear4", "kitti_dpt"}
    labels = {"ade20k_linear", "ade20k_ms", "voc2012_linear", "voc2012_ms"}
    assert {of.table.kind for of in heads if not of.after_norm} == depth
    assert {of.table.kind for of in heads if of.pads} == depth | labels
    assert {of.table.kind for of in heads if not of.own_file} == {"depth_anything"}


def test_tensors_of_depth_anything() -> None:
    """Of 64 channels, to maps of 4, 6, 8 and 10, joined at 8; without a bias where upstream has none."""
    maps = (4, 6, 8, 10)
    biased: dict[str, tuple[int, ...]] = {
        **{f"projects.{i}": (width, 64, 1, 1) for i, width in enumerate(maps)},
        "resize_layers.0": (4, 4, 4, 4), "resize_layers.1": (6, 6, 2, 2), "resize_layers.3": (10, 10, 3, 3),
        **{f"scratch.refinenet{i}.out_conv": (8, 8, 1, 1) for i in (1, 2, 3, 4)},
        **{
            f"scratch.refinenet{i}.resConfUnit{unit}.conv{conv}": (8, 8, 3, 3)
            for i in (1, 2, 3, 4) for unit in (1, 2) for conv in (1, 2)
        },
        "scratch.output_conv1": (4, 8, 3, 3), "scratch.output_conv2.0": (32, 4, 3, 3),
        "scratch.output_conv2.2": (1, 32, 1, 1),
    }  # fmt: skip
    wanted = {f"depth_head.{name}.weight": shape for name, shape in biased.items()}
    # The kernel of a transposed convolution has its inputs first; here both are as many.
    wanted |= {f"depth_head.{name}.bias": shape[:1] for name, shape in biased.items()}
    wanted |= {f"depth_head.scratch.layer{i + 1}_rn.weight": (8, width, 3, 3) for i, width in enumerate(maps)}
    assert head("depth_anything", **DEPTH_ANYTHING).tensors == wanted


def test_widths_of_a_released_dpt_head() -> None:
    assert [published.dpt_widths(dim) for dim in (384, 1536)] == [(48, 96, 192, 384), (192, 384, 768, 1536)]

"""Tensors of Hugging Face's and timm's layouts under the published names, with written shapes and values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from dinoexport.models.dinov2 import layouts
from dinoexport.spec import Array

WIDTH = 6


def adapted(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor as it is read, and as large as its shape promises."""
    shapes, read = layouts.adapt({name: array.shape for name, array in arrays.items()}, lambda name: arrays[name])
    found = {name: read(name) for name in shapes}
    assert {name: array.shape for name, array in found.items()} == dict(shapes)
    return found


def distinct(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {
        name: (100 * i + np.arange(np.prod(shape))).reshape(shape).astype(np.float32)
        for i, (name, shape) in enumerate(shapes.items(), start=1)
    }


def same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


HUGGING_FACE = {
    "embeddings.cls_token": ("cls_token", (1, 1, WIDTH)),
    "embeddings.mask_token": ("mask_token", (1, WIDTH)),
    "embeddings.register_tokens": ("register_tokens", (1, 4, WIDTH)),
    "embeddings.position_embeddings": ("pos_embed", (1, 5, WIDTH)),
    "embeddings.patch_embeddings.projection.weight": ("patch_embed.proj.weight", (WIDTH, 3, 2, 2)),
    "embeddings.patch_embeddings.projection.bias": ("patch_embed.proj.bias", (WIDTH,)),
    "encoder.layer.1.norm1.weight": ("blocks.1.norm1.weight", (WIDTH,)),
    "encoder.layer.1.attention.output.dense.weight": ("blocks.1.attn.proj.weight", (WIDTH, WIDTH)),
    "encoder.layer.1.attention.output.dense.bias": ("blocks.1.attn.proj.bias", (WIDTH,)),
    "encoder.layer.1.layer_scale1.lambda1": ("blocks.1.ls1.gamma", (WIDTH,)),
    "encoder.layer.1.layer_scale2.lambda1": ("blocks.1.ls2.gamma", (WIDTH,)),
    "encoder.layer.1.mlp.weights_in.weight": ("blocks.1.mlp.w12.weight", (8, WIDTH)),
    "encoder.layer.1.mlp.weights_out.bias": ("blocks.1.mlp.w3.bias", (WIDTH,)),
    "encoder.layer.2.mlp.fc1.weight": ("blocks.2.mlp.fc1.weight", (8, WIDTH)),
    "layernorm.weight": ("norm.weight", (WIDTH,)),
    "layernorm.bias": ("norm.bias", (WIDTH,)),
}


def attention(part: str, kind: str = "weight", block: int = 1) -> str:
    return f"encoder.layer.{block}.attention.attention.{part}.{kind}"


def test_names_of_hugging_face() -> None:
    """Inside a larger model, without that model's prefix."""
    arrays = distinct({name: shape for name, (_, shape) in HUGGING_FACE.items()})
    found = adapted({f"dinov2.{name}": array for name, array in arrays.items()})
    same(found, {ours: arrays[name] for name, (ours, _) in HUGGING_FACE.items()})


def test_query_key_and_value_are_one() -> None:
    """Block by block, in this order whatever the file's is."""
    shapes = {attention(part, block=block): (2, 3) for block in (1, 0) for part in ("value", "query", "key")}
    shapes |= {attention(part, "bias"): (2,) for part in ("key", "value", "query")}
    arrays = distinct(shapes)
    stacked = {
        f"blocks.{block}.attn.qkv.weight": np.concatenate(
            [arrays[attention(part, block=block)] for part in ("query", "key", "value")]
        )
        for block in (0, 1)
    }
    bias = np.concatenate([arrays[attention(part, "bias")] for part in ("query", "key", "value")])
    same(adapted(arrays), stacked | {"blocks.1.attn.qkv.bias": bias})


@pytest.mark.parametrize(
    "shapes",
    [
        {"query": (2, 3), "value": (2, 3)},
        {"query": (2, 3), "key": (2, 3), "value": (2, 4)},
        {"query": (), "key": (), "value": ()},
    ],
    ids=["missing", "unequal", "scalars"],
)
def test_a_query_without_counterparts_keeps_the_files_name(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """So that the loader lists it."""
    arrays = distinct({f"m.{attention(part)}": shape for part, shape in shapes.items()})
    same(adapted(arrays), arrays)


def test_a_published_file_keeps_its_names() -> None:
    """Whatever lies in it besides the backbone is left out."""
    names = ("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma", "norm.weight")
    arrays = distinct(dict.fromkeys(names, (2, 3)))
    same(adapted(arrays | {"head.weight": np.zeros(2)}), arrays)


def test_two_backbones_in_one_file() -> None:
    """Width and depth of the requested model choose."""
    of_one = {
        f"{prefix}.{name}": shape
        for prefix, width in (("a", 4), ("b", WIDTH))
        for name, shape in {
            "patch_embed.proj.weight": (width, 3, 2, 2), "pos_embed": (1, 5, width), "blocks.0.norm1.weight": (width,),
        }.items()
    }  # fmt: skip
    shapes, _ = layouts.adapt(of_one, lambda name: pytest.fail(f"{name} was read"), width=WIDTH, depth=1)
    assert shapes["pos_embed"] == (1, 5, WIDTH)


@pytest.mark.parametrize(
    ("first", "last", "packed"),
    [
        # A hidden width of 5 is not half of any other side.
        ((10, WIDTH), (WIDTH, 5), True),
        ((5, WIDTH), (WIDTH, 5), False),
        ((12, WIDTH), (WIDTH, 12), False),
        ((3, WIDTH), (WIDTH, 3), False),
        ((10, WIDTH), (), False),
        ((), (WIDTH, 5), False),
        ((10, WIDTH), None, False),
        (None, (WIDTH, 5), False),
    ],
)
def test_timms_swiglu_is_two_matrices_in_one(
    first: tuple[int, ...] | None, last: tuple[int, ...] | None, packed: bool
) -> None:
    """Recognised by the first matrix, which is twice as high as the last one is wide; names of ordinary ones stay."""
    shapes = {"fc1.weight": first, "fc2.weight": last, "fc1.bias": (10,), "fc2.bias": (WIDTH,)}
    arrays = distinct({f"blocks.3.mlp.{name}": shape for name, shape in shapes.items() if shape is not None})
    named = {"fc1": "w12", "fc2": "w3"} if packed else {"fc1": "fc1", "fc2": "fc2"}
    same(adapted(arrays), {name.replace(name[13:16], named[name[13:16]]): array for name, array in arrays.items()})


def test_timms_table_without_prefix_tokens() -> None:
    """The class token is at no position: zeros before the table, with registers or without."""
    arrays = distinct({"pos_embed": (1, 9, WIDTH), "cls_token": (1, 1, WIDTH)})
    whole = np.concatenate((np.zeros((1, 1, WIDTH)), arrays["pos_embed"]), axis=1)
    same(adapted(arrays), arrays | {"pos_embed": whole})
    registers = np.ones((1, 4, WIDTH), np.float32)
    expected = arrays | {"pos_embed": whole, "register_tokens": registers}
    same(adapted(arrays | {"reg_token": registers}), expected)


@pytest.mark.parametrize(("registers", "patches"), [(1, 9), (4, 16), (2, 4), (1, 0)])
def test_timms_table_with_all_tokens(registers: int, patches: int) -> None:
    """Class token, registers, patches: the registers get their positions, which DINOv2 does not add."""
    arrays = distinct({"pos_embed": (1, 1 + registers + patches, WIDTH), "reg_token": (1, registers, WIDTH)})
    rows = arrays["pos_embed"][0]
    expected = {
        "pos_embed": np.concatenate((rows[:1], rows[1 + registers :]))[None],
        "register_tokens": arrays["reg_token"] + rows[None, 1 : 1 + registers],
    }
    same(adapted(arrays), expected)


@pytest.mark.parametrize(
    ("positions", "registers"),
    [
        ((1, 10, WIDTH), None),  # the published table: a class token and 3 x 3
        ((1, 12, WIDTH), (1, 4, WIDTH)),
        ((1, 3, WIDTH), (1, 4, WIDTH)),
        ((1, 18, WIDTH), (4, WIDTH)),
        ((10, WIDTH), None),
        (None, (1, 4, WIDTH)),
    ],
)
def test_other_tables_stay_as_they_are(positions: tuple[int, ...] | None, registers: tuple[int, ...] | None) -> None:
    given = {"cls_token": (1, 1, WIDTH), "pos_embed": positions, "reg_token": registers}
    arrays = distinct({name: shape for name, shape in given.items() if shape is not None})
    same(adapted(arrays), {name.replace("reg_token", "register_tokens"): array for name, array in arrays.items()})

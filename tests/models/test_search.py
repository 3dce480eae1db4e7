"""Which tensors of a checkpoint are a backbone, by their names and shapes alone."""

from __future__ import annotations

import pytest

from dinoexport.errors import WeightsError
from dinoexport.family import Shapes
from dinoexport.models.dinov2.search import Backbone, backbones, search


def official(prefix: str = "", *, width: int = 8, depth: int = 2) -> dict[str, tuple[int, ...]]:
    """The least a backbone has, in the published layout."""
    return {
        f"{prefix}patch_embed.proj.weight": (width, 3, 14, 14),
        f"{prefix}pos_embed": (1, 17, width),
        **{f"{prefix}blocks.{i}.norm1.weight": (width,) for i in range(depth)},
    }


def prefix_of(found: Shapes, **wanted: int) -> str:
    chosen = search(found, **wanted)
    assert chosen is not None
    return chosen.backbone.prefix


def refused(found: Shapes, **wanted: int) -> tuple[str, str]:
    with pytest.raises(WeightsError) as error:
        search(found, **wanted)
    return error.value.message, error.value.next_step


def test_names_of_hugging_face() -> None:
    own = {
        "embeddings.patch_embeddings.projection.weight": "m.embeddings.patch_embeddings.projection.weight",
        "embeddings.position_embeddings": "m.embeddings.position_embeddings",
        "encoder.layer.0.norm1.weight": "m.encoder.layer.0.norm1.weight",
        "encoder.layer.11.attention.attention.query.bias": "m.encoder.layer.11.attention.attention.query.bias",
        "encoder.layer.3.layer_scale1.lambda1": "m.encoder._checkpoint.layer.3.layer_scale1.lambda1",
    }
    shapes = {name: (8, 3, 14, 14) if "projection" in name else (8,) for name in own.values()}
    (found,) = backbones(shapes)
    assert found == Backbone(layout="hugging face", before=("m",), after=(), names=own)
    assert found.is_whole and found.depth == 12 and found.width(shapes) == 8


def test_a_group_without_blocks_or_without_a_shape() -> None:
    (found,) = backbones({"patch_embed.proj.weight": (), "pos_embed": (1, 17, 8)})
    assert not found.is_whole and found.depth == 0
    assert found.width({"patch_embed.proj.weight": ()}) == 0


def test_without_a_whole_backbone_the_largest_group_is_it() -> None:
    found = backbones({"a.cls_token": (8,), "b.cls_token": (8,), "b.pos_embed": (8,), "c.cls_token": (8,)})
    assert [group.before for group in found] == [("b",)]
    assert backbones({"fc.weight": (2, 2)}) == [] and search({"fc.weight": (2, 2)}) is None
    assert prefix_of({"b.cls_token": (8,), "c": (8,)}, width=8, depth=2) == "b"


@pytest.mark.parametrize(
    ("plain", "wrapped"),
    [
        ("blocks.0.norm1.weight", "blocks._orig_mod.0.norm1.weight"),
        ("blocks.0.attn.qkv.weight", "blocks.0.attn._orig_mod.qkv.weight"),
        ("patch_embed.proj.weight", "patch_embed._fsdp.proj.weight"),
    ],
)
def test_of_two_names_the_one_without_a_wrapper_counts(plain: str, wrapped: str) -> None:
    """Whichever comes first in the file; the other is left out by name."""
    for names in ((plain, wrapped), (wrapped, plain)):
        (found,) = backbones(dict.fromkeys(names, (8,)))
        assert found.names == {plain: plain}
        (found,) = backbones({wrapped: (8,)})
        assert found.names == {plain: wrapped}


def test_a_name_that_can_be_read_in_two_ways() -> None:
    """As `cls_token` of something called norm, which needs no foreign segment, not as `norm.weight` around one."""
    (found,) = backbones({"norm.cls_token.weight": (8,)})
    assert found == Backbone(
        layout="official", before=("norm",), after=("weight",), names={"cls_token": "norm.cls_token.weight"}
    )


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("blocks.3.norm1.weight", "blocks.3.norm1.weight"),
        ("blocks.0.3.norm1.weight", "blocks.3.norm1.weight"),  # a chunk, then the block
        ("blocks.0.1.3.norm1.weight", None),
        ("blocks.norm1.weight", None),
        ("blocks.3.norm1", None),
        ("blocks.\u0663.norm1.weight", None),  # a digit, but not of ASCII
    ],
)
def test_numbers_of_a_block(name: str, own: str | None) -> None:
    assert [list(group.names) for group in backbones({name: (8,)})] == ([[own]] if own else [])


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [({"width": 16, "depth": 2}, "b"), ({"width": 8, "depth": 3}, "c"), ({"width": 8, "depth": 2}, "a")],
)
def test_width_and_depth_decide(wanted: dict[str, int], chosen: str) -> None:
    found = official("a.") | official("b.", width=16) | official("c.", depth=3)
    assert prefix_of(found, **wanted) == chosen


def test_an_unclear_choice_is_refused() -> None:
    found = official("a.") | official("b.")
    for wanted in ({}, {"width": 8, "depth": 2}, {"width": 16, "depth": 2}, {"width": 8, "depth": 3}):
        assert refused(found, **wanted) == (
            "The checkpoint holds 2 backbones, under 'a', 'b'.", "Choose one with --prefix, as --prefix a",
        )  # fmt: skip
    assert refused(official() | official("b.")) == (
        "The checkpoint holds 2 backbones, under '', 'b'.", "Choose one with --prefix, as --prefix b",
    )  # fmt: skip


def test_a_teacher_is_chosen_before_its_students_only() -> None:
    teacher, student = official("teacher.backbone."), official("student.backbone.")
    assert prefix_of(student | teacher) == "teacher.backbone"
    assert prefix_of(official("a.student.") | student | teacher) == "teacher.backbone"
    assert "'teacher.backbone', 'ema'" in refused(teacher | official("ema."))[0]
    assert "holds 3 backbones" in refused(teacher | student | official("ema."))[0]
    assert "holds 3 backbones" in refused(teacher | student | official("a.teacher."))[0]
    assert "holds 2 backbones" in refused(student | official("a.student."))[0]


def test_what_was_chosen_and_left_out_is_said() -> None:
    found = search(official("student.") | official("teacher.", depth=3), width=8, depth=2)
    assert found is not None and found.strays == ()
    assert found.notes == (
        "The backbone under 'student' was chosen, not the one under 'teacher'.",
        "It is the student; upstream evaluates and publishes the teacher.",
        (
            "Left out, because they are not part of it: teacher.patch_embed.proj.weight, teacher.pos_embed, "
            "teacher.blocks.0.norm1.weight and 2 more."
        ),
    )


@pytest.mark.parametrize(
    ("count", "listed"),
    [(1, "head.0"), (3, "head.0, head.1, head.2"), (4, "head.0, head.1, head.2 and 1 more")],
)
def test_three_omissions_are_named(count: int, listed: str) -> None:
    """Those of no backbone; a tensor at its top that computes with it is a stray instead."""
    found = search(official() | {"rope.freqs": (4,)} | {f"head.{i}": (8,) for i in range(count)})
    assert found is not None and found.strays == ("rope.freqs",)
    assert found.notes == (f"Left out, because they are not part of it: {listed}.",)

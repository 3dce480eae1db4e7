"""Checkpoints that Hugging Face's, timm's and upstream's training code write, judged by the tokens they give.

The oracle is the other library's own model: its state dict is saved, loaded as ours, and its tokens must come out.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.config.recipe import Recipe
from dinoexport.models.dinov2 import reference
from dinoexport.models.dinov2.config import Architecture
from dinoexport.weights.checkpoint import Checkpoint
from tests.checkpoint_files import (
    Tensors,
    opened,
    refused,
    refused_read,
    save_pth,
    save_safetensors,
    settled,
    tiny,
    tiny_state,
)

# 37 x 37 patches: the one size at which all libraries leave the position table alone.
NATIVE = (1, 3, 518, 518)


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter far from its first value and from every other one: a fresh LayerScale would hide the blocks."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (0.3 if parameter.ndim == 1 else 0))
    return model.eval()


def ours(checkpoint: Checkpoint, wanted: Recipe, pixels: torch.Tensor) -> torch.Tensor:
    arch = Architecture(**wanted.model)
    (tokens,) = reference.tokens_of(
        arch,
        lambda name: torch.from_numpy(checkpoint.read(name)),
        [pixels],
        blocks=[arch.depth - 1],
        block_done=lambda _: None,
    )
    return tokens[arch.depth - 1]


def assert_same(tokens_BND: torch.Tensor, theirs_BND: torch.Tensor) -> None:
    assert tokens_BND.shape == theirs_BND.shape
    assert torch.linalg.vector_norm(theirs_BND) > 1
    for i in range(min(6, theirs_BND.shape[1])):  # class and registers one by one: patches would outvote them
        assert relative_l2(tokens_BND[:, i], theirs_BND[:, i]) <= 1e-5
    assert relative_l2(tokens_BND, theirs_BND) <= 1e-5


def relative_l2(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(NATIVE, generator=torch.Generator().manual_seed(0))


# Hugging Face


def hugging_face(wanted: Recipe, kind: str = "Model") -> Any:
    import transformers

    registers = wanted.model["register_count"]
    facts = {
        "hidden_size": wanted.model["embed_dim"],
        "num_hidden_layers": wanted.model["depth"],
        "num_attention_heads": wanted.model["num_heads"],
        "use_swiglu_ffn": wanted.model["feed_forward"] == "swiglu",
        "image_size": 518,
        "patch_size": 14,
    }
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **facts)
        return scattered(getattr(transformers, f"Dinov2WithRegisters{kind}")(config))
    return scattered(getattr(transformers, f"Dinov2{kind}")(transformers.Dinov2Config(**facts)))


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
@pytest.mark.parametrize("register_count", [0, 4])
def test_hugging_face(tmp_path: Path, pixels: torch.Tensor, feed_forward: str, register_count: int) -> None:
    """A folder that save_pretrained wrote, and the older pytorch_model.bin."""
    wanted = tiny(feed_forward=feed_forward, register_count=register_count)
    model = hugging_face(wanted)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        theirs = model(pixels).last_hidden_state
    checkpoint = opened(tmp_path, wanted)
    assert_same(ours(checkpoint, wanted, pixels), theirs)

    older = opened(save_pth(tmp_path / "pytorch_model.bin", model.state_dict()), wanted)
    for name in Architecture(**wanted.model).tensors:
        np.testing.assert_array_equal(older.read(name), checkpoint.read(name), err_msg=name)


@pytest.mark.parametrize("register_count", [0, 4])
def test_a_classifier_of_hugging_face_in_shards(tmp_path: Path, pixels: torch.Tensor, register_count: int) -> None:
    """Its backbone has a prefix, and a head that is left out."""
    wanted = tiny(register_count=register_count)
    model = hugging_face(wanted, "ForImageClassification")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    backbone = model.dinov2_with_registers if register_count else model.dinov2
    with torch.inference_mode():
        theirs = backbone(pixels).last_hidden_state
    assert_same(ours(opened(tmp_path, wanted), wanted, pixels), theirs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder.layer.1.attention.attention.key.weight": None}, "missing: blocks.1.attn.qkv.weight (144, 48)"),
        (
            {"encoder.layer.1.attention.attention.key.weight": None},
            "unexpected: encoder.layer.1.attention.attention.query.weight (48, 48)",
        ),
        (
            {"encoder.layer.1.attention.attention.key.bias": torch.zeros(())},
            "unexpected: encoder.layer.1.attention.attention.key.bias ()",
        ),
        (
            {"encoder.layer.0.attention.attention.value.weight": torch.zeros(48, 47)},
            "missing: blocks.0.attn.qkv.weight (144, 48)",
        ),
        ({"embeddings.cls_token": None}, "missing: cls_token (1, 1, 48)"),
        ({"embeddings.position_embeddings": torch.zeros(1, 258, 48)}, "mis-shaped: pos_embed is (1, 258, 48)"),
        ({"encoder.lora.weight": torch.zeros(2)}, "unexpected: encoder.lora.weight (2,)"),
    ],
)
def test_a_hugging_face_file_that_does_not_fit(
    tmp_path: Path, change: dict[str, torch.Tensor | None], says: str
) -> None:
    changed = hugging_face(tiny()).state_dict() | change
    state = {name: tensor for name, tensor in changed.items() if tensor is not None}
    assert says in refused(save_pth(tmp_path / "w.pth", state)).message


# timm


class _Anything(type):
    """A class with any class in it, all of them empty; as a module, what can be imported and never used."""

    def __getattr__(cls, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


@pytest.fixture(scope="module")
def timm_vit() -> Any:
    """timm's own `vision_transformer`.

    timm imports torchvision for its datasets, transforms and frozen batch norms. The tests' environment has none, and a
    ViT uses none of it: where it is missing, empty classes stand in while timm is imported, and go again.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    parts = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    stand_ins = {f"torchvision{part}": _Anything("torchvision", (), {}) for part in parts}
    if importlib.util.find_spec("torchvision") is None:
        sys.modules.update(stand_ins)  # type: ignore[arg-type]
    try:
        from timm.models import vision_transformer
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
    return vision_transformer


def timm_model(timm_vit: Any, wanted: Recipe, **more: Any) -> Any:
    """What timm's vit_*_patch14_dinov2 and vit_*_patch14_reg4_dinov2 pass, in our size."""
    facts: dict[str, Any] = {
        "img_size": 518,
        "patch_size": 14,
        "embed_dim": wanted.model["embed_dim"],
        "depth": wanted.model["depth"],
        "num_heads": wanted.model["num_heads"],
        "init_values": 1e-5,
        "num_classes": 0,
    }
    if wanted.model["feed_forward"] == "swiglu":
        facts |= {"mlp_ratio": 2.66667 * 2, "mlp_layer": timm_vit.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    if wanted.model["register_count"]:
        facts |= {"reg_tokens": wanted.model["register_count"], "no_embed_class": True}
    return scattered(timm_vit.VisionTransformer(**(facts | more)))


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
@pytest.mark.parametrize("register_count", [0, 4])
def test_timm(tmp_path: Path, pixels: torch.Tensor, timm_vit: Any, feed_forward: str, register_count: int) -> None:
    wanted = tiny(feed_forward=feed_forward, register_count=register_count)
    model = timm_model(timm_vit, wanted)
    with torch.inference_mode():
        theirs = model.forward_features(pixels)
    checkpoint = opened(save_safetensors(tmp_path / "model.safetensors", model.state_dict()), wanted)
    assert_same(ours(checkpoint, wanted, pixels), theirs)
    if register_count:  # layer norms hide a constant, so tokens alone do not show this
        assert not checkpoint.read("pos_embed")[:, 0].any()


def test_timm_with_a_classifier(tmp_path: Path, pixels: torch.Tensor, timm_vit: Any) -> None:
    """A training checkpoint of timm's: the weights under state_dict, a head, the optimiser's tensors beside it."""
    wanted = tiny(register_count=4)
    model = timm_model(timm_vit, wanted, num_classes=10)
    with torch.inference_mode():
        theirs = model.forward_features(pixels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    path = save_pth(tmp_path / "checkpoint.pth", content)
    assert_same(ours(opened(path, wanted), wanted, pixels), theirs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pos_embed": torch.zeros(1, 255, 48)}, "mis-shaped: pos_embed is (1, 255, 48), needs (1, 1370, 48)"),
        ({"pos_embed": torch.zeros(1369)}, "mis-shaped: pos_embed is (1369,), needs (1, 1370, 48)"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(())}, "mis-shaped: blocks.0.mlp.fc1.weight is (), needs (192, 48)"),
        ({"reg_token": torch.zeros(1, 8, 48)}, "mis-shaped: register_tokens is (1, 8, 48), needs (1, 4, 48)"),
    ],
)
def test_a_timm_file_that_does_not_fit(
    tmp_path: Path, timm_vit: Any, change: dict[str, torch.Tensor], says: str
) -> None:
    wanted = tiny(register_count=4)
    state = timm_model(timm_vit, wanted).state_dict() | change
    assert says in refused(save_pth(tmp_path / "w.pth", state), wanted).message


# Upstream's training


def chunked(state: Tensors) -> Tensors:
    """As BlockChunk numbers them (dinov2/models/vision_transformer.py): chunk, then the block's number in the model."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): tensor for name, tensor in state.items()}


def prefixed(state: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def heads() -> Tensors:
    return {"dino_head.mlp.0.weight": torch.ones(3, 3), "ibot_head.last_layer.weight_v": torch.ones(3)}


def other_values(state: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in state.items()}


def teacher_file(state: Tensors) -> Any:
    """eval/training_*/teacher_checkpoint.pth of dinov2/train/train.py."""
    return {"teacher": prefixed(chunked(state), "backbone.") | heads()}


def distributed_teacher(state: Tensors) -> Any:
    return {"teacher": prefixed(prefixed(chunked(state), "backbone.") | heads(), "module.")}


def student_and_teacher(state: Tensors) -> Any:
    """The student comes first and has other values."""
    student = prefixed(chunked(other_values(state)), "backbone.") | heads()
    return {"student": student, "iteration": 12, "teacher": prefixed(chunked(state), "backbone.") | heads()}


def whole_model(state: Tensors) -> Any:
    """SSLMetaArch's state dict: `model` holds student.* and teacher.*."""
    both = prefixed(other_values(state), "student.backbone.") | prefixed(state, "teacher.backbone.")
    return {"model": both | prefixed(heads(), "teacher."), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}


def one_chunk(state: Tensors) -> Any:
    return {name.replace("blocks.", "blocks.0.", 1): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "layout",
    [teacher_file, distributed_teacher, student_and_teacher, whole_model, chunked, one_chunk,
     lambda state: {"model": state}, lambda state: prefixed(state, "backbone.")],
)  # fmt: skip
def test_upstream_training_checkpoints(tmp_path: Path, layout: Any) -> None:
    state = tiny_state()
    checkpoint = opened(save_pth(tmp_path / "w.pth", layout(state)))
    for name, tensor in state.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy(), err_msg=name)


def test_a_student_alone_is_called_one(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "w.pth", {"student": prefixed(tiny_state(), "backbone.")})
    assert np.array_equal(opened(path).read("cls_token"), tiny_state()["cls_token"].numpy())
    assert any("student" in note for note in settled(path).notes)


def test_a_part_of_another_model_is_left_out(tmp_path: Path) -> None:
    state = tiny_state()
    path = save_pth(tmp_path / "w.pth", {"model": state, "backbone": {"cls_token": state["cls_token"] + 1}})
    assert np.array_equal(opened(path).read("cls_token"), state["cls_token"].numpy())
    assert any("backbone.cls_token" in note for note in settled(path).notes)


def test_a_part_that_is_not_finite_is_named_as_the_file_names_it(tmp_path: Path) -> None:
    state = hugging_face(tiny()).state_dict()
    name = "encoder.layer.1.attention.attention.value.bias"
    state[name] = torch.full((48,), float("nan"))
    assert name in refused_read(save_pth(tmp_path / "w.pth", state), "blocks.1.attn.qkv.bias").message

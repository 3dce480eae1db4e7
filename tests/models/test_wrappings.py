"""Checkpoints as users have them: one small DINOv2 in the wrappings of the field, each after a public report."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.errors import UsageError, WeightsError
from dinoexport.models.dinov2.search import search
from tests.checkpoint_files import TINY, Tensors, opened, refused, save_pth, save_safetensors, settled, tiny_state
from tests.properties import examples

OTHER = 7.0  # added to the tensors of a second model, so that taking it shows


def under(prefix: str, state: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: Tensors) -> Tensors:
    return {name: tensor + OTHER for name, tensor in state.items()}


def chunked(state: Tensors) -> Tensors:
    """Blocks in chunks of two, as upstream's training writes them."""
    return {re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", n): t for n, t in state.items()}


def renamed(state: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


HEADS = {"dino_head.mlp.0.weight": torch.ones(3, 3), "ibot_head.last_layer.weight_v": torch.ones(3, 3)}

# What the file holds, by what made it; all of them are the plain state dict.
TAKEN: dict[str, Callable[[Tensors], Any]] = {
    "plain": lambda s: s,
    "torch.compile": lambda s: under("_orig_mod.", s),
    "DDP of a compiled model": lambda s: {"model": under("module._orig_mod.", s)},
    "compiled DDP": lambda s: under("_orig_mod.module.", s),
    "the block list compiled": lambda s: {"state_dict": renamed(s, "blocks.", "blocks._orig_mod.")},
    "each block compiled": lambda s: {
        re.sub(r"^(blocks\.\d+)", r"\1._orig_mod", name): tensor for name, tensor in s.items()
    },
    "activation checkpointing": lambda s: {
        re.sub(r"^(blocks\.\d+)", r"\1._checkpoint_wrapped_module", name): tensor for name, tensor in s.items()
    },
    "FSDP's names, gathered": lambda s: {
        "model": {
            "_fsdp_wrapped_module." + re.sub(r"(blocks\.\d+)", r"\1._fsdp_wrapped_module", name): tensor
            for name, tensor in s.items()
        }
    },
    "Lightning": lambda s: {
        "epoch": 1, "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 1e-4},
        "state_dict": under("model.encoder.", s) | {"model.head.fc.weight": torch.ones(3, 48)},
    },
    "mmsegmentation": lambda s: {
        "meta": {"CLASSES": ["a"]},
        "state_dict": under("backbone.", s) | {"decode_head.conv_seg.weight": torch.ones(2, 48, 1, 1)},
    },
    "inside Depth Anything": lambda s: under("pretrained.", s) | {"depth_head.projects.0.weight": torch.ones(48, 48)},
    "peft, merged": lambda s: under("base_model.model.", s),
    "a teacher of upstream's training": lambda s: {"teacher": under("backbone.", chunked(s)) | HEADS},
    "teacher beside student": lambda s: {
        "student": under("backbone.", other(chunked(s))), "teacher": under("backbone.", chunked(s)) | HEADS,
    },
    "a student alone": lambda s: {"student": under("backbone.", s)},
    "every value named": lambda s: {f"{name}.data": tensor for name, tensor in s.items()},
    "a decoder with blocks of its own": lambda s: under("encoder.", s)
    | {f"decoder.blocks.0.{name}": torch.ones(5) for name in ("norm1.weight", "attn.qkv.weight", "mlp.fc1.weight")},
    "another backbone, of another width": lambda s: under("ours.", s)
    | {
        "small.patch_embed.proj.weight": torch.ones(24, 3, 14, 14), "small.pos_embed": torch.ones(1, 257, 24),
        "small.blocks.0.norm1.weight": torch.ones(24),
    },
    "an optimiser beside it": lambda s: {
        "model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("made_by", TAKEN)
def test_a_backbone_is_found_in_any_wrapping(tmp_path: Path, made_by: str) -> None:
    state = tiny_state()
    checkpoint = opened(save_pth(tmp_path / "w.pth", TAKEN[made_by](state)))
    for name, tensor in state.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy(), err_msg=name)


NOISE = st.lists(
    st.sampled_from(["module", "_orig_mod", "model", "net", "backbone", "encoder", "base_model", "x1"]), max_size=3
)


@examples(30)
@given(before=NOISE, within=NOISE, after=st.sampled_from(["", ".data", ".value"]), chunk=st.booleans())
def test_names_are_found_whatever_stands_around_them(
    before: list[str], within: list[str], after: str, chunk: bool
) -> None:
    """By names alone: every tensor is known for what it is, and nothing is left over."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_state().items()}
    start, inside = "".join(f"{part}." for part in before), "".join(f"{part}." for part in within)

    def wrapped(name: str) -> str:
        if chunk:
            name = re.sub(r"^blocks\.", "blocks.0.", name)
        return start + re.sub(r"^(blocks\.(?:0\.)?\d+\.|patch_embed\.)", rf"\1{inside}", name) + after

    found = search({wrapped(name): shape for name, shape in shapes.items()} | {"head.weight": (3, 3)})
    assert found is not None and found.strays == ()
    assert found.backbone.names == {name: wrapped(name) for name in shapes}
    assert found.backbone.prefix == ".".join(before)


def test_what_was_taken_and_left_out_is_said(tmp_path: Path) -> None:
    """The prefix, the teacher's rule, and how much was left out: a few names and a number."""
    content = TAKEN["teacher beside student"](tiny_state())
    content["teacher"] |= {f"dino_head.mlp.{i}.bias": torch.ones(1) for i in range(50)}
    taken, left = settled(save_pth(tmp_path / "w.pth", content)).notes
    assert "'teacher.backbone'" in taken and "'student.backbone'" in taken
    assert left.count("dino_head") <= 3 and re.search(r"and \d\d+ more", left)
    assert "student" in " ".join(settled(save_pth(tmp_path / "s.pth", TAKEN["a student alone"](tiny_state()))).notes)


def ema_beside_plain(state: Tensors) -> Any:
    """As timm's train.py saves it."""
    return {"epoch": 3, "arch": "vit", "state_dict": collections.OrderedDict(state), "state_dict_ema": other(state)}


def test_several_backbones_are_not_chosen_between(tmp_path: Path) -> None:
    """Both are named, and so is how to choose; with --prefix each can be had."""
    path = save_pth(tmp_path / "w.pth", ema_beside_plain(tiny_state()))
    error = refused(path)
    assert "'state_dict'" in error.message and "'state_dict_ema'" in error.message
    assert "--prefix" in error.next_step
    plain = tiny_state()["norm.weight"].numpy()
    assert np.array_equal(opened(path, prefix="state_dict").read("norm.weight"), plain)
    assert np.array_equal(opened(path, prefix="state_dict_ema").read("norm.weight"), plain + np.float32(OTHER))
    with pytest.raises(WeightsError, match="no tensors under 'ema'") as caught:
        opened(path, prefix="ema")
    assert "state_dict_ema" in caught.value.next_step


# Files that cannot be loaded, and what is said of them


@pytest.mark.parametrize("save", [save_pth, save_safetensors])
def test_an_adapter_that_is_not_merged(tmp_path: Path, save: Callable[[Path, Tensors], Path]) -> None:
    state = renamed(under("base_model.model.", tiny_state()), "qkv.", "qkv.base_layer.")
    state |= {"base_model.model.blocks.0.attn.qkv.lora_A.default.weight": torch.ones(8, 48)}
    error = refused(save(tmp_path / f"w.{'pth' if save is save_pth else 'safetensors'}", state))
    assert "LoRA" in error.message and "not merged" in error.message and "merge_and_unload" in error.next_step


def test_a_rank_of_fsdp(tmp_path: Path) -> None:
    names = [
        f"{who}.backbone._fsdp_wrapped_module.blocks.{i}._fsdp_wrapped_module._flat_param"
        for who in ("student", "teacher") for i in range(2)
    ]  # fmt: skip
    error = refused(save_pth(tmp_path / "w.pth", {"model": dict.fromkeys(names, torch.zeros(5000)), "iteration": 3}))
    assert "sharded by FSDP" in error.message and "eval/training_N/teacher_checkpoint.pth" in error.next_step
    assert len(error.message.splitlines()) == 1


def test_a_distributed_checkpoint_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"part")
    error = refused(tmp_path)
    assert "distributed checkpoint" in error.message and "dcp_to_torch" in error.next_step


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_torchscript_program(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.LayerNorm(4)), tmp_path / "w.pth")
    error = refused(tmp_path / "w.pth")
    assert "TorchScript" in error.message and "state_dict()" in error.next_step


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qkv.SCB", "blocks.0.mlp.fc1.qweight", "blocks.0.mlp.fc1.weight.absmax"]
)
def test_quantised_weights(tmp_path: Path, name: str) -> None:
    error = refused(save_pth(tmp_path / "w.pth", tiny_state() | {name: torch.ones(3)}))
    assert "quantised" in error.message and name in error.message


def test_a_whole_pickled_module(tmp_path: Path) -> None:
    error = refused(save_pth(tmp_path / "w.pth", torch.nn.Linear(2, 2)))
    assert "whole pickled module" in error.message and "state_dict()" in error.next_step


def test_what_changes_the_arithmetic_is_not_left_out(tmp_path: Path) -> None:
    """A norm before the blocks, a norm of queries, a block too many: another architecture, not a leftover."""
    for name in ("norm_pre.weight", "blocks.0.attn.q_norm.weight", "blocks.2.norm1.weight", "patch_embed.norm.weight"):
        assert (
            f"unexpected: {name} (48,)"
            in refused(save_pth(tmp_path / "w.pth", tiny_state() | {name: torch.ones(48)})).message
        )


# Pickles with other things beside the tensors


class Trap:
    """Runs a command when it is unpickled the ordinary way."""

    def __reduce__(self) -> Any:
        return pathlib.Path.mkdir, (pathlib.Path("/tmp/dinoexport-was-run"),)


INERT = {
    "argparse.Namespace": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(path=pathlib.PurePosixPath("/x"))),
    "a path": pathlib.PurePosixPath("/somewhere"),
    "a NumPy scalar": np.float64(0.5),
    "a NumPy array": np.arange(3),
    "a defaultdict": collections.defaultdict(list, {"a": [1]}),
    "a date": datetime.date(2024, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", INERT)
def test_settings_beside_the_tensors_are_passed_over(tmp_path: Path, kind: str) -> None:
    path = save_pth(tmp_path / "w.pth", {"args": INERT[kind], "state_dict": tiny_state(), "again": [INERT[kind]]})
    assert np.array_equal(opened(path).read("cls_token"), tiny_state()["cls_token"].numpy())


def test_nothing_of_them_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a harmless class is called: its name in the pickle is all that is looked at."""
    path = save_pth(tmp_path / "w.pth", {"args": INERT["argparse.Namespace"], "state_dict": tiny_state()})

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("it was built")

    before = set(map(str, torch.serialization.get_safe_globals()))
    monkeypatch.setattr(argparse.Namespace, "__init__", built)
    monkeypatch.setattr(argparse.Namespace, "__setattr__", built)
    assert opened(path).read("cls_token").any()
    now = set(map(str, torch.serialization.get_safe_globals()))
    assert now == before, "what other code in this process may load is as before"


def test_code_beside_them_is_refused(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "w.pth", {"args": INERT["a path"], "state_dict": tiny_state(), "trap": Trap()})
    assert "nothing of it was run" in refused(path).message
    assert not Path("/tmp/dinoexport-was-run").exists()


# What weights show of themselves


def changed(state: Tensors, **tensors: torch.Tensor | None) -> Tensors:
    return {name: tensor for name, tensor in (state | tensors).items() if tensor is not None}


def test_the_tables_side_is_read_off(tmp_path: Path) -> None:
    """A checkpoint of upstream's training at 224 pixels: 16x16 positions."""
    state = changed(tiny_state(), pos_embed=torch.ones(1, 257, 48))
    path = save_pth(tmp_path / "w.pth", {"teacher": under("backbone.", chunked(state)) | HEADS})
    assert settled(path).recipe.model["position_side"] == 16
    assert opened(path).read("pos_embed").shape == (1, 257, 48)
    stated = TINY.changed(model=TINY.model | {"position_side": 37})
    with pytest.raises(UsageError, match=r"position_side = 37.*say 16"):
        settled(path, stated)


def test_absent_biases_and_layer_scale_are_read_off(tmp_path: Path) -> None:
    state = {n: t for n, t in tiny_state().items() if not n.endswith("qkv.bias") and "gamma" not in n}
    path = save_pth(tmp_path / "w.pth", state)
    found = settled(path).recipe.model
    assert (found["qkv_bias"], found["layer_scale"]) == (False, False)
    assert opened(path).read("norm.bias").shape == (48,)
    with pytest.raises(UsageError, match=r"qkv_bias = True.*say False"):
        settled(path, TINY.changed(model=TINY.model | {"qkv_bias": True}))
    some = {n: t for n, t in tiny_state().items() if n != "blocks.1.attn.qkv.bias"}
    assert "missing: blocks.1.attn.qkv.bias" in refused(save_pth(tmp_path / "s.pth", some)).message


def test_further_channels_must_be_said(tmp_path: Path) -> None:
    state = changed(tiny_state(), **{"patch_embed.proj.weight": torch.ones(48, 4, 14, 14)})
    path = save_pth(tmp_path / "w.pth", state)
    with pytest.raises(UsageError, match="4 channels") as caught:
        settled(path)
    assert "in_chans = 4" in caught.value.next_step
    four = TINY.changed(model=TINY.model | {"in_chans": 4})
    assert opened(path, four).read("patch_embed.proj.weight").shape == (48, 4, 14, 14)


def test_timms_positions_of_class_and_registers(tmp_path: Path) -> None:
    """A table with a row for each register too: theirs is added to them, as timm does at run time."""
    recipe = TINY.changed(model=TINY.model | {"register_count": 4})
    table = torch.randn(1, 5 + 256, 48, generator=torch.Generator().manual_seed(0))
    registers = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1))
    state = changed(tiny_state(), pos_embed=table, reg_token=registers)
    checkpoint = opened(save_pth(tmp_path / "w.pth", state), recipe)
    np.testing.assert_array_equal(checkpoint.read("register_tokens"), (registers + table[:, 1:5]).numpy())
    np.testing.assert_array_equal(checkpoint.read("pos_embed"), torch.cat((table[:, :1], table[:, 5:]), 1).numpy())

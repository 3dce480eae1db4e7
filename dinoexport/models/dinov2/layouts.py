"""Checkpoints of DINOv2 in the layouts people have, seen in the one upstream publishes.

Known: upstream training checkpoints (a `teacher` dict, `backbone.` prefix, blocks in chunks), Hugging Face's
`Dinov2Model` and `Dinov2WithRegistersModel`, and timm's. What a layout is, is read off its names and shapes alone; a
name nobody knows stays as it is, so the loader can list it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dinoexport.family import Read, Shapes
from dinoexport.spec import Array

# Parts of training checkpoints and of classifiers built on the backbone that are not the backbone.
_NOT_BACKBONE = re.compile(r"^(dino_head|ibot_head|classifier|head|optimizer)\.")
_WRAPPERS = re.compile(r"^(?:(?:teacher|state_dict|model|module|backbone|dinov2_with_registers|dinov2)\.)*")
_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_HF_BLOCK = re.compile(r"^encoder\.layer\.(\d+)\.(.+)$")

_HF_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_HF_INSIDE = {
    "attention.output.dense.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in.": "mlp.w12.",
    "mlp.weights_out.": "mlp.w3.",
}
_HF_QKV = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class _View:
    """A tensor in the published layout, made from tensors of the file when it is read."""

    shape: tuple[int, ...]
    read: Callable[[], Array]


def adapt(found: Shapes, read: Read) -> tuple[Shapes, Read]:
    """(name -> shape, reader) in the published layout for a checkpoint whose tensors are `found`."""
    views: dict[str, _View] = {}
    # In a training checkpoint only the teacher counts: it is what upstream evaluates and publishes.
    for name in [name for name in found if _is_teacher(name)] or found:
        bare = _CHUNKED_BLOCK.sub(r"blocks.\1.", _WRAPPERS.sub("", name))
        if not _NOT_BACKBONE.match(bare):
            # The second tensor of one name keeps the file's own, so that the loader lists it.
            views[name if bare in views else bare] = _View(shape=found[name], read=_reader(read, name))
    if any(_HF_BLOCK.match(name) for name in views):
        views = _from_hugging_face(views)
    views = _from_timm(views)
    return {name: view.shape for name, view in views.items()}, lambda name: views[name].read()


def _reader(read: Read, name: str) -> Callable[[], Array]:
    return lambda: read(name)


def _is_teacher(name: str) -> bool:
    wrappers = _WRAPPERS.match(name)
    return wrappers is not None and "teacher" in wrappers[0].split(".")


def _from_hugging_face(views: dict[str, _View]) -> dict[str, _View]:
    renamed: dict[str, _View] = {}
    for name, view in views.items():
        if name in _HF_OUTSIDE:
            renamed[_HF_OUTSIDE[name]] = view
            continue
        block = _HF_BLOCK.match(name)
        inside = block[2] if block else name
        attention = re.match(r"attention\.attention\.(query|key|value)\.(weight|bias)$", inside)
        if block and attention:
            stem = f"encoder.layer.{block[1]}.attention.attention"
            parts = [views.get(f"{stem}.{part}.{attention[2]}") for part in _HF_QKV]
            whole = [part for part in parts if part is not None and part.shape == view.shape != ()]
            if len(whole) == len(parts):
                renamed[f"blocks.{block[1]}.attn.qkv.{attention[2]}"] = _stacked(whole)
            else:
                renamed[name] = view
            continue
        for theirs, ours in _HF_INSIDE.items():
            inside = inside.replace(theirs, ours)
        renamed[f"blocks.{block[1]}.{inside}" if block else name] = view
    return renamed


def _stacked(parts: list[_View]) -> _View:
    rows = sum(part.shape[0] for part in parts)
    return _View(
        shape=(rows, *parts[0].shape[1:]), read=lambda: np.concatenate([part.read() for part in parts], axis=0)
    )


def _from_timm(views: dict[str, _View]) -> dict[str, _View]:
    """Undoes timm: it packs SwiGLU as fc1 and fc2, calls registers reg_token, adds the class token's position to it."""
    renamed: dict[str, _View] = {}
    for name, view in views.items():
        block = re.match(r"(blocks\.\d+\.mlp)\.(fc1|fc2)\.(weight|bias)$", name)
        packed = block and _is_packed(views, block[1])
        renamed[f"{block[1]}.{'w12' if block[2] == 'fc1' else 'w3'}.{block[3]}" if block and packed else name] = view
    positions = renamed.get("pos_embed")
    if "reg_token" in renamed and positions is not None and len(positions.shape) == 3:
        renamed["register_tokens"] = renamed.pop("reg_token")
        batch, count, dim = positions.shape
        renamed["pos_embed"] = _View(
            shape=(batch, 1 + count, dim),
            read=lambda: np.concatenate((np.zeros((batch, 1, dim), np.float32), positions.read()), axis=1),
        )
    return renamed


def _is_packed(views: dict[str, _View], mlp: str) -> bool:
    """Whether the first matrix makes twice what the last one takes: gate and value in one."""
    first, last = views.get(f"{mlp}.fc1.weight"), views.get(f"{mlp}.fc2.weight")
    if first is None or last is None or not first.shape or not last.shape:
        return False
    return first.shape[0] == 2 * last.shape[-1]

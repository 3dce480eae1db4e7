"""Convert DINOv2 checkpoints from the known layouts to the one that upstream publishes.

Known: upstream's own (published or from its training, blocks in chunks), Hugging Face's `Dinov2Model` and
`Dinov2WithRegistersModel`, and timm's, each in any wrapping that `search` recognises. A layout is recognised by
its names and shapes; an unknown name is kept, so that the loader can list it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dinoexport.family import Read, Shapes
from dinoexport.models.dinov2.search import Found, search
from dinoexport.spec import Array

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
    """A tensor in the published layout, computed from tensors of the file when it is read."""

    shape: tuple[int, ...]
    read: Callable[[], Array]


def adapt(found: Shapes, read: Read, *, width: int | None = None, depth: int | None = None) -> tuple[Shapes, Read]:
    """(name -> shape, reader) in the published layout for a checkpoint whose tensors are `found`.

    width and depth: of the requested model, if the checkpoint holds several. Tensors outside the backbone are left out;
    tensors of the backbone that no DINOv2 has keep the file's names.
    """
    return adapted(search(found, width=width, depth=depth), found, read)


def adapted(chosen: Found | None, found: Shapes, read: Read) -> tuple[Shapes, Read]:
    """The same for the chosen backbone; the whole file unchanged if there is none."""
    if chosen is None:
        return found, read
    named = chosen.backbone.names | {name: name for name in chosen.strays}
    views = {own: _View(shape=found[name], read=_reader(read, name)) for own, name in named.items()}
    if chosen.backbone.layout == "hugging face":
        views = _from_hugging_face(views, chosen.backbone.names)
    views = _from_timm(views)
    return {name: view.shape for name, view in views.items()}, lambda name: views[name].read()


def _reader(read: Read, name: str) -> Callable[[], Array]:
    return lambda: read(name)


def _from_hugging_face(views: dict[str, _View], names: Mapping[str, str]) -> dict[str, _View]:
    """A query, key or value whose counterparts are missing keeps the file's name, of `names`, so that it is listed."""
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
                renamed[names[name]] = view
            continue
        for theirs, ours in _HF_INSIDE.items():
            inside = inside.replace(theirs, ours)
        renamed[f"blocks.{block[1]}.{inside}" if block else name] = view
    return renamed


def _stacked(parts: list[_View]) -> _View:
    import numpy as np

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
    registers = renamed.pop("reg_token", None)
    if registers is not None:
        renamed["register_tokens"] = registers
    positions = renamed.get("pos_embed")
    if positions is not None and len(positions.shape) == 3:
        renamed |= _with_class_position(positions, registers)
    return renamed


def _with_class_position(positions: _View, registers: _View | None) -> dict[str, _View]:
    """Timm's table has no position for class token and registers, which it adds up itself, or one for each of them."""
    import numpy as np

    batch, count, dim = positions.shape
    prefix = 0 if registers is None or len(registers.shape) != 3 else registers.shape[1]
    if math.isqrt(count) ** 2 == count:
        view = _View(
            shape=(batch, 1 + count, dim),
            read=lambda: np.concatenate((np.zeros((batch, 1, dim), np.float32), positions.read()), axis=1),
        )
        return {"pos_embed": view}
    if registers is not None and prefix and math.isqrt(max(count - 1 - prefix, 0)) ** 2 == count - 1 - prefix:
        of_patches = _View(
            shape=(batch, count - prefix, dim),
            read=lambda: np.concatenate((positions.read()[:, :1], positions.read()[:, 1 + prefix :]), axis=1),
        )
        shifted = _View(shape=registers.shape, read=lambda: registers.read() + positions.read()[:, 1 : 1 + prefix])
        return {"pos_embed": of_patches, "register_tokens": shifted}
    return {}


def _is_packed(views: dict[str, _View], mlp: str) -> bool:
    """Whether the first matrix is twice as wide as the last one's input: gate and value in one."""
    first, last = views.get(f"{mlp}.fc1.weight"), views.get(f"{mlp}.fc2.weight")
    if first is None or last is None or not first.shape or not last.shape:
        return False
    return first.shape[0] == 2 * last.shape[-1]

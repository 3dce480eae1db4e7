"""The plain upstream formulation of DINOv2 in PyTorch: the reference.

It follows dinov2/models/vision_transformer.py and dinov2/layers of the upstream repository, with its tensor names,
`F.interpolate`, scaled-dot-product attention and LayerScale. It shares no code with `graph.py`, so it does not repeat a
wrong fold or a wrong resize. Tests compare it with numbers of the official implementation.

Blocks are the outer loop and images the inner one: a block's weights are read once, used on every case and dropped, so
ViT-g in fp32 needs the memory of one block and of the cases' tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoexport.models.dinov2.config import Architecture

Load = Callable[[str], Tensor]
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@torch.inference_mode()
def tokens_of(
    arch: Architecture,
    load: Load,
    images_B3HW: Sequence[Tensor],
    *,
    blocks: Sequence[int],
    block_done: Callable[[int], None],
    keep_stream: Callable[[int, int, Tensor], None] | None = None,
) -> list[dict[int, Tensor]]:
    """Normalised tokens (B, 1 + R + N, D) of each image batch after each block in `blocks`.

    load: tensor name -> weights in the dtype to compute in. Images of any size are cropped first, top left kept.
    keep_stream: gets (batch's index, blocks done, the residual stream as it is), from the stem's on.
    """
    streams = [_embed(arch, load, image) for image in images_B3HW]
    if keep_stream is not None:
        for j, stream in enumerate(streams):
            keep_stream(j, 0, stream)
    norm_weight, norm_bias = load("norm.weight"), load("norm.bias")
    kept: list[dict[int, Tensor]] = [{} for _ in streams]
    for i in range(arch.depth):
        # A list comprehension would hold the tokens of two blocks at once.
        weights = {
            name.removeprefix(f"blocks.{i}."): load(name) for name in arch.tensors if name.startswith(f"blocks.{i}.")
        }
        for j in range(len(streams)):
            streams[j] = _block(arch, weights, streams[j])
            if keep_stream is not None:
                keep_stream(j, i + 1, streams[j])
            if i in blocks:
                kept[j][i] = F.layer_norm(streams[j], (arch.embed_dim,), norm_weight, norm_bias, arch.layer_norm_eps)
        block_done(i + 1)
    return kept


def _embed(arch: Architecture, load: Load, image: Tensor) -> Tensor:
    """prepare_tokens_with_masks: patch embedding, class token, position embedding, then registers after the class."""
    patch = arch.patch_size
    height, width = (side // patch * patch for side in image.shape[-2:])
    kernel = load("patch_embed.proj.weight")
    image = image[..., :height, :width].to(kernel.dtype)
    patches = F.conv2d(image, kernel, load("patch_embed.proj.bias"), stride=patch).flatten(2).transpose(1, 2)
    batch = patches.shape[0]
    tokens = torch.cat((load("cls_token").expand(batch, -1, -1), patches), dim=1)
    tokens = tokens + position_embedding(
        load("pos_embed"), height // patch, width // patch, offset=float(arch.offset), antialias=arch.antialias
    )
    if arch.register_count:
        registers = load("register_tokens").expand(batch, -1, -1)
        tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)
    return tokens


def position_embedding(table: Tensor, h: int, w: int, *, offset: float, antialias: bool) -> Tensor:
    """interpolate_pos_encoding: the table (1, 1 + side*side, D) for an image of h x w patches.

    Upstream resizes by a scale if there is an offset, and to a size if there is none. A square image with as many
    patches as the table uses the table unchanged.
    """
    class_position, patch_positions = table[:, :1], table[:, 1:]
    side = math.isqrt(patch_positions.shape[1])
    if h == w == side:
        return table
    grid = patch_positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = ((h + offset) / side, (w + offset) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=antialias)
    assert grid.shape[-2:] == (h, w)
    return torch.cat((class_position, grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)), dim=1)


def _block(arch: Architecture, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """dinov2/layers/block.py in evaluation: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, (arch.embed_dim,), weight, bias, arch.layer_norm_eps)

    def layer_scale(name: str, x: Tensor) -> Tensor:
        return x * weights[f"{name}.gamma"] if arch.layer_scale else x

    batch, count, dim = tokens.shape
    qkv = linear("attn.qkv", norm("norm1", tokens)).reshape(batch, count, 3, arch.num_heads, dim // arch.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim)
    tokens = tokens + layer_scale("ls1", linear("attn.proj", attended))

    x = norm("norm2", tokens)
    if arch.feed_forward == "swiglu":
        gate, value = linear("mlp.w12", x).chunk(2, dim=-1)
        fed = linear("mlp.w3", F.silu(gate) * value)
    else:
        fed = linear("mlp.fc2", _ACTIVATIONS[arch.activation](linear("mlp.fc1", x)))
    return tokens + layer_scale("ls2", fed)

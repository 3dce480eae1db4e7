"""The plain formulations of DINOv2's heads and of Depth Anything V2's in PyTorch: the reference.

Written after dinov2/hub/{classifiers,depthers}.py, dinov2/eval/{depth,segmentation}, dinov2/hub/depth and Depth
Anything V2's depth_anything_v2/dpt.py, with their tensor names. It shares no code with `graph.py`; the official
implementations' numbers pin it in the tests. h and w count patches of the padded image, H and W pixels of the given
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.models.dinov2.published import BINS, NORM_EPSILON, PATCH

Load = Callable[[str], Tensor]
_BATCH_NORM_EPSILON = 1e-5  # nn.BatchNorm2d's default, which the official head keeps


def padded(image_B3HW: Tensor) -> Tensor:
    """CenterPadding(14): zeros of the normalised image around it, the odd one to the right and below."""
    height, width = image_B3HW.shape[-2:]
    rows, columns = -height % PATCH, -width % PATCH
    return F.pad(image_B3HW, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


@torch.inference_mode()
def answers_of(
    head: Head, load: Load, streams: Mapping[int, Tensor], norm: tuple[Tensor, Tensor], image_B3HW: Tensor
) -> dict[str, Tensor]:
    """The head's outputs, and for labels `labels/lead`: how far each pixel's best logit is ahead of its second.

    load: the head's tensors in the dtype to compute in. streams: block -> tokens (B, 1 + R + h*w, D) before the final
    norm, whose weight and bias `norm` is. image: as it was before any padding.
    """
    dtype = norm[0].dtype
    prefix = 1 + head.arch.register_count
    height, width = image_B3HW.shape[-2:]
    h, w = (-(-side // PATCH) if head.pads else side // PATCH for side in (height, width))
    tokens = []
    for block in head.blocks:
        stream = streams[block].to(dtype)
        if head.after_norm:
            stream = F.layer_norm(stream, stream.shape[-1:], *norm, NORM_EPSILON)
        tokens.append(stream)
    classes = [stream[:, 0] for stream in tokens]
    patches = [stream[:, prefix:] for stream in tokens]
    maps = [stream.transpose(1, 2).reshape(stream.shape[0], -1, h, w) for stream in patches]
    match head.form:
        case "classifier":
            x = torch.cat((*classes, patches[-1].mean(dim=1)), dim=1)
            return _classified(F.linear(x, load("linear_head.weight"), load("linear_head.bias")))
        case "linear_depth" | "dpt_depth":
            if head.form == "dpt_depth":
                raw = _dpt(load, patches, classes, (h, w)) + head.depth_range[0]
            else:
                raw = _binned(head, load, maps, classes)
            depth = F.interpolate(raw.clamp(*head.depth_range), size=(height, width), mode="bilinear")
            return {"depth": depth[:, 0], "raw": raw[:, 0]}
        case "segmentation":
            return _segmented(load, maps, (height, width))
        case "depth_anything":
            return {"depth": _depth_anything(load, maps, (h, w), head.table.max_depth)}
        case "fitted_linear":
            x = classes[0] if head.table.kind == "logreg" else torch.cat((classes[0], patches[0].mean(dim=1)), dim=1)
            return _fitted(F.linear(x, load("fitted.weight"), load("fitted.bias")).softmax(dim=1))
        case "fitted_knn":
            return _fitted(_neighbours(head, load, classes[0]))


def _classified(logits_BK: Tensor) -> dict[str, Tensor]:
    return {"logits": logits_BK, "probabilities": logits_BK.float().softmax(dim=1)}


def _fitted(probabilities_BK: Tensor) -> dict[str, Tensor]:
    best = probabilities_BK.float().topk(2, dim=1).values
    return {
        "probabilities": probabilities_BK,
        "class_index": probabilities_BK.argmax(dim=1).int(),
        "class_index/lead": best[:, 0] - best[:, 1],
    }


def _neighbours(head: Head, load: Load, class_BD: Tensor) -> Tensor:
    """dinov2/eval/knn.py: softmax(cosine / T) over the nearest k, summed by class."""
    assert head.table.neighbours and head.table.temperature
    cosines = F.normalize(class_BD, dim=1) @ load("fitted.bank").T
    nearest, index = cosines.topk(head.table.neighbours, dim=1)
    weights = (nearest / head.table.temperature).softmax(dim=1)
    return (weights.unsqueeze(-1) * load("fitted.votes")[index]).sum(dim=1)


def _binned(head: Head, load: Load, maps: list[Tensor], classes: list[Tensor]) -> Tensor:
    """dinov2/hub/depth/decode_heads.py BNHead: uniform bins, the "linear" norm, class token after patch token."""
    low, high = head.depth_range
    pairs = [
        torch.cat((grid, token[:, :, None, None].expand_as(grid)), dim=1)
        for grid, token in zip(maps, classes, strict=True)
    ]
    features = torch.cat(pairs, dim=1)
    h, w = features.shape[-2:]
    features = F.interpolate(features, size=(4 * h, 4 * w), mode="bilinear")
    logits = (
        F.relu(F.conv2d(features, load("decode_head.conv_depth.weight"), load("decode_head.conv_depth.bias"))) + 0.1
    )
    share = logits / logits.sum(dim=1, keepdim=True)
    bins = torch.linspace(low, high, BINS, dtype=share.dtype)
    return torch.einsum("bkhw,k->bhw", share, bins).unsqueeze(1)


def _segmented(load: Load, maps: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """dinov2/eval/segmentation/models/decode_heads/linear_head.py, whole image at once."""
    mean, variance, weight, bias = (
        load(f"decode_head.bn.{name}") for name in ("running_mean", "running_var", "weight", "bias")
    )
    features = F.batch_norm(torch.cat(maps, dim=1), mean, variance, weight, bias, eps=_BATCH_NORM_EPSILON)
    patch_logits = F.conv2d(features, load("decode_head.conv_seg.weight"), load("decode_head.conv_seg.bias"))
    logits = F.interpolate(patch_logits, size=size, mode="bilinear")
    best = logits.topk(2, dim=1).values
    return {
        "labels": logits.argmax(dim=1).int(),
        "labels/lead": best[:, 0] - best[:, 1],
        "patch_logits": patch_logits,
    }


def _dpt(load: Load, patches: list[Tensor], classes: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """dinov2/hub/depth/decode_heads.py DPTHead, before min_depth is added."""

    def conv(x: Tensor, name: str, *, bias: bool = True, **options: int) -> Tensor:
        weight = load(f"decode_head.{name}.weight")
        return F.conv2d(x, weight, load(f"decode_head.{name}.bias") if bias else None, **options)

    def unit(x: Tensor, name: str) -> Tensor:
        y = conv(F.relu(x), f"{name}.conv1.conv", bias=False, padding=1)
        return x + conv(F.relu(y), f"{name}.conv2.conv", bias=False, padding=1)

    features = []
    for i, (tokens, class_token) in enumerate(zip(patches, classes, strict=True)):
        at = "decode_head.reassemble_blocks."
        both = torch.cat((tokens, class_token.unsqueeze(1).expand_as(tokens)), dim=-1)
        readout = f"{at}readout_projects.{i}.0"
        x = F.gelu(F.linear(both, load(f"{readout}.weight"), load(f"{readout}.bias")))
        x = x.transpose(1, 2).reshape(x.shape[0], -1, *grid)
        x = conv(x, f"reassemble_blocks.projects.{i}.conv")
        resize = f"{at}resize_layers.{i}"
        if i < 2:
            x = F.conv_transpose2d(x, load(f"{resize}.weight"), load(f"{resize}.bias"), stride=(4, 2)[i])
        elif i == 3:
            x = F.conv2d(x, load(f"{resize}.weight"), load(f"{resize}.bias"), stride=2, padding=1)
        features.append(conv(x, f"convs.{i}.conv", bias=False, padding=1))
    out = features[-1]
    for i in range(4):
        name = f"fusion_blocks.{i}"
        if i:
            other = F.interpolate(features[3 - i], size=out.shape[2:], mode="bilinear", align_corners=False)
            out = out + unit(other, f"{name}.res_conv_unit1")
        out = unit(out, f"{name}.res_conv_unit2")
        out = F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=True)
        out = conv(out, f"{name}.project.conv")
    out = F.relu(conv(out, "project.conv", padding=1))
    out = conv(out, "conv_depth.head.0", padding=1)
    out = F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=True)
    out = F.relu(conv(out, "conv_depth.head.2", padding=1))
    return F.relu(conv(out, "conv_depth.head.4"))


def _depth_anything(load: Load, maps: list[Tensor], grid: tuple[int, int], max_depth: float | None) -> Tensor:
    """depth_anything_v2/dpt.py DPTHead; metric_depth's ends in a sigmoid times the greatest depth."""

    def conv(x: Tensor, name: str, *, bias: bool = True, **options: int) -> Tensor:
        weight = load(f"depth_head.{name}.weight")
        return F.conv2d(x, weight, load(f"depth_head.{name}.bias") if bias else None, **options)

    def unit(x: Tensor, name: str) -> Tensor:
        return conv(F.relu(conv(F.relu(x), f"{name}.conv1", padding=1)), f"{name}.conv2", padding=1) + x

    levels = []
    for i, feature in enumerate(maps):
        x = conv(feature, f"projects.{i}")
        resize = f"depth_head.resize_layers.{i}"
        if i < 2:
            x = F.conv_transpose2d(x, load(f"{resize}.weight"), load(f"{resize}.bias"), stride=(4, 2)[i])
        elif i == 3:
            x = F.conv2d(x, load(f"{resize}.weight"), load(f"{resize}.bias"), stride=2, padding=1)
        levels.append(conv(x, f"scratch.layer{i + 1}_rn", bias=False, padding=1))
    path = levels[3]
    for i in (4, 3, 2, 1):
        net = f"scratch.refinenet{i}"
        if i < 4:
            path = path + unit(levels[i - 1], f"{net}.resConfUnit1")
        path = unit(path, f"{net}.resConfUnit2")
        size = levels[i - 2].shape[2:] if i > 1 else [2 * side for side in path.shape[2:]]
        path = F.interpolate(path, size=size, mode="bilinear", align_corners=True)
        path = conv(path, f"{net}.out_conv")
    out = conv(path, "scratch.output_conv1", padding=1)
    out = F.interpolate(out, size=[PATCH * side for side in grid], mode="bilinear", align_corners=True)
    out = conv(F.relu(conv(out, "scratch.output_conv2.0", padding=1)), "scratch.output_conv2.2")
    depth = F.relu(out) if max_depth is None else out.sigmoid() * max_depth
    return depth[:, 0]

"""DINOv2's heads as they are traced: weights folded, upsampling after the products it commutes with.

The plain formulations that judge these are in `reference.py`; they share no code on purpose. Suffixes as in
`models/dinov2/graph.py`; h and w count patches of the padded image, C channels, K classes or bins. As there, a trace
depends on this file, the published constants and plain arguments alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoexport.models.dinov2.published import BINS, DPT_CHANNELS, NORM_EPSILON, PATCH, RESIZES, dpt_widths

_UPSAMPLED = 4  # the linear depth heads' own factor before their bins are weighed


def _parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def _over(side: int) -> int:
    """What is lacking to the next multiple of a patch; of negative numbers runtimes disagree on the remainder."""
    return (side + PATCH - 1) // PATCH * PATCH - side


def _to_grid(tokens_BND: Tensor, h: int, w: int) -> Tensor:
    """(B, D, h, w) of patch tokens, row by row.

    The tracer knows the tokens' number and h * w as two numbers and would refuse to make one of the other.
    """
    tokens_BDN = tokens_BND.transpose(1, 2)
    batch, dim = tokens_BDN.shape[:2]
    if not torch.compiler.is_exporting():
        return tokens_BDN.reshape(batch, dim, h, w)
    shape = torch.cat([torch.full((1,), size, dtype=torch.int64) for size in (0, dim, h, w)])
    return torch.onnx.ops.symbolic(
        "Reshape", (tokens_BDN, shape), dtype=tokens_BDN.dtype, shape=(batch, dim, h, w), version=20
    )


def _bilinear(x_BCHW: Tensor, height: int, width: int, *, corners: bool = False) -> Tensor:
    """Resized to a size, never by a factor: the tracer would keep the factor of the traced size."""
    return F.interpolate(x_BCHW, size=(height, width), mode="bilinear", align_corners=corners)


class Pad(nn.Module):
    """The image to normalised pixels (B, 3, 14 h, 14 w), zeros around it, the odd one right and below."""

    byte_scale: Tensor
    byte_shift: Tensor

    def __init__(self, *, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.from_bytes = mean is not None
        if mean is not None and std is not None:
            self.register_buffer("byte_scale", (1 / (255 * torch.tensor(std))).view(-1, 1, 1))
            self.register_buffer("byte_shift", (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Padding comes after normalising: what is added is the mean colour."""
        if self.from_bytes:
            image = image.float().permute(0, 3, 1, 2) * self.byte_scale + self.byte_shift
        rows, columns = (_over(side) for side in image.shape[-2:])
        return F.pad(image, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class _Traced(nn.Module):
    """What all heads share: sizes of the image, and tokens of the blocks they read, in float32.

    layers: how many blocks are read. pads: whether the image was padded to whole patches.
    """

    def __init__(
        self, *, dim: int, prefix_count: int, layers: int, after_norm: bool, pads: bool, from_bytes: bool
    ) -> None:
        super().__init__()
        self.dim, self.prefix_count, self.layers = dim, prefix_count, layers
        self.rows_axis = 1 if from_bytes else 2
        self.after_norm, self.pads = after_norm, pads
        if after_norm:
            self.norm_weight_D, self.norm_bias_D = _parameter(self.dim), _parameter(self.dim)

    def sizes(self, image: Tensor) -> tuple[int, int, int, int]:
        """(H, W, h, w)."""
        height, width = image.shape[self.rows_axis : self.rows_axis + 2]
        up = PATCH - 1 if self.pads else 0
        return height, width, (height + up) // PATCH, (width + up) // PATCH

    def normed(self, stream_BND: Tensor) -> Tensor:
        """The tokens after the final norm, or as they are, float32."""
        if not self.after_norm:
            return stream_BND.float()
        return F.layer_norm(stream_BND.float(), (self.dim,), self.norm_weight_D, self.norm_bias_D, NORM_EPSILON)

    def patch_map(self, tokens_BND: Tensor, h: int, w: int) -> Tensor:
        """(B, D, h, w)."""
        return _to_grid(tokens_BND[:, self.prefix_count :], h, w)


class Classifier(_Traced):
    """Class tokens and the mean patch token through one linear layer."""

    def __init__(self, *, class_count: int, width: int, **shared: Any) -> None:
        super().__init__(**shared)
        self.weight_KC, self.bias_K = _parameter(class_count, width), _parameter(class_count)

    def forward(self, *streams_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities (B, K)."""
        normed = [self.normed(stream) for stream in streams_BND]
        mean_BD = normed[-1][:, self.prefix_count :].mean(dim=1)
        features_BC = torch.cat((*(tokens[:, 0] for tokens in normed), mean_BD), dim=1)
        logits_BK = F.linear(features_BC, self.weight_KC, self.bias_K)
        return logits_BK, logits_BK.softmax(dim=1)


class FittedLinear(_Traced):
    """A user's classifier on the class token, or on it and the mean patch token."""

    def __init__(self, *, class_count: int, width: int, **shared: Any) -> None:
        super().__init__(**shared)
        self.with_mean = width == 2 * self.dim
        self.weight_KC, self.bias_K = _parameter(class_count, width), _parameter(class_count)

    def forward(self, stream_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, K) and the best class (B,)."""
        tokens = self.normed(stream_BND)
        features = tokens[:, 0]
        if self.with_mean:
            features = torch.cat((features, tokens[:, self.prefix_count :].mean(dim=1)), dim=1)
        probabilities = F.linear(features, self.weight_KC, self.bias_K).softmax(dim=1)
        return probabilities, probabilities.argmax(dim=1).int()


class FittedNeighbours(_Traced):
    """The nearest of a bank of normalised class tokens vote, weighted by softmax(cosine / T)."""

    def __init__(self, *, bank: int, neighbours: int, temperature: float, class_count: int, **shared: Any) -> None:
        super().__init__(**shared)
        self.neighbours, self.temperature = neighbours, temperature
        self.bank_ND = _parameter(bank, self.dim, dtype=torch.float16)
        self.votes_NK = _parameter(bank, class_count, dtype=torch.float16)

    def forward(self, stream_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, K) and the best class (B,)."""
        class_BD = self.normed(stream_BND)[:, 0]
        unit_BD = class_BD / class_BD.norm(dim=1, keepdim=True).clamp(min=1e-12)
        cosines_BN = F.linear(unit_BD, self.bank_ND.float())
        nearest, index = cosines_BN.topk(self.neighbours, dim=1)
        weights = (nearest / self.temperature).softmax(dim=1).unsqueeze(1)
        probabilities = (weights @ self.votes_NK[index].float()).squeeze(1)
        return probabilities, probabilities.argmax(dim=1).int()


class LinearDepth(_Traced):
    """Depth as the mean of bins, weighted by one linear layer over patch and class tokens.

    A 1x1 convolution and a bilinear resize commute, so the layer is applied to patches and its 256 bins are resized
    instead of up to 8 D features: for ViT-g at 518 pixels 22 MB instead of 1.08 GB. The class tokens' share is the same
    everywhere, a bias of each image. Numerator and denominator are one product.
    """

    def __init__(self, *, depth_range: tuple[float, float], **shared: Any) -> None:
        super().__init__(**shared)
        self.range = depth_range
        width = self.layers * self.dim
        self.patch_KC11, self.class_KC = _parameter(BINS, width, 1, 1), _parameter(BINS, width)
        self.bias_K, self.weigh_2K11 = _parameter(BINS), _parameter(2, BINS, 1, 1)

    def forward(self, image: Tensor, *streams_BND: Tensor) -> Tensor:
        """Depth (B, H, W), metres."""
        height, width, h, w = self.sizes(image)
        tokens = [self.normed(stream) for stream in streams_BND]
        maps_BChw = torch.cat([self.patch_map(stream, h, w) for stream in tokens], dim=1)
        classes_BC = torch.cat([stream[:, 0] for stream in tokens], dim=1)
        of_image_BK11 = F.linear(classes_BC, self.class_KC, self.bias_K).unsqueeze(-1).unsqueeze(-1)
        logits_BKhw = F.conv2d(maps_BChw, self.patch_KC11) + of_image_BK11
        weights = F.relu(_bilinear(logits_BKhw, _UPSAMPLED * h, _UPSAMPLED * w)) + 0.1
        both = F.conv2d(weights, self.weigh_2K11)
        raw = (both[:, :1] / both[:, 1:]).clamp(*self.range)
        return _bilinear(raw, height, width)[:, 0]


class Segmentation(_Traced):
    """Labels by one linear layer over patch tokens, with BatchNorm folded into it."""

    def __init__(self, *, class_count: int, width: int, **shared: Any) -> None:
        super().__init__(**shared)
        self.weight_KC11, self.bias_K = _parameter(class_count, width, 1, 1), _parameter(class_count)

    def forward(self, image: Tensor, *streams_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, H, W) int32 and logits per patch (B, K, h, w)."""
        height, width, h, w = self.sizes(image)
        maps_BChw = torch.cat([self.patch_map(self.normed(stream), h, w) for stream in streams_BND], dim=1)
        logits_BKhw = F.conv2d(maps_BChw, self.weight_KC11, self.bias_K)
        return _bilinear(logits_BKhw, height, width).argmax(dim=1).int(), logits_BKhw


class _Convolution(nn.Module):
    """A convolution of the graph; `transposed` with a stride as large as its kernel."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, bias: bool = True, stride: int = 1, transposed: bool = False,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stride, self.padding, self.transposed = stride, size // 2, transposed
        self.kernel = _parameter(*((inputs, outputs) if transposed else (outputs, inputs)), size, size, dtype=dtype)
        self.bias = _parameter(outputs, dtype=dtype) if bias else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The convolution alone."""
        if self.transposed:
            return F.conv_transpose2d(x_BCHW, self.kernel, self.bias, stride=self.stride)
        return F.conv2d(x_BCHW, self.kernel, self.bias, stride=self.stride, padding=self.padding)


class _Residual(nn.Module):
    """x + convolution(relu(convolution(relu(x))))."""

    def __init__(self, channels: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = _Convolution(channels, channels, 3, bias=bias, dtype=dtype)
        self.second = _Convolution(channels, channels, 3, bias=bias, dtype=dtype)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The unit."""
        added: Tensor = self.second(F.relu(self.first(F.relu(x_BCHW))))
        return x_BCHW + added


class _Pyramid(_Traced):
    """What both DPT heads share: four maps of halving size, brought to one width, and joined from the coarsest on.

    The 1x1 convolution behind each upsampling comes before it: they commute, and there are a quarter of the pixels.
    body: the dtype of its convolutions. What reads tokens, and the last layer, stay float32.
    """

    def __init__(self, widths: tuple[int, ...], channels: int, *, bias: bool, body: torch.dtype, **shared: Any) -> None:
        super().__init__(**shared)
        self.body = body
        self.projects = nn.ModuleList(_Convolution(self.dim, width, 1, dtype=torch.float32) for width in widths)
        self.resizes = nn.ModuleDict({
            str(i): _Convolution(
                widths[i], widths[i], size, stride=2 if i == 3 else size, transposed=i < 3, dtype=body
            )
            for i, size in RESIZES.items()
        })  # fmt: skip
        self.levels = nn.ModuleList(_Convolution(width, channels, 3, bias=False, dtype=body) for width in widths)
        # The coarsest level has nothing to join.
        self.joining = nn.ModuleList(_Residual(channels, bias=bias, dtype=body) for _ in range(3))
        self.units = nn.ModuleList(_Residual(channels, bias=bias, dtype=body) for _ in range(4))
        self.fusing = nn.ModuleList(_Convolution(channels, channels, 1, dtype=body) for _ in range(4))

    def level(self, i: int, map_BDhw: Tensor) -> Tensor:
        """The i-th map, finest first, at its own size and the common width."""
        x = self.projects[i](map_BDhw).to(self.body)
        if i in RESIZES:
            x = self.resizes[str(i)](x)
        level: Tensor = self.levels[i](x)
        return level


class DptDepth(_Pyramid):
    """The released DPT heads: class token read into every patch, no BatchNorm."""

    def __init__(self, *, depth_range: tuple[float, float], body: str, **shared: Any) -> None:
        dtype: torch.dtype = getattr(torch, body)
        super().__init__(dpt_widths(shared["dim"]), DPT_CHANNELS, bias=False, body=dtype, **shared)
        self.range = depth_range
        self.readouts = nn.ModuleList(
            _Convolution(self.dim, self.dim, 1, bias=False, dtype=torch.float32) for _ in range(4)
        )
        for i in range(4):
            self.register_parameter(f"class_weight_{i}", _parameter(self.dim, self.dim))
            self.register_parameter(f"class_bias_{i}", _parameter(self.dim))
        self.project = _Convolution(DPT_CHANNELS, DPT_CHANNELS, 3, dtype=dtype)
        self.last = nn.ModuleList([
            _Convolution(DPT_CHANNELS, DPT_CHANNELS // 2, 3, dtype=dtype),
            _Convolution(DPT_CHANNELS // 2, 32, 3, dtype=dtype),
            _Convolution(32, 1, 1, dtype=torch.float32),
        ])  # fmt: skip

    def forward(self, image: Tensor, *streams_BND: Tensor) -> Tensor:
        """Depth (B, H, W), metres."""
        height, width, h, w = self.sizes(image)
        maps = []
        for i, stream in enumerate(streams_BND):
            tokens = self.normed(stream)
            weight, bias = self.get_parameter(f"class_weight_{i}"), self.get_parameter(f"class_bias_{i}")
            of_class = F.linear(tokens[:, 0], weight, bias).unsqueeze(-1).unsqueeze(-1)
            maps.append(self.level(i, F.gelu(self.readouts[i](self.patch_map(tokens, h, w)) + of_class)))
        rows, columns = (h + 1) // 2, (w + 1) // 2
        out = maps[3]
        for i in range(4):
            if i:
                other = maps[3 - i]
                # Not the size of `out` where h or w is odd; resizing to one's own size changes nothing.
                out = out + self.joining[i - 1](_bilinear(other, rows, columns))
            out = self.fusing[i](self.units[i](out))
            rows, columns = 2 * rows, 2 * columns
            out = _bilinear(out, rows, columns, corners=True)
        out = self.last[0](F.relu(self.project(out)))
        out = F.relu(self.last[1](_bilinear(out, 2 * rows, 2 * columns, corners=True)))
        low, high = self.range
        raw = (F.relu(self.last[2](out.float())) + low).clamp(max=high)
        return _bilinear(raw, height, width)[:, 0]


class DepthAnything(_Pyramid):
    """Depth Anything V2's head: patch tokens after the final norm, no class token."""

    def __init__(
        self, *, features: int, channels: tuple[int, ...], max_depth: float | None, body: str, **shared: Any
    ) -> None:
        dtype: torch.dtype = getattr(torch, body)
        super().__init__(channels, features, bias=True, body=dtype, **shared)
        self.max_depth = max_depth
        self.last = nn.ModuleList([
            _Convolution(features, features // 2, 3, dtype=dtype),
            _Convolution(features // 2, 32, 3, dtype=dtype),
            _Convolution(32, 1, 1, dtype=torch.float32),
        ])  # fmt: skip

    def forward(self, image: Tensor, *streams_BND: Tensor) -> Tensor:
        """Depth (B, 14 h, 14 w): metres, or a disparity where there is no greatest depth."""
        _, _, h, w = self.sizes(image)
        maps = [self.level(i, self.patch_map(self.normed(s), h, w)) for i, s in enumerate(streams_BND)]
        # Where each joined map goes: to the next finer level's size, the finest to twice its own.
        sizes = [(h, w), (2 * h, 2 * w), (4 * h, 4 * w), (8 * h, 8 * w)]
        out = maps[3]
        for i, (rows, columns) in enumerate(sizes):
            if i:
                out = out + self.joining[i - 1](maps[3 - i])
            out = _bilinear(self.fusing[i](self.units[i](out)), rows, columns, corners=True)
        out = _bilinear(self.last[0](out), PATCH * h, PATCH * w, corners=True)
        raw = self.last[2](F.relu(self.last[1](out)).float())
        depth = F.relu(raw) if self.max_depth is None else raw.sigmoid() * self.max_depth
        return depth[:, 0]

"""The traced form of the DINOv2 ViT: weights are folded into their final layout, and TensorRT can fuse all operations.

Three pieces make every variant: the stem (pixels to tokens), a block (tokens to tokens) and the head (tokens to named
outputs). Each is made with plain numbers and imports nothing of ours, so that its trace depends on this file and them
alone. Suffixes name axes: B images, N tokens, D width, H and W pixels, h and w patches, I and O in and out.
The plain formulation that judges this one is in `reference.py`; they share no code on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def dtype_of(name: str) -> torch.dtype:
    """PyTorch's dtype of this name, as `float16`."""
    found: torch.dtype = getattr(torch, name)
    return found


def _parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A tensor of the graph. Its values come from the checkpoint when the file is written."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel, branch-free, zero from a distance of 2 on.

    Equal to PyTorch's two polynomials. OpenVINO folded a form with floor and four taps wrongly for static shapes (error
    0.5), so all samples get a weight, instead of selecting four.
    """
    u, v = F.relu(2 - distance), F.relu(1 - distance)
    return (-a * u * u * (u - 1)) + (4 * a + 3) * v * v - 2 * v * v * v


class Stem(nn.Module):
    """Pixels (B, 3, H, W) to tokens (B, 1 + R + h*w, D), in float32 throughout.

    The patch convolution floors, so a size that is not a multiple of its stride is cropped at the right and bottom, as
    the model card requires. mean, std: per channel; with them the input is uint8 (B, H, W, 3) instead, normalised here.
    prefix_count: class token and registers. side: of the position table, in patches; border: how many of its rows and
    columns replicate its edge on each side. offset: upstream's `interpolate_offset`, as (parts, of how many).
    """

    byte_scale: Tensor
    byte_shift: Tensor

    def __init__(
        self,
        *,
        dim: int,
        channels: int,
        patch: int,
        prefix_count: int,
        side: int,
        border: int,
        antialias: bool,
        offset: tuple[int, int],
        residual: str,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.antialias, self.side, self.patch = antialias, side, patch
        # Sizes are counted in such parts of a patch that the offset is a whole number of them; tenths at least.
        self.parts = 10 if 10 % offset[1] == 0 else offset[1]
        self.offset_parts = offset[0] * self.parts // offset[1]
        self.prefix_count = prefix_count
        self.residual = dtype_of(residual)
        self.table_size = side + 2 * border
        self.from_bytes = mean is not None
        self.kernel_OIHW = _parameter(dim, channels, patch, patch)
        self.bias_O = _parameter(dim)
        self.prefix_1RD = _parameter(1, prefix_count, dim)
        self.table_hwD = _parameter(self.table_size, self.table_size * dim)
        if mean is not None and std is not None:
            # (x / 255 - mean) / std as one product and one sum; a byte's value is exact in float32.
            self.register_buffer("byte_scale", (1 / (255 * torch.tensor(std))).view(-1, 1, 1))
            self.register_buffer("byte_shift", (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Tokens (B, 1 + R + h*w, D) in the residual stream's dtype."""
        if self.from_bytes:
            # Cast before Transpose: TensorRT does not transpose uint8.
            image = image.float().permute(0, 3, 1, 2) * self.byte_scale + self.byte_shift
        patches_BDhw = F.conv2d(image, self.kernel_OIHW, self.bias_O, stride=self.patch)
        h, w = patches_BDhw.shape[2:]
        patches_BND = patches_BDhw.flatten(2).transpose(1, 2)
        tokens_BND = F.pad(patches_BND, (0, 0, self.prefix_count, 0)) + self._positions(h, w)
        return tokens_BND.to(self.residual)

    def _positions(self, h: int, w: int) -> Tensor:
        """Class token, registers and the position table resized to h x w patches, (1, 1 + R + h*w, D).

        Resizing is separable, so it is two small matrix products with weights that follow from h and w. Upstream
        (vision_transformer.py, interpolate_pos_encoding) takes the table untouched on its native grid.
        """
        index_h, index_w = torch.arange(h), torch.arange(w)
        parts_h, parts_w = self.parts * torch.full((1,), h), self.parts * torch.full((1,), w)
        if self.offset_parts:
            off_h, off_w = self._off_grid(parts_h, parts_w)
            weights_h = self._weights(index_h, parts_h + off_h)
            weights_w = self._weights(index_w, parts_w + off_w)
        else:
            weights_h, weights_w = self._weights(index_h, parts_h), self._weights(index_w, parts_w)
        rows = (weights_h @ self.table_hwD).unflatten(-1, (self.table_size, -1))
        patches = (weights_w @ rows).flatten(0, 1).unsqueeze(0)
        return torch.cat((self.prefix_1RD, patches), dim=1)

    def _off_grid(self, parts_h: Tensor, parts_w: Tensor) -> tuple[Tensor, Tensor]:
        """Upstream's "historical kludge" for each side, interpolate_offset: on every grid but the native one.

        Uses squares instead of Abs: OpenVINO 2026.4 assumes that a count minus the grid is positive and drops the Abs,
        which gave token errors of 20 %. With antialiasing PyTorch does not resize a side as long as the table's.
        """
        native = self.parts * self.side
        off_h, off_w = (parts_h - native).square(), (parts_w - native).square()
        if self.antialias:
            off_h, off_w = off_h.clamp(max=1), off_w.clamp(max=1)
        else:
            off_h = off_w = (off_h + off_w).clamp(max=1)
        if self.offset_parts != 1:
            off_h, off_w = off_h * self.offset_parts, off_w * self.offset_parts
        return off_h, off_w

    def _weights(self, index: Tensor, parts: Tensor) -> Tensor:
        """Bicubic weights (n, table's size) of an image side of `parts` parts of a patch.

        Antialiased: a = -0.5, widened where the table shrinks, each row normalised to one. Else a = -0.75, and the
        table's edges are replicated.
        """
        distances = self._distances(index, parts)
        if not self.antialias:
            return _cubic(distances, a=-0.75)
        weights = _cubic(distances / (self.parts * self.side / parts.float()).clamp(min=1), a=-0.5)
        return weights / weights.sum(dim=1, keepdim=True)

    def _distances(self, index: Tensor, parts: Tensor) -> Tensor:
        """The distance of patch i from each sample of the table, in samples; the image has `parts` parts of patches.

        (i + 1/2 - n/2) side/n - sample, measured from the middle, in integers up to the one division, so that terms
        cancel exactly, even in a runtime that computes in bf16, where floating point gave a token error of 6 %. The
        middle of an even side is between two samples, so the integers are twice the distances from it.
        """
        if self.table_size % 2:
            samples, unit = torch.arange(self.table_size) - self.table_size // 2, 2
        else:
            samples, unit = 2 * torch.arange(self.table_size) - (self.table_size - 1), 1
        from_middle = (2 * self.parts * index + self.parts - parts) * self.side
        return ((from_middle.unsqueeze(1) - unit * parts * samples).float() / (2 * parts).float()).abs()


class Block(nn.Module):
    """Tokens (B, N, D) to tokens (B, N, D).

    Attention is written as MatMul, Softmax, MatMul with the scale in q's weights: TensorRT's fused attention needs the
    scale before the first product. LayerScale is in the projections. LayerNorm stays one operator, fp32 inside:
    decomposed in fp16 it overflows. norms and scores: the dtypes of LayerNorm and of attention's scores and softmax.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        hidden: int,
        swiglu: bool,
        activation: str,
        epsilon: float,
        qkv_bias: bool,
        body: str,
        norms: str,
        scores: str,
    ) -> None:
        super().__init__()
        self.norms, self.scores, self.body = dtype_of(norms), dtype_of(scores), dtype_of(body)
        self.epsilon, self.activation = epsilon, activation
        self.dim, self.num_heads, self.swiglu = dim, num_heads, swiglu
        of_body = partial(_parameter, dtype=self.body)
        for norm in ("norm1", "norm2"):
            self.register_parameter(f"{norm}_weight_D", _parameter(dim, dtype=self.norms))
            self.register_parameter(f"{norm}_bias_D", _parameter(dim, dtype=self.norms))
        self.qkv_weight_IO = of_body(dim, 3 * dim)
        self.qkv_bias_O = of_body(3 * dim) if qkv_bias else None
        self.proj_weight_IO, self.proj_bias_O = of_body(dim, dim), of_body(dim)
        first = 2 * hidden if swiglu else hidden
        self.first_weight_IO, self.first_bias_O = of_body(dim, first), of_body(first)
        self.last_weight_IO, self.last_bias_O = of_body(hidden, dim), of_body(dim)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Computes x + attention(norm1(x)), then x + feed_forward(norm2(x))."""
        attended = self._attention(self._norm(tokens_BND, "norm1"))
        tokens_BND = tokens_BND + attended.to(tokens_BND.dtype)
        fed = self._feed_forward(self._norm(tokens_BND, "norm2"))
        return tokens_BND + fed.to(tokens_BND.dtype)

    def _norm(self, tokens_BND: Tensor, name: str) -> Tensor:
        weight, bias = self.get_parameter(f"{name}_weight_D"), self.get_parameter(f"{name}_bias_D")
        return F.layer_norm(tokens_BND.to(self.norms), (self.dim,), weight, bias, self.epsilon).to(self.body)

    def _attention(self, x_BND: Tensor) -> Tensor:
        qkv = x_BND @ self.qkv_weight_IO
        if self.qkv_bias_O is not None:
            qkv = qkv + self.qkv_bias_O
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv.split(self.dim, dim=-1))
        scores = q.transpose(1, 2).to(self.scores) @ k.permute(0, 2, 3, 1).to(self.scores)
        mixed: Tensor = scores.softmax(dim=-1).to(self.body) @ v.transpose(1, 2)
        return mixed.transpose(1, 2).flatten(2) @ self.proj_weight_IO + self.proj_bias_O

    def _feed_forward(self, x_BND: Tensor) -> Tensor:
        hidden = x_BND @ self.first_weight_IO + self.first_bias_O
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = _ACTIVATIONS[self.activation](hidden)
        return hidden @ self.last_weight_IO + self.last_bias_O


class Head(nn.Module):
    """Tokens (B, 1 + R + N, D) through the final norm, in float32, to class (B, D), register and patch tokens."""

    def __init__(self, *, dim: int, prefix_count: int, epsilon: float, with_registers: bool) -> None:
        super().__init__()
        self.dim, self.prefix_count, self.epsilon = dim, prefix_count, epsilon
        self.with_registers = with_registers and prefix_count > 1
        self.norm_weight_D, self.norm_bias_D = _parameter(self.dim), _parameter(self.dim)

    def forward(self, tokens_BND: Tensor) -> tuple[Tensor, ...]:
        """(class tokens, register tokens if requested, patch tokens)."""
        normed = F.layer_norm(tokens_BND.float(), (self.dim,), self.norm_weight_D, self.norm_bias_D, self.epsilon)
        registers = (normed[:, 1 : self.prefix_count],) if self.with_registers else ()
        return (normed[:, 0], *registers, normed[:, self.prefix_count :])


class WholeHead(nn.Module):
    """Tokens (B, 1 + R + N, D) through the final norm, in float32, in one tensor; and the class token (B, D)."""

    def __init__(self, *, dim: int, epsilon: float) -> None:
        super().__init__()
        self.dim, self.epsilon = dim, epsilon
        self.norm_weight_D, self.norm_bias_D = _parameter(self.dim), _parameter(self.dim)

    def forward(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """(all tokens, class token)."""
        normed = F.layer_norm(tokens_BND.float(), (self.dim,), self.norm_weight_D, self.norm_bias_D, self.epsilon)
        return normed, normed[:, 0]

"""The traced form of a Llama-type decoder with a cache: one graph reads a prompt and adds a token.

Three pieces make every variant: the stem (tokens to the residual stream, the rotation and the mask), a block and the
head. Rotation, attention and norm stay single ONNX operators of opset 23: all three compilers have fast kernels for
them. New keys and values are appended outside the attention operator, because TensorRT supports none with its own
past.

Suffixes name axes: B sequences, T new tokens, P past ones, S = P + T, D width, H query heads, G key-value heads, K head
size, V vocabulary, I and O in and out, N blocks of a weight's rows. The plain formulation, which this one is validated
against, is in `reference.py`; they share no code on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A tensor of the graph. Its values come from the checkpoint when the file is written."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Stem(nn.Module):
    """Token ids (B, T) and mask (B, S) to the stream, the rotation's cosines and sines, and the attention mask."""

    frequencies: Tensor

    def __init__(
        self, *, vocabulary: int, dim: int, head_dim: int, rope_theta: float, body: str, residual: str
    ) -> None:
        super().__init__()
        self.residual = _dtype_of(residual)
        self.table_VD = _parameter(vocabulary, dim, dtype=_dtype_of(body))
        exponents = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("frequencies", 1.0 / rope_theta**exponents)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, first_position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stream (B, T, D), cosines and sines (B, T, K/2) in float32, mask (B, 1, T, S), true where a token is seen.

        A sequence's first token that is not padding is at `first_position`. Positions are counted in float32, which
        holds every integer of a context exactly, and angles are products rounded to float32, as in the published code;
        a table would also limit the context.
        A padding token attends to itself, so that no row of the mask is empty and no softmax is NaN. The mask has an
        axis for sequences even if all are equal: OpenVINO in bf16 applies a shared one only to the first sequence.
        """
        stream = F.embedding(input_ids, self.table_VD).to(self.residual)
        seen, new = attention_mask.shape[1], input_ids.shape[1]
        keys_S = torch.arange(seen)
        queries_T1 = (torch.arange(new) + (seen - new)).unsqueeze(1)
        padding_B11 = (1 - attention_mask.float()).sum(dim=1).reshape(-1, 1, 1)
        positions_BT1 = F.relu(queries_T1.float() - padding_B11) + first_position.float()
        angles = positions_BT1 * self.frequencies
        earlier_TS, itself_TS = keys_S <= queries_T1, keys_S == queries_T1
        real_B1S = (attention_mask > 0).unsqueeze(1)
        mask = earlier_TS & (real_B1S | itself_TS)
        return stream, angles.cos(), angles.sin(), mask.unsqueeze(1)


class Products(nn.Module):
    """Products of a module, by name: x (B, T, I) times the weight `{name}_IO`.

    offsets: products whose weight, stored in few bits, has an offset `{name}_offset_NO` for each block of `block` rows,
    which is added to all numbers of the block. Its share of the product is the sum of the block's inputs times the
    offset, so the offsets are a product of their own with one row per block.
    """

    def __init__(self, *, body: str, offsets: Sequence[str] = (), block: int = 0) -> None:
        super().__init__()
        self.body, self.offsets, self.block = _dtype_of(body), frozenset(offsets), block

    def add(self, name: str, rows: int, columns: int) -> None:
        """Adds the parameters of one product."""
        setattr(self, f"{name}_IO", _parameter(rows, columns, dtype=self.body))
        if name in self.offsets:
            setattr(self, f"{name}_offset_NO", _parameter(rows // self.block, columns, dtype=self.body))

    def products(self, x: Tensor, *names: str) -> list[Tensor]:
        """The products of x and each of the weights."""
        found = [x @ getattr(self, f"{name}_IO") for name in names]
        if self.offsets.isdisjoint(names):
            return found
        sums_BTN = x.unflatten(-1, (-1, self.block)).sum(dim=-1)
        return [
            product + sums_BTN @ getattr(self, f"{name}_offset_NO") if name in self.offsets else product
            for name, product in zip(names, found, strict=True)
        ]


class Block(Products):
    """One block: the stream (B, T, D) onward, and its keys and values (B, G, S, K) with the new ones last.

    Norms and the rotation are computed in float32 whatever the body's precision.
    """

    def __init__(
        self,
        *,
        dim: int,
        kv_dim: int,
        head_dim: int,
        hidden_dim: int,
        norm_eps: float,
        body: str,
        offsets: Sequence[str] = (),
        block: int = 0,
    ) -> None:
        super().__init__(body=body, offsets=offsets, block=block)
        self.dim, self.eps, self.head_dim = dim, norm_eps, head_dim
        self.attention_norm_D = _parameter(dim, dtype=torch.float32)
        for name, columns in {"q": dim, "k": kv_dim, "v": kv_dim, "out": dim}.items():
            self.add(name, dim, columns)
        self.ffn_norm_D = _parameter(dim, dtype=torch.float32)
        self.add("gate", dim, hidden_dim)
        self.add("up", dim, hidden_dim)
        self.add("down", hidden_dim, dim)

    def forward(
        self, stream: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes x + attention(norm(x)), then x + feed_forward(norm(x))."""
        x = self._norm(stream, self.attention_norm_D)
        q, k, v = self.products(x, "q", "k", "v")
        q, k = (self._rotated(self._heads(turned), cosines, sines) for turned in (q, k))
        keys_BGSK = torch.cat((past_key, k), dim=2)
        values_BGSK = torch.cat((past_value, self._heads(v)), dim=2)
        mixed, *_ = torch.onnx.ops.attention(q, keys_BGSK, values_BGSK, mask, scale=self.head_dim**-0.5)
        (mixed,) = self.products(mixed.transpose(1, 2).flatten(2), "out")
        stream = stream + mixed.to(stream.dtype)
        gate, up = self.products(self._norm(stream, self.ffn_norm_D), "gate", "up")
        (fed,) = self.products(F.silu(gate) * up, "down")
        return stream + fed.to(stream.dtype), keys_BGSK, values_BGSK

    def _norm(self, stream: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(stream.float(), (self.dim,), weight_D, self.eps).to(self.body)

    def _heads(self, x_BTO: Tensor) -> Tensor:
        heads: Tensor = x_BTO.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads

    def _rotated(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotates the pairs (0, K/2), (1, K/2 + 1), ...: `layouts` has moved Meta's neighbours there."""
        turned: Tensor = torch.onnx.ops.rotary_embedding(heads.float(), cosines, sines)
        return turned.to(self.body)


class Head(Products):
    """The stream (B, T, D) through the last norm to logits of its last tokens, float32. logits_to_keep: 0 for all."""

    def __init__(
        self, *, dim: int, vocabulary: int, norm_eps: float, body: str, offsets: Sequence[str] = (), block: int = 0
    ) -> None:
        super().__init__(body=body, offsets=offsets, block=block)
        self.dim, self.eps = dim, norm_eps
        self.norm_D = _parameter(dim, dtype=torch.float32)
        self.add("output", dim, vocabulary)

    def forward(self, stream: Tensor, logits_to_keep: Tensor) -> Tensor:
        """Logits (B, kept, V)."""
        stream = _last_tokens(stream, logits_to_keep)
        x = F.rms_norm(stream.float(), (self.dim,), self.norm_D, self.eps).to(self.body)
        (logits,) = self.products(x, "output")
        return logits.float()


def _last_tokens(stream: Tensor, count: Tensor) -> Tensor:
    """The last tokens (B, kept, D); all tokens for a count of 0, because a slice from -0 is the whole.

    One operator when traced: PyTorch's tracer has no slice by the value of a tensor.
    """
    if not torch.onnx.is_in_onnx_export():
        return stream[:, -int(count) :]
    ends, axis = torch.full((1,), 2**62), torch.full((1,), 1)
    kept: Tensor = torch.onnx.ops.symbolic(
        "Slice", (stream, -count, ends, axis), dtype=stream.dtype, shape=stream.shape, version=13
    )
    return kept

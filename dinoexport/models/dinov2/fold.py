"""Compute the traced graph's tensors from the published ones while the file is written: transpose, scale, stack.

All folds are exact in exact arithmetic and are computed in float32 before any cast. Attention's scale is folded into q
(a power of two in every published variant, so without rounding), LayerScale into the projection before it, and the
class token's position into the class token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dinoexport.family import Read
from dinoexport.models.dinov2.config import Architecture
from dinoexport.spec import Array, Weight


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Weights by the parameter names of `graph.py`. Nothing is read until a weight's own `read` is called."""

    arch: Architecture
    read: Read

    def stem(self) -> Mapping[str, Weight]:
        """Patch kernel, prefix tokens and position table."""
        dim, registers = self.arch.embed_dim, self.arch.register_count
        size = self.arch.position_side + 2 * self.arch.table_border
        patch = self.arch.patch_size
        return {
            "kernel_OIHW": self._as_is("patch_embed.proj.weight", dim, self.arch.in_chans, patch, patch),
            "bias_O": self._as_is("patch_embed.proj.bias", dim),
            "prefix_1RD": Weight(shape=(1, 1 + registers, dim), read=self._prefix),
            "table_hwD": Weight(shape=(size, size * dim), read=self._table),
        }

    def block(self, i: int) -> Mapping[str, Weight]:
        """Norms, q-k-v with q scaled, projections with LayerScale inside."""
        dim, hidden = self.arch.embed_dim, self.arch.hidden_dim
        swiglu = self.arch.feed_forward == "swiglu"
        first, last, packed = ("mlp.w12", "mlp.w3", 2 * hidden) if swiglu else ("mlp.fc1", "mlp.fc2", hidden)
        at = f"blocks.{i}."
        return {
            "norm1_weight_D": self._as_is(f"{at}norm1.weight", dim),
            "norm1_bias_D": self._as_is(f"{at}norm1.bias", dim),
            "qkv_weight_IO": Weight(
                shape=(dim, 3 * dim), read=lambda: (self.read(f"{at}attn.qkv.weight") * self._qkv_scale()[:, None]).T
            ),
            **self._qkv_bias(f"{at}attn.qkv.bias"),
            **self._scaled(f"{at}attn.proj", f"{at}ls1.gamma", "proj", dim, dim),
            "norm2_weight_D": self._as_is(f"{at}norm2.weight", dim),
            "norm2_bias_D": self._as_is(f"{at}norm2.bias", dim),
            "first_weight_IO": Weight(shape=(dim, packed), read=lambda: self.read(f"{at}{first}.weight").T),
            "first_bias_O": self._as_is(f"{at}{first}.bias", packed),
            **self._scaled(f"{at}{last}", f"{at}ls2.gamma", "last", hidden, dim),
        }

    def head(self) -> Mapping[str, Weight]:
        """The final norm."""
        dim = self.arch.embed_dim
        return {"norm_weight_D": self._as_is("norm.weight", dim), "norm_bias_D": self._as_is("norm.bias", dim)}

    def _as_is(self, name: str, *shape: int) -> Weight:
        return Weight(shape=shape, read=lambda: self.read(name))

    def _scaled(self, linear: str, gamma: str, name: str, inputs: int, outputs: int) -> Mapping[str, Weight]:
        """A projection, with the LayerScale `gamma` behind it inside where the model has one."""
        weight: Callable[[], Array] = lambda: self.read(f"{linear}.weight").T  # noqa: E731
        bias: Callable[[], Array] = lambda: self.read(f"{linear}.bias")  # noqa: E731
        if self.arch.layer_scale:
            weight = lambda: (self.read(f"{linear}.weight") * self.read(gamma)[:, None]).T  # noqa: E731
            bias = lambda: self.read(f"{linear}.bias") * self.read(gamma)  # noqa: E731
        return {
            f"{name}_weight_IO": Weight(shape=(inputs, outputs), read=weight),
            f"{name}_bias_O": Weight(shape=(outputs,), read=bias),
        }

    def _qkv_bias(self, name: str) -> Mapping[str, Weight]:
        if not self.arch.qkv_bias:
            return {}
        shape = (3 * self.arch.embed_dim,)
        return {"qkv_bias_O": Weight(shape=shape, read=lambda: self.read(name) * self._qkv_scale())}

    def _qkv_scale(self) -> Array:
        """(3 D,): attention's 1/sqrt(head width) over q, one over k and v."""
        import numpy as np

        dim = self.arch.embed_dim
        scale = np.ones(3 * dim, np.float32)
        scale[:dim] = 1 / math.sqrt(dim // self.arch.num_heads)
        return scale

    def _prefix(self) -> Array:
        """(1, 1 + R, D): the class token with its position, then registers, which have none."""
        import numpy as np

        tokens = self.read("cls_token") + self.read("pos_embed")[:, :1]
        if self.arch.register_count:
            tokens = np.concatenate((tokens, self.read("register_tokens")), axis=1)
        return tokens

    def _table(self) -> Array:
        """The position table as rows (h, w*D), its edges replicated where the kernel may reach past them."""
        import numpy as np

        side, border = self.arch.position_side, self.arch.table_border
        table = self.read("pos_embed")[0, 1:].reshape(side, side, -1)
        if border:
            table = np.pad(table, ((border, border), (border, border), (0, 0)), mode="edge")
        return table.reshape(table.shape[0], -1)

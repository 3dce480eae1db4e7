"""Meta's tensors in the layouts of the traced graph: transposed, heads in halves, in few bits where that is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinoexport.family import Read
from dinoexport.models.llama import layouts
from dinoexport.models.llama.config import Architecture, GraphChoices
from dinoexport.spec import Array, Precision, Weight

# Precision -> bits of the stored weights of products.
BITS = {Precision.INT8: 8, Precision.INT4: 4}


@dataclass(frozen=True, kw_only=True)
class GraphWeights:
    """The weights of a graph of `precision`, each read when it is written."""

    arch: Architecture
    choices: GraphChoices
    precision: Precision
    read: Read

    @property
    def body(self) -> Precision:
        """The arithmetic of the graph's products."""
        return Precision(self.choices.body) if self.precision in BITS else self.precision

    def stem(self) -> dict[str, Weight]:
        """The table of the vocabulary."""
        return {"table_VD": self._weight("tok_embeddings.weight")}

    def block(self, i: int) -> dict[str, Weight]:
        """Block i: two norms and seven products."""

        def norm(name: str) -> Weight:
            return self._weight(f"layers.{i}.{name}.weight")

        def product(name: str, tensor: str, heads: int = 0) -> Weight:
            return self._product(name, f"layers.{i}.{tensor}.weight", heads)

        return {
            "attention_norm_D": norm("attention_norm"),
            "q_IO": product("q", "attention.wq", self.arch.heads),
            "k_IO": product("k", "attention.wk", self.arch.kv_heads),
            "v_IO": product("v", "attention.wv"),
            "out_IO": product("out", "attention.wo"),
            "ffn_norm_D": norm("ffn_norm"),
            "gate_IO": product("gate", "feed_forward.w1"),
            "up_IO": product("up", "feed_forward.w3"),
            "down_IO": product("down", "feed_forward.w2"),
        }

    def head(self) -> dict[str, Weight]:
        """The last norm and the product that gives logits."""
        return {"norm_D": self._weight("norm.weight"), "output_IO": self._output()}

    def stored_bytes(self) -> int:
        """The bytes of the graph's weights in its file: a tied model holds the table twice."""
        body = 4 if self.body is Precision.FP32 else 2
        products = [self._output()]
        for i in range(self.arch.layers):
            products += [weight for weight in self.block(i).values() if len(weight.shape) > 1]
        norms = 4 * self.arch.dim * (2 * self.arch.layers + 1)
        return norms + body * self.arch.vocabulary * self.arch.dim + sum(_stored(weight, body) for weight in products)

    def _output(self) -> Weight:
        return self._product("output", self.arch.output_name)

    def _weight(self, name: str) -> Weight:
        """A tensor in the published layout."""
        return Weight(shape=self.arch.tensors[name], read=lambda: self.read(name))

    def _product(self, product: str, name: str, heads: int = 0) -> Weight:
        """A tensor in the layout of a product, (in, out); the rows of `heads` rotated heads are in halves."""

        def values() -> Array:
            array = self.read(name)
            transposed: Array = (layouts.halves(array, heads) if heads else array).T
            return transposed

        shape, bits = self.arch.tensors[name][::-1], BITS.get(self.precision, 0)
        if bits == 4 and product in self.choices.int8:
            bits = 8
        if not bits:
            return Weight(shape=shape, read=values)
        zero_points = bits == 4 and self.choices.zero_points
        return Weight(shape=shape, read=values, bits=bits, block=self.choices.block, zero_points=zero_points)


def _stored(weight: Weight, body: int) -> int:
    """Bytes of a product's weight, with its scales and zero points."""
    numbers = math.prod(weight.shape)
    if not weight.bits:
        return numbers * body
    blocks = numbers // weight.block
    return numbers * weight.bits // 8 + blocks * body + (blocks * weight.bits // 8 if weight.zero_points else 0)

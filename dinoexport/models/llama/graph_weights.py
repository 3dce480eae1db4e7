"""Meta's tensors in the layouts of the traced graph: transposed, heads in halves, in few bits where that is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinoexport.family import Read
from dinoexport.models.llama import layouts
from dinoexport.models.llama.config import OUTPUT, PARTS, Architecture, GraphChoices
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
        """The embedding table."""
        return {"table_VD": self._weight("tok_embeddings.weight")}

    def block(self, i: int) -> dict[str, Weight]:
        """Block i: two norms and seven products."""
        found = {}
        for norm in ("attention_norm", "ffn_norm"):
            found[f"{norm}_D"] = self._weight(f"layers.{i}.{norm}.weight")
        for product, part in PARTS.items():
            found |= self._product(product, f"layers.{i}.{part}.weight")
        return found

    def head(self) -> dict[str, Weight]:
        """The last norm and the product that gives logits."""
        return {"norm_D": self._weight("norm.weight")} | self._product(OUTPUT, self.arch.output_name)

    def offsets(self, *products: str) -> tuple[str, ...]:
        """Those of the products whose weights have an offset in each block."""
        return tuple(product for product in products if self._bits(product) == 4)

    def stored_bytes(self) -> int:
        """The bytes of the graph's weights in its file: a tied model holds the table twice."""
        body = 4 if self.body is Precision.FP32 else 2
        weights = [self.head(), *map(self.block, range(self.arch.layers))]
        products = [weight for part in weights for weight in part.values() if len(weight.shape) > 1]
        norms = 4 * self.arch.dim * (2 * self.arch.layers + 1)
        return norms + body * self.arch.vocabulary * self.arch.dim + sum(_stored(weight, body) for weight in products)

    def _weight(self, name: str) -> Weight:
        """A tensor in the published layout."""
        return Weight(shape=self.arch.tensors[name], read=lambda: self.read(name))

    def _bits(self, product: str) -> int:
        """Bits of a product's stored weight; 0 for the graph's own precision."""
        bits = BITS.get(self.precision, 0)
        return 8 if bits == 4 and product in self.choices.int8 else bits

    def _product(self, product: str, name: str) -> dict[str, Weight]:
        """A tensor in the layout of a product, (in, out); the rows of rotated heads are in halves."""
        heads = {"q": self.arch.heads, "k": self.arch.kv_heads}.get(product, 0)

        def values() -> Array:
            array = self.read(name)
            transposed: Array = (layouts.halves(array, heads) if heads else array).T
            return transposed

        whole, shape = f"{product}_IO", self.arch.tensors[name][::-1]
        bits = self._bits(product)
        if not bits:
            return {whole: Weight(shape=shape, read=values)}
        found = {whole: Weight(shape=shape, read=values, bits=bits, block=self.choices.block)}
        if self.offsets(product):
            of_blocks = (shape[0] // self.choices.block, shape[1])
            found[f"{product}_offset_NO"] = Weight(shape=of_blocks, read=values, offsets_of=whole)
        return found


def _stored(weight: Weight, body: int) -> int:
    """Bytes of a product's weight and its scales, or of its offsets."""
    numbers = math.prod(weight.shape)
    if not weight.bits:
        return numbers * body
    return numbers * weight.bits // 8 + numbers // weight.block * body

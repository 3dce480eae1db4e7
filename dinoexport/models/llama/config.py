"""The recipe tables `[model]` and `[graph]` of a Llama-type decoder, and the facts that follow from them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dinoexport.config.recipe import Frozen
from dinoexport.models.llama.text import TextTable
from dinoexport.spec import closest

# A block's products, by the names of the graph's weights -> Meta's names.
PARTS = {
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "out": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
# The product that gives logits.
OUTPUT = "output"
PRODUCTS = (*PARTS, OUTPUT)


class Architecture(Frozen):
    """The `[model]` table."""

    # A build takes memory by these before it reads a weight. The largest published Llama, of 405 billion weights, is
    # 16384 wide and 126 deep, with 128 heads, 53248 hidden and 128256 words, for 131072 tokens: each may be twice that.
    dim: int = Field(gt=0, le=32768, description="Width D of the residual stream.")
    layers: int = Field(gt=0, le=256, description="Number of blocks.")
    heads: int = Field(gt=0, le=512, description="Query heads; they divide dim.")
    kv_heads: int = Field(
        gt=0, le=512, description="Key-value heads G; each serves heads / kv_heads neighbouring query heads."
    )
    hidden_dim: int = Field(gt=0, le=131072, description="Width of the gated feed-forward.")
    vocabulary: int = Field(gt=1, le=1_048_576, description="Rows V of the embedding table.")
    norm_eps: float = Field(gt=0, lt=1, description="Epsilon of the RMS norms.")
    rope_theta: float = Field(gt=1, description="Base of the rotary frequencies.")
    context: int = Field(gt=1, le=16_777_216, description="The most tokens of a sequence, prompt and answer together.")
    published_contexts: tuple[int, ...] = Field(
        default=(),
        description="Other values for the context in the authors' own files, such as the one used in training.",
    )
    text: TextTable = Field(default_factory=TextTable, description="Its prompts.")
    tied: bool = Field(default=False, description="Whether the output matrix is the embedding table.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} does not divide dim {self.dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"a head of {self.head_dim} has no pairs to rotate")
        return self

    @property
    def head_dim(self) -> int:
        """Size K of a head."""
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        """Width of keys and of values, all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of Meta's checkpoint and its shape, embeddings first."""
        dim, kv, hidden = self.dim, self.kv_dim, self.hidden_dim
        block: dict[str, tuple[int, ...]] = {
            "attention.wq.weight": (dim, dim),
            "attention.wk.weight": (kv, dim),
            "attention.wv.weight": (kv, dim),
            "attention.wo.weight": (dim, dim),
            "feed_forward.w1.weight": (hidden, dim),
            "feed_forward.w2.weight": (dim, hidden),
            "feed_forward.w3.weight": (hidden, dim),
            "attention_norm.weight": (dim,),
            "ffn_norm.weight": (dim,),
        }
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocabulary, dim)}
        for i in range(self.layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
        shapes["norm.weight"] = (dim,)
        return shapes if self.tied else shapes | {"output.weight": (self.vocabulary, dim)}

    @property
    def output_name(self) -> str:
        """The tensor that computes the logits."""
        return "tok_embeddings.weight" if self.tied else "output.weight"

    @property
    def cache_values_a_token(self) -> int:
        """Numbers per token in the cache: keys and values of every block."""
        return 2 * self.layers * self.kv_dim


class GraphChoices(Frozen):
    """The `[graph]` table."""

    residual: Literal["fp16", "fp32"] = Field(
        default="fp32",
        description="The dtype of a 16-bit graph's residual stream; `fp16` means the graph's own precision. "
        "An fp32 graph always uses fp32.",
    )
    body: Literal["fp32", "fp16"] = Field(
        default="fp32",
        description="The arithmetic of a graph with int8 or int4 weights: fp32 for CPUs, fp16 for GPUs.",
    )
    block: int = Field(default=32, ge=16, le=65536, description="Rows of a weight in int8 or int4 that share a scale.")
    int8: tuple[str, ...] = Field(
        default=("v", "down"),
        description="Products of an int4 graph whose weights stay in int8: q, k, v, out, gate, up, down, output. "
        "`v` and `down` lose the most accuracy in four bits.",
    )

    @model_validator(mode="after")
    def _known_products(self) -> Self:
        if wrong := [name for name in self.int8 if name not in PRODUCTS]:
            raise ValueError(f"int8: there is no product {wrong[0]!r}.{closest(wrong[0], PRODUCTS)}")
        return self

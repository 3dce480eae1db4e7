"""The recipe tables `[model]` and `[graph]` of a DINOv2 variant, and the facts that follow from them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dinoexport.config.recipe import Frozen
from dinoexport.spec import closest

PATCH = 14  # pixels a side; every published DINOv2 backbone
GRID = 37  # patches a side of the position table: trained at 518 = 37 * 14 pixels
# ImageNet's mean and deviation per RGB channel, on pixels in 0..1 (upstream dinov2/data/transforms.py).
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
NORM_EPSILON = 1e-6  # upstream dinov2/models/vision_transformer.py: partial(nn.LayerNorm, eps=1e-6)


class Architecture(Frozen):
    """The `[model]` table."""

    embed_dim: int = Field(gt=0, description="Width D of a token.")
    depth: int = Field(gt=0, description="Number of blocks.")
    num_heads: int = Field(gt=0, description="Attention heads; they divide embed_dim.")
    feed_forward: Literal["mlp", "swiglu"] = Field(description="`swiglu` is ViT-g's.")
    register_count: int = Field(ge=0, description="Register tokens R.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        return self

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: 4 D, or upstream's SwiGLU rounding (dinov2/layers/swiglu_ffn.py)."""
        if self.feed_forward == "mlp":
            return 4 * self.embed_dim
        return (int(4 * self.embed_dim * 2 / 3) + 7) // 8 * 8

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the published checkpoint and its shape, in the published order."""
        dim, hidden = self.embed_dim, self.hidden_dim
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, 1 + GRID * GRID, dim),
            **({"register_tokens": (1, self.register_count, dim)} if self.register_count else {}),
            "mask_token": (1, dim),
            "patch_embed.proj.weight": (dim, 3, PATCH, PATCH),
            "patch_embed.proj.bias": (dim,),
        }
        swiglu = self.feed_forward == "swiglu"
        first, last, packed = ("mlp.w12", "mlp.w3", 2 * hidden) if swiglu else ("mlp.fc1", "mlp.fc2", hidden)
        block: dict[str, tuple[int, ...]] = {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "ls1.gamma": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            f"{first}.weight": (packed, dim),
            f"{first}.bias": (packed,),
            f"{last}.weight": (dim, hidden),
            f"{last}.bias": (dim,),
            "ls2.gamma": (dim,),
        }
        for i in range(self.depth):
            shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


class GraphChoices(Frozen):
    """The `[graph]` table."""

    input: Literal["pixels", "images"] = Field(
        default="pixels",
        description="`pixels`: float32 NCHW, normalised. `images`: uint8 NHWC, normalised inside the graph.",
    )
    interface: Literal["dinov2", "transformers"] = Field(
        default="dinov2",
        description="Names of input and outputs. `transformers`: `pixel_values` in, `last_hidden_state` and "
        "`pooler_output` out, with config.json and preprocessor_config.json beside the graph, as optimum and "
        "transformers.js load it.",
    )
    sizes: Literal["crop", "strict"] = Field(
        default="crop",
        description="`crop`: other sizes lose their right and lower rest. `strict`: only multiples of 14 are accepted.",
    )
    residual: Literal["fp16", "fp32"] = Field(
        default="fp16", description="What an fp16 graph adds its blocks up in. An fp32 graph always uses fp32."
    )
    fp32: tuple[str, ...] = Field(
        default=(),
        description="Parts of an fp16 graph kept in fp32: `norms`, `softmax` (with the scores it is of), `blocks.N`.",
    )
    blocks: tuple[int, ...] = Field(default=(), description="Blocks whose normalised tokens become outputs too.")
    last_blocks: int = Field(default=0, ge=0, description="The same for the last n blocks.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.blocks and self.last_blocks:
            raise ValueError("give blocks or last_blocks, not both")
        if self.interface == "transformers" and (self.input != "pixels" or self.blocks or self.last_blocks):
            raise ValueError("interface transformers takes normalised pixels and gives the last block's tokens alone")
        return self

    def fp32_parts(self, depth: int) -> frozenset[str]:
        """The parts kept in fp32; a ValueError when the model has no such part."""
        known = ("norms", "softmax", *(f"blocks.{i}" for i in range(depth)))
        if wrong := [part for part in self.fp32 if part not in known]:
            raise ValueError(f"fp32: there is no part {wrong[0]!r}.{closest(wrong[0], known)}")
        return frozenset(self.fp32)

    def chosen_blocks(self, depth: int) -> tuple[int, ...]:
        """Indices of the blocks that become outputs, ascending; a ValueError when the model has no such block."""
        wrong = [i for i in self.blocks if not 0 <= i < depth]
        if wrong or self.last_blocks > depth:
            raise ValueError(f"the model has blocks 0 to {depth - 1}; there is no {wrong or self.last_blocks}")
        return tuple(sorted(set(self.blocks))) or tuple(range(depth - self.last_blocks, depth))

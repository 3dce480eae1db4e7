"""The recipe tables `[model]` and `[graph]` of a DINOv2 variant, and the facts that follow from them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dinoexport.config.recipe import Frozen
from dinoexport.errors import UsageError
from dinoexport.models.dinov2.published import NORM_EPSILON, PATCH
from dinoexport.spec import Precision, closest

GRID = 37  # patches a side of the published position tables: trained at 518 = 37 * 14 pixels
# Upstream's `interpolate_offset` of the published models: without registers, with registers (dinov2/hub/backbones.py).
_PUBLISHED_OFFSETS = (0.1, 0.0)
# Without antialiasing a bicubic kernel reaches two samples past the table's edge.
_REACH = 2
# An offset is a fraction with at most this denominator, so that the graph can count in whole numbers.
_OFFSET_DENOMINATOR_MAX = 1000
Activation = Literal["gelu", "gelu_tanh", "relu"]


class Architecture(Frozen):
    """The `[model]` table."""

    # A build takes memory by these before it reads a weight. The largest published one is ViT-g: 1536 wide, 40 deep,
    # 24 heads, 4 registers; five times its width and depth is 150 billion weights, more than this traces in a day.
    embed_dim: int = Field(gt=0, le=8192, description="Width D of a token.")
    depth: int = Field(gt=0, le=200, description="Number of blocks.")
    num_heads: int = Field(gt=0, le=256, description="Attention heads; they divide embed_dim.")
    feed_forward: Literal["mlp", "swiglu"] = Field(description="ViT-g has `swiglu`, the others `mlp`.")
    register_count: int = Field(ge=0, le=64, description="Register tokens R.")
    patch_size: int = Field(default=PATCH, gt=0, le=64, description="Pixels a side of a patch.")
    in_chans: int = Field(default=3, gt=0, le=32, description="Channels of the image.")
    position_side: int = Field(
        default=GRID,
        gt=0,
        le=512,
        description="Patches a side of the position table. Read off the checkpoint where there is a file.",
    )
    interpolate_offset: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="The offset that upstream adds to the grid's size before it resizes the position table; weights do "
        "not show it. Default: as published, 0.1 without registers and 0.0 with registers.",
    )
    interpolate_antialias: bool | None = Field(
        default=None,
        description="Whether the position table is resized with antialiasing; weights do not show it. "
        "Default: as published, false without registers and true with registers.",
    )
    layer_norm_eps: float = Field(default=NORM_EPSILON, gt=0, lt=0.1, description="LayerNorm's epsilon.")
    qkv_bias: bool = Field(default=True, description="Whether q, k and v have biases. Read off the checkpoint.")
    layer_scale: bool = Field(default=True, description="Whether blocks have LayerScale. Read off the checkpoint.")
    mlp_hidden: int | None = Field(
        default=None,
        gt=0,
        le=65536,
        description="Width of the feed-forward. Read off the checkpoint. Default: upstream's rule.",
    )
    activation: Activation = Field(default="gelu", description="Activation of the feed-forward `mlp`.")

    @field_validator("interpolate_offset")
    @classmethod
    def _offset_is_a_fraction(cls, offset: float | None) -> float | None:
        if offset is not None and float(_fraction(offset)) != offset:
            raise ValueError(f"needs a fraction of at most {_OFFSET_DENOMINATOR_MAX} parts, as 0.1, has {offset!r}")
        return offset

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        return self

    @property
    def offset(self) -> Fraction:
        """Upstream's `interpolate_offset`, exactly."""
        published = _PUBLISHED_OFFSETS[self.register_count > 0]
        return _fraction(published if self.interpolate_offset is None else self.interpolate_offset)

    @property
    def antialias(self) -> bool:
        """Upstream's `interpolate_antialias`."""
        return self.register_count > 0 if self.interpolate_antialias is None else self.interpolate_antialias

    @property
    def table_border(self) -> int:
        """How many rows and columns replicate the position table's edge on each side: where PyTorch clamps indices."""
        return 0 if self.antialias else _REACH

    @property
    def stem_facts(self) -> dict[str, Any]:
        """What the traced stem is made with, besides its dtype."""
        return {
            "dim": self.embed_dim,
            "channels": self.in_chans,
            "patch": self.patch_size,
            "prefix_count": 1 + self.register_count,
            "side": self.position_side,
            "border": self.table_border,
            "antialias": self.antialias,
            "offset": (self.offset.numerator, self.offset.denominator),
        }

    @property
    def native_size(self) -> int:
        """Pixels a side of the image whose grid is the position table's own."""
        return self.position_side * self.patch_size

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: 4 D, or upstream's SwiGLU rounding (dinov2/layers/swiglu_ffn.py)."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        if self.feed_forward == "mlp":
            return 4 * self.embed_dim
        return (int(4 * self.embed_dim * 2 / 3) + 7) // 8 * 8

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint and its shape, under the published names and in the published order."""
        dim, hidden = self.embed_dim, self.hidden_dim
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, 1 + self.position_side**2, dim),
            **({"register_tokens": (1, self.register_count, dim)} if self.register_count else {}),
            "mask_token": (1, dim),
            "patch_embed.proj.weight": (dim, self.in_chans, self.patch_size, self.patch_size),
            "patch_embed.proj.bias": (dim,),
        }
        swiglu = self.feed_forward == "swiglu"
        first, last, packed = ("mlp.w12", "mlp.w3", 2 * hidden) if swiglu else ("mlp.fc1", "mlp.fc2", hidden)
        block: dict[str, tuple[int, ...]] = {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            **({"attn.qkv.bias": (3 * dim,)} if self.qkv_bias else {}),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            **({"ls1.gamma": (dim,)} if self.layer_scale else {}),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            f"{first}.weight": (packed, dim),
            f"{first}.bias": (packed,),
            f"{last}.weight": (dim, hidden),
            f"{last}.bias": (dim,),
            **({"ls2.gamma": (dim,)} if self.layer_scale else {}),
        }
        for i in range(self.depth):
            shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


def _fraction(offset: float) -> Fraction:
    return Fraction(str(offset)).limit_denominator(_OFFSET_DENOMINATOR_MAX)


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
        description="`crop`: other sizes are cropped right and below. `strict`: only multiples of the patch size "
        "are accepted.",
    )
    residual: Literal["fp16", "fp32"] = Field(
        default="fp16", description="The dtype of an fp16 graph's residual stream. An fp32 graph always uses fp32."
    )
    fp32: tuple[str, ...] = Field(
        default=(),
        description="Parts of an fp16 graph kept in fp32: `norms`, `softmax` (with its scores), `blocks.N`.",
    )
    blocks: tuple[int, ...] = Field(default=(), description="Blocks whose normalised tokens are additional outputs.")
    last_blocks: int = Field(default=0, ge=0, description="The same for the last n blocks.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.blocks and self.last_blocks:
            raise ValueError("give blocks or last_blocks, not both")
        if self.interface == "transformers" and (self.input != "pixels" or self.blocks or self.last_blocks):
            raise ValueError("interface transformers takes normalised pixels and gives only the last block's tokens")
        return self

    def fp32_parts(self, depth: int) -> frozenset[str]:
        """The parts kept in fp32; raises ValueError if the model has no such part."""
        known = ("norms", "softmax", *(f"blocks.{i}" for i in range(depth)))
        if wrong := [part for part in self.fp32 if part not in known]:
            raise ValueError(f"fp32: there is no part {wrong[0]!r}.{closest(wrong[0], known)}")
        return frozenset(self.fp32)

    def chosen_blocks(self, depth: int) -> tuple[int, ...]:
        """Indices of the blocks that become outputs, ascending; raises ValueError if the model has no such block."""
        wrong = [i for i in self.blocks if not 0 <= i < depth]
        if wrong or self.last_blocks > depth:
            raise ValueError(f"the model has blocks 0 to {depth - 1}; there is no {wrong or self.last_blocks}")
        return tuple(sorted(set(self.blocks))) or tuple(range(depth - self.last_blocks, depth))


def dtype_name(precision: Precision) -> str:
    """PyTorch's name of it."""
    names = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}
    if precision not in names:
        raise UsageError(
            f"PyTorch has no {precision} of its own to compare with.",
            next_step=f"Leave times_own_error_max out of [limits.{precision}].",
        )
    return names[precision]

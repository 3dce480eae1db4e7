"""The known heads: the recipe table `[head]`, the blocks a head reads, its tensors and its classes.

Facts of the released heads are from the upstream repository (dinov2/hub/classifiers.py, depthers.py and
dinov2/eval/*), those of Depth Anything V2 from its own (depth_anything_v2/dpt.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinoexport.config import resources
from dinoexport.config.recipe import Frozen
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.published import BINS, DPT_CHANNELS, RESIZES, dpt_widths
from dinoexport.spec import closest

Form = Literal[
    "classifier", "linear_depth", "dpt_depth", "segmentation", "depth_anything", "fitted_linear", "fitted_knn"
]
_LAYERS = 4
# Upstream's choice for ViT-L is not an even spread; the others' are (dinov2/hub/depthers.py, out_index).
_SPREAD = {24: (4, 11, 17, 23)}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset on which heads were trained. terms: the dataset's; the weights have the upstream repository's licence.

    classes: how many; 0 for depth. class_names: the list in recipes/classes. depth_range: metres.
    """

    name: str
    terms: str
    classes: int = 0
    class_names: str = ""
    depth_range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One head. layers: how many blocks it reads."""

    form: Form
    dataset: Dataset
    layers: int = 1


_IMAGENET = Dataset(
    name="ImageNet-1k",
    terms="ImageNet's own: non-commercial research and education (image-net.org)",
    classes=1000,
    class_names="imagenet1k",
)
_NYU = Dataset(
    name="NYU Depth V2",
    terms="the dataset's page states no licence; its authors ask to be cited (Silberman et al. 2012)",
    depth_range=(0.001, 10.0),
)
_KITTI = Dataset(name="KITTI", terms="CC BY-NC-SA 3.0 (cvlibs.net/datasets/kitti)", depth_range=(0.001, 80.0))
_ADE20K = Dataset(
    name="ADE20K", terms="ADE20K's own: non-commercial research and education", classes=150, class_names="ade20k"
)
_VOC = Dataset(
    name="Pascal VOC 2012",
    terms="images under Flickr's terms of use (host.robots.ox.ac.uk/pascal/VOC)",
    classes=21,
    class_names="voc2012",
)
_DEPTH_ANYTHING = Dataset(
    name="Depth Anything V2's synthetic and pseudo-labelled images", terms="see the licence of the weights"
)
_OWN = Dataset(name="the user's own images", terms="the user's own")

KINDS: Mapping[str, Kind] = {
    "linear": Kind(form="classifier", dataset=_IMAGENET),
    "linear4": Kind(form="classifier", dataset=_IMAGENET, layers=_LAYERS),
    "nyu_linear": Kind(form="linear_depth", dataset=_NYU),
    "nyu_linear4": Kind(form="linear_depth", dataset=_NYU, layers=_LAYERS),
    "nyu_dpt": Kind(form="dpt_depth", dataset=_NYU, layers=_LAYERS),
    "kitti_linear": Kind(form="linear_depth", dataset=_KITTI),
    "kitti_linear4": Kind(form="linear_depth", dataset=_KITTI, layers=_LAYERS),
    "kitti_dpt": Kind(form="dpt_depth", dataset=_KITTI, layers=_LAYERS),
    "ade20k_linear": Kind(form="segmentation", dataset=_ADE20K),
    "ade20k_ms": Kind(form="segmentation", dataset=_ADE20K, layers=_LAYERS),
    "voc2012_linear": Kind(form="segmentation", dataset=_VOC),
    "voc2012_ms": Kind(form="segmentation", dataset=_VOC, layers=_LAYERS),
    "depth_anything": Kind(form="depth_anything", dataset=_DEPTH_ANYTHING, layers=_LAYERS),
    "logreg": Kind(form="fitted_linear", dataset=_OWN),
    "probe": Kind(form="fitted_linear", dataset=_OWN),
    "knn": Kind(form="fitted_knn", dataset=_OWN),
}


# The largest published depth head is 384 wide and reads maps of 1536 channels; a build takes memory by these.
_WIDTH_MAX = 8192
Width = Annotated[int, Field(gt=0, le=_WIDTH_MAX)]


class HeadTable(Frozen):
    """The `[head]` table."""

    kind: str = Field(description=f"Which head: {', '.join(KINDS)}.")
    depth_range: tuple[float, float] | None = Field(
        default=None, description="Least and greatest depth in metres; no file holds it. Default: the dataset's."
    )
    tokens: bool = Field(default=False, description="Whether the backbone's tokens stay outputs too.")
    features: int | None = Field(
        default=None, gt=0, le=_WIDTH_MAX, description="depth_anything: width of the fusion blocks."
    )
    channels: tuple[Width, Width, Width, Width] | None = Field(
        default=None, description="depth_anything: widths of the four reassembled maps."
    )
    max_depth: float | None = Field(
        default=None, gt=0, description="depth_anything: greatest depth of a metric model, metres. None: relative."
    )
    classes: tuple[str, ...] = Field(default=(), description="A fitted head's class names, in the outputs' order.")
    bank: int | None = Field(
        default=None, gt=0, le=10_000_000, description="knn: how many feature vectors the graph holds."
    )
    neighbours: int | None = Field(default=None, gt=0, description="knn: how many nearest images vote.")
    temperature: float | None = Field(default=None, gt=0, description="knn: softmax over cosines is divided by it.")

    @model_validator(mode="after")
    def _only_what_the_kind_has(self) -> Self:
        if self.kind not in KINDS:
            released = tuple(
                kind for kind, facts in KINDS.items() if facts.dataset.classes or facts.dataset.depth_range
            )
            known = closest(self.kind, released) or f" There are {', '.join(released)}."
            raise ValueError(f"there is no head {self.kind!r}.{known}")
        form = KINDS[self.kind].form
        of_form = {
            "depth_range": ("linear_depth", "dpt_depth"),
            "features": ("depth_anything",),
            "channels": ("depth_anything",),
            "max_depth": ("depth_anything",),
            "classes": ("fitted_linear", "fitted_knn"),
            "bank": ("fitted_knn",),
            "neighbours": ("fitted_knn",),
            "temperature": ("fitted_knn",),
        }
        for key, forms in of_form.items():
            if getattr(self, key) not in (None, ()) and form not in forms:
                raise ValueError(f"{key}: a {self.kind} head has none")
        needed = {
            "depth_anything": ("features", "channels"),
            "fitted_linear": ("classes",),
            "fitted_knn": ("classes", "bank", "neighbours", "temperature"),
        }
        if missing := [key for key in needed.get(form, ()) if getattr(self, key) in (None, ())]:
            made = "; dinoexport fit makes such a head from images" if form.startswith("fitted") else ""
            raise ValueError(f"a {self.kind} head needs {', '.join(missing)}{made}")
        if self.depth_range is not None and not 0 <= self.depth_range[0] < self.depth_range[1]:
            raise ValueError("depth_range: the least depth comes first, and neither is negative")
        return self


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head on one backbone: the blocks it reads, its tensors under the published names, its classes or range."""

    arch: Architecture
    table: HeadTable

    @property
    def kind(self) -> Kind:
        """The facts that do not depend on the backbone."""
        return KINDS[self.table.kind]

    @property
    def form(self) -> Form:
        """The form of its computation."""
        return self.kind.form

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks it reads, 0-based, ascending."""
        depth, last = self.arch.depth, self.arch.depth - 1
        if self.kind.layers == 1:
            return (last,)
        if self.form in ("classifier", "segmentation"):
            return tuple(range(depth - _LAYERS, depth))
        return _SPREAD.get(depth) or tuple((i + 1) * depth // _LAYERS - 1 for i in range(_LAYERS))

    @property
    def after_norm(self) -> bool:
        """Whether it reads tokens after the backbone's final norm; the released depth heads read them before."""
        return self.form not in ("linear_depth", "dpt_depth")

    @property
    def pads(self) -> bool:
        """Whether the image is padded to multiples of a patch, and the padded map is then resized to the image."""
        return self.form in ("linear_depth", "dpt_depth", "segmentation")

    @property
    def own_file(self) -> bool:
        """Whether its weights are published in a separate file, not in the backbone's."""
        return self.form != "depth_anything"

    @property
    def depth_unit(self) -> str:
        """What follows a depth in words; relative depth has no unit."""
        return "" if self.form == "depth_anything" and self.table.max_depth is None else " m"

    @property
    def depth_range(self) -> tuple[float, float]:
        """Least and greatest depth, metres."""
        chosen = self.table.depth_range or self.kind.dataset.depth_range
        assert chosen is not None, self.table.kind
        return chosen

    @property
    def width(self) -> int:
        """How many channels its first linear layer takes."""
        dim, layers = self.arch.embed_dim, self.kind.layers
        if self.form == "classifier":
            return (layers + 1) * dim
        if self.form == "linear_depth":
            return 2 * layers * dim
        if self.table.kind == "probe":
            return 2 * dim
        return layers * dim if self.form == "segmentation" else dim

    @property
    def class_count(self) -> int:
        """The number of its classes; 0 for depth."""
        return self.kind.dataset.classes or len(self.table.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names, in the order of the outputs."""
        if not self.kind.dataset.class_names:
            return self.table.classes
        path = resources.folder("recipes") / "classes" / f"{self.kind.dataset.class_names}.txt"
        return tuple(path.read_text(encoding="utf-8").split("\n")[:-1])

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the head with its shape, under the published names; a classifier's names get a prefix."""
        dim, count = self.arch.embed_dim, self.class_count
        match self.form:
            case "classifier":
                return {"linear_head.weight": (count, self.width), "linear_head.bias": (count,)}
            case "segmentation":
                names = ("weight", "bias", "running_mean", "running_var")
                return {
                    "decode_head.conv_seg.weight": (count, self.width, 1, 1),
                    "decode_head.conv_seg.bias": (count,),
                    **{f"decode_head.bn.{name}": (self.width,) for name in names},
                }
            case "linear_depth":
                return {
                    "decode_head.conv_depth.weight": (BINS, self.width, 1, 1),
                    "decode_head.conv_depth.bias": (BINS,),
                }
            case "dpt_depth":
                return _dpt_tensors(dim)
            case "depth_anything":
                assert self.table.features and self.table.channels
                return _depth_anything_tensors(dim, self.table.features, self.table.channels)
            case "fitted_linear":
                return {"fitted.weight": (count, self.width), "fitted.bias": (count,)}
            case "fitted_knn":
                assert self.table.bank
                return {"fitted.bank": (self.table.bank, self.width), "fitted.votes": (self.table.bank, count)}


def _dpt_tensors(dim: int) -> dict[str, tuple[int, ...]]:
    channels, widths = DPT_CHANNELS, dpt_widths(dim)
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: int = 0) -> None:
        shapes[f"decode_head.{name}.weight"] = shape
        if bias:
            shapes[f"decode_head.{name}.bias"] = (bias,)

    layer("conv_depth.head.0", channels // 2, channels, 3, 3, bias=channels // 2)
    layer("conv_depth.head.2", 32, channels // 2, 3, 3, bias=32)
    layer("conv_depth.head.4", 1, 32, 1, 1, bias=1)
    for i, width in enumerate(widths):
        layer(f"reassemble_blocks.projects.{i}.conv", width, dim, 1, 1, bias=width)
        layer(f"reassemble_blocks.readout_projects.{i}.0", dim, 2 * dim, bias=dim)
        layer(f"convs.{i}.conv", channels, width, 3, 3)
        layer(f"fusion_blocks.{i}.project.conv", channels, channels, 1, 1, bias=channels)
        for unit in (1, 2) if i else (2,):
            for conv in (1, 2):
                layer(f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv", channels, channels, 3, 3)
    for i, size in RESIZES.items():
        layer(f"reassemble_blocks.resize_layers.{i}", widths[i], widths[i], size, size, bias=widths[i])
    layer("project.conv", channels, channels, 3, 3, bias=channels)
    return shapes


def _depth_anything_tensors(dim: int, features: int, channels: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: int = 0) -> None:
        shapes[f"depth_head.{name}.weight"] = shape
        if bias:
            shapes[f"depth_head.{name}.bias"] = (bias,)

    for i, width in enumerate(channels):
        layer(f"projects.{i}", width, dim, 1, 1, bias=width)
    for i, size in RESIZES.items():
        layer(f"resize_layers.{i}", channels[i], channels[i], size, size, bias=channels[i])
    for i, width in enumerate(channels, start=1):
        layer(f"scratch.layer{i}_rn", features, width, 3, 3)
    for i in range(1, _LAYERS + 1):
        layer(f"scratch.refinenet{i}.out_conv", features, features, 1, 1, bias=features)
        for unit in (1, 2):
            for conv in (1, 2):
                name = f"scratch.refinenet{i}.resConfUnit{unit}.conv{conv}"
                layer(name, features, features, 3, 3, bias=features)
    layer("scratch.output_conv1", features // 2, features, 3, 3, bias=features // 2)
    layer("scratch.output_conv2.0", 32, features // 2, 3, 3, bias=32)
    layer("scratch.output_conv2.2", 1, 32, 1, 1, bias=1)
    return shapes

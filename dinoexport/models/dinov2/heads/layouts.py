"""Layouts of head files: the released heads', Depth Anything V2's, and Hugging Face's of Depth Anything.

A released depth or segmentation head is an mmcv checkpoint: `meta`, `state_dict` and perhaps an optimizer's state. Only
`state_dict` is read. The file of a classifier holds only `weight` and `bias`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from dinoexport.config import recipe
from dinoexport.config.recipe import Recipe
from dinoexport.family import Read, Shapes
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.heads.kinds import KINDS, Head, HeadTable

_CLASSIFIER = "linear_head."
_COUNTER = "decode_head.bn.num_batches_tracked"
# In Depth Anything's file, and unused: its path through the coarsest fusion block has one input only.
_UNUSED_UNIT = "depth_head.scratch.refinenet4.resConfUnit1."
_BACKBONE = "pretrained."

_HF_LEVELS = r"neck\.reassemble_stage\.layers\.(\d)\.(projection|resize)\.(weight|bias)$"
_HF_CONVS = r"neck\.convs\.(\d)\.weight$"
_HF_FUSION = (
    r"neck\.fusion_stage\.layers\.(\d)\.(?:(projection)|residual_layer([12])\.convolution([12]))\.(weight|bias)$"
)
_HF_ENDS = {"head.conv1.": "output_conv1.", "head.conv2.": "output_conv2.0.", "head.conv3.": "output_conv2.2."}


def published_name(name: str) -> str:
    """The published file's name of our tensor `name`."""
    return name.removeprefix(_CLASSIFIER)


def unused(head: Head) -> frozenset[str]:
    """Tensors that inference does not use; a published file may or may not hold them."""
    return frozenset(name for name in head.tensors if name.startswith(_UNUSED_UNIT))


def adapt(found: Shapes, read: Read) -> tuple[Shapes, Read]:
    """Renames the tensors of a separate head file to our names: (name -> shape, reader)."""
    inside = [name for name in found if name.startswith("state_dict.")]
    names = {(name.removeprefix("state_dict.")): name for name in inside or found}
    if set(names) == {"weight", "bias"}:
        names = {f"{_CLASSIFIER}{name}": theirs for name, theirs in names.items()}
    names.pop(_COUNTER, None)  # counts training steps; evaluation has no use for it
    return {name: found[theirs] for name, theirs in names.items()}, lambda name: read(names[name])


def adapt_whole(
    backbone: Callable[[Shapes, Read], tuple[Shapes, Read]], found: Shapes, read: Read
) -> tuple[Shapes, Read]:
    """The same for a file with backbone and head, in Depth Anything's own layout or Hugging Face's.

    backbone: renames the tensors of the backbone, as if they were in a separate file.
    """
    wrappers = ("state_dict.", "model.", "module.")
    bare: dict[str, str] = {}
    for name in found:
        short = name
        while prefix := next((p for p in wrappers if short.startswith(p)), ""):
            short = short.removeprefix(prefix)
        bare[short] = name
    of_head: dict[str, str] = {}
    of_backbone: dict[str, str] = {}
    for short, name in bare.items():
        if short.startswith(_BACKBONE):
            of_backbone[short.removeprefix(_BACKBONE)] = name
        elif short.startswith("depth_head."):
            of_head[short] = name
        elif renamed := _from_hugging_face(short):
            of_head[renamed] = name
        else:
            of_backbone[short] = name
    shapes, read_backbone = backbone(
        {short: found[name] for short, name in of_backbone.items()}, lambda short: read(of_backbone[short])
    )
    both = {**shapes, **{name: found[theirs] for name, theirs in of_head.items()}}
    return both, lambda name: read(of_head[name]) if name in of_head else read_backbone(name)


def _from_hugging_face(name: str) -> str | None:
    """The published name of a tensor of `DepthAnythingForDepthEstimation`'s neck or head."""
    if level := re.fullmatch(_HF_LEVELS, name):
        part = "projects" if level[2] == "projection" else "resize_layers"
        return f"depth_head.{part}.{level[1]}.{level[3]}"
    if conv := re.fullmatch(_HF_CONVS, name):
        return f"depth_head.scratch.layer{int(conv[1]) + 1}_rn.weight"
    if fusion := re.fullmatch(_HF_FUSION, name):
        net = f"depth_head.scratch.refinenet{4 - int(fusion[1])}"  # coarsest first there
        inside = "out_conv" if fusion[2] else f"resConfUnit{fusion[3]}.conv{fusion[4]}"
        return f"{net}.{inside}.{fusion[5]}"
    return next(
        (
            f"depth_head.scratch.{ours}{name.removeprefix(theirs)}"
            for theirs, ours in _HF_ENDS.items()
            if name.startswith(theirs)
        ),
        None,
    )


def recognised(wanted: Head, shapes: Shapes) -> str:
    """The released head, and its backbone if it is another one, that has exactly these tensors; empty if none has."""
    for arch, variant in _backbones(wanted):
        kinds = [
            kind
            for kind in KINDS
            if not KINDS[kind].form.startswith("fitted")
            and kind != "depth_anything"
            and Head(arch=arch, table=HeadTable(kind=kind)).tensors == dict(shapes)
        ]
        if kinds:
            files = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"
            return f"{files} of {variant}" if variant else files
    return ""


def _backbones(wanted: Head) -> list[tuple[Architecture, str]]:
    """The requested backbone, then one shipped backbone of each other width, with its name."""
    found = [(wanted.arch, "")]
    for name in recipe.variants():
        other: Recipe = recipe.load(name)
        if other.family == "dinov2" and not other.head:
            arch = Architecture.model_validate(other.model)
            if arch.embed_dim != wanted.arch.embed_dim:
                found.append((arch, name))
    return found

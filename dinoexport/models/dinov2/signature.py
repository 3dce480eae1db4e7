"""The input and outputs of the graph: images in, class, register and patch tokens out."""

from __future__ import annotations

from collections.abc import Mapping

from dinoexport import images
from dinoexport.config.recipe import Range
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import serving
from dinoexport.models.dinov2.config import Architecture, GraphChoices
from dinoexport.spec import Graph, Tensor


def graph(
    profile: Mapping[str, Range], arch: Architecture, choices: GraphChoices, preprocessing: Preprocessing
) -> Graph:
    """The one graph, `model`."""
    dim, registers = arch.embed_dim, arch.register_count
    patch, channels = arch.patch_size, arch.in_chans
    multiple = patch if choices.sizes == "strict" else 1
    dims = tuple(
        limits.dim(name) if name == "batch" else limits.dim(name, multiple_of=multiple, step=patch)
        for name, limits in sorted(profile.items())
    )
    if choices.input == "pixels":
        nchw = ("batch", channels, "height", "width")
        image = Tensor(name="pixels", dtype="float32", shape=nchw, meaning=_pixels(arch, preprocessing))
    else:
        nhwc = ("batch", "height", "width", channels)
        image = Tensor(name="images", dtype="uint8", shape=nhwc, meaning=_bytes(preprocessing))
    outputs = []
    for block, prefix in token_outputs(arch, choices):
        last = not prefix
        where = "the last block" if last else f"block {block}"
        outputs.append(_tokens(f"{prefix}class_token", ("batch", dim), f"class token of {where}"))
        if last and registers:
            outputs.append(_tokens("register_tokens", ("batch", registers, dim), "register tokens"))
        outputs.append(
            _tokens(f"{prefix}patch_tokens", ("batch", "patches", dim), f"patch tokens of {where}, row by row")
        )
    return Graph(name="model", inputs=(image,), outputs=tuple(outputs), dims=dims)


def token_outputs(arch: Architecture, choices: GraphChoices) -> tuple[tuple[int, str], ...]:
    """(block, prefix of its outputs' names): the chosen blocks, then the last one, the model's own output."""
    chosen = choices.chosen_blocks(arch.depth)
    return (*((i, f"block_{i}_") for i in chosen), (arch.depth - 1, ""))


def _pixels(arch: Architecture, preprocessing: Preprocessing) -> str:
    mean, std = preprocessing.mean, preprocessing.std
    colours = "RGB" if arch.in_chans == serving.RGB else f"{arch.in_chans} channels"
    return f"{colours} scaled to 0..1, minus mean {mean}, divided by deviation {std}"


def _bytes(preprocessing: Preprocessing) -> str:
    mean, std = preprocessing.mean, preprocessing.std
    if (mean, std) == (images.IMAGENET_MEAN, images.IMAGENET_STD):
        return "RGB bytes 0..255; the graph normalises them with ImageNet's mean and deviation"
    return f"bytes 0..255; the graph scales them to 0..1, takes mean {mean} off and divides by deviation {std}"


def _tokens(name: str, shape: tuple[int | str, ...], meaning: str) -> Tensor:
    return Tensor(name=name, dtype="float32", shape=shape, meaning=f"{meaning}, after the final norm")

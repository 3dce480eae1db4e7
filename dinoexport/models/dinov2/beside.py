"""Read the configuration files beside DINOv2 weights: Hugging Face's, timm's and upstream's.

They are read as data, never imported or run. A key with an invalid value raises a UsageError that names it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from dinoexport.errors import UsageError
from dinoexport.family import Fact
from dinoexport.weights.config_file import Config, read_json, read_yaml

_HF_TYPES = ("dinov2", "dinov2_with_registers")
_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
# Pillow's numbers, which Hugging Face stores.
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Where Hugging Face's processors leave things as they are.
_RESCALE = 1 / 255
# Heads by upstream's and timm's names of architectures (dinov2/models/vision_transformer.py).
_HEADS = {"small": 6, "base": 12, "large": 16, "giant": 24, "giant2": 24, "so150m": 13}
# What upstream's training uses where its config.yaml is silent (dinov2/configs/ssl_default_config.yaml).
_UPSTREAM_DEFAULTS = {"interpolate_offset": 0.1, "interpolate_antialias": False}


def facts(weights: Path) -> tuple[Fact, ...]:
    """All facts about the model in the files beside `weights`, a file or a folder."""
    folder = weights if weights.is_dir() else weights.parent
    found: list[Fact] = []
    config = read_json(folder / "config.json")
    if config is not None and (theirs := _hugging_face_config(config)) is not None:
        found += _hugging_face(theirs)
        processor = read_json(folder / "preprocessor_config.json")
        if processor is not None:
            found += _processor(processor)
    elif config is not None and "architecture" in config.content:
        found += _timm(config)
    for place in (folder, *_run_folder(folder)):
        training = read_yaml(place / "config.yaml")
        if training is not None and "student" in training.content:
            return (*found, *_upstream(training))
    return tuple(found)


def _run_folder(folder: Path) -> tuple[Path, ...]:
    """The folder RUN of RUN/eval/training_N, in which upstream writes config.yaml."""
    within = folder.absolute()
    return (within.parents[1],) if within.parent.name == "eval" else ()


# Hugging Face


def _hugging_face_config(config: Config) -> Config | None:
    """The backbone's own configuration: the file's, or a larger model's part for it."""
    for place in (config, config.table("backbone_config"), config.table("vision_config")):
        if place.content.get("model_type") in _HF_TYPES:
            return place
    return None


def _hugging_face(config: Config) -> list[Fact]:
    numbers = (int, float)
    found = config.facts(
        {
            "hidden_size": ("model.embed_dim", int),
            "num_hidden_layers": ("model.depth", int),
            "num_attention_heads": ("model.num_heads", int),
            "patch_size": ("model.patch_size", int),
            "num_channels": ("model.in_chans", int),
            "layer_norm_eps": ("model.layer_norm_eps", numbers),
            "qkv_bias": ("model.qkv_bias", bool),
        }
    )
    registers = 0 if config.content["model_type"] == "dinov2" else config.get("num_register_tokens", int)
    if registers is not None:
        found.append(Fact(key="model.register_count", value=registers, source=config.source("num_register_tokens")))
    swiglu = config.get("use_swiglu_ffn", bool)
    if swiglu is not None:
        kind = "swiglu" if swiglu else "mlp"
        found.append(Fact(key="model.feed_forward", value=kind, source=config.source("use_swiglu_ffn")))
    side, patch = config.get("image_size", int), config.get("patch_size", int)
    if side and patch:
        found.append(Fact(key="model.position_side", value=side // patch, source=config.source("image_size")))
    activation = config.get("hidden_act", str)
    if activation is not None and not swiglu:
        value = _HF_ACTIVATIONS.get(activation, activation)
        found.append(Fact(key="model.activation", value=value, source=config.source("hidden_act")))
    ratio, width = config.get("mlp_ratio", numbers), config.get("hidden_size", int)
    if ratio is not None and width is not None and not swiglu:
        found.append(Fact(key="model.mlp_hidden", value=int(width * ratio), source=config.source("mlp_ratio")))
    return found


def _processor(config: Config) -> list[Fact]:
    """Hugging Face's image processors; what one leaves out is folded into mean and deviation."""
    found: list[Fact] = []
    scale = config.get("rescale_factor", (int, float))
    rescale = 1.0 if config.get("do_rescale", bool) is False else _RESCALE if scale is None else float(scale)
    mean, std = (_numbers(config, f"image_{kind}") for kind in ("mean", "std"))
    if config.get("do_normalize", bool) is False:
        channels = len(mean or (0, 0, 0))
        mean, std = (0.0,) * channels, (1.0,) * channels
    factor = 1 / (255 * rescale) if rescale else 1.0
    if math.isclose(factor, 1):
        factor = 1.0
    for key, values in (("mean", mean), ("std", std)):
        if values is not None:
            scaled = tuple(value * factor for value in values)
            found.append(Fact(key=f"preprocess.{key}", value=scaled, source=config.source(f"image_{key}")))
    resample = config.get("resample", int)
    if resample in _RESAMPLING:
        name = _RESAMPLING[resample]
        found.append(Fact(key="preprocess.interpolation", value=name, source=config.source("resample")))
    if config.content.get("keep_aspect_ratio") or config.content.get("ensure_multiple_of", 1) not in (None, 1):
        return found  # sizes differ between images, so there is no single resize and crop
    resize = _side(config, "size")
    crop = resize if config.get("do_center_crop", bool) is False else _side(config, "crop_size")
    if config.get("do_resize", bool) is not False and resize is not None:
        found.append(Fact(key="preprocess.resize", value=resize, source=config.source("size")))
    if crop is not None:
        found.append(Fact(key="preprocess.crop", value=crop, source=config.source("crop_size")))
    return found


def _numbers(config: Config, key: str) -> tuple[float, ...] | None:
    value = config.get(key, (list, int, float))
    values = [value] * 3 if isinstance(value, int | float) else value
    if values is None:
        return None
    if not values or not all(isinstance(number, int | float) and not isinstance(number, bool) for number in values):
        raise UsageError(f"{config.path}: {key} is {value!r}, not numbers.", next_step="Fix the file.")
    return tuple(float(number) for number in values)


def _side(config: Config, key: str) -> int | tuple[int, int] | None:
    """A size in a recipe's form: one side, or (height, width)."""
    value = config.get(key, (dict, int))
    if not isinstance(value, dict):
        return value if value is None else int(value)
    table = Config(config.path, value)
    shortest = table.get("shortest_edge", int)
    if shortest is not None:
        return int(shortest)
    height, width = table.get("height", int), table.get("width", int)
    if height is None or width is None:
        return None
    return (height, width) if key == "size" or height != width else int(height)


# timm


def _timm(config: Config) -> list[Fact]:
    arguments = config.table("model_args")
    found = arguments.facts(
        {
            "embed_dim": ("model.embed_dim", int),
            "depth": ("model.depth", int),
            "num_heads": ("model.num_heads", int),
            "patch_size": ("model.patch_size", int),
            "in_chans": ("model.in_chans", int),
            "reg_tokens": ("model.register_count", int),
            "qkv_bias": ("model.qkv_bias", bool),
        },
        under="model_args.",
    )
    name = str(config.content["architecture"])
    known = re.match(r"vit_(small|base|large|giant)_patch(\d+)_", name)
    if known and "num_heads" not in arguments.content:
        found.append(Fact(key="model.num_heads", value=_HEADS[known[1]], source=config.source("architecture")))
    if arguments.get("dynamic_img_size", bool):
        # timm's resample_abs_pos_embed: by size, antialiased, whatever the model.
        source = config.source("model_args.dynamic_img_size")
        found.append(Fact(key="model.interpolate_offset", value=0.0, source=source))
        found.append(Fact(key="model.interpolate_antialias", value=True, source=source))
    # Older files have no table of its own for this.
    shown = config.table("pretrained_cfg") if "pretrained_cfg" in config.content else config
    for key in ("mean", "std"):
        values = _numbers(shown, key)
        if values is not None:
            found.append(Fact(key=f"preprocess.{key}", value=values, source=shown.source(key)))
    interpolation = shown.get("interpolation", str)
    if interpolation is not None:
        found.append(Fact(key="preprocess.interpolation", value=interpolation, source=shown.source("interpolation")))
    size = shown.get("input_size", list)
    if size is not None and len(size) == 3 and all(isinstance(side, int) for side in size):
        height, width = size[1:]
        share = shown.get("crop_pct", (int, float)) or 1.0
        crop = height if height == width else (height, width)
        squash = shown.get("crop_mode", str) == "squash"
        resize = (height, width) if squash or height != width else math.floor(height / share)
        found.append(Fact(key="preprocess.crop", value=crop, source=shown.source("input_size")))
        found.append(Fact(key="preprocess.resize", value=resize, source=shown.source("input_size and crop_pct")))
    return found


# Upstream's training


def _upstream(config: Config) -> list[Fact]:
    student, crops = config.table("student"), config.table("crops")
    found = student.facts(
        {
            "patch_size": ("model.patch_size", int),
            "num_register_tokens": ("model.register_count", int),
            "in_chans": ("model.in_chans", int),
            "qkv_bias": ("model.qkv_bias", bool),
            "interpolate_offset": ("model.interpolate_offset", (int, float)),
            "interpolate_antialias": ("model.interpolate_antialias", bool),
        },
        under="student.",
    )
    stated = {fact.key for fact in found}
    found += [
        Fact(key=f"model.{key}", value=value, source=f"upstream's default, for {config.path.name} has no student.{key}")
        for key, value in _UPSTREAM_DEFAULTS.items()
        if f"model.{key}" not in stated
    ]
    architecture = re.match(r"vit_(\w+)$", student.get("arch", str) or "")
    if architecture and architecture[1] in _HEADS:
        found.append(Fact(key="model.num_heads", value=_HEADS[architecture[1]], source=config.source("student.arch")))
    feed_forward = student.get("ffn_layer", str)
    if feed_forward is not None:
        kind = "swiglu" if feed_forward.startswith("swiglu") else feed_forward
        found.append(Fact(key="model.feed_forward", value=kind, source=config.source("student.ffn_layer")))
    side, patch = crops.get("global_crops_size", int), student.get("patch_size", int)
    if side and patch:
        # build_model passes it as img_size (dinov2/models/__init__.py).
        value = side // patch
        found.append(Fact(key="model.position_side", value=value, source=config.source("crops.global_crops_size")))
    return found

"""Computes the traced heads' tensors from the published ones, one at a time, while the ONNX file is written.

BatchNorm is folded into the layer after it, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dinoexport.family import Read
from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.models.dinov2.published import BINS, DPT_CHANNELS, RESIZES
from dinoexport.spec import Array, Weight

_BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class FoldedHead:
    """Weights by the parameter names of `heads/graph.py`. Nothing is read until a weight's own `read` is called."""

    head: Head
    read: Read

    def weights(self) -> Mapping[str, Weight]:
        """All weights of the head, and the backbone's final norm if the head reads tokens after it."""
        dim = self.head.arch.embed_dim
        norm: dict[str, Weight] = {}
        if self.head.after_norm:
            norm = {"norm_weight_D": self._as_is("norm.weight", dim), "norm_bias_D": self._as_is("norm.bias", dim)}
        match self.head.form:
            case "classifier":
                return norm | self._linear("linear_head")
            case "fitted_linear":
                return norm | self._linear("fitted")
            case "fitted_knn":
                shapes = self.head.tensors
                return norm | {
                    "bank_ND": self._as_is("fitted.bank", *shapes["fitted.bank"]),
                    "votes_NK": self._as_is("fitted.votes", *shapes["fitted.votes"]),
                }
            case "linear_depth":
                return norm | self._bins()
            case "segmentation":
                return norm | self._segmentation()
            case "dpt_depth":
                return norm | self._dpt()
            case "depth_anything":
                return norm | self._depth_anything()

    def _as_is(self, name: str, *shape: int) -> Weight:
        return Weight(shape=shape, read=lambda: self.read(name))

    def _linear(self, name: str) -> dict[str, Weight]:
        count, width = self.head.class_count, self.head.width
        return {
            "weight_KC": self._as_is(f"{name}.weight", count, width),
            "bias_K": self._as_is(f"{name}.bias", count),
        }

    def _bins(self) -> dict[str, Weight]:
        """The linear layer, split into its columns for patch tokens and for class tokens, and [bins; ones]."""
        layers, dim = len(self.head.blocks), self.head.arch.embed_dim

        def part(which: int) -> Array:
            weight = self.read("decode_head.conv_depth.weight").reshape(BINS, layers, 2, dim)
            return np.ascontiguousarray(weight[:, :, which].reshape(BINS, layers * dim))

        def weigh() -> Array:
            bins = np.linspace(*self.head.depth_range, BINS, dtype=np.float32)
            return np.stack((bins, np.ones_like(bins)))[:, :, None, None]

        width = layers * dim
        return {
            "patch_KC11": Weight(shape=(BINS, width, 1, 1), read=lambda: part(0)[:, :, None, None]),
            "class_KC": Weight(shape=(BINS, width), read=lambda: part(1)),
            "bias_K": self._as_is("decode_head.conv_depth.bias", BINS),
            "weigh_2K11": Weight(shape=(2, BINS, 1, 1), read=weigh),
        }

    def _segmentation(self) -> dict[str, Weight]:
        count, width = self.head.class_count, self.head.width

        def scale_and_shift() -> tuple[Array, Array]:
            mean, variance, weight, bias = (
                self.read(f"decode_head.bn.{name}").astype(np.float64)
                for name in ("running_mean", "running_var", "weight", "bias")
            )
            scale = weight / np.sqrt(variance + _BATCH_NORM_EPSILON)
            return scale, bias - mean * scale

        def kernel() -> Array:
            weight = self.read("decode_head.conv_seg.weight").astype(np.float64)
            return (weight * scale_and_shift()[0][None, :, None, None]).astype(np.float32)

        def shifted() -> Array:
            weight = self.read("decode_head.conv_seg.weight").astype(np.float64)[:, :, 0, 0]
            return (self.read("decode_head.conv_seg.bias") + weight @ scale_and_shift()[1]).astype(np.float32)

        return {
            "weight_KC11": Weight(shape=(count, width, 1, 1), read=kernel),
            "bias_K": Weight(shape=(count,), read=shifted),
        }

    def _dpt(self) -> dict[str, Weight]:
        dim, at, channels = self.head.arch.embed_dim, "decode_head.", DPT_CHANNELS
        names: dict[str, str] = {"project": "project.conv"}
        for i in range(4):
            names |= {
                f"projects.{i}": f"reassemble_blocks.projects.{i}.conv",
                f"levels.{i}": f"convs.{i}.conv",
                f"fusing.{i}": f"fusion_blocks.{i}.project.conv",
            }
            for unit, place in ((1, f"joining.{i - 1}"), (2, f"units.{i}")):
                if i or unit == 2:
                    for conv, ours in ((1, "first"), (2, "second")):
                        names[f"{place}.{ours}"] = f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv"
        names |= {f"resizes.{i}": f"reassemble_blocks.resize_layers.{i}" for i in RESIZES}
        names |= {f"last.{i}": f"conv_depth.head.{2 * i}" for i in range(3)}
        weights = self._convolutions(names, at)
        for i in range(4):
            readout = f"{at}reassemble_blocks.readout_projects.{i}.0"
            weights |= {
                f"readouts.{i}.kernel": Weight(shape=(dim, dim, 1, 1), read=self._columns(readout, 0)),
                f"class_weight_{i}": Weight(shape=(dim, dim), read=self._columns(readout, 1)),
                f"class_bias_{i}": self._as_is(f"{readout}.bias", dim),
            }
        assert channels == self.head.tensors[f"{at}project.conv.weight"][0]
        return weights

    def _columns(self, readout: str, which: int) -> Callable[[], Array]:
        """The half of a readout's columns that reads patch tokens (0), as a 1x1 kernel, or class tokens (1)."""
        dim = self.head.arch.embed_dim

        def read() -> Array:
            weight = self.read(f"{readout}.weight")
            half = np.ascontiguousarray(weight[:, which * dim : (which + 1) * dim])
            return half if which else half[:, :, None, None]

        return read

    def _depth_anything(self) -> dict[str, Weight]:
        names: dict[str, str] = {}
        for i in range(4):
            net = 4 - i  # refinenet4 is the coarsest
            names |= {
                f"projects.{i}": f"projects.{i}",
                f"levels.{i}": f"scratch.layer{i + 1}_rn",
                f"fusing.{i}": f"scratch.refinenet{net}.out_conv",
            }
            for unit, place in ((1, f"joining.{i - 1}"), (2, f"units.{i}")):
                if i or unit == 2:
                    for conv, ours in ((1, "first"), (2, "second")):
                        names[f"{place}.{ours}"] = f"scratch.refinenet{net}.resConfUnit{unit}.conv{conv}"
        names |= {f"resizes.{i}": f"resize_layers.{i}" for i in RESIZES}
        names |= {
            f"last.{i}": f"scratch.{name}"
            for i, name in enumerate(("output_conv1", "output_conv2.0", "output_conv2.2"))
        }
        return self._convolutions(names, "depth_head.")

    def _convolutions(self, names: Mapping[str, str], prefix: str) -> dict[str, Weight]:
        """Kernels and, where the file has them, biases, by the traced module's name."""
        shapes = self.head.tensors
        weights: dict[str, Weight] = {}
        for ours, theirs in names.items():
            for part, published in (("kernel", f"{prefix}{theirs}.weight"), ("bias", f"{prefix}{theirs}.bias")):
                if published in shapes:
                    weights[f"{ours}.{part}"] = self._as_is(published, *shapes[published])
        return weights

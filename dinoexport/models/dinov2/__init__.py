"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023, arXiv:2309.16588): ViT-S/B/L/g.

This module implements `dinoexport.family`. Upstream code: github.com/facebookresearch/dinov2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport import images
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.family import Call, Description, Example, Fact, FrontEnd, Piece, Read, Shapes
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import cases, described, layouts, serving, synthetic
from dinoexport.models.dinov2.config import Architecture, GraphChoices
from dinoexport.models.dinov2.heads.kinds import HeadTable
from dinoexport.models.dinov2.heads.model import HeadedModel, backbone_graph, joined
from dinoexport.models.dinov2.uses import ImageUses
from dinoexport.spec import Array, Arrays, Case, Graph, Picture, Precision, Progress, Runner, Tensor, Workload

if TYPE_CHECKING:
    import torch

_TRACED = "dinoexport.models.dinov2.graph"


class Dinov2:
    """The family `dinov2`."""

    def model(self, recipe: Recipe) -> Dinov2Model | HeadedModel:
        """The variant of a recipe; raises UsageError that names errors in `[model]`, `[graph]` or `[head]`."""
        arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
        choices = parse(GraphChoices, backbone_graph(recipe), where=f"recipe {recipe.name}, [graph]")
        try:
            choices.chosen_blocks(arch.depth)
            choices.fp32_parts(arch.depth)
        except ValueError as error:
            raise UsageError(
                f"recipe {recipe.name}, [graph]: {error}.", next_step="Choose blocks and parts of the model."
            ) from None
        wanted = {"batch", "height", "width"}
        if set(recipe.profile) != wanted:
            raise UsageError(
                f"recipe {recipe.name}, [profile]: has {sorted(recipe.profile)}, needs {sorted(wanted)}.",
                next_step="Give each dynamic dimension its min, opt and max.",
            )
        ends = [(d, r.min, r.max) for d, r in recipe.profile.items() if d != "batch"]
        patch = arch.patch_size
        if wrong := [f"{d} {low}..{high}" for d, low, high in ends if low % patch or high % patch]:
            raise UsageError(
                f"recipe {recipe.name}, [profile]: {', '.join(wrong)} must begin and end at multiples of {patch}.",
                next_step=f"Patches are {patch} pixels a side; {patch}, {16 * patch} and {73 * patch} are legal.",
            )
        kind = Dinov2Model
        if choices.interface == "transformers" and not recipe.head:
            from dinoexport.models.dinov2.transformers_interface import TransformersModel

            kind = TransformersModel
        backbone = kind(recipe=recipe, arch=arch, choices=choices, preprocessing=_preprocessing(recipe, arch, choices))
        return joined(recipe, backbone) if recipe.head else backbone

    def table_schemas(self) -> Mapping[str, Any]:
        """JSON schemas of the recipe tables that are the family's own."""
        return {
            "model": Architecture.model_json_schema(),
            "graph": GraphChoices.model_json_schema(),
            "head": HeadTable.model_json_schema(),
            "preprocess": Preprocessing.model_json_schema(),
        }

    def recipe_from(self, weights: Path, found: Shapes) -> Recipe | None:
        """See `described`."""
        return described.recipe_from(weights, found)

    def described(self, recipe: Recipe, weights: Path, found: Shapes) -> Description:
        """See `described`."""
        return described.described(recipe, weights, found)

    def assumed(self, recipe: Recipe) -> tuple[Fact, ...]:
        """See `described`."""
        return described.assumed(recipe)


def _preprocessing(recipe: Recipe, arch: Architecture, choices: GraphChoices) -> Preprocessing:
    """The table `[preprocess]`, with a mean and a deviation for each channel."""
    table = dict(recipe.preprocess)
    if arch.in_chans != serving.RGB and not {"mean", "std"} & table.keys() and choices.input == "pixels":
        # The graph takes normalised pixels, so this only prepares the photographs of the validation.
        table |= {
            name: [values[i % len(values)] for i in range(arch.in_chans)]
            for name, values in (("mean", images.IMAGENET_MEAN), ("std", images.IMAGENET_STD))
        }
    read = parse(Preprocessing, table, where=f"recipe {recipe.name}, [preprocess]")
    if len(read.mean) != arch.in_chans:
        raise UsageError(
            f"recipe {recipe.name}, [preprocess]: mean and std have {len(read.mean)} channels, "
            f"[model] in_chans is {arch.in_chans}.",
            next_step="Give mean and std a value for each channel.",
        )
    return read


@dataclass(frozen=True, kw_only=True)
class Dinov2Model:
    """One DINOv2 variant; implements `dinoexport.family.Model`."""

    recipe: Recipe
    arch: Architecture
    choices: GraphChoices
    preprocessing: Preprocessing

    @property
    def taken(self) -> cases.ImageInput:
        """The form of the graph's images."""
        return cases.ImageInput(
            arch=self.arch,
            preprocessing=self.preprocessing,
            as_bytes=self.choices.input == "images",
            strict=self.choices.sizes == "strict",
        )

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """One graph, `model`: images in, class, register and patch tokens out."""
        dim, registers = self.arch.embed_dim, self.arch.register_count
        patch, channels = self.arch.patch_size, self.arch.in_chans
        multiple = patch if self.choices.sizes == "strict" else 1
        dims = tuple(
            limits.dim(name) if name == "batch" else limits.dim(name, multiple_of=multiple, step=patch)
            for name, limits in sorted(self.recipe.profile.items())
        )
        if self.choices.input == "pixels":
            nchw = ("batch", channels, "height", "width")
            image = Tensor(name="pixels", dtype="float32", shape=nchw, meaning=self._pixels_meaning)
        else:
            nhwc = ("batch", "height", "width", channels)
            image = Tensor(name="images", dtype="uint8", shape=nhwc, meaning=self._bytes_meaning)
        outputs = []
        for block, prefix in self.token_outputs:
            last = not prefix
            where = "the last block" if last else f"block {block}"
            outputs.append(_tokens(f"{prefix}class_token", ("batch", dim), f"class token of {where}"))
            if last and registers:
                outputs.append(_tokens("register_tokens", ("batch", registers, dim), "register tokens"))
            outputs.append(
                _tokens(f"{prefix}patch_tokens", ("batch", "patches", dim), f"patch tokens of {where}, row by row")
            )
        return (Graph(name="model", inputs=(image,), outputs=tuple(outputs), dims=dims),)

    @property
    def _pixels_meaning(self) -> str:
        mean, std = self.preprocessing.mean, self.preprocessing.std
        colours = "RGB" if self.arch.in_chans == serving.RGB else f"{self.arch.in_chans} channels"
        return f"{colours} scaled to 0..1, minus mean {mean}, divided by deviation {std}"

    @property
    def _bytes_meaning(self) -> str:
        mean, std = self.preprocessing.mean, self.preprocessing.std
        if (mean, std) == (images.IMAGENET_MEAN, images.IMAGENET_STD):
            return "RGB bytes 0..255; the graph normalises them with ImageNet's mean and deviation"
        return f"bytes 0..255; the graph scales them to 0..1, takes mean {mean} off and divides by deviation {std}"

    @cached_property
    def token_outputs(self) -> tuple[tuple[int, str], ...]:
        """(block, prefix of its outputs' names): the chosen blocks, then the last one, the model's own output."""
        chosen = self.choices.chosen_blocks(self.arch.depth)
        return (*((i, f"block_{i}_") for i in chosen), (self.arch.depth - 1, ""))

    @property
    def tensors(self) -> Shapes:
        """The published checkpoint's tensors."""
        return self.arch.tensors

    @property
    def optional_tensors(self) -> frozenset[str]:
        """`mask_token` is used only in training; timm's files have none."""
        return frozenset({"mask_token"})

    @property
    def head_weights(self) -> None:
        """None: tokens need no head."""
        return None

    @property
    def head_facts(self) -> None:
        """None: tokens are features."""
        return None

    def adapt(self, found: Shapes, read: Read) -> tuple[Shapes, Read]:
        """See `layouts`."""
        return layouts.adapt(found, read, width=self.arch.embed_dim, depth=self.arch.depth)

    def synthetic(self, name: str, seed: int, *, peak: float | None = None) -> Array:
        """See `synthetic`; with a `peak`, the massive activations of trained large ViTs."""
        if peak is None:
            return synthetic.tensor(name, self.tensors[name], seed)
        return synthetic.stressed(name, self.tensors[name], seed, arch=self.arch, peak=peak)

    def calls(self, graph: Graph, read: Read) -> tuple[Call, ...]:
        """Stem, each block, and a head for each block that is an output."""
        from dinoexport.models.dinov2 import fold

        body = _dtype_name(self.recipe.precision or Precision.FP32)
        residual = "float16" if body == "float16" and self.choices.residual == "fp16" else "float32"
        fp32 = self.choices.fp32_parts(self.arch.depth) if body == "float16" else frozenset()
        norms = "float32" if "norms" in fp32 else residual
        scores = "float32" if "softmax" in fp32 else body
        form = f"{body} with residual {residual}, norms {norms}, scores {scores}"
        folded = fold.Folded(arch=self.arch, read=read)

        def over_tokens(name: str, module: str, arguments: Mapping[str, Any]) -> Piece:
            return Piece(
                name=f"{name}, {form}",
                code=f"{_TRACED}:{module}",
                arguments=arguments,
                example_inputs={"tokens": Example(dtype=residual, shape=(2, 5, self.arch.embed_dim))},
                dynamic={"tokens": {0: "batch", 1: "tokens"}},
            )

        from_bytes = self.choices.input == "images"
        patch, channels = self.arch.patch_size, self.arch.in_chans
        height, width = 17 * patch, 19 * patch  # neither native nor square, so that tracing specialises on nothing
        if from_bytes:
            example = Example(dtype="uint8", shape=(2, height, width, channels))
            normalising = {"mean": self.preprocessing.mean, "std": self.preprocessing.std}
        else:
            example, normalising = Example(dtype="float32", shape=(2, channels, height, width)), {}
        image_name = graph.inputs[0].name
        stem = Piece(
            name=f"stem, {form}",
            code=f"{_TRACED}:Stem",
            arguments=self.arch.stem_facts | {"residual": residual, **normalising},
            example_inputs={image_name: example},
            dynamic={image_name: {axis: dim for axis, dim in enumerate(graph.inputs[0].shape) if isinstance(dim, str)}},
            least_sizes={"height": patch, "width": patch},
        )
        facts, exactly = self._block_facts, dict.fromkeys(("body", "norms", "scores"), "float32")
        block = over_tokens("block", "Block", {**facts, "body": body, "norms": norms, "scores": scores})
        exact = over_tokens("fp32_block", "Block", {**facts, **exactly})
        final = {
            "dim": self.arch.embed_dim,
            "prefix_count": 1 + self.arch.register_count,
            "epsilon": self.arch.layer_norm_eps,
        }
        last_head = over_tokens("head", "Head", {**final, "with_registers": True})
        chosen_head = over_tokens("chosen_head", "Head", {**final, "with_registers": False})

        def sequence() -> Iterator[Call]:
            yield Call(piece=stem, scope="stem", inputs=(image_name,), outputs=("stem_tokens",), weights=folded.stem())
            value = "stem_tokens"
            for i in range(self.arch.depth):
                yield Call(
                    piece=exact if f"blocks.{i}" in fp32 else block,
                    scope=f"blocks.{i}",
                    inputs=(value,),
                    outputs=(f"blocks.{i}_tokens",),
                    weights=folded.block(i),
                )
                value = f"blocks.{i}_tokens"
                for head_block, prefix in self.token_outputs:
                    if head_block == i:
                        names = tuple(t.name for t in graph.outputs if _belongs(t.name, prefix))
                        yield Call(
                            piece=chosen_head if prefix else last_head,
                            scope=f"{prefix}norm",
                            inputs=(value,),
                            outputs=names,
                            weights=folded.head(),
                        )

        return tuple(sequence())

    @property
    def _block_facts(self) -> dict[str, Any]:
        arch = self.arch
        return {
            "dim": arch.embed_dim,
            "num_heads": arch.num_heads,
            "hidden": arch.hidden_dim,
            "swiglu": arch.feed_forward == "swiglu",
            "activation": arch.activation,
            "epsilon": arch.layer_norm_eps,
            "qkv_bias": arch.qkv_bias,
        }

    @property
    def promotable(self) -> tuple[str, ...]:
        """The parts that published fixes keep in fp32: the residual stream, norms, softmax; then each whole block."""
        if self.recipe.precision is not Precision.FP16:
            return ()
        return ("residual", "norms", "softmax", *(f"blocks.{i}" for i in range(self.arch.depth)))

    def promoted(self, parts: Sequence[str]) -> Mapping[str, Any]:
        """The table `[graph]` with `parts` in fp32, in addition to those already in it."""
        others = tuple(part for part in self.promotable if part in {*self.choices.fp32, *parts} - {"residual"})
        residual = "fp32" if "residual" in parts else self.choices.residual
        return self.choices.changed(residual=residual, fp32=others).model_dump(mode="json")

    @property
    def probes(self) -> Mapping[str, tuple[str, ...]]:
        """The residual stream after the stem and after each block."""
        return {"model": ("stem_tokens", *(f"blocks.{i}_tokens" for i in range(self.arch.depth)))}

    def reference(
        self, read: Read, inputs: Sequence[Arrays], *, precision: Precision, progress: Progress, inside: bool = False
    ) -> list[dict[str, Array]]:
        """The plain upstream formulation; see `reference`. inside: the residual stream at `probes` too."""
        import torch

        from dinoexport.models.dinov2 import reference

        dtype = self.dtype(precision)
        streams: list[dict[str, Array]] = [{} for _ in inputs]

        def keep(j: int, blocks_done: int, stream: torch.Tensor) -> None:
            streams[j][self.probes["model"][blocks_done]] = stream.float().numpy()

        answers = reference.tokens_of(
            self.arch,
            lambda name: torch.from_numpy(read(name)).to(dtype),
            [torch.from_numpy(self.normalised(arrays)) for arrays in inputs],
            blocks=[block for block, _ in self.token_outputs],
            block_done=lambda done: progress(f"PyTorch {precision}", done, self.arch.depth),
            keep_stream=keep if inside else None,
        )
        return [
            self.named({i: t.float().numpy() for i, t in tokens.items()}) | stream
            for tokens, stream in zip(answers, streams, strict=True)
        ]

    def upstream(self, read: Read, inputs: Sequence[Arrays], *, progress: Progress) -> list[dict[str, Array]]:
        """The outputs of facebookresearch/dinov2 from torch.hub; see `hub`."""
        from dinoexport.models.dinov2 import hub

        blocks = [block for block, _ in self.token_outputs]
        answers = hub.tokens_of(
            self.recipe.name, self.arch, read, [self.normalised(arrays) for arrays in inputs], blocks, progress
        )
        return [self.named(tokens) for tokens in answers]

    def dtype(self, precision: Precision) -> torch.dtype:
        """PyTorch's dtype for `precision`; raises UsageError for int8, which PyTorch does not have."""
        return _dtype(precision)

    def normalised(self, arrays: Arrays) -> Array:
        """The case's image as normalised pixels (B, C, H, W), whatever the graph's input."""
        if "pixels" in arrays:
            return arrays["pixels"]
        return self.preprocessing.normalised(arrays["images"])

    def named(self, tokens_BND: Mapping[int, Array]) -> dict[str, Array]:
        """Normalised tokens by block, under the graph's output names."""
        import numpy as np

        prefix_count = 1 + self.arch.register_count
        outputs: dict[str, Array] = {}
        for block, prefix in self.token_outputs:
            tokens = tokens_BND[block]
            outputs[f"{prefix}class_token"] = np.ascontiguousarray(tokens[:, 0])
            if not prefix and self.arch.register_count:
                outputs["register_tokens"] = np.ascontiguousarray(tokens[:, 1:prefix_count])
            outputs[f"{prefix}patch_tokens"] = np.ascontiguousarray(tokens[:, prefix_count:])
        return outputs

    def case(self, table: Mapping[str, Any], folder: Path) -> Case:
        """A noise image of a given size, or a photograph prepared as the recipe says; see `cases`."""
        return cases.read_case(table, folder, self.taken)

    def cases_from(
        self, folder: Path, *, progress: Progress, only: Collection[str] | None = None
    ) -> Iterator[Case | str]:
        """A case for each readable image in `folder`, prepared as the recipe says."""
        if self.arch.in_chans != serving.RGB:
            raise UsageError(
                f"{self.recipe.name} takes images of {self.arch.in_chans} channels; no image file has them.",
                next_step="Validate it without --images.",
            )
        return cases.from_folder(folder, self.taken, progress=progress, only=only)

    @property
    def uses(self) -> ImageUses:
        """Class tokens, mean patch tokens, and patches found again in the mirrored image; see `uses`."""
        return ImageUses(preprocessing=self.preprocessing)

    @property
    def fits(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """As in dinov2/eval: the class token, alone or followed by the mean patch token."""
        if self.choices.interface == "transformers":
            return {}
        token = ("class_token", "as is")
        return {"logreg": (token,), "linear": (token, ("patch_tokens", "mean")), "knn": (token,)}

    def fitted_head(self, kind: str) -> str:
        """`linear` is the name of a released head, so a fitted one is a `probe`."""
        return "probe" if kind == "linear" else kind

    def pictures(
        self, case: Case, reference: Arrays, candidates: Mapping[str, Arrays]
    ) -> tuple[tuple[Picture, ...], ...]:
        """Photographs, their patch tokens as colours, errors per patch; see `pictures`."""
        from dinoexport.models.dinov2 import pictures

        expected = reference["patch_tokens"]
        tokens = {name: answers["patch_tokens"] for name, answers in candidates.items() if "patch_tokens" in answers}
        drawable = {name: ours for name, ours in tokens.items() if ours.shape == expected.shape}
        pixels = self.normalised(case.inputs)
        return pictures.of_case(
            pixels, expected, drawable, patch=self.arch.patch_size, preprocessing=self.preprocessing
        )

    def drive(self, runners: Mapping[str, Runner], inputs: Arrays) -> dict[str, Array]:
        """One call of the one graph."""
        return runners["model"](inputs)

    def front_ends(self, samples: Path | None, *, progress: Progress) -> tuple[FrontEnd, ...]:
        """Encoded images in, prepared as the recipe says or near their own size; see `serving`."""
        return serving.front_ends(self.graphs[0], self.taken, samples, progress=progress)

    def prepare(self, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]) -> dict[str, Array]:
        """Images decoded, resized, and normalised unless the graph does that itself; see `serving`."""
        return serving.prepare(front_end, settings, encoded, self.taken)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Noise images at the size of the evaluation and at the native size, one and eight at a time."""
        return cases.workloads(self.recipe.profile, self.taken)

    @property
    def text(self) -> None:
        """None: the model does not generate text."""
        return None

    @property
    def facts(self) -> Mapping[str, int | str]:
        """Width, depth, heads, feed-forward and registers."""
        return {
            "width": self.arch.embed_dim,
            "depth": self.arch.depth,
            "heads": self.arch.num_heads,
            "feed_forward": f"{self.arch.feed_forward} {self.arch.hidden_dim}",
            "registers": self.arch.register_count,
        }

    @property
    def card(self) -> Mapping[str, str]:
        """From the model card of DINOv2-S/B/L/g in the upstream repository (MODEL_CARD.md), if it is one of them."""
        patch = self.arch.patch_size
        crop = f"An image whose sides are not multiples of {patch} is cropped to the closest smaller multiple."
        if not self.recipe.weights:
            return {
                "model": f"yours: {self.recipe.name}, a {self.arch.native_size}-pixel ViT of DINOv2's architecture, "
                f"patch {patch}",
                "training_data": "yours: nothing is known of it here",
                "intended_use": "yours to say",
                "limits": crop,
                "bias": "yours to measure; the published models' biases are in their model card, not here",
            }
        return {
            "model": f"DINOv2 {self.recipe.name}: {self.arch.native_size}-pixel ViT, patch {patch}, "
            "trained on LVD-142M",
            "intended_use": "Vision backbone: k-NN and linear classification on the class token (alone or with the "
            "mean patch token), retrieval by nearest neighbours, depth and segmentation by linear layers on "
            "patch tokens.",
            "limits": f"{crop} Fine-tuning is possible for small gains and increases bias towards the "
            "fine-tuning labels.",
            "bias": "Despite training without annotations, significant biases remain toward rich households from "
            "Western countries.",
        }


def _dtype(precision: Precision) -> torch.dtype:
    """PyTorch's dtype. It has none for int8, which a quantiser makes from an fp32 graph."""
    import torch

    found: torch.dtype = getattr(torch, _dtype_name(precision))
    return found


def _dtype_name(precision: Precision) -> str:
    """PyTorch's name of it."""
    names = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}
    if precision not in names:
        raise UsageError(
            f"PyTorch has no {precision} of its own to compare with.",
            next_step=f"Leave times_own_error_max out of [limits.{precision}].",
        )
    return names[precision]


def _tokens(name: str, shape: tuple[int | str, ...], meaning: str) -> Tensor:
    return Tensor(name=name, dtype="float32", shape=shape, meaning=f"{meaning}, after the final norm")


def _belongs(output: str, prefix: str) -> bool:
    return output.startswith(prefix) if prefix else not output.startswith("block_")


FAMILY = Dinov2()

"""One DINOv2 variant, in every role that `dinoexport.family.Model` names; each role is in a module of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport.config.recipe import Recipe
from dinoexport.errors import UsageError
from dinoexport.family import Call, FrontEnd, Read, Shapes
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import cases, layouts, pieces, reporting, serving, signature, synthetic
from dinoexport.models.dinov2.config import Architecture, GraphChoices
from dinoexport.models.dinov2.uses import ImageUses
from dinoexport.spec import Array, Arrays, Case, Graph, Picture, Precision, Progress, Runner, Workload

if TYPE_CHECKING:
    import torch


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
        return (signature.graph(self.recipe.profile, self.arch, self.choices, self.preprocessing),)

    @cached_property
    def token_outputs(self) -> tuple[tuple[int, str], ...]:
        """See `signature`."""
        return signature.token_outputs(self.arch, self.choices)

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
        precision = self.recipe.precision or Precision.FP32
        return tuple(pieces.calls(graph, self.arch, self.choices, self.preprocessing, precision=precision, read=read))

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
        """The plain upstream formulation; see `oracle`. inside: the residual stream at `probes` too."""
        from dinoexport.models.dinov2 import oracle

        found = oracle.tokens_of(
            self.arch,
            read,
            [self.normalised(arrays) for arrays in inputs],
            blocks=[block for block, _ in self.token_outputs],
            stream_names=self.probes["model"] if inside else (),
            precision=precision,
            progress=progress,
        )
        return [self.named(tokens) | stream for tokens, stream in found]

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
        from dinoexport.models.dinov2 import oracle

        return oracle.dtype(precision)

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

    @property
    def fitted_validation(self) -> str:
        """The validation of the released heads."""
        return "dinov2_heads"

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

    def of_sizes(self, sizes: Sequence[Mapping[str, int]]) -> FrontEnd:
        """Encoded images in, each prepared at the nearest of these sizes; see `serving`."""
        return serving.of_sizes(self.graphs[0], sizes)

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
        """See `reporting`."""
        return reporting.facts(self.arch)

    @property
    def card(self) -> Mapping[str, str]:
        """See `reporting`."""
        return reporting.card(self.recipe, self.arch, sizes=self.choices.sizes)

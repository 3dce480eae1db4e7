"""A DINOv2 backbone with a head as one model and one graph; implements `dinoexport.family.Model`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.family import Call, FrontEnd, HeadWeights, Read, Shapes
from dinoexport.models.dinov2 import reporting
from dinoexport.models.dinov2.heads import finishing, layouts, pictures, serving, signature, synthetic
from dinoexport.models.dinov2.heads.kinds import Head, HeadTable
from dinoexport.models.dinov2.published import PATCH
from dinoexport.spec import (
    Array,
    Arrays,
    Case,
    Graph,
    HeadFacts,
    Picture,
    Precision,
    Progress,
    Runner,
    Tensor,
    Workload,
)

if TYPE_CHECKING:
    import torch

    from dinoexport.models.dinov2.model import Dinov2Model

# The part of a reduced-precision graph that may go back to fp32 on its own.
_PART = "head"
_PADDED = "padded_pixels"


@dataclass(frozen=True, kw_only=True)
class HeadedModel:
    """One variant with a head. backbone: the same variant without the head."""

    recipe: Recipe
    backbone: Dinov2Model
    head: Head

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """One graph, `model`: images in; depth, labels or probabilities out, and tokens if requested."""
        (graph,) = self.backbone.graphs
        tokens = graph.outputs if self.head.table.tokens else ()
        dims = graph.dims
        if self.head.pads and self.backbone.choices.sizes != "strict":
            dims = tuple(replace(dim, step=1) for dim in dims)  # every pixel has an answer of its own
        return (replace(graph, outputs=(*signature.outputs(self.head), *tokens), dims=dims),)

    @property
    def tensors(self) -> Shapes:
        """The tensors of the backbone, then those of the head."""
        return {**self.backbone.tensors, **self.head.tensors}

    @property
    def optional_tensors(self) -> frozenset[str]:
        """The backbone's, tensors that the head never uses, and the final norm if nothing reads it."""
        reads_norm = self.head.after_norm or self.head.table.tokens
        norm = frozenset() if reads_norm else frozenset({"norm.weight", "norm.bias"})
        return self.backbone.optional_tensors | layouts.unused(self.head) | norm

    @property
    def head_weights(self) -> HeadWeights | None:
        """The separate file of the head; None if one file holds backbone and head."""
        return _OwnFile(head=self.head) if self.head.own_file else None

    @property
    def head_facts(self) -> HeadFacts:
        """Dataset, its terms, range and classes."""
        return signature.facts(self.head)

    def adapt(self, found: Shapes, read: Read) -> tuple[Shapes, Read]:
        """Adapts the backbone's tensors; for Depth Anything, which has one file, both parts."""
        if self.head.own_file:
            return self.backbone.adapt(found, read)
        return layouts.adapt_whole(self.backbone.adapt, found, read)

    def synthetic(self, name: str, seed: int, *, peak: float | None = None) -> Array:
        """See both `synthetic` modules; only the backbone has a peak."""
        if name in self.head.tensors:
            return synthetic.tensor(self.head, name, seed)
        return self.backbone.synthetic(name, seed, peak=peak)

    def calls(self, graph: Graph, read: Read) -> tuple[Call, ...]:
        """Padding where the head pads, the backbone's stem and blocks, the head, and tokens if requested."""
        from dinoexport.models.dinov2.heads import fold, pieces

        head, image = self.head, graph.inputs[0]
        from_bytes = image.name == "images"
        inside = (graph.inputs[0].name, *self.backbone.probes["model"])
        plain = replace(self.backbone, choices=self.backbone.choices.changed(input="pixels"))
        backbone = plain if head.pads else self.backbone
        (own,) = backbone.graphs
        body = [
            call
            for call in backbone.calls(own, read)
            if call.outputs[0] in inside or any(output in _names(graph.outputs) for output in call.outputs)
        ]
        example = pieces.example(head, from_bytes)
        calls: list[Call] = []
        if head.pads:
            pad = pieces.padding(image, example, self._normalising(from_bytes))
            calls.append(Call(piece=pad, scope="pad", inputs=(image.name,), outputs=(_PADDED,), weights={}))
            body[0] = replace(body[0], inputs=(_PADDED,))
        residual = next(
            call.piece.example_inputs["tokens"].dtype for call in body if "tokens" in call.piece.example_inputs
        )
        dtype = self._body()
        piece = pieces.of_head(head, image, example, residual=residual, body=dtype)
        calls += body
        calls.append(
            Call(
                piece=piece,
                scope="head",
                inputs=(
                    *((image.name,) if image.name in piece.example_inputs else ()),
                    *(f"blocks.{i}_tokens" for i in head.blocks),
                ),
                outputs=tuple(tensor.name for tensor in signature.outputs(head)),
                weights=fold.FoldedHead(head=head, read=read).weights(),
            )
        )
        return tuple(calls)

    def _normalising(self, from_bytes: bool) -> dict[str, Any]:
        """Mean and deviation of each channel, if the graph normalises bytes; else nothing."""
        if not from_bytes:
            return {}
        return {"mean": self.backbone.preprocessing.mean, "std": self.backbone.preprocessing.std}

    @property
    def text(self) -> None:
        """None: it generates no text."""
        return None

    def _body(self) -> str:
        """The dtype of a DPT head's convolutions: the graph's, unless `head` stays in fp32."""
        halved = self.recipe.precision is Precision.FP16 and _PART not in self.recipe.graph.get("fp32", ())
        dpt = self.head.form in ("dpt_depth", "depth_anything")
        return "float16" if halved and dpt else "float32"

    @property
    def promotable(self) -> tuple[str, ...]:
        """The parts of the backbone; before them the head, if it has fp16 parts, because it costs least in fp32."""
        parts = self.backbone.promotable
        return (_PART, *parts) if parts and self.head.form in ("dpt_depth", "depth_anything") else parts

    def promoted(self, parts: Sequence[str]) -> Mapping[str, Any]:
        """The table `[graph]` with `parts` in fp32."""
        table = dict(self.backbone.promoted([part for part in parts if part != _PART]))
        kept = _PART in parts or _PART in self.recipe.graph.get("fp32", ())
        return table | ({"fp32": [*table["fp32"], _PART]} if kept else {})

    @property
    def probes(self) -> Mapping[str, tuple[str, ...]]:
        """The backbone's: the residual stream after the stem and after each block."""
        return self.backbone.probes

    def reference(
        self, read: Read, inputs: Sequence[Arrays], *, precision: Precision, progress: Progress, inside: bool = False
    ) -> list[dict[str, Array]]:
        """The plain formulations of backbone and head; see `reference` of both."""
        import torch

        from dinoexport.models.dinov2 import reference as of_backbone
        from dinoexport.models.dinov2.heads import reference

        head, names = self.head, self.probes["model"]
        dtype = self.backbone.dtype(precision)
        # A linear head in fp16 would overflow or drown in rounding what a user keeps in fp32: see `graph._Pyramid`.
        of_head = dtype if head.form in ("dpt_depth", "depth_anything") else torch.float32
        images = [torch.from_numpy(self.backbone.normalised(arrays)) for arrays in inputs]
        shown = [reference.padded(image) if head.pads else image for image in images]
        streams: list[dict[int, torch.Tensor]] = [{} for _ in inputs]
        followed: list[dict[str, Array]] = [{} for _ in inputs]

        def keep(j: int, blocks_done: int, stream: torch.Tensor) -> None:
            if blocks_done - 1 in head.blocks:
                streams[j][blocks_done - 1] = stream
            if inside:
                followed[j][names[blocks_done]] = stream.float().numpy()

        tokens = of_backbone.tokens_of(
            head.arch,
            lambda name: torch.from_numpy(read(name)).to(dtype),
            shown,
            blocks=[block for block, _ in self.backbone.token_outputs] if head.table.tokens else [],
            block_done=lambda done: progress(f"PyTorch {precision}", done, head.arch.depth),
            keep_stream=keep,
        )
        norm = tuple(torch.from_numpy(read(name)).to(of_head) for name in ("norm.weight", "norm.bias"))
        answers = []
        for j, image in enumerate(images):
            found = reference.answers_of(
                head,
                lambda name: torch.from_numpy(read(name)).to(of_head),
                streams[j],
                (norm[0], norm[1]),
                image,
            )
            found.pop("raw", None)
            answer = {name: _plain(value) for name, value in found.items()}
            if head.table.tokens:
                answer |= self.backbone.named({i: t.float().numpy() for i, t in tokens[j].items()})
            answers.append(answer | followed[j])
            streams[j].clear()
        return answers

    def upstream(
        self,
        read: Read,
        inputs: Sequence[Arrays],
        *,
        progress: Progress,
    ) -> list[dict[str, Array]]:
        """Not offered: the hub's linear depth heads ignore their range, and its segmentation needs mmcv."""
        raise UsageError(
            "torch.hub's code is not a reference for heads: it gives linear NYU depths eight times too large.",
            next_step="Use --reference plain, whose formulas the official code's numbers pin.",
        )

    def case(self, table: Mapping[str, Any], folder: Path) -> Case:
        """The backbone's cases."""
        return self.backbone.case(table, folder)

    def cases_from(
        self, folder: Path, *, progress: Progress, only: Collection[str] | None = None
    ) -> Iterator[Case | str]:
        """A case for each readable image, prepared as the recipe says."""
        return self.backbone.cases_from(folder, progress=progress, only=only)

    @property
    def uses(self) -> None:
        """None: the outputs themselves are the downstream results, and they are compared directly."""
        return None

    @property
    def fits(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """Nothing: the outputs are results, not features."""
        return {}

    def fitted_head(self, kind: str) -> str:
        """The backbone's name for it."""
        return self.backbone.fitted_head(kind)

    @property
    def fitted_validation(self) -> str:
        """The backbone's."""
        return self.backbone.fitted_validation

    def pictures(
        self, case: Case, reference: Arrays, candidates: Mapping[str, Arrays]
    ) -> tuple[tuple[Picture, ...], ...]:
        """Depth in colours, label maps or best classes, and where a candidate differs; see `pictures`."""
        return pictures.of_case(
            self.head, self.backbone.normalised(case.inputs), reference, candidates, self.backbone.preprocessing
        )

    def drive(self, runners: Mapping[str, Runner], inputs: Arrays) -> dict[str, Array]:
        """One call of the one graph."""
        return runners["model"](inputs)

    def front_ends(self, samples: Path | None, *, progress: Progress) -> tuple[FrontEnd, ...]:
        """Encoded images, prepared as in the head's own evaluation; see `serving`."""
        return serving.front_ends(self.head, self.graphs[0], self.backbone.taken, samples, progress=progress)

    def prepare(self, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]) -> dict[str, Array]:
        """Decodes and resizes images, and normalises them if the graph does not; see `serving`."""
        return serving.prepare(self.head, self.backbone, front_end, settings, encoded)

    @property
    def answer_forms(self) -> tuple[str, ...]:
        """Class names; for depth and labels PNG files, or arrays of the photograph's size."""
        return finishing.forms(self.head)

    def with_answers(self, end: FrontEnd, form: str) -> FrontEnd:
        """See `serving`."""
        return serving.with_answers(self.head, end, form)

    def finish(self, settings: Mapping[str, Any], arrays: Arrays) -> dict[str, Array]:
        """See `finishing`."""
        return serving.finish(self.head, settings, arrays)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """The backbone's."""
        return self.backbone.workloads

    @property
    def facts(self) -> Mapping[str, int | str]:
        """The backbone's, and the head's name."""
        return {**self.backbone.facts, "head": self.head.table.kind}

    @property
    def card(self) -> Mapping[str, str]:
        """The backbone's, and what the head was trained on, its range and its classes."""
        strict = self.backbone.choices.sizes == "strict"
        sizes = "pad" if self.head.pads and not strict else self.backbone.choices.sizes
        of_backbone = dict(reporting.card(self.recipe, self.backbone.arch, sizes=sizes))
        if self.recipe.weights and not self.head.own_file:
            of_backbone |= signature.depth_anything_card(self.recipe.name)
        return {**of_backbone, **signature.card(self.head)}


@dataclass(frozen=True, kw_only=True)
class _OwnFile:
    """A head whose weights are in a separate file; implements `dinoexport.family.HeadWeights`."""

    head: Head

    @property
    def name(self) -> str:
        """The head's kind."""
        return self.head.table.kind

    @property
    def tensors(self) -> Shapes:
        """Every tensor with its shape, under our names."""
        return self.head.tensors

    def adapt(self, found: Shapes, read: Read) -> tuple[Shapes, Read]:
        """See `layouts`."""
        return layouts.adapt(found, read)

    def recognised(self, shapes: Shapes) -> str:
        """See `layouts`."""
        return layouts.recognised(self.head, shapes)

    def synthetic(self, name: str, seed: int) -> Array:
        """See `synthetic`."""
        return synthetic.tensor(self.head, name, seed)


def joined(recipe: Recipe, backbone: Dinov2Model) -> HeadedModel:
    """The backbone with the recipe's head; raises UsageError if they do not fit each other."""
    table = parse(HeadTable, recipe.head, where=f"recipe {recipe.name}, [head]")
    head = Head(arch=backbone.arch, table=table)
    if backbone.arch.register_count and head.form not in ("classifier", "fitted_linear", "fitted_knn"):
        raise UsageError(
            f"recipe {recipe.name}, [head]: no {table.kind} head was trained for a backbone with registers.",
            next_step="Use the variant without registers, or the heads linear and linear4.",
        )
    if len(set(head.blocks)) < head.kind.layers or min(head.blocks) < 0:
        raise UsageError(
            f"recipe {recipe.name}, [head]: {table.kind} reads {head.kind.layers} blocks, "
            f"the model has {backbone.arch.depth}.",
            next_step="Choose a head that reads one block.",
        )
    if backbone.arch.patch_size != PATCH:
        raise UsageError(
            f"recipe {recipe.name}, [head]: heads were trained on patches of {PATCH} pixels.",
            next_step="Use a backbone of that patch size.",
        )
    if head.form == "depth_anything" and backbone.choices.sizes != "strict":
        raise UsageError(
            f'recipe {recipe.name}, [graph]: {table.kind} needs sizes = "strict": the official code takes multiples of '
            f"{PATCH} only.",
            next_step="Resize images to multiples of it; the served front end does so.",
        )
    return HeadedModel(recipe=recipe, backbone=backbone, head=head)


def backbone_graph(recipe: Recipe) -> dict[str, Any]:
    """The table `[graph]` without the head's entry in `fp32`."""
    kept = recipe.graph.get("fp32", ())
    if not recipe.head or _PART not in kept:
        return recipe.graph
    return recipe.graph | {"fp32": [part for part in kept if part != _PART]}


def _names(tensors: Sequence[Tensor]) -> set[str]:
    return {tensor.name for tensor in tensors}


def _plain(value: torch.Tensor) -> Array:
    import numpy as np

    array: Array = (value if value.dtype.is_floating_point is False else value.float()).numpy()
    return np.ascontiguousarray(array)

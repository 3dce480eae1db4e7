"""One decoder, in every role that `dinoexport.family.Model` names; each role is in a module of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.family import Call, FrontEnd, Read, Shapes
from dinoexport.models.llama import cases, companions, driving, layouts, pieces, reporting, signature, synthetic
from dinoexport.models.llama.config import Architecture, GraphChoices
from dinoexport.models.llama.graph_weights import BITS, GraphWeights
from dinoexport.models.llama.text import LlamaText
from dinoexport.spec import Array, Arrays, Case, Graph, Picture, Precision, Progress, Runner, Workload


def of(recipe: Recipe) -> LlamaModel:
    """The variant of a recipe; raises UsageError that names errors in `[model]` or `[graph]`."""
    arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
    choices = parse(GraphChoices, recipe.graph, where=f"recipe {recipe.name}, [graph]")
    if set(recipe.profile) != set(signature.DIMS):
        raise UsageError(
            f"recipe {recipe.name}, [profile]: has {sorted(recipe.profile)}, needs {sorted(signature.DIMS)}.",
            next_step="Give each dynamic dimension its min, opt and max; past is the length of the cache, from 0.",
        )
    if recipe.quantised != "weights":
        raise UsageError(
            f'recipe {recipe.name}: quantised = "{recipe.quantised}" is not for decoders.',
            next_step='Write quantised = "weights": with one scale for all activations of a product, a real model '
            "kept 66 % of its likeliest tokens.",
        )
    if recipe.profile["past"].min != 0 or recipe.profile["length"].min != 1:
        raise UsageError(
            f"recipe {recipe.name}, [profile]: past must begin at 0 and length at 1.",
            next_step="The same graph reads a prompt into an empty cache and adds one token at a time.",
        )
    if recipe.profile["past"].max >= arch.context or recipe.profile["length"].max > arch.context:
        raise UsageError(
            f"recipe {recipe.name}, [profile]: past up to {recipe.profile['past'].max} and length up to "
            f"{recipe.profile['length'].max} leave the context of {arch.context}.",
            next_step="Set the max of past below the context, and that of length to at most the context.",
        )
    if recipe.precision in BITS and (arch.dim % choices.block or arch.hidden_dim % choices.block):
        raise UsageError(
            f"recipe {recipe.name}, [graph]: block {choices.block} does not divide {arch.dim} and {arch.hidden_dim}.",
            next_step="Choose a block that divides both.",
        )
    return LlamaModel(recipe=recipe, arch=arch, choices=choices)


@dataclass(frozen=True, kw_only=True)
class LlamaModel:
    """One decoder; implements `dinoexport.family.Model`."""

    recipe: Recipe
    arch: Architecture
    choices: GraphChoices

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """One graph, `model`, with the names of Hugging Face's exporters."""
        return (signature.graph(self.recipe.profile, self.arch, body=pieces.DTYPES[self._weights(_unread).body]),)

    @property
    def precision(self) -> Precision:
        """The precision of the graph."""
        return self.recipe.precision or Precision.FP32

    @property
    def tensors(self) -> Shapes:
        """Meta's tensors."""
        return self.arch.tensors

    @property
    def optional_tensors(self) -> frozenset[str]:
        """None: all tensors are used."""
        return frozenset()

    @property
    def head_weights(self) -> None:
        """None: one checkpoint holds everything."""
        return None

    @property
    def head_facts(self) -> None:
        """None: the outputs are logits and a cache."""
        return None

    @property
    def fits(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """Nothing: a decoder's outputs are not features of an item."""
        return {}

    def fitted_head(self, kind: str) -> str:
        """Never called: see `fits`."""
        return kind

    @property
    def fitted_validation(self) -> str:
        """Never used: see `fits`."""
        return self.recipe.validation

    def adapt(self, found: Shapes, read: Read) -> tuple[Shapes, Read]:
        """See `layouts`."""
        return layouts.adapt(self.arch, found, read)

    def synthetic(self, name: str, seed: int, *, peak: float | None = None) -> Array:
        """See `synthetic`; with a `peak`, the massive activations of trained decoders."""
        if peak is None:
            return synthetic.tensor(name, self.tensors[name], seed)
        return synthetic.stressed(name, self.tensors[name], seed, arch=self.arch, peak=peak)

    def calls(self, graph: Graph, read: Read) -> tuple[Call, ...]:
        """Stem, each block, head."""
        return tuple(pieces.calls(self._weights(read)))

    def _weights(self, read: Read) -> GraphWeights:
        return GraphWeights(arch=self.arch, choices=self.choices, precision=self.precision, read=read)

    @property
    def companion_files(self) -> Mapping[str, bytes]:
        """See `companions`."""
        return companions.files(self.arch)

    def engine_form(self) -> Mapping[str, Any]:
        """Weights of few bits are multiplied in fp16 there."""
        if self.precision not in BITS:
            return self.recipe.graph
        return self.choices.changed(body="fp16").model_dump(mode="json")

    @property
    def stored_bytes(self) -> int:
        """See `graph_weights`."""
        return self._weights(_unread).stored_bytes()

    @property
    def promotable(self) -> tuple[str, ...]:
        """None: norms, rotation and softmax are in fp32 in any graph."""
        return ()

    def promoted(self, parts: Sequence[str]) -> Mapping[str, Any]:
        """The table `[graph]`, which has no parts to choose."""
        assert not parts
        return self.choices.model_dump(mode="json")

    @property
    def probes(self) -> Mapping[str, tuple[str, ...]]:
        """The residual stream after the embedding and after each block."""
        return {"model": ("embedded", *(f"layers.{i}_stream" for i in range(self.arch.layers)))}

    def reference(
        self, read: Read, inputs: Sequence[Arrays], *, precision: Precision, progress: Progress, inside: bool = False
    ) -> list[dict[str, Array]]:
        """The plain formulation, each prompt alone and without a cache; see `oracle`."""
        from dinoexport.models.llama import oracle

        return oracle.of(self.arch, read, inputs, precision=precision, progress=progress, inside=inside)

    def upstream(self, read: Read, inputs: Sequence[Arrays], *, progress: Progress) -> list[dict[str, Array]]:
        """Meta's code cannot be downloaded by a program, so it is not supported here."""
        raise UsageError(
            "Meta's own code of this model cannot be downloaded by a program.",
            next_step="Leave out --reference hub: tests compare the plain formulation with numbers of Meta's code.",
        )

    def case(self, table: Mapping[str, Any], folder: Path) -> Case:
        """Prompts of random ids, of given ids or of ids in a file; see `cases`."""
        return cases.read_case(table, folder, self.arch)

    def cases_from(
        self, folder: Path, *, progress: Progress, only: Collection[str] | None = None
    ) -> Iterator[Case | str]:
        """None: this family makes no cases of a folder of files."""
        return iter(())

    @property
    def uses(self) -> None:
        """None."""
        return None

    def pictures(
        self, case: Case, reference: Arrays, candidates: Mapping[str, Arrays]
    ) -> tuple[tuple[Picture, ...], ...]:
        """None: a picture of logits would show nothing."""
        return ()

    def drive(self, runners: Mapping[str, Runner], inputs: Arrays) -> dict[str, Array]:
        """Prompts in chunks, then tokens chosen greedily; see `driving`."""
        return driving.drive(runners, self.graphs[0], self.arch, inputs)

    def front_ends(self, samples: Path | None, *, progress: Progress) -> tuple[FrontEnd, ...]:
        """None: a decoder has no front end."""
        return ()

    def prepare(self, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]) -> dict[str, Array]:
        """There is no front end to prepare for."""
        raise UsageError(f"There is no front end {front_end!r}.", next_step="Use the text model.")

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """See `cases`."""
        return cases.workloads(self.arch)

    @property
    def text(self) -> LlamaText:
        """See `text`."""
        return LlamaText(table=self.arch.text)

    @property
    def facts(self) -> Mapping[str, int | str]:
        """See `reporting`."""
        return reporting.facts(self.arch)

    @property
    def card(self) -> Mapping[str, str]:
        """See `reporting`."""
        return reporting.card(self.recipe)


def _unread(name: str) -> Array:
    """Where only shapes and sizes are wanted."""
    raise AssertionError(name)

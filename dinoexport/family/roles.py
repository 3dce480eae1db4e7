"""The roles of a model: one protocol for each, so that a function asks for the role it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dinoexport.family.pieces import Call, Read, Shapes
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
from dinoexport.text.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class FrontEnd:
    """Preparation of users' files for a graph, served in front of it.

    name: the suffix of the served model's name. meaning: what one encoded item is. settings: plain data for
    `Model.prepare`, stored with the served model. answers: what the front end gives instead of the graph's outputs.
    carried: what preparation gives beside the graph's inputs, for making them.
    """

    name: str
    graph: str
    meaning: str
    settings: Mapping[str, Any]
    answers: tuple[Tensor, ...] = ()
    carried: tuple[Tensor, ...] = ()


class HeadWeights(Protocol):
    """A head: turns a backbone's outputs into results, and has its weights in a separate file.

    Its tensors are among the model's `tensors`, under the same names.
    """

    @property
    def name(self) -> str:
        """The head's kind."""

    @property
    def tensors(self) -> Shapes:
        """Every tensor of the file, under the model's names."""

    def adapt(self, found: Shapes, read: Read) -> tuple[Shapes, Read]:
        """A head's file in any layout the family knows, under the model's names."""

    def recognised(self, shapes: Shapes) -> str:
        """The known head that tensors of these shapes belong to, in words; empty if there is none."""

    def synthetic(self, name: str, seed: int) -> Array:
        """The tensor `name` of synthetic head `seed`."""


class Uses(Protocol):
    """How downstream results are computed from a model's outputs, on cases of one item each."""

    @property
    def neighbours_by(self) -> tuple[str, ...]:
        """The features, joined, by whose cosine an item's nearest neighbours are found."""

    @property
    def classified_by(self) -> tuple[str, ...]:
        """The features, joined, that a linear classifier reads."""

    def features(self, outputs: Arrays) -> dict[str, Array]:
        """Vectors (D,) that represent the item, by name: all that is kept of its outputs."""

    def second_view(self, inputs: Arrays) -> dict[str, Array]:
        """Inputs with another view of the item, in the same form as `inputs`."""

    def matches(self, outputs: Arrays, of_view: Arrays) -> Array:
        """For each part of the item (P,) the index of the part that is nearest to it in the second view."""

    def thumbnail(self, inputs: Arrays) -> Picture:
        """A small picture by which a person recognises the item."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The text that a validation case lets a model generate greedily.

    prompts: the token ids of each sequence. tokens, logits: the outputs that hold the tokens (B, N), and the logits
    (B, N, V) they were chosen from.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: str
    logits: str


class TextRole(Protocol):
    """What a model that generates text provides in addition to its graphs."""

    @property
    def prompts(self) -> Prompts:
        """The prompts it was trained to answer."""

    def tokenizer(self, weights: Path) -> Mapping[str, bytes]:
        """The tokenizer's file by name, found in or beside `weights`; empty if there is none."""

    def rollout(self, inputs: Arrays) -> Rollout | None:
        """The text that a case with these inputs lets the model generate; None if it generates nothing."""


class WeightLayout(Protocol):
    """The tensors of a checkpoint, and how other layouts are read."""

    @property
    def tensors(self) -> Shapes:
        """Every tensor the model needs, in the layout the family's authors publish."""

    @property
    def optional_tensors(self) -> frozenset[str]:
        """Tensors that a checkpoint may hold although inference does not use them."""

    @property
    def head_weights(self) -> HeadWeights | None:
        """The part whose weights are in a separate file; None if all weights are in the checkpoint."""

    @property
    def head_facts(self) -> HeadFacts | None:
        """What the outputs mean if the model has a head; None if it gives plain features."""

    def adapt(self, found: Shapes, read: Read) -> tuple[Shapes, Read]:
        """A checkpoint in any layout the family knows, renamed to the published layout. Unknown names are kept."""

    def synthetic(self, name: str, seed: int, *, peak: float | None = None) -> Array:
        """The tensor `name` of the synthetic checkpoint `seed`: the same on every machine, no value vanishingly small.

        peak: the largest activations as a multiple of the median, as in trained models. None: no such activations.
        """


class Exportable(Protocol):
    """A model as graphs made of traced modules."""

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The signatures of the model's ONNX graphs."""

    def calls(self, graph: Graph, read: Read) -> tuple[Call, ...]:
        """The graph as calls of traced pieces, first to last. `read` waits until a weight is written."""

    @property
    def promotable(self) -> tuple[str, ...]:
        """Parts of a graph of reduced precision that may be kept in fp32, each on its own; none in an fp32 graph."""

    def promoted(self, parts: Sequence[str]) -> Mapping[str, Any]:
        """The recipe's `[graph]` table with `parts` of `promotable` in fp32."""


class Runnable(Protocol):
    """A model whose graphs run cases, in any runtime."""

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The signatures of the model's ONNX graphs."""

    def drive(self, runners: Mapping[str, Runner], inputs: Arrays) -> dict[str, Array]:
        """Runs one case with the graphs' runners: one call for an encoder, a loop for a decoder."""

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Inputs for timing, within the graphs' dimensions; the most common one first."""


class Oracle(Protocol):
    """PyTorch's outputs, by code that shares nothing with what is traced."""

    def reference(
        self, read: Read, inputs: Sequence[Arrays], *, precision: Precision, progress: Progress, inside: bool = False
    ) -> list[dict[str, Array]]:
        """The plain published formulation in PyTorch, apart from what is traced; outputs in float32. Imports torch.

        inside: the values at `probes` as well, by their names. For an output that is labels, `NAME/lead` too: how far
        each label's best score is ahead of the second.
        """

    def upstream(self, read: Read, inputs: Sequence[Arrays], *, progress: Progress) -> list[dict[str, Array]]:
        """The same outputs from the authors' own code, if this machine has it. Imports torch."""

    @property
    def probes(self) -> Mapping[str, tuple[str, ...]]:
        """Graph name -> values inside it, first to last, at which the growth of an error is followed.

        If a runner returns them too, `drive` passes them on.
        """


class CaseSource(Protocol):
    """Validation cases: shipped ones and a user's own files."""

    def case(self, table: Mapping[str, Any], folder: Path) -> Case:
        """The validation case that `table` describes; files it names lie in `folder`."""

    def cases_from(
        self, folder: Path, *, progress: Progress, only: Collection[str] | None = None
    ) -> Iterator[Case | str]:
        """Cases made of a user's own files, one after the other, and a line for every file that cannot be used.

        only: the names of the requested cases; no other file is opened.
        """

    @property
    def uses(self) -> Uses | None:
        """How to compute downstream results on `cases_from`; None if the family has none."""


class Fittable(Protocol):
    """A model whose outputs are features that a classifier can be fitted on."""

    @property
    def fits(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """Kind of classifier -> the outputs it reads, joined: (output, `as is` or its `mean` over the second axis).

        Kinds are `logreg`, `linear` and `knn`; empty where the outputs are not features.
        """

    def fitted_head(self, kind: str) -> str:
        """The name in the recipe's `[head]` of a fitted classifier of `kind`."""

    @property
    def fitted_validation(self) -> str:
        """The shipped validation file that limits how far a fitted classifier's probabilities may differ."""


class Servable(Protocol):
    """Preparation of users' files and texts for a served model."""

    @property
    def text(self) -> TextRole | None:
        """How the model generates text; None if it does not."""

    def front_ends(self, samples: Path | None, *, progress: Progress) -> tuple[FrontEnd, ...]:
        """The preparation served in front of the graphs; `samples`: a folder of files like those of the clients."""

    def prepare(self, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]) -> dict[str, Array]:
        """A graph's inputs, an item for each of `encoded`; a UsageError that names an unusable item."""


class Reported(Protocol):
    """What listings and reports show about a model."""

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The signatures of the model's ONNX graphs."""

    def pictures(
        self, case: Case, reference: Arrays, candidates: Mapping[str, Arrays]
    ) -> tuple[tuple[Picture, ...], ...]:
        """Rows of pictures of a case that is `shown`: the outputs of PyTorch and of the candidates."""

    @property
    def facts(self) -> Mapping[str, int | str]:
        """What distinguishes this variant from the others of its family, for `list`: widths, depths, counts."""

    @property
    def card(self) -> Mapping[str, str]:
        """Intended use, limits and bias, as the authors' model card states them."""


class Model(WeightLayout, Exportable, Runnable, Oracle, CaseSource, Fittable, Servable, Reported, Protocol):
    """One variant of a family, as a recipe describes it, in every role. Functions ask for the role they need."""


@runtime_checkable
class HasCompanionFiles(Protocol):
    """A model whose graphs other tools load, together with files that those tools define."""

    @property
    def companion_files(self) -> Mapping[str, bytes]:
        """Name -> content of the files beside the graphs in a bundle."""


@runtime_checkable
class SizedWeights(Protocol):
    """A model whose graphs do not store every tensor once in their own precision."""

    @property
    def stored_bytes(self) -> int:
        """The bytes of its graphs' weights in their files."""


@runtime_checkable
class PreparesSizes(Protocol):
    """A model that prepares users' files at sizes that they name."""

    def of_sizes(self, sizes: Sequence[Mapping[str, int]]) -> FrontEnd:
        """The front end that makes each file as large as the nearest of `sizes`, each a value for every dimension."""


@runtime_checkable
class FinishesAnswers(Protocol):
    """A model whose answers can be served in forms other than the graph's arrays: as names, as files."""

    @property
    def answer_forms(self) -> tuple[str, ...]:
        """The possible forms."""

    def with_answers(self, end: FrontEnd, form: str) -> FrontEnd:
        """A front end like `end` whose answers are in `form`."""

    def finish(self, settings: Mapping[str, Any], arrays: Arrays) -> dict[str, Array]:
        """A front end's `answers` from the graph's outputs and `carried` values; InputRefused if there are none."""


@runtime_checkable
class HasEngineForm(Protocol):
    """A model whose graphs are made in another form for an engine than for a CPU."""

    def engine_form(self) -> Mapping[str, Any]:
        """The recipe's table `[graph]` with what engines need."""

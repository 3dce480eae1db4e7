"""Llama-type decoders: Llama 2, Code Llama and models of the same architecture.

Implements `dinoexport.family`. Touvron et al. 2023, arXiv:2307.09288; Rozière et al. 2023, arXiv:2308.12950.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import InputRefused, UsageError
from dinoexport.family import Call, Description, Example, Fact, FrontEnd, Piece, Read, Shapes
from dinoexport.models.llama import cases, companions, described, layouts, synthetic
from dinoexport.models.llama.cases import setting
from dinoexport.models.llama.config import Architecture, GraphChoices
from dinoexport.models.llama.text import LlamaText
from dinoexport.runtime import decoding
from dinoexport.runtime.decoding import ATTENTION_MASK, FIRST_POSITION, INPUT_IDS, LOGITS, LOGITS_TO_KEEP
from dinoexport.spec import (
    Array,
    Arrays,
    Case,
    Dim,
    Graph,
    Picture,
    Precision,
    Progress,
    Runner,
    Tensor,
    Weight,
    Workload,
)

if TYPE_CHECKING:
    import torch

# RMSNormalization, RotaryEmbedding and Attention are operators since this opset.
_OPSET = 23
_TRACED = "dinoexport.models.llama.graph"
_DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}
# Precision -> bits of the stored weights of products.
_BITS = {Precision.INT8: 8, Precision.INT4: 4}
_WANTED_DIMS = ("batch", "length", "past")


class Llama:
    """The family `llama`."""

    def model(self, recipe: Recipe) -> LlamaModel:
        """The variant of a recipe; raises UsageError that names errors in `[model]` or `[graph]`."""
        arch = parse(Architecture, recipe.model, where=f"recipe {recipe.name}, [model]")
        choices = parse(GraphChoices, recipe.graph, where=f"recipe {recipe.name}, [graph]")
        if set(recipe.profile) != set(_WANTED_DIMS):
            raise UsageError(
                f"recipe {recipe.name}, [profile]: has {sorted(recipe.profile)}, needs {sorted(_WANTED_DIMS)}.",
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
        if recipe.precision in _BITS and (arch.dim % choices.block or arch.hidden_dim % choices.block):
            raise UsageError(
                f"recipe {recipe.name}, [graph]: block {choices.block} does not divide {arch.dim} and "
                f"{arch.hidden_dim}.",
                next_step="Choose a block that divides both.",
            )
        return LlamaModel(recipe=recipe, arch=arch, choices=choices)

    def table_schemas(self) -> Mapping[str, Any]:
        """JSON schemas of the recipe tables that are the family's own."""
        return {"model": Architecture.model_json_schema(), "graph": GraphChoices.model_json_schema()}

    def recipe_from(self, weights: Path, found: Shapes) -> Recipe | None:
        """See `described`."""
        return described.recipe_from(weights, found)

    def described(self, recipe: Recipe, weights: Path, found: Shapes) -> Description:
        """See `described`."""
        return described.described(recipe, weights, found)

    def assumed(self, recipe: Recipe) -> tuple[Fact, ...]:
        """See `described`."""
        return described.assumed(recipe)

    def split_axis(self, name: str) -> int | None:
        """See `layouts`."""
        return layouts.split_axis(name)


@dataclass(frozen=True, kw_only=True)
class LlamaModel:
    """One decoder; implements `dinoexport.family.Model`."""

    recipe: Recipe
    arch: Architecture
    choices: GraphChoices

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """One graph, `model`, with the names of Hugging Face's exporters."""
        dims = {name: self.recipe.profile[name].dim(name) for name in _WANTED_DIMS}
        length, past = dims["length"], dims["past"]
        total = Dim(
            name="total",
            min=1,
            opt=length.opt + past.opt,
            max=min(length.max + past.max, self.arch.context),
            sum_of=("past", "length"),
        )
        body = _DTYPES[self._body]
        heads, size = self.arch.kv_heads, self.arch.head_dim
        cache_in, cache_out = [], []
        for i in range(self.arch.layers):
            for kind in ("key", "value"):
                meaning = f"{kind}s of block {i}, heads in Hugging Face's order of rotated halves"
                before = ("batch", heads, "past", size)
                cache_in.append(Tensor(name=f"past_key_values.{i}.{kind}", dtype=body, shape=before, meaning=meaning))
                after = ("batch", heads, "total", size)
                cache_out.append(Tensor(name=f"present.{i}.{kind}", dtype=body, shape=after, meaning=meaning))
        inputs = (
            Tensor(name=INPUT_IDS, dtype="int64", shape=("batch", "length"), meaning="token ids"),
            Tensor(
                name=ATTENTION_MASK,
                dtype="int64",
                shape=("batch", "total"),
                meaning="1 for each token of the past and of input_ids, 0 for padding before a sequence",
            ),
            *cache_in,
            Tensor(
                name=LOGITS_TO_KEEP,
                dtype="int64",
                shape=(1,),
                meaning="logits of so many last tokens are wanted; 0 for all",
                default=0,
            ),
            Tensor(
                name=FIRST_POSITION,
                dtype="int64",
                shape=(1,),
                meaning="the position of each sequence's first token that is not padding",
                default=0,
            ),
        )
        logits = Tensor(
            name=LOGITS,
            dtype="float32",
            shape=("batch", "kept", self.arch.vocabulary),
            meaning="unnormalised log probabilities of the next token",
        )
        carried = {past.name: present.name for past, present in zip(cache_in, cache_out, strict=True)}
        return (
            Graph(
                name="model",
                inputs=inputs,
                outputs=(logits, *cache_out),
                dims=(*dims.values(), total),
                carried=carried,
            ),
        )

    @property
    def precision(self) -> Precision:
        """The precision of the graph."""
        return self.recipe.precision or Precision.FP32

    @property
    def _body(self) -> Precision:
        """The arithmetic of the graph's products."""
        return Precision(self.choices.body) if self.precision in _BITS else self.precision

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
        arch, body = self.arch, _DTYPES[self._body]
        residual = body if self.choices.residual == "fp16" else "float32"
        form = f"{body} with residual {residual}"
        batch, past, length = 2, 5, 3
        total = past + length
        pairs = Example(dtype="float32", shape=(batch, length, arch.head_dim // 2))
        cache = Example(dtype=body, shape=(batch, arch.kv_heads, past, arch.head_dim))
        stream = Example(dtype=residual, shape=(batch, length, arch.dim))
        by_token = {0: "batch", 1: "length"}
        stem = Piece(
            name=f"stem, {form}",
            code=f"{_TRACED}:Stem",
            arguments={
                "vocabulary": arch.vocabulary,
                "dim": arch.dim,
                "head_dim": arch.head_dim,
                "rope_theta": arch.rope_theta,
                "body": body,
                "residual": residual,
            },
            example_inputs={
                INPUT_IDS: Example(dtype="int64", shape=(batch, length)),
                ATTENTION_MASK: Example(dtype="int64", shape=(batch, total)),
                FIRST_POSITION: Example(dtype="int64", shape=(1,)),
            },
            dynamic={INPUT_IDS: by_token, ATTENTION_MASK: {0: "batch", 1: "total"}},
            opset=_OPSET,
        )
        block = Piece(
            name=f"block, {form}",
            code=f"{_TRACED}:Block",
            arguments={
                "dim": arch.dim,
                "kv_dim": arch.kv_dim,
                "head_dim": arch.head_dim,
                "hidden_dim": arch.hidden_dim,
                "norm_eps": arch.norm_eps,
                "body": body,
            },
            example_inputs={
                "stream": stream,
                "cosines": pairs,
                "sines": pairs,
                "mask": Example(dtype="bool", shape=(batch, 1, length, total)),
                "past_key": cache,
                "past_value": cache,
            },
            dynamic={
                "stream": by_token,
                "cosines": by_token,
                "sines": by_token,
                "mask": {0: "batch", 2: "length", 3: "total"},
                "past_key": {0: "batch", 2: "past"},
                "past_value": {0: "batch", 2: "past"},
            },
            opset=_OPSET,
        )
        head = Piece(
            name=f"head, {form}",
            code=f"{_TRACED}:Head",
            arguments={
                "dim": arch.dim,
                "vocabulary": arch.vocabulary,
                "norm_eps": arch.norm_eps,
                "body": body,
            },
            example_inputs={"stream": stream, LOGITS_TO_KEEP: Example(dtype="int64", shape=(1,))},
            dynamic={"stream": by_token},
            opset=_OPSET,
        )

        def sequence() -> Iterator[Call]:
            shared = ("cosines", "sines", "mask")
            value = "embedded"
            yield Call(
                piece=stem,
                scope="stem",
                inputs=(INPUT_IDS, ATTENTION_MASK, FIRST_POSITION),
                outputs=(value, *shared),
                weights={"table_VD": self._weight(read, "tok_embeddings.weight")},
            )
            for i in range(self.arch.layers):
                pasts = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
                presents = (f"present.{i}.key", f"present.{i}.value")
                yield Call(
                    piece=block,
                    scope=f"layers.{i}",
                    inputs=(value, *shared, *pasts),
                    outputs=(f"layers.{i}_stream", *presents),
                    weights=self._block_weights(read, i),
                )
                value = f"layers.{i}_stream"
            yield Call(
                piece=head,
                scope="head",
                inputs=(value, LOGITS_TO_KEEP),
                outputs=(LOGITS,),
                weights={
                    "norm_D": self._weight(read, "norm.weight"),
                    "output_IO": self._product(read, "output", self.arch.output_name),
                },
            )

        return tuple(sequence())

    def _block_weights(self, read: Read, i: int) -> dict[str, Weight]:
        def norm(name: str) -> Weight:
            return self._weight(read, f"layers.{i}.{name}.weight")

        def product(name: str, tensor: str, heads: int = 0) -> Weight:
            return self._product(read, name, f"layers.{i}.{tensor}.weight", heads)

        return {
            "attention_norm_D": norm("attention_norm"),
            "q_IO": product("q", "attention.wq", self.arch.heads),
            "k_IO": product("k", "attention.wk", self.arch.kv_heads),
            "v_IO": product("v", "attention.wv"),
            "out_IO": product("out", "attention.wo"),
            "ffn_norm_D": norm("ffn_norm"),
            "gate_IO": product("gate", "feed_forward.w1"),
            "up_IO": product("up", "feed_forward.w3"),
            "down_IO": product("down", "feed_forward.w2"),
        }

    def _weight(self, read: Read, name: str) -> Weight:
        """A tensor in the published layout."""
        return Weight(shape=self.tensors[name], read=lambda: read(name))

    def _product(self, read: Read, product: str, name: str, heads: int = 0) -> Weight:
        """A tensor in the layout of a product, (in, out); the rows of `heads` rotated heads are in halves."""

        def values() -> Array:
            array = read(name)
            transposed: Array = (layouts.halves(array, heads) if heads else array).T
            return transposed

        shape, bits = self.tensors[name][::-1], _BITS.get(self.precision, 0)
        if bits == 4 and product in self.choices.int8:
            bits = 8
        if not bits:
            return Weight(shape=shape, read=values)
        zero_points = bits == 4 and self.choices.zero_points
        return Weight(shape=shape, read=values, bits=bits, block=self.choices.block, zero_points=zero_points)

    @property
    def companion_files(self) -> Mapping[str, bytes]:
        """See `companions`."""
        return companions.files(self.arch)

    def engine_form(self) -> Mapping[str, Any]:
        """Weights of few bits are multiplied in fp16 there, and have no zero points: TensorRT takes none."""
        if self.precision not in _BITS:
            return self.recipe.graph
        return self.choices.changed(body="fp16", zero_points=False).model_dump(mode="json")

    @property
    def stored_bytes(self) -> int:
        """The bytes of the graph's weights in its file: a tied model holds the table twice."""
        body = 4 if self._body is Precision.FP32 else 2
        unread: dict[str, Array] = {}
        products = [self._product(unread.__getitem__, "output", self.arch.output_name)]
        for i in range(self.arch.layers):
            products += [
                weight for weight in self._block_weights(unread.__getitem__, i).values() if len(weight.shape) > 1
            ]
        norms = 4 * self.arch.dim * (2 * self.arch.layers + 1)
        return norms + body * self.arch.vocabulary * self.arch.dim + sum(_stored(weight, body) for weight in products)

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
        """The plain formulation, each prompt alone and without a cache; see `reference`."""
        from dinoexport.models.llama import answers

        for arrays in inputs:
            self._check(arrays)
        return answers.of(
            self.arch, read, inputs, dtype=_dtype(precision), progress=progress, label=str(precision), inside=inside
        )

    def upstream(self, read: Read, inputs: Sequence[Arrays], *, progress: Progress) -> list[dict[str, Array]]:
        """Meta's code cannot be downloaded by a program, so it is not supported here."""
        raise UsageError(
            "Meta's own code of this model cannot be downloaded by a program.",
            next_step="Leave out --judge hub: the plain formulation is pinned to numbers of Meta's code by the tests.",
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
        """Reads the prompts in chunks, padded on the left, and continues greedily for the requested number of steps."""
        import numpy as np

        self._check(inputs)
        tokens, keep, steps = inputs["tokens"], setting(inputs, "keep"), setting(inputs, "steps")
        batch, width = tokens.shape
        lengths = (tokens >= 0).sum(axis=1)
        ids, mask = decoding.padded([row[:n] for row, n in zip(tokens, lengths, strict=True)])
        first = setting(inputs, "first_position")
        decoder = decoding.begin(runners["model"], self.graphs[0])
        chunk = setting(inputs, "chunk") or width
        kept: list[Array] = []
        inside: dict[str, list[Array]] = {}
        for start in range(0, width, chunk):
            end = min(start + chunk, width)
            rows = end - max(start, width - keep)
            logits = decoder.rows(ids[:, start:end], mask[:, :end], keep=max(rows, 1), first_position=first)
            if rows > 0:
                kept.append(logits)
            for name, array in decoder.inside.items():
                inside.setdefault(name, []).append(array * mask[:, start:end, None].astype(array.dtype))
        logits = np.concatenate(kept, axis=1)
        answers = {LOGITS: logits} | {name: np.concatenate(parts, axis=1) for name, parts in inside.items()}
        if not steps:
            return answers
        seen, chosen = [logits[:, -1]], [logits[:, -1].argmax(axis=1)]
        for _ in range(steps - 1):
            mask = np.concatenate((mask, np.ones((batch, 1), np.int64)), axis=1)
            seen.append(decoder.rows(chosen[-1][:, None], mask, first_position=first)[:, 0])
            chosen.append(seen[-1].argmax(axis=1))
        return answers | {"rollout": np.stack(chosen, axis=1), "rollout_logits": np.stack(seen, axis=1)}

    def _check(self, inputs: Arrays) -> None:
        """Raises InputRefused for an empty prompt, ids outside the vocabulary, and more tokens than the context has."""
        tokens = inputs["tokens"]
        lengths = (tokens >= 0).sum(axis=1)
        if tokens.size == 0 or lengths.min() == 0:
            raise InputRefused("A prompt is empty.", next_step="Give at least one token.")
        if tokens.max() >= self.arch.vocabulary:
            raise InputRefused(
                f"Token id {tokens.max()} is outside the vocabulary of {self.arch.vocabulary}.",
                next_step="Use the tokenizer that belongs to the model.",
            )
        needed = int(lengths.max()) + setting(inputs, "steps") + setting(inputs, "first_position")
        if needed > self.arch.context:
            raise InputRefused(
                f"{needed} tokens are more than the context of {self.arch.context}.",
                next_step="Shorten the prompt or ask for fewer tokens.",
            )

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
        """Widths, depth, heads, vocabulary, base and context."""
        return {
            "width": self.arch.dim,
            "depth": self.arch.layers,
            "heads": self.arch.heads,
            "kv_heads": self.arch.kv_heads,
            "feed_forward": f"gated {self.arch.hidden_dim}",
            "vocabulary": self.arch.vocabulary,
            "rope_theta": f"{self.arch.rope_theta:g}",
            "context": self.arch.context,
        }

    @property
    def card(self) -> Mapping[str, str]:
        """The recipe's `[card]`."""
        own = {
            "intended_use": "yours to say: nothing beside the weights does",
            "limits": "yours to measure; what it writes may be wrong",
        }
        return {"model": f"{self.recipe.name}: a decoder of the Llama architecture", **(self.recipe.card or own)}


def _stored(weight: Weight, body: int) -> int:
    """Bytes of a product's weight, with its scales and zero points."""
    numbers = math.prod(weight.shape)
    if not weight.bits:
        return numbers * body
    blocks = numbers // weight.block
    return numbers * weight.bits // 8 + blocks * body + (blocks * weight.bits // 8 if weight.zero_points else 0)


def _dtype(precision: Precision) -> torch.dtype:
    """PyTorch's dtype; it has none for weights of fewer bits."""
    import torch

    dtypes = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
    if precision not in dtypes:
        raise UsageError(
            f"PyTorch has no {precision} of its own to compare with.",
            next_step=f"Leave times_own_error_max out of [limits.{precision}].",
        )
    return dtypes[precision]


FAMILY = Llama()

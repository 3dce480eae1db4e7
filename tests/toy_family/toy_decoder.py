"""A second family, a decoder of two graphs with a cache, and what it traces. The entry point beside it installs it.

A token's embedding joins the cache (B, T, D); the logits (B, V) are its mean through one matrix. `prefill` reads
a prompt, `step` adds a token to what `prefill` left. A case is a greedy roll-out of both.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from dinoexport.config.recipe import Recipe
from dinoexport.family import Call, Example, Piece
from dinoexport.spec import Case, Dim, Graph, Tensor, Weight, Workload

VOCABULARY, WIDTH, STEPS = 11, 8, 3
TOKENS = Tensor(name="token_ids", dtype="int64", shape=("batch", "length"), meaning="token numbers")
PAST = Tensor(name="past", dtype="float32", shape=("batch", "past_length", WIDTH), meaning="embeddings so far")
CACHE = Tensor(
    name="cache", dtype="float32", shape=("batch", "total_length", WIDTH), meaning="embeddings, new ones last"
)
LOGITS = Tensor(name="logits", dtype="float32", shape=("batch", VOCABULARY), meaning="unnormalised log probabilities")
DIMS = (Dim(name="batch", min=1, opt=1, max=4), Dim(name="length", min=1, opt=4, max=16))


@dataclass(frozen=True)
class Toy:
    recipe: Recipe
    graphs = (
        Graph(name="prefill", inputs=(TOKENS,), outputs=(CACHE, LOGITS), dims=DIMS),
        Graph(name="step", inputs=(TOKENS, PAST), outputs=(CACHE, LOGITS), dims=DIMS),
    )
    tensors = {"embedding": (VOCABULARY, WIDTH), "unembedding": (VOCABULARY, WIDTH)}  # noqa: RUF012
    optional_tensors = frozenset()
    promotable = ()
    uses = None
    text = None
    probes = {}  # noqa: RUF012
    facts = {"width": WIDTH}  # noqa: RUF012
    card = {"intended_use": "a test"}  # noqa: RUF012

    @property
    def workloads(self):
        inputs = {"prompt": np.arange(8).reshape(2, 4)}
        return (Workload(name="2 prompts", inputs=inputs, items=2 * (STEPS + 1), unit="tokens"),)

    def adapt(self, found, read):
        return found, read

    def synthetic(self, name, seed, *, peak=None):
        noise = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
        values = noise.standard_normal(self.tensors[name]).astype(np.float32)
        if peak is not None and name == "embedding":
            values[:, 0] = peak
        return values

    def calls(self, graph, read):
        examples = {
            "token_ids": Example(dtype="int64", shape=(2, 3)),
            "past": Example(dtype="float32", shape=(2, 5, WIDTH)),
        }
        names = tuple(tensor.name for tensor in graph.inputs)
        piece = Piece(
            name=graph.name,
            code="toy_graph:Decoder",
            arguments={"vocabulary": VOCABULARY, "width": WIDTH},
            example_inputs={name: examples[name] for name in names},
            dynamic={t.name: {i: d for i, d in enumerate(t.shape) if isinstance(d, str)} for t in graph.inputs},
        )
        weights = {
            "embedding_VD": Weight(shape=(VOCABULARY, WIDTH), read=lambda: read("embedding")),
            "unembedding_DV": Weight(shape=(WIDTH, VOCABULARY), read=lambda: read("unembedding").T),
        }
        return (Call(piece=piece, scope="decoder", inputs=names, outputs=("cache", "logits"), weights=weights),)

    head_weights = head_facts = None
    fits = {}  # noqa: RUF012

    def reference(self, read, inputs, *, precision, progress, inside=False):
        import torch

        embedding, unembedding = torch.from_numpy(read("embedding")), torch.from_numpy(read("unembedding"))
        answers = []
        for arrays in inputs:
            tokens, logits = torch.from_numpy(arrays["prompt"]), []
            for _ in range(1 + STEPS):  # the plain way: no cache, everything again
                logits.append(torch.nn.functional.linear(embedding[tokens].mean(dim=1), unembedding))
                tokens = torch.cat((tokens, logits[-1].argmax(dim=1, keepdim=True)), dim=1)
            answers.append({"logits": torch.stack(logits, dim=1).numpy()})
        return answers

    def promoted(self, parts):
        return self.recipe.graph

    def upstream(self, read, inputs, *, progress):
        raise NotImplementedError

    def case(self, table, folder):
        prompt = np.array(table["prompt"], np.int64)
        return Case(name=table["name"], why=table["why"], inputs={"prompt": prompt})

    def cases_from(self, folder, *, progress, only=None):
        return iter(())

    def pictures(self, case, reference, candidates):
        return ()

    def front_ends(self, samples, *, progress):
        return ()

    def prepare(self, front_end, settings, encoded):
        raise NotImplementedError

    def drive(self, runners, inputs):
        answer = runners["prefill"]({"token_ids": inputs["prompt"]})
        logits = [answer["logits"]]
        for _ in range(STEPS):
            token = logits[-1].argmax(axis=1, keepdims=True)
            answer = runners["step"]({"token_ids": token, "past": answer["cache"]})
            logits.append(answer["logits"])
        return {"logits": np.stack(logits, axis=1)}


class ToyFamily:
    def model(self, recipe):
        return Toy(recipe)

    def table_schemas(self):
        return {"model": {"type": "object"}, "graph": {"type": "object"}}


FAMILY = ToyFamily()

"""The Triton model of a bundle that generates text: text in, text out, in one response or in many."""

from __future__ import annotations

import dataclasses

from dinoexport import bundle
from dinoexport.bundle import Manifest
from dinoexport.errors import UsageError
from dinoexport.family import Servable
from dinoexport.runtime import runners, text_model
from dinoexport.serving.triton import text_signature as signature
from dinoexport.serving.triton.config import Entry, Word, parameter
from dinoexport.serving.triton.served_models import TritonModel, backend_code, config_text, identity, onnx_files
from dinoexport.serving.triton.signature import PARAMETER, Served


def tokenizer_of(manifest: Manifest, model: Servable) -> str | None:
    """The tokenizer of a bundle that generates text; None for a model of another kind.

    Raises UsageError for a decoder without a tokenizer: its graph alone would keep no cache between requests.
    """
    if model.text is None:
        return None
    found = text_model.tokenizer_file(manifest)
    if found is None:
        raise UsageError(
            "The bundle's graph is a decoder, and there is no tokenizer in it, so it cannot take text.",
            next_step="Build it again with the tokenizer's file beside the weights.",
        )
    return found


def of_bundle(manifest: Manifest, tokenizer: str, *, name: str, version: int) -> TritonModel:
    """The model with its graph, its tokenizer and the reference for `check`."""
    (facts,) = manifest.graphs
    served = Served(
        name=name,
        version=version,
        role="text",
        variant=manifest.variant,
        family=manifest.family,
        precision=manifest.precision,
        recipe=manifest.recipe,
        graph=facts,
        way=dataclasses.replace(runners.built_way(manifest), threads=0),
        tokenizer=tokenizer,
    )
    content = [
        *identity(name, version),
        Entry("backend", "python"),
        Entry("max_batch_size", 0, "the model puts answers together itself, token by token"),
        Entry("model_transaction_policy", (Entry("decoupled", True),), "an answer is several responses"),
        Entry("instance_group", (Entry("count", 1), Entry("kind", Word("KIND_CPU"))), "one: it batches by itself"),
        *(_value("input", name, value) for name, value in signature.INPUTS.items()),
        *(_value("output", name, value) for name, value in signature.OUTPUTS.items()),
        parameter(PARAMETER, served.model_dump_json(), "what clients check their requests by"),
    ]
    return TritonModel(
        name=name,
        config=config_text(served, content),
        files={**onnx_files(manifest, facts), tokenizer: tokenizer, bundle.REFERENCE: bundle.REFERENCE},
        code=backend_code("TextModel", "text_backend"),
    )


def _value(side: str, name: str, value: signature.Value) -> Entry:
    content = (
        Entry("name", name),
        Entry("data_type", Word(value.data_type)),
        Entry("dims", (-1 if value.many else 1,)),
        *([Entry("optional", True)] if side == "input" else []),
    )
    return Entry(side, content, value.meaning)

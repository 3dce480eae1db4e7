"""Open a bundle, or a server's copy of one, to generate text: the graph as a decoder, the tokenizer, the prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoexport import bundle, family
from dinoexport.bundle import Manifest
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.family import WeightLayout
from dinoexport.runtime import carried_memory, cpu, decoding, runners
from dinoexport.spec import Graph, Way
from dinoexport.system import changes
from dinoexport.text import tokenizer
from dinoexport.text.decoder import SteppedDecoder
from dinoexport.text.requests import OpenTextModel

# Multiplications per call: about a second on two cores, so that no request waits longer to join or leave.
_CALL_PRODUCTS = 2.25e11
_CHUNKS = (16, 512)


def tokenizer_file(manifest: Manifest) -> str | None:
    """The name of the bundle's tokenizer; None if it has none."""
    return next((file.name for file in manifest.files if file.name in tokenizer.FILES), None)


def open_bundle(folder: Path) -> OpenTextModel:
    """The bundle in `folder`, run as it was validated. Raises UsageError for one that does not generate text."""
    with changes.reading(folder):
        return _opened(folder, bundle.read_manifest(folder))


def _opened(folder: Path, manifest: Manifest) -> OpenTextModel:
    name = tokenizer_file(manifest)
    if name is None:
        raise UsageError(
            f"{folder} has no tokenizer, so it cannot take text.",
            next_step="Build it with the tokenizer's file beside the weights.",
        )
    (facts,) = manifest.graphs
    wanted = [file for file in manifest.files if file.name in (name, facts.file, f"{facts.file}.data")]
    seen = bundle.check_files(folder, wanted)
    bundle.check_graphs(folder, manifest)
    opened = open_served(
        folder / facts.file,
        folder / name,
        graph=facts.graph(),
        family_name=manifest.family,
        recipe=manifest.recipe,
        way=runners.built_way(manifest),
    )
    bundle.check_same(folder, seen)
    return opened


def open_served(
    onnx: Path, tokenizer_path: Path, *, graph: Graph, family_name: str, recipe: Mapping[str, Any], way: Way
) -> OpenTextModel:
    """Graph and tokenizer by their paths; `recipe` as the manifest or the served model has it."""
    model = family.find(family_name).model(parse(Recipe, recipe, where="the recipe"))
    if model.text is None:
        raise UsageError(f"A {family_name} does not generate text.", next_step="Use a bundle of a decoder.")
    found = tokenizer.load(tokenizer_path)
    carried = carried_memory.of(graph)
    assert carried is not None, "a decoder carries its cache"
    (opened,) = cpu.open_graphs({onnx: graph}, cpu.way_here(way)).values()
    decoder = SteppedDecoder(
        begin_steps=lambda: decoding.begin(opened, graph),
        vocabulary=vocabulary_of(graph),
        context=context_of(graph),
        token_bytes=carried.a_token,
        chunk=chunk_for(model, graph),
    )
    tokenizer.check_vocabulary(found, decoder.vocabulary)
    return OpenTextModel(tokenizer=found, decoder=decoder, prompts=model.text.prompts)


def context_of(graph: Graph) -> int:
    """The largest number of tokens that the graph takes, past and new together."""
    return next(dim.max for dim in graph.dims if dim.name == "total")


def vocabulary_of(graph: Graph) -> int:
    """The number of logits."""
    (logits,) = (tensor for tensor in graph.outputs if tensor.name == decoding.LOGITS)
    size = logits.shape[-1]
    assert isinstance(size, int)
    return size


def chunk_for(model: WeightLayout, graph: Graph) -> int:
    """How many tokens of a prompt are read in one call: a power of two, the same on every machine."""
    parameters = sum(math.prod(shape) for shape in model.tensors.values())
    least, most = _CHUNKS
    most = min(most, next(dim.max for dim in graph.dims if dim.name == "length"))
    return min(most, max(least, 1 << int(math.log2(max(1.0, _CALL_PRODUCTS / parameters)))))

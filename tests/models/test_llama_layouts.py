"""Checkpoints of Llama-type models in every layout they are published in: the same weights give the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoexport import family
from dinoexport.errors import WeightsError
from dinoexport.graph.onnx_writer import Traces, export
from dinoexport.models.llama import cases
from dinoexport.runtime import cpu, decoding, ort
from dinoexport.runtime.ort_decoder import OrtDecoder, with_shared_cache
from dinoexport.spec import Precision, Runtime, Way, silent
from dinoexport.validation.metrics import distance
from dinoexport.weights.checkpoint import open_checkpoint
from tests import llama_files
from tests.models.test_llama import model_of

SEED = 7
LAYOUTS: dict[str, Callable[[Path, Any], Path]] = {
    "meta": lambda folder, arch: llama_files.write_meta(folder, arch, SEED),
    "meta in two files": lambda folder, arch: llama_files.write_meta(folder, arch, SEED, shards=2),
    "hf": lambda folder, arch: llama_files.write_hf(folder, arch, SEED),
    "hf in three files": lambda folder, arch: llama_files.write_hf(folder, arch, SEED, shards=3),
    **{
        f"gguf {kind}": lambda folder, arch, kind=kind: llama_files.write_gguf(
            folder.with_suffix(".gguf"), arch, SEED, kind
        )
        for kind in ("F32", "F16", "BF16")
    },
}


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of("tiny_gqa")


@pytest.fixture(scope="module")
def digests_of(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], dict[str, str]]:
    traces: Traces = {}

    def of(read: Any) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("onnx")
        export(model.graphs[0], model.calls(model.graphs[0], read), folder, metadata={}, traces=traces)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

    return of


@pytest.fixture(scope="module")
def expected(model: Any, digests_of: Callable[[Any], dict[str, str]]) -> dict[str, str]:
    return digests_of(lambda name: model.synthetic(name, SEED))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bytes(
    layout: str,
    model: Any,
    expected: dict[str, str],
    digests_of: Callable[[Any], dict[str, str]],
    tmp_path: Path,
) -> None:
    source = LAYOUTS[layout](tmp_path / "weights", model.arch)
    checkpoint = open_checkpoint(model, model.recipe, str(source), progress=silent)
    assert digests_of(checkpoint.read) == expected


def test_a_second_copy_of_a_tied_table_is_left_out(tmp_path: Path) -> None:
    """Some files of tied models hold the table as the output matrix too, here in another shard."""
    model = model_of("tiny_gqa", tied=True)
    folder = llama_files.write_hf(tmp_path / "weights", model.arch, SEED, shards=3)
    last, index = folder / "model-00003-of-00003.safetensors", folder / "model.safetensors.index.json"
    table = load_file(folder / "model-00001-of-00003.safetensors")["model.embed_tokens.weight"]
    save_file({**load_file(last), "lm_head.weight": table}, last)
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = last.name
    index.write_text(json.dumps(listed))
    checkpoint = open_checkpoint(model, model.recipe, str(folder), progress=silent)
    assert "output.weight" not in model.tensors
    for name in model.tensors:
        assert np.array_equal(checkpoint.read(name), model.synthetic(name, SEED)), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_gguf_is_near(kind: str, model: Any, tmp_path: Path) -> None:
    """The file's own values, in the right places: a permuted row would be off by more than one."""
    source = llama_files.write_gguf(tmp_path / "weights.gguf", model.arch, SEED, kind)
    checkpoint = open_checkpoint(model, model.recipe, str(source), progress=silent)
    limit = 0.01 if kind == "Q8_0" else 0.15
    for name in model.tensors:
        values = model.synthetic(name, SEED)
        assert np.linalg.norm(checkpoint.read(name) - values) <= limit * np.linalg.norm(values), name


@pytest.fixture(scope="module")
def int4_traces() -> Traces:
    """Both kinds have the same pieces."""
    return {}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bits_of_a_gguf_are_kept(kind: str, int4_traces: Traces, tmp_path: Path) -> None:
    """The int4 file answers as PyTorch does with the GGUF file's own values, as far as fp32 goes."""
    model = model_of("tiny_gqa", precision=Precision.INT4)
    model = family.find("llama").model(model.recipe.changed(graph={"int8": []}))
    source = llama_files.write_gguf(tmp_path / "weights.gguf", model.arch, SEED, kind)
    read = open_checkpoint(model, model.recipe, str(source), progress=silent).read
    graph = model.graphs[0]
    export(graph, model.calls(graph, read), tmp_path, metadata={}, traces=int4_traces)
    inputs = cases.inputs_of(cases.synthetic.prompt(model.arch.vocabulary, 40, SEED)[None], keep=40)
    (reference,) = model.reference(read, [inputs], precision=Precision.FP32, progress=silent)
    for logits in answers_in_fp32(tmp_path / "model.onnx", graph, inputs["tokens"]):
        assert distance(logits, reference["logits"]).relative_l2 <= 1e-5


def test_products_with_weights_of_different_bits_are_not_joined(int4_traces: Traces, tmp_path: Path) -> None:
    """Values and down projections are in eight bits: queries and keys become one product, gate and up another."""
    model = model_of("tiny_gqa", precision=Precision.INT4)
    (graph,) = model.graphs
    calls = model.calls(graph, lambda name: model.synthetic(name, SEED))
    export(graph, calls, tmp_path, metadata={}, traces=int4_traces)
    tokens = cases.synthetic.prompt(model.arch.vocabulary, 40, SEED)[None]
    in_file, joined = answers_in_fp32(tmp_path / "model.onnx", graph, tokens)
    assert distance(joined, in_file).relative_l2 <= 1e-5
    shared = with_shared_cache(tmp_path / "model.onnx", graph)
    assert shared is not None
    operators = operators_of(shared.model)
    assert operators["DequantizeLinear"] == 5 * model.arch.layers + 1
    assert operators["SkipSimplifiedLayerNormalization"] == 2 * model.arch.layers - 1


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.FP32])
def test_attention_rotates_heads_of_sixteen(precision: Precision, tmp_path: Path) -> None:
    """Unequal prompts, a step and more tokens. In int4 it takes queries, keys and values as one product has them."""
    model = model_of("tiny", precision=precision, layers=2)
    model = family.find("llama").model(model.recipe.changed(graph={"int8": []}))
    (graph,) = model.graphs
    export(graph, model.calls(graph, lambda name: model.synthetic(name, SEED)), tmp_path, metadata={}, traces={})
    shared = with_shared_cache(tmp_path / "model.onnx", graph)
    assert shared is not None and shared.tables is not None
    operators = operators_of(shared.model)
    assert operators["RotaryEmbedding"] == 0 and operators["GroupQueryAttention"] == model.arch.layers
    assert operators["Split"] == (model.arch.layers if precision is Precision.INT4 else 0), "of gate and up"
    ids, mask = decoding.padded([cases.synthetic.prompt(320, n, SEED, n) for n in (40, 4, 33)])
    in_file, opened = decoders_in_fp32(tmp_path / "model.onnx", graph)
    for began, upto in ((0, 30), (30, 31), (31, 40)):
        given = ids[:, began:upto], mask[:, :upto]
        ours, theirs = (each.rows(*given, keep=0, first_position=5000) for each in (opened, in_file))
        wanted = mask[:, began:upto] == 1
        assert np.allclose(ours[wanted], theirs[wanted], atol=1e-5), upto


def test_heads_that_the_operator_refuses_are_run_as_they_are(tmp_path: Path) -> None:
    """ONNX Runtime's own attention takes heads whose width is a multiple of eight; these are twelve wide."""
    model = model_of("tiny", dim=48, layers=1)
    (graph,) = model.graphs
    read = lambda name: model.synthetic(name, SEED)  # noqa: E731
    export(graph, model.calls(graph, read), tmp_path, metadata={}, traces={})
    way = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32, threads=1)
    decoder = cpu.open_decoder(tmp_path / "model.onnx", graph, way)
    inputs = cases.inputs_of(cases.synthetic.prompt(320, 9, SEED)[None], keep=4)
    (reference,) = model.reference(read, [inputs], precision=Precision.FP32, progress=silent)
    found = decoder.rows(inputs["tokens"], np.ones((1, 9), np.int64), keep=4)
    assert distance(found, reference["logits"]).relative_l2 <= 1e-5


def answers_in_fp32(path: Path, graph: Any, tokens: Any) -> Iterator[Any]:
    """Logits of the decoders in fp32, of which the second one has fewer products."""
    shared = with_shared_cache(path, graph)
    assert shared is not None
    assert operators_of(shared.model)["MatMul"] < operators_of(path.read_bytes())["MatMul"]
    for decoder in decoders_in_fp32(path, graph):
        yield decoder.rows(tokens, np.ones(tokens.shape, np.int64), keep=tokens.shape[1])


def decoders_in_fp32(path: Path, graph: Any) -> tuple[decoding.Decoder, decoding.Decoder]:
    """The file, and what is made of it when it is opened; optimised, both would round activations of few bits."""
    shared = with_shared_cache(path, graph)
    assert shared is not None
    in_file = decoding.ArrayDecoder(
        ort._runner(ort._session(path, optimised=False), graph, [tensor.name for tensor in graph.outputs]), graph
    )
    tables = shared.tables and ort._session(path, model=shared.tables)
    return in_file, OrtDecoder(ort._session(path, model=shared.model, optimised=False), graph, tables)


def operators_of(model: Any) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.ModelProto.FromString(model).graph.node)


def open_folder(model: Any, folder: Path) -> Any:
    return open_checkpoint(model, model.recipe, str(folder), progress=silent)


def test_a_missing_shard_is_named(model: Any, tmp_path: Path) -> None:
    folder = llama_files.write_meta(tmp_path, model.arch, SEED, shards=2)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(WeightsError, match="mis-shaped"):
        open_folder(model, folder)


def test_a_doubled_shard_is_refused(model: Any, tmp_path: Path) -> None:
    folder = llama_files.write_meta(tmp_path, model.arch, SEED, shards=2)
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    with pytest.raises(WeightsError, match="same file twice"):
        open_folder(model, folder)


def test_shards_that_do_not_add_up_are_refused(model: Any, tmp_path: Path) -> None:
    folder = llama_files.write_meta(tmp_path, model.arch, SEED, shards=2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    shard["norm.weight"] = shard["norm.weight"] + 1
    torch.save(shard, folder / "consolidated.01.pth")
    with pytest.raises(WeightsError, match=r"different copies of norm\.weight"):
        open_folder(model, folder).read("norm.weight")


def test_rounded_frequencies_are_ignored(model: Any, tmp_path: Path) -> None:
    """The files hold `rope.freqs` of another base; no tensor of the model is made of it."""
    folder = llama_files.write_meta(tmp_path, model.arch, SEED)
    read = open_folder(model, folder).read
    assert all(np.array_equal(read(name), model.synthetic(name, SEED)) for name in model.tensors)


def test_a_folder_with_gguf_files_names_one(model: Any, tmp_path: Path) -> None:
    source = llama_files.write_gguf(tmp_path / "weights.gguf", model.arch, SEED, "F16")
    with pytest.raises(WeightsError, match="a GGUF file is a whole checkpoint") as refused:
        open_folder(model, tmp_path)
    assert str(source) in refused.value.next_step


def test_a_damaged_gguf_is_refused(model: Any, tmp_path: Path) -> None:
    source = llama_files.write_gguf(tmp_path / "weights.gguf", model.arch, SEED, "F16")
    source.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="damaged"):
        open_folder(model, source)

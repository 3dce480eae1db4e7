"""Llama-type decoders against numbers nobody here made: Meta's Code Llama code's, and Hugging Face's implementation's.

`data/goldens/codellama/*.npz` hold what Meta's own code (fp32, PyTorch, CPU) answers on the checkpoints that
`models/llama/synthetic.py` makes, seed 7. Keys are CASE/ARRAY; `columns` are the vocabulary's entries that are kept.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport import family
from dinoexport.config.recipe import Recipe
from dinoexport.errors import InputRefused, UsageError
from dinoexport.graph import traces
from dinoexport.graph.onnx_writer import export, traced
from dinoexport.models.llama import cases
from dinoexport.models.llama.config import Architecture
from dinoexport.runtime import cpu, decoding, openvino, openvino_decoder, ort, ort_decoder, telemetry
from dinoexport.spec import Graph, Precision, Runner, Runtime, Way, silent
from dinoexport.validation.metrics import distance
from tests import conformance, llama_files
from tests.conftest import DATA

# What `make .interop/.ready` installs.
OPTIMUM = Path(__file__).parents[2] / ".interop" / "optimum"
SEED = 7
LIMIT = 1e-5
CONFIGS = {
    "tiny": {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 4, "hidden_dim": 192, "vocabulary": 320},
    "tiny_gqa": {"dim": 64, "layers": 3, "heads": 8, "kv_heads": 2, "hidden_dim": 224, "vocabulary": 320},
    "small": {"dim": 256, "layers": 4, "heads": 8, "kv_heads": 8, "hidden_dim": 768, "vocabulary": 32016},
}
CONFIGS["tiny_theta1e4"] = CONFIGS["tiny"] | {"rope_theta": 1e4}
# Nothing a golden has: three heads of one size shared by six, another base and epsilon, another feed-forward.
CONFIGS["other"] = CONFIGS["tiny"] | {
    "dim": 96,
    "heads": 6,
    "kv_heads": 3,
    "hidden_dim": 100,
    "rope_theta": 5e5,
    "norm_eps": 3e-6,
}
CASES = ("1x1", "1x7", "1x64", "1x300", "3x7", "3x5-12-9", "1x40+24", "1x64@20000", "1x64@99936")
ORT = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32, threads=1)
OPENVINO = Way(runtime=Runtime.OPENVINO, precision=Precision.FP32, threads=1)


def model_of(name: str, *, precision: Precision | None = None, **changes: Any) -> Any:
    """The model of a configuration, with other dimensions where they are given."""
    arch = {"norm_eps": 1e-5, "rope_theta": 1e6, "context": 100_000, **CONFIGS[name], **changes}
    profile = {
        "batch": {"min": 1, "opt": 1, "max": 4},
        "length": {"min": 1, "opt": 1, "max": min(4096, arch["context"])},
        "past": {"min": 0, "opt": min(256, arch["context"] // 2), "max": arch["context"] - 1},
    }
    table = {"name": name, "family": "llama", "validation": "x", "model": arch, "profile": profile}
    table |= {"quantised": "weights"}
    return family.find("llama").model(Recipe.model_validate(table | {"precision": precision}))


def reader(model: Any, seed: int = SEED) -> Any:
    return lambda name: model.synthetic(name, seed)


def write(model: Any, folder: Path, seed: int = SEED) -> Path:
    """The model's ONNX file."""
    calls = model.calls(model.graphs[0], reader(model, seed))
    export(model.graphs[0], calls, folder, metadata={}, trace=functools.partial(traced, trace=traces.of))
    return folder / "model.onnx"


class Golden:
    """One file of official answers: what was asked, and how to compare with it."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / "goldens" / "codellama" / f"{name}-seed{SEED}.npz") as stored:
            self.arrays = {key: stored[key] for key in stored.files}

    def inputs(self, case: str) -> dict[str, Any]:
        logits = self.arrays.get(f"{case}/logits")
        return cases.inputs_of(
            self.arrays[f"{case}/tokens"],
            keep=1 if logits is None else logits.shape[1],
            chunk=40 if "+" in case else 0,
            steps=17 if f"{case}/generated" in self.arrays else 0,
            first_position=int(self.arrays[f"{case}/positions"][0]) if "@" in case else 0,
        )

    def check(self, case: str, answers: dict[str, Any]) -> None:
        """Logits of the prompt and of each greedy step to 1e-5, and every id the same."""
        columns = self.arrays["columns"]
        for ours, theirs in (("logits", "logits"), ("rollout_logits", "generated_logits")):
            if f"{case}/{theirs}" in self.arrays:
                far = distance(answers[ours][..., columns], self.arrays[f"{case}/{theirs}"])
                assert far.relative_l2 <= LIMIT, (case, ours, far)
        if f"{case}/generated" in self.arrays:
            assert np.array_equal(answers["rollout"], self.arrays[f"{case}/generated"]), case


@pytest.mark.parametrize("name", ["tiny", "tiny_gqa", "tiny_theta1e4", "small"])
def test_reference_is_meta_s(name: str) -> None:
    model, golden = model_of(name), Golden(name)
    answers = model.reference(
        reader(model), [golden.inputs(case) for case in CASES], precision=Precision.FP32, progress=silent
    )
    for case, answer in zip(CASES, answers, strict=True):
        golden.check(case, answer)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The ONNX file of a configuration, traced when it is first asked for."""
    return functools.cache(lambda name: write(model_of(name), tmp_path_factory.mktemp(name)))


def as_in_the_file(path: Path, graph: Graph) -> Runner:
    """The file's own operators in ONNX Runtime, as other people's tools run it: no cache is kept in place."""
    return ort.open_edited(path.read_bytes(), path, graph, more_outputs=())


@pytest.mark.parametrize("name", ["tiny", "tiny_gqa"])
def test_file_is_meta_s_as_it_is(name: str, exported: Callable[[str], Path]) -> None:
    model, golden = model_of(name), Golden(name)
    opened = {model.graphs[0].name: as_in_the_file(exported(name), model.graphs[0])}
    for case in CASES:
        golden.check(case, model.drive(opened, golden.inputs(case)))


@pytest.mark.parametrize("way", [ORT, OPENVINO], ids=lambda way: way.runtime)
@pytest.mark.parametrize("name", ["tiny", "tiny_gqa", "tiny_theta1e4", "small"])
def test_exported_file_is_meta_s(name: str, way: Way, exported: Callable[[str], Path]) -> None:
    model, golden = model_of(name), Golden(name)
    opened = cpu.open_graphs({exported(name): model.graphs[0]}, way)
    for case in CASES:
        golden.check(case, model.drive(opened, golden.inputs(case)))


def test_openvino_reads_one_mask_of_numbers(exported: Callable[[str], Path]) -> None:
    """A mask of truth values is converted in every block, one value at a time: five sixths of a prompt's time."""
    graph = model_of("tiny_gqa").graphs[0]
    model = telemetry.openvino().Core().read_model(exported("tiny_gqa"))
    openvino_decoder.make_stateful(model, graph)
    attentions = [o for o in model.get_ops() if o.get_type_name() == "ScaledDotProductAttention"]
    assert len(attentions) == CONFIGS["tiny_gqa"]["layers"]
    assert {str(o.get_input_element_type(3)) for o in attentions} == {"<Type: 'float32'>"}
    assert len({o.input_value(3).get_node().get_friendly_name() for o in attentions}) == 1


def test_around_narrow_weights_a_decoder_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 there missed the limits of a real model, on CPUs that have it."""
    monkeypatch.setattr(openvino, "computes", lambda _: True)
    narrow = (Precision.INT8, Precision.INT4)
    assert [openvino.rest(precision, carried=True) for precision in narrow] == [Precision.FP32] * 2
    assert [openvino.rest(precision, carried=False) for precision in narrow] == [Precision.BF16] * 2
    assert openvino.rest(Precision.BF16, carried=True) is None
    monkeypatch.setattr(openvino, "computes", lambda _: False)
    assert openvino.rest(Precision.INT8, carried=False) is Precision.FP32


def test_a_cache_of_20000_tokens(exported: Callable[[str], Path]) -> None:
    """ONNX Runtime reads the whole prompt. OpenVINO, 17 times slower at heads of 16, continues from the last chunk."""
    model, golden = model_of("tiny"), Golden("tiny-cache20000")
    ids = cases.synthetic.prompt(320, 20000, SEED)[None].astype(np.int64)
    ids = np.concatenate((ids, golden.arrays["1x20000/generated"]), axis=1)
    mask, last = np.ones_like(ids), 19_900
    ours, other = (
        decoding.begin(cpu.open_graphs({exported("tiny"): model.graphs[0]}, way)["model"], model.graphs[0])
        for way in (ORT, OPENVINO)
    )
    for start in range(0, last, 995):
        ours.rows(ids[:, start : start + 995], mask[:, : start + 995])
    other.resume({name: array.copy() for name, array in ours.carried().items()})
    for decoder in (ours, other):
        logits = [decoder.rows(ids[:, last:20_000], mask[:, :20_000])[:, 0]]
        logits += [decoder.rows(ids[:, at : at + 1], mask[:, : at + 1])[:, 0] for at in range(20_000, 20_016)]
        answers = {"rollout_logits": np.stack(logits, axis=1), "rollout": np.stack(logits, axis=1).argmax(axis=2)}
        assert np.array_equal(answers["rollout"], golden.arrays["1x20000/generated"])
        far = distance(answers["rollout_logits"], golden.arrays["1x20000/generated_logits"])
        assert far.relative_l2 <= LIMIT


def test_traced_modules_are_meta_s() -> None:
    model, golden = model_of("tiny_gqa"), Golden("tiny_gqa")
    chosen = ("1x40+24", "3x5-12-9", "1x64@99936")
    inputs = [golden.inputs(case) for case in chosen]
    for case, answer in zip(chosen, conformance.eagerly(model, reader(model), inputs), strict=True):
        golden.check(case, answer)


def test_conforms(tmp_path: Path) -> None:
    model = model_of("other", context=64, layers=2)
    tables: list[dict[str, Any]] = [
        {"name": "batch", "why": "unequal prompts, in chunks, continued", "prompts": [5, 12, 9], "keep": 4, "steps": 3}
        | {"chunk": 5},
        {"name": "one", "why": "one token", "prompts": [1]},
    ]
    conformance.check(model, [model.case(table, tmp_path) for table in tables], tmp_path, seed=11)


def transformers_model(model: Any, seed: int) -> Any:
    """Hugging Face's LlamaForCausalLM with the same weights."""
    import transformers

    config = transformers.LlamaConfig(**llama_files.hf_config(model.arch) | {"torch_dtype": "float32"})
    theirs = transformers.LlamaForCausalLM(config).eval()
    named = llama_files.hf_names(model.arch, seed)
    theirs.load_state_dict({name: tensor.float() for name, tensor in named.items()}, strict=not model.arch.tied)
    return theirs


@pytest.mark.parametrize("changes", [{}, {"tied": True}], ids=["untied", "tied"])
def test_transformers_agrees(changes: dict[str, Any], tmp_path: Path) -> None:
    """The second oracle, on a configuration no golden has: whole, in chunks, padded on the left, and step by step."""
    model = model_of("other", **changes)
    theirs = transformers_model(model, 3)
    tokens = cases.batch_of([cases.synthetic.prompt(320, n, 3, row).tolist() for row, n in enumerate((40, 23))])
    inputs = cases.inputs_of(tokens, keep=20, chunk=17, steps=6)
    opened = cpu.open_graphs({write(model, tmp_path, 3): model.graphs[0]}, ORT)
    answers = model.drive(opened, inputs)
    # The shorter prompt by itself, with the batch's width: where chunks begin depends on the prompt.
    alone = model.drive(opened, {name: array[1:] for name, array in inputs.items()})
    assert distance(alone["logits"][0], answers["logits"][1]).relative_l2 <= LIMIT
    assert alone["rollout"][0].tolist() == answers["rollout"][1].tolist()
    for row in range(2):
        ids = torch.from_numpy(tokens[row][tokens[row] >= 0])[None]
        with torch.inference_mode():
            logits = theirs(ids).logits[0, -20:].numpy()
            generated = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=-1
            )
        assert distance(answers["logits"][row], logits).relative_l2 <= LIMIT
        assert answers["rollout"][row].tolist() == generated[0, ids.shape[1] :].tolist()


def test_optimum_writes_the_same_tokens(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """Their ORTModelForCausalLM on our file and the config.json beside it: prompts of unequal length, padded."""
    if not OPTIMUM.is_dir():
        pytest.skip("no optimum here: make .interop/.ready installs it")
    model, path = model_of("tiny_gqa"), exported("tiny_gqa")
    for name, content in model.companion_files.items():
        (path.parent / name).write_bytes(content)
    prompts = [cases.synthetic.prompt(320, n, 3, n) for n in (9, 4)]
    ids, mask = decoding.padded(prompts)
    (tmp_path / "in.json").write_text(json.dumps({"ids": ids.tolist(), "mask": mask.tolist(), "steps": 7}))
    ran = subprocess.run(
        [sys.executable, str(DATA.parent / "interop" / "ort_decoder.py"), str(path.parent), str(tmp_path / "in.json")],
        env={**os.environ, "PYTHONPATH": str(OPTIMUM), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    wanted = model.drive(
        cpu.open_graphs({path: model.graphs[0]}, ORT),
        cases.inputs_of(cases.batch_of([prompt.tolist() for prompt in prompts]), steps=7),
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == wanted["rollout"].tolist()


@pytest.mark.parametrize("way", [ORT, OPENVINO], ids=lambda way: way.runtime)
def test_decoder_continues_resets_and_reorders(way: Way, exported: Callable[[str], Path]) -> None:
    model = model_of("tiny_gqa")
    graph = model.graphs[0]
    decoder = cpu.open_decoder(exported("tiny_gqa"), graph, way)
    plain = decoding.ArrayDecoder(as_in_the_file(exported("tiny_gqa"), graph), graph)
    ids, mask = decoding.padded([cases.synthetic.prompt(320, n, SEED, n) for n in (9, 4, 6)])
    one = np.ones((3, 1), np.int64)
    for _ in range(2):
        for each in (decoder, plain):
            each.reset()
        assert np.allclose(decoder.step(ids, mask), plain.step(ids, mask), atol=1e-5)
        for each in (decoder, plain):
            each.reorder([2, 0, 0])
        later = np.concatenate((mask[[2, 0, 0]], one), axis=1)
        token = ids[[2, 0, 1], :1]
        ours, theirs = decoder.step(token, later), plain.step(token, later)
        assert np.allclose(ours, theirs, atol=1e-5)
        assert decoder.past_tokens == ids.shape[1] + 1
    alone = cpu.open_decoder(exported("tiny_gqa"), graph, way)
    alone.step(ids[2:, 3:], mask[2:, 3:])
    assert np.allclose(alone.step(token[:1], later[:1, 3:]), ours[:1], atol=1e-5)


@pytest.mark.parametrize("name", ["tiny_gqa", "other"])
def test_cache_in_place_is_the_file_s(name: str, exported: Callable[[str], Path]) -> None:
    """Unequal prompts, chunks on a filled cache, more tokens than there is room for, other sequences, one call."""
    (graph,) = model_of(name).graphs
    opened = cpu.open_graphs({exported(name): graph}, ORT)[graph.name]
    plain = decoding.ArrayDecoder(as_in_the_file(exported(name), graph), graph)
    decoder = decoding.begin(opened, graph)
    assert isinstance(decoder, ort_decoder.OrtDecoder)
    ids, mask = decoding.padded([cases.synthetic.prompt(320, n, SEED, n) for n in (290, 4, 201)])
    began = 0
    for upto, keep in ((95, 8), (105, 2), (106, 1), (289, 0), (290, 1)):
        given = ids[:, began:upto], mask[:, :upto]
        ours, theirs = (each.rows(*given, keep=keep, first_position=9) for each in (decoder, plain))
        assert ours.shape == theirs.shape
        wanted = mask[:, upto - keep if keep else began : upto] == 1  # not padding
        assert np.allclose(ours[wanted], theirs[wanted], atol=2e-5), upto
        began = upto
    for value, array in plain.carried().items():
        for row, padding in enumerate((mask == 0).sum(axis=1)):  # whose entries nothing reads
            ours, theirs = (each[row, :, padding:] for each in (decoder.carried()[value], array))
            assert np.allclose(ours, theirs, atol=1e-5), value
    two = {value: array[1:, :, 80:] for value, array in plain.carried().items()}
    arrays = decoding.inputs_of(ids[1:, :1], np.concatenate((mask[1:, 80:], mask[1:, -1:]), axis=1), 1) | two
    ours, theirs = opened(arrays), as_in_the_file(exported(name), graph)(arrays)
    assert ours.keys() == theirs.keys()
    for value, array in theirs.items():
        assert np.allclose(ours[value], array, atol=1e-5), value
    decoder.resume(two)
    for first in (5, 70_000):  # of the same sequences, whose buffers stay
        plain.resume({value: array[:, :, : decoder.past_tokens] for value, array in decoder.carried().items()})
        mask = np.ones((2, decoder.past_tokens + 1), np.int64)
        ours, theirs = (each.rows(ids[1:, :1], mask, first_position=first) for each in (decoder, plain))
        assert np.allclose(ours, theirs, atol=2e-5), first


@pytest.mark.parametrize("way", [ORT, OPENVINO], ids=lambda way: way.runtime)
def test_each_step_has_arrays_of_its_own(way: Way, exported: Callable[[str], Path]) -> None:
    """Later steps change neither the logits of earlier ones nor a caller's inputs, which he may write over."""
    graph = model_of("tiny_gqa").graphs[0]
    decoder, fresh = (cpu.open_decoder(exported("tiny_gqa"), graph, way) for _ in range(2))
    token, mask = np.array([[7]]), np.ones((1, 3), np.int64)
    first = decoder.step(token, mask[:, :1])
    kept = first.copy()
    token[:] = 9
    second = decoder.step(token, mask[:, :2])
    token[:] = 11
    third = decoder.step(token, mask)
    assert np.array_equal(first, kept) and not np.array_equal(first, second)
    for wanted, ids in ((first, [7]), (second, [7, 9]), (third, [7, 9, 11])):
        fresh.reset()
        assert np.allclose(fresh.step(np.array([ids]), mask[:, : len(ids)]), wanted, atol=1e-5), ids


@pytest.mark.parametrize("way", [ORT, OPENVINO], ids=lambda way: way.runtime)
def test_decoder_refuses_what_does_not_continue(way: Way, exported: Callable[[str], Path]) -> None:
    model = model_of("tiny_gqa")
    decoder = cpu.open_decoder(exported("tiny_gqa"), model.graphs[0], way)
    ids, mask = decoding.padded([np.arange(4)] * 2)
    decoder.step(ids, mask)
    with pytest.raises(InputRefused, match="covers 4 tokens"):
        decoder.step(ids[:, :1], mask)
    with pytest.raises(InputRefused, match="holds 2 sequences"):
        decoder.step(ids[:1, :1], np.ones((1, 5), np.int64))
    with pytest.raises(InputRefused, match="int64"):
        decoder.step(ids[:, :1].astype(np.int32), np.ones((2, 5), np.int64))


@pytest.mark.parametrize(
    ("tokens", "steps", "problem"),
    [([[]], 0, "empty"), ([[1, 2], []], 0, "empty"), ([[320]], 0, "vocabulary"), ([[1] * 60], 5, "context")],
)
def test_prompts_that_are_refused(tokens: list[list[int]], steps: int, problem: str) -> None:
    model = model_of("tiny", context=64)
    with pytest.raises(InputRefused, match=problem):
        model.drive({}, cases.inputs_of(cases.batch_of(tokens), steps=steps))


def test_recipes_that_are_refused() -> None:
    with pytest.raises(UsageError, match="kv_heads 3 does not divide"):
        model_of("tiny", kv_heads=3)
    with pytest.raises(UsageError, match="has no pairs"):
        model_of("tiny", dim=20, heads=4)


def test_arch_of_the_published_sizes() -> None:
    """Parameter counts that reproduce the sizes Meta publishes."""
    seven = Architecture(
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        hidden_dim=11008,
        vocabulary=32016,
        norm_eps=1e-5,
        rope_theta=1e6,
        context=16384,
    )
    assert sum(int(np.prod(shape)) for shape in seven.tensors.values()) == 6_738_546_688

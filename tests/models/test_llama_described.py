"""Recipes made from the files of a Llama-type model, and files held against a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport import family
from dinoexport.config import recipe as recipes
from dinoexport.config.recipe import Recipe
from dinoexport.errors import DinoexportError, UsageError, WeightsError
from dinoexport.models.llama import beside, described
from dinoexport.models.llama.prompts import MARKERS
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import silent
from dinoexport.weights import gguf_file
from dinoexport.weights.checkpoint import open_checkpoint
from dinoexport.weights.settle import Settled, settle
from tests import llama_files
from tests.models.test_llama import model_of

SEED = 5
ARCH = model_of("other", context=700).arch
META: dict[str, Any] = {"context": 2048}


def settled(weights: Path, recipe: Recipe | None = None) -> Settled:
    return settle(recipe, str(weights), prefix=None, progress=silent)


def own_recipe(**changes: Any) -> Recipe:
    return model_of("other", **{"context": 700} | changes).recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    return {
        "meta": llama_files.write_meta(place / "meta", ARCH, SEED),
        "meta in two files": llama_files.write_meta(place / "meta2", ARCH, SEED, shards=2),
        "hf": llama_files.write_hf(place / "hf", ARCH, SEED, shards=2),
        "gguf": llama_files.write_gguf(place / "own.gguf", ARCH, SEED, "F16"),
    }


@pytest.fixture
def edited(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a folder whose configuration has other keys; None takes one away."""

    def edit(layout: str, **changes: Any) -> Path:
        folder = tmp_path / "own"
        folder.mkdir()
        for file in folders[layout].iterdir():
            (folder / file.name).symlink_to(file)
        path = folder / {"hf": "config.json"}.get(layout, "params.json")
        content = json.loads(path.read_text()) | changes
        path.unlink()
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return folder

    return edit


@pytest.mark.parametrize("layout", ["meta", "meta in two files", "hf", "gguf"])
def test_the_files_make_the_recipe(layout: str, folders: dict[str, Path]) -> None:
    found = settled(folders[layout])
    wanted = ARCH.model_dump(exclude={"text", "published_contexts"}) | (META if "meta" in layout else {})
    assert {key: value for key, value in found.recipe.model.items() if key != "tied"} | {"tied": False} == wanted
    assert found.made and found.recipe.licence == "yours" and found.recipe.family == "llama"
    assert list(found.assumed) == (["model.context"] if "meta" in layout else [])


@pytest.mark.parametrize(("context", "likely"), [(2, 1), (700, 350), (4096, 1024)])
def test_a_made_recipe_takes_every_length_up_to_the_context(
    context: int, likely: int, edited: Callable[..., Path]
) -> None:
    recipe = settled(edited("hf", max_position_embeddings=context)).recipe
    ranges = {name: (size.min, size.opt, size.max) for name, size in recipe.profile.items()}
    assert ranges == {
        "batch": (1, 1, 4), "length": (1, 1, min(context, 2048)), "past": (0, likely, context - 1),
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["meta", "hf", "gguf"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 1e6), ("norm_eps", 1e-5), ("heads", 12), ("kv_heads", 6), ("vocabulary", 336), ("context", 800)],
)
def test_a_recipe_that_disagrees_is_refused_with_both_values(
    key: str, value: Any, layout: str, folders: dict[str, Path]
) -> None:
    if (key, layout) == ("context", "meta"):
        pytest.skip("params.json says no context")
    with pytest.raises(UsageError, match=rf"the recipe says model\.{key} = ") as refused:
        settled(folders[layout], own_recipe(**{key: value}))
    theirs = getattr(ARCH, key)
    assert str(value) in refused.value.message and str(theirs) in refused.value.message


def test_a_published_context_is_no_disagreement(edited: Callable[..., Path]) -> None:
    folder = edited("hf", max_position_embeddings=512)
    with pytest.raises(UsageError, match=r"model\.context"):
        settled(folder, own_recipe())
    assert settled(folder, own_recipe(published_contexts=(512,))).recipe.model["context"] == 700


def test_both_spellings_of_the_base(edited: Callable[..., Path]) -> None:
    new = edited("hf", rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert settled(new).recipe.model["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("layout", "changes", "problem"),
    [
        (
            "hf",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            "rope_theta says model.rope_theta = 500000.* rope_parameters.rope_theta says 10000",
        ),
        ("hf", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear': positions that are scaled"),
        ("hf", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}, "'llama3'"),
        ("hf", {"hidden_act": "gelu"}, "another activation than silu"),
        ("hf", {"attention_bias": True}, "biases"),
        ("hf", {"head_dim": 32}, "head_dim is 32"),
        ("hf", {"vocab_size": -1}, "vocab_size is -1, which makes no sense"),
        ("hf", {"num_attention_heads": "six"}, "'six', which makes no sense"),
        ("hf", {"model_type": "mistral"}, "no installed family"),
        ("meta", {"qk_norm": True}, "qk_norm is not known"),
        ("meta", {"use_scaled_rope": True}, "positions that are scaled"),
        ("meta", {"multiple_of": 0}, "multiple_of is 0"),
        ("meta", {"n_heads": None}, "how many heads"),
        ("meta", {"dim": 48}, "a file is missing"),
        ("meta", {"vocab_size": 32000}, r"vocab_size says model.vocabulary = 32000, the weights say 320"),
    ],
)
def test_files_that_are_refused(
    layout: str, changes: dict[str, Any], problem: str, edited: Callable[..., Path]
) -> None:
    with pytest.raises(DinoexportError, match=problem):
        settled(edited(layout, **changes))


def test_scaled_positions_of_a_gguf_are_refused(tmp_path: Path) -> None:
    """As Llama 3.1 has them: a factor for each frequency, in a tensor."""
    factors = {"rope_freqs.weight": np.ones(ARCH.head_dim // 2, np.float32)}
    path = llama_files.write_gguf(tmp_path / "own.gguf", ARCH, SEED, "F16", more=factors)
    for recipe in (None, own_recipe()):
        with pytest.raises(UsageError, match="scales its positions"):
            settled(path, recipe)


@pytest.mark.parametrize(
    ("kind", "output_kind", "graph"),
    [("Q4_1", "", {"int8": ()}), ("Q4_0", "Q8_0", {"int8": ("output",)}), ("Q8_0", "", {}), ("F16", "", {})],
)
def test_an_int4_graph_keeps_the_four_bits_of_a_gguf(
    kind: str, output_kind: str, graph: dict[str, Any], tmp_path: Path
) -> None:
    arch = model_of("tiny_gqa").arch
    path = llama_files.write_gguf(tmp_path / "own.gguf", arch, SEED, kind, output_kind=output_kind)
    assert {key: tuple(value) for key, value in settled(path).recipe.graph.items()} == graph


def test_another_kind_of_model_is_named(edited: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="of the kind 'mistral'"):
        settled(edited("hf", model_type="mistral"), own_recipe())


def test_a_vocabulary_of_minus_one_is_the_embedding_s(edited: Callable[..., Path]) -> None:
    """As Llama 2's params.json have it: the tokenizer was to fill it in."""
    assert settled(edited("meta", vocab_size=-1)).recipe.model["vocabulary"] == ARCH.vocabulary


@pytest.mark.parametrize(
    ("params", "hidden"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
        ({"dim": 96, "multiple_of": 1}, 256),
        ({"dim": 96}, None),
        ({"multiple_of": 256}, None),
    ],
    ids=["Llama 2 7B", "Llama 2 70B", "no rounding", "no multiple", "no width"],
)
def test_the_feed_forward_is_as_wide_as_params_say(
    params: dict[str, Any], hidden: int | None, edited: Callable[..., Path]
) -> None:
    """The published widths are those of the weights."""
    folder = edited("meta", **dict.fromkeys(("dim", "multiple_of", "ffn_dim_multiplier")) | params)
    assert {fact.key: fact.value for fact in beside.facts(folder)}.get("model.hidden_dim") == hidden


def test_what_the_tensors_show_where_the_files_are_silent(edited: Callable[..., Path]) -> None:
    silent_keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    found = settled(edited("hf", **dict.fromkeys(silent_keys))).recipe.model
    shown = ("layers", "dim", "hidden_dim", "vocabulary")
    assert {key: found[key] for key in shown} == {key: getattr(ARCH, key) for key in shown}


def test_heads_of_keys_where_the_files_are_silent(
    folders: dict[str, Path], edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as of queries by the authors' code; in a GGUF as many as the tensors have."""
    for layout, key in (("hf", "num_key_value_heads"), ("meta", "n_kv_heads")):
        folder = edited(layout, **{key: None})
        assert {fact.key: fact.value for fact in beside.facts(folder)}["model.kv_heads"] == ARCH.heads == 6
        shutil.rmtree(folder)
    content = gguf_file.metadata(folders["gguf"])
    del content["llama.attention.head_count_kv"]
    monkeypatch.setattr(gguf_file, "metadata", lambda _path: content)
    assert settled(folders["gguf"]).recipe.model["kv_heads"] == ARCH.kv_heads == 3


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_no_heads_are_named_where_none_are(layout: str, edited: Callable[..., Path]) -> None:
    names = {"hf": ("num_attention_heads", "num_key_value_heads"), "meta": ("n_heads", "n_kv_heads")}[layout]
    facts = beside.facts(edited(layout, **dict.fromkeys(names)))
    assert facts and not any(fact.key.endswith("heads") for fact in facts)


def test_values_that_no_model_has(edited: Callable[..., Path]) -> None:
    for value in (0, -1e-5, float("inf")):
        folder = edited("hf", rms_norm_eps=value)
        with pytest.raises(UsageError, match="rms_norm_eps"):
            beside.facts(folder)
        shutil.rmtree(folder)


def test_a_head_of_the_size_that_it_has_anyway(
    folders: dict[str, Path], edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the width is not given; a GGUF's heads may not say how many numbers are turned."""
    for hidden_size in (96, None):
        folder = edited("hf", head_dim=16, hidden_size=hidden_size)
        assert beside.facts(folder)
        shutil.rmtree(folder)
    content = gguf_file.metadata(folders["gguf"])
    monkeypatch.setattr(gguf_file, "metadata", lambda _path: content)
    for turned in (16, None):
        content["llama.rope.dimension_count"] = turned
        assert beside.facts(folders["gguf"])
    content["llama.rope.dimension_count"] = 8
    with pytest.raises(UsageError, match=r"rope\.dimension_count is 8: heads of which only a part is rotated"):
        beside.facts(folders["gguf"])


@pytest.mark.parametrize(("layout", "key"), [("hf", "attention_bias"), ("hf", "mlp_bias"), ("meta", "use_scaled_rope")])
def test_what_is_switched_on_is_said(layout: str, key: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=rf"json: {key} is True: "):
        beside.facts(edited(layout, **{key: True}))


def test_what_a_silent_params_json_means(edited: Callable[..., Path]) -> None:
    found = settled(edited("meta", rope_theta=None, norm_eps=None))
    assumed = {"rope_theta": 1e4, "norm_eps": 1e-5, "context": 2048}
    assert {key: found.recipe.model[key] for key in assumed} == assumed
    assert set(found.assumed) == {f"model.{key}" for key in assumed}


def test_the_width_that_tensors_and_files_must_agree_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """Half of attention.wq is in the file that is there."""
    for name in ("params.json", "consolidated.00.pth"):
        (tmp_path / name).symlink_to(folders["meta in two files"] / name)
    with pytest.raises(UsageError) as caught:
        settled(tmp_path)
    assert caught.value.message == (
        f"The weights at {tmp_path} hold 4,608 numbers of attention.wq where a width of 96 has 9,216: "
        "a file is missing, or heads are not 96 wide together."
    )


@pytest.mark.parametrize(
    ("content", "hints"),
    [
        ({}, {"bos": None, "eos": None, "infill": None, "template": ""}),
        ({"bos_token_id": 0, "eos_token_id": 1}, {"bos": None, "eos": None, "infill": None, "template": ""}),
        (
            {"tokens": ["a", "b", "c"], "bos_token_id": 0, "eos_token_id": 2},
            {"bos": "a", "eos": "c", "infill": False, "template": ""},
        ),
        (
            {"tokens": ["a", "b"], "bos_token_id": -1, "eos_token_id": 2, "chat_template": "t"},
            {"bos": None, "eos": None, "infill": False, "template": "t"},
        ),
        (
            {"tokens": [*MARKERS[:4]], "bos_token_id": "1", "add_bos_token": True},
            {"bos": None, "eos": None, "infill": True, "template": ""},
        ),
        (
            {"tokens": [*MARKERS[:3]], "bos_token_id": 1, "add_bos_token": False},
            {"bos": "", "eos": None, "infill": False, "template": ""},
        ),
    ],
)
def test_hints_of_a_gguf_file(content: dict[str, Any], hints: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    named = {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in content.items()}
    monkeypatch.setattr(described.gguf_file, "metadata", lambda _path: named)
    assert described._gguf_hints(Path("w.gguf")) == hints


def test_what_a_silent_file_means_is_an_assumption(edited: Callable[..., Path]) -> None:
    found = settled(edited("hf", rope_theta=None, rms_norm_eps=None, max_position_embeddings=None))
    assumed = {"rope_theta": 1e4, "norm_eps": 1e-6, "context": 2048}
    assert {key: found.recipe.model[key] for key in assumed} == assumed
    assert set(found.assumed) == {f"model.{key}" for key in assumed}


@pytest.mark.parametrize(("theta", "context"), [(1e6, 16384), (999_999.0, 2048)])
def test_a_base_of_a_million_is_code_llama_s(theta: float, context: int, edited: Callable[..., Path]) -> None:
    """Which was trained on 16384 tokens; params.json says no context."""
    assert settled(edited("meta", rope_theta=theta)).recipe.model["context"] == context


def test_a_missing_shard_stops_it(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("params.json", "consolidated.00.pth"):
        (tmp_path / name).symlink_to(folders["meta in two files"] / name)
    with pytest.raises(UsageError, match="a file is missing"):
        settled(tmp_path)


@pytest.mark.parametrize("indexed", [True, False], ids=["by the index", "by its name"])
def test_a_missing_part_is_named(indexed: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["hf"].iterdir():
        if file.name != "model-00001-of-00002.safetensors" and (indexed or not file.name.endswith(".index.json")):
            # With an index, whatever the part is called.
            name = "model-b.safetensors" if indexed and file.suffix == ".safetensors" else file.name
            (tmp_path / name).symlink_to(file)
    if indexed:
        index = tmp_path / "model.safetensors.index.json"
        content = (
            index.read_text().replace("model-00001-of-00002", "model-a").replace("model-00002-of-00002", "model-b")
        )
        index.unlink()
        index.write_text(content)
    for recipe in (None, own_recipe()):
        with pytest.raises(WeightsError, match="model-a" if indexed else "lacks model-00001-of-00002"):
            settled(tmp_path, recipe)
    if indexed:  # an index that makes no sense stops nothing by itself
        index.write_text('{"weight_map": [3]}')
        with pytest.raises(UsageError, match="no installed family"):
            settled(tmp_path)


def test_a_doubled_part_stops_the_plan(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, source in (("params.json",) * 2, *((f"consolidated.0{i}.pth", "consolidated.00.pth") for i in range(2))):
        (tmp_path / name).symlink_to(folders["meta in two files"] / source)
    with pytest.raises(WeightsError, match="the same file twice"):
        settled(tmp_path)


def test_prompts_by_the_tokenizer_s_configuration(edited: Callable[..., Path]) -> None:
    folder = edited("hf")
    template = "{{ '<|im_start|>' + message['role'] }}"
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert settled(folder).recipe.model["text"] == {"bos": "", "eos": "<|im_end|>", "chat": "chatml"}
    pieces = [f"<{i}>" for i in range(ARCH.vocabulary - 4)] + list(MARKERS[:4])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False, "ignore_merges": False}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token + '[INST] ' }}"}))
    assert settled(folder).recipe.model["text"] == {"infill": True, "chat": "instruct"}


def test_a_build_without_a_variant(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every case fits the model's context of 700 tokens."""
    request = pipeline.build_request(None, weights=str(folders["hf"]), target="cpu", out=tmp_path / "x")
    lengths = {case.name: (case.inputs["tokens"] >= 0).sum(axis=1).tolist() for case in request.cases}
    assert lengths == {
        "prompt": [96],
        "long": [700],
        "batch": [5, 31, 17],
        "one_token": [1],
        "far": [24],
        "past_the_context": [8],
    }
    assert request.cases[4].inputs["first_position"][0] == 676
    assert [case.name for case in request.cases if case.expect_refusal] == ["past_the_context"]


@pytest.mark.parametrize("name", [name for name in recipes.variants() if recipes.load(name).family == "llama"])
def test_published_configurations_fit_their_recipes(name: str, tmp_path: Path) -> None:
    """config.json as it is published, read beside a recipe, says nothing that the recipe does not."""
    from dinoexport.models.llama import beside
    from dinoexport.models.llama.config import Architecture

    recipe = recipes.load(name)
    arch = Architecture.model_validate(recipe.model)
    card = family.find("llama").model(recipe).card
    assert {"intended_use", "limits", "risks"} <= card.keys()
    if not recipe.weights:
        assert "use_policy" in card and "Meta Platforms" in card["notice"] and "accept" in recipe.obtain
        with pytest.raises(WeightsError, match="names no published weights") as refused:
            open_checkpoint(family.find("llama").model(recipe), recipe, None, progress=silent)
        assert recipe.obtain in refused.value.next_step
    for context in (arch.context, *arch.published_contexts):
        config = llama_files.hf_config(arch) | {"max_position_embeddings": context, "pretraining_tp": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        said = {fact.key.removeprefix("model."): fact.value for fact in beside.facts(tmp_path)}
        assert all(getattr(arch, key) == value for key, value in said.items() if key != "context")

"""Recipes, targets and validations: what is shipped parses, and what is wrong is refused by name."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport import family
from dinoexport.cli.catalogue import recipe_schema
from dinoexport.config import recipe, resources
from dinoexport.config.limits import Validation, load_validation
from dinoexport.config.recipe import Recipe, load, parse, read_toml
from dinoexport.config.target import Target, load_target
from dinoexport.errors import UsageError
from dinoexport.spec import Precision
from tests.conftest import DATA
from tests.properties import examples

VARIANTS = (
    *("vits14", "vitb14", "vitl14", "vitg14", "vits14_reg", "vitb14_reg", "vitl14_reg", "vitg14_reg"),
    *(f"depth-anything-v2-{size}" for size in ("vits", "vitb", "vitl")),
    *(
        f"depth-anything-v2-metric-{place}-{size}"
        for place in ("hypersim", "vkitti")
        for size in ("vits", "vitb", "vitl")
    ),
)
SHA256 = "0123456789abcdef" * 4


@functools.cache
def printed_schema() -> Any:
    """The validator of `dinoexport schema`, whose own schema is held to its draft."""
    import jsonschema  # takes 4 s, with its parsers of formats: not paid by each worker that collects this file

    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def vits14() -> dict[str, Any]:
    return recipe._with_base(read_toml(resources.folder("recipes") / "vits14.toml"))


def with_change(path: str, value: Any) -> dict[str, Any]:
    """The table of vits14 with `value` at the dotted `path`."""
    table = copy.deepcopy(vits14())
    *outer, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner: Any = table
    for part in outer:
        inner = inner[part]
    inner[last] = value
    return table


def refused(table: dict[str, Any]) -> str:
    """Why the recipe, or the family that reads its tables, refuses `table`."""
    with pytest.raises(UsageError) as caught:
        parsed = parse(Recipe, table, where="mine.toml")
        family.find(parsed.family).model(parsed)
    assert caught.value.next_step
    return caught.value.message


def test_the_variants_are_the_published_ones() -> None:
    by_family: dict[str, set[str]] = {}
    for name in recipe.variants():
        by_family.setdefault(load(name).family, set()).add(name)
    assert by_family["dinov2"] == set(VARIANTS)
    sizes, kinds = ("7b", "13b", "34b"), ("", "-python", "-instruct")
    assert by_family["llama"] == {"smollm2-135m", *(f"codellama-{size}{kind}" for size in sizes for kind in kinds)}


@pytest.mark.parametrize("variant", recipe.variants())
def test_a_shipped_recipe_parses_and_fits_the_printed_schema(variant: str) -> None:
    loaded = load(variant)
    assert loaded.name == variant
    assert family.find(loaded.family).model(loaded).graphs
    printed_schema().validate(read_toml(resources.folder("recipes") / f"{variant}.toml"))


@pytest.mark.parametrize("path", sorted(DATA.glob("*.toml")), ids=lambda path: path.stem)
def test_the_tests_own_files_parse(path: Path) -> None:
    if path.stem.endswith("cases"):
        load_validation(path.stem, beside=DATA)
    else:
        printed_schema().validate(read_toml(path))
        assert load(str(path)).name == path.stem


def test_every_shipped_target_parses() -> None:
    names = resources.names("recipes/targets")
    assert "cpu" in names
    for name in names:
        assert load_target(name).name == name


def test_every_shipped_validation_parses_with_its_cases() -> None:
    names = resources.names("validate")
    assert "dinov2" in names
    for name in names:
        validation, folder = load_validation(name, beside=None)
        assert folder == resources.folder("validate")
        assert set(validation.limits) >= set(Precision) - {Precision.INT4}
        (asked,) = {load(v).family for v in recipe.variants() if load(v).validation == name}
        model = next(family.find(asked).model(load(v)) for v in recipe.variants() if load(v).validation == name)
        cases = [model.case(table, folder) for table in validation.cases]
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("familly", "family"),
        ("licens", "licence"),
        ("profil", "profile"),
        ("model.embed_dims", "embed_dim"),
        ("model.num_head", "num_heads"),
        ("graph.last_block", "last_blocks"),
        ("graph.residuals", "residual"),
        ("profile.height.maxi", "max"),
        ("profile.batch.optt", "opt"),
        ("weights.0.sha265", "sha256"),
    ],
)
def test_an_unknown_key_is_refused_by_name_with_the_one_that_was_meant(path: str, meant: str) -> None:
    table = with_change(path, 3)
    message = refused(table)
    key = path.removeprefix("model.").removeprefix("graph.")
    assert f"unknown key {key!r}" in message
    assert f"Did you mean {meant!r}?" in message
    assert not printed_schema().is_valid(table)


def test_a_key_of_another_level_is_no_suggestion() -> None:
    """`min` belongs to a range: at the top nobody may be told that they meant `min`."""
    message = refused(with_change("min", 3))
    assert "unknown key 'min'" in message
    assert "Did you mean 'min'" not in message


def test_an_unknown_dimension_is_named() -> None:
    message = refused(with_change("profile.heigth", {"min": 14, "opt": 14, "max": 14}))
    assert "heigth" in message


def test_every_wrong_key_is_named_not_only_the_first() -> None:
    table = vits14() | {"familly": 1, "nmae": 2}
    table["profile"]["width"]["maks"] = 3
    del table["name"]
    message = refused(table)
    for key in ("'familly'", "'nmae'", "'profile.width.maks'", "key 'name' is missing"):
        assert key in message
    table = with_change("model.hedas", 1)
    table["model"]["dept"] = 2
    message = refused(table)
    assert "'hedas'" in message
    assert "'dept'" in message


def test_a_misspelt_name_gets_the_one_that_was_meant() -> None:
    with pytest.raises(UsageError, match="Did you mean 'vits14'"):
        load("vits41")
    with pytest.raises(UsageError, match="Did you mean 'vitg14_reg'"):
        load("ViTG14-reg")
    with pytest.raises(UsageError, match="Did you mean 'cpu'"):
        load_target("cpuu")
    with pytest.raises(UsageError, match="Did you mean 'dinov2'"):
        load_validation("dino2", beside=None)
    assert "Did you mean 'dinov2'" in refused(with_change("family", "dino2"))
    assert "Did you mean 'fp16'" in refused(with_change("precision", "f16"))
    assert "Did you mean 'swiglu'" in refused(with_change("model.feed_forward", "swigl"))


def test_a_precision_that_is_a_key_gets_the_one_that_was_meant() -> None:
    table = {"name": "box", "description": "a box", "runtime": "onnxruntime", "precisions": {"fp3": "why not"}}
    with pytest.raises(UsageError, match=r"'precisions\.fp3'.*Did you mean 'fp32'"):
        parse(Target, table, where="box.toml")


@pytest.mark.parametrize("name", ["../vits14", "/etc/x", "a/b", "..", ".hidden", "", "Upper", "a b", "x\n", "x" * 65])
def test_a_name_with_path_parts_is_refused(name: str) -> None:
    for key in ("name", "family", "validation"):
        assert f"'{key}'" in refused(with_change(key, name))
    with pytest.raises(UsageError):
        load(name)
    with pytest.raises(UsageError):
        load_target(name)


@pytest.mark.parametrize(
    ("path", "value", "because"),
    [
        ("profile.height", {"min": 28, "opt": 14, "max": 1022}, "min <= opt <= max"),
        ("profile.height", {"min": 14, "opt": 1036, "max": 1022}, "min <= opt <= max"),
        ("profile.batch", {"min": 4, "opt": 4, "max": 2}, "min <= opt <= max"),
        ("profile.batch", {"min": 0, "opt": 1, "max": 2}, "'profile.batch.min'"),
        ("profile.batch", {"min": -1, "opt": 1, "max": 2}, "'profile.batch.min'"),
        ("profile.batch", {"min": 1, "opt": 1.5, "max": 2}, "'profile.batch.opt'"),
        ("profile.batch", {"min": 1, "opt": 1}, "key 'profile.batch.max' is missing"),
        ("profile.batch", 3, "'profile.batch'"),
        (
            "profile.height",
            {"min": 15, "opt": 28, "max": 1022},
            "height 15..1022 must begin and end at multiples of 14",
        ),
        ("profile.width", {"min": 14, "opt": 28, "max": 1000}, "width 14..1000 must begin and end at multiples of 14"),
        ("profile", {"batch": {"min": 1, "opt": 1, "max": 2}}, "needs ['batch', 'height', 'width']"),
        ("graph.blocks", [12], "there is no [12]"),
        ("graph.blocks", [3, -1], "there is no [-1]"),
        ("graph.last_blocks", 13, "there is no 13"),
        ("graph.last_blocks", -1, "'last_blocks'"),
        ("graph.sizes", "stretch", "'sizes'"),
        ("model.num_heads", 7, "num_heads 7 does not divide embed_dim 384"),
        ("model.depth", 0, "'depth'"),
        ("model", 3, "'model'"),
        ("weights", [{"url": "file:///etc/passwd", "sha256": SHA256}], "'weights.0.url'"),
        ("weights", [{"url": "https://x.org/w.pth", "sha256": SHA256.upper()}], "'weights.0.sha256'"),
        ("weights", [{"url": "https://x.org/w.pth", "sha256": SHA256, "size_bytes": 0}], "'weights.0.size_bytes'"),
    ],
)
def test_the_impossible_is_refused(path: str, value: Any, because: str) -> None:
    assert because in refused(with_change(path, value))


def test_last_blocks_may_be_all_blocks() -> None:
    parsed = parse(Recipe, with_change("graph.last_blocks", 12), where="mine.toml")
    outputs = family.find("dinov2").model(parsed).graphs[0].outputs
    assert [t.name for t in outputs if t.name.endswith("class_token")] == [
        *(f"block_{i}_class_token" for i in range(12)),
        "class_token",
    ]


def test_blocks_and_last_blocks_together_are_refused() -> None:
    table = with_change("graph.blocks", [3])
    table["graph"]["last_blocks"] = 2
    assert "not both" in refused(table)


def test_a_recipe_may_start_from_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "vits14"\nname = "mine"\n[graph]\nlast_blocks = 4\n[profile]\nheight = { max = 518 }\n')
    mine, base = load(str(path)), load("vits14")
    assert (mine.name, mine.graph["last_blocks"]) == ("mine", 4)
    assert mine.graph["sizes"] == base.graph["sizes"]
    assert mine.profile["height"] == base.profile["height"].model_copy(update={"max": 518})
    assert (mine.profile["width"], mine.model, mine.weights) == (base.profile["width"], base.model, base.weights)


def test_base_alone_is_that_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "vitb14_reg"\n')
    assert load(str(path)) == load("vitb14_reg")
    printed_schema().validate(read_toml(path))


def test_a_partial_table_on_a_base_fits_the_schema_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "vits14"\n[model]\ndepth = 6\n[profile.height]\nmax = 518\n')
    assert load(str(path)).profile["height"].max == 518
    printed_schema().validate(read_toml(path))


@pytest.mark.parametrize("base", ['"vits41"', '"../vits14"', "5", "[]"])
def test_an_unknown_base_is_refused(tmp_path: Path, base: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"base = {base}\n")
    with pytest.raises(UsageError, match="no variant"):
        load(str(path))


def test_a_wrong_key_in_a_recipe_with_a_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "vits14"\npresicion = "fp16"\n')
    with pytest.raises(UsageError, match=r"mine\.toml: unknown key 'presicion'.*'precision'"):
        load(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"name = ",
        b'name = "a"\nname = "b"\n',
        b'name = "\xff\xfe"\n',
        b"\x00\x01\x02",
        b"a = " + b"[" * 50_000,  # deeper than the parser's stack
        b"a = " + b"9" * 5_000,  # more digits than Python turns into a number
    ],
    ids=["no value", "twice the same", "not UTF-8", "binary", "deep", "long number"],
)
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine\.toml is not valid TOML") as caught:
        load(str(path))
    assert caught.value.next_step


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    for name in ("missing.toml", "folder.toml"):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            load(str(tmp_path / name))
        assert name in caught.value.message


def test_an_empty_recipe_names_all_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("")
    with pytest.raises(UsageError) as caught:
        load(str(path))
    for key in ("name", "family", "validation", "model", "profile"):
        assert f"key {key!r} is missing" in caught.value.message


def test_a_users_validation_goes_before_the_shipped_one(tmp_path: Path) -> None:
    content = (resources.folder("validate") / "dinov2.toml").read_text()
    (tmp_path / "dinov2.toml").write_text(content.replace("value = 0.01,", "value = 0.02,"))
    mine, folder = load_validation("dinov2", beside=tmp_path)
    assert folder == tmp_path
    assert mine.limits[Precision.FP16].relative_l2_max.value == 0.02
    _, folder = load_validation("dinov2", beside=tmp_path / "elsewhere")
    assert folder == resources.folder("validate")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_a_limit_must_be_a_number_that_can_be_missed(value: Any) -> None:
    table = read_toml(resources.folder("validate") / "dinov2.toml")
    table["limits"]["fp16"]["relative_l2_max"]["value"] = value
    with pytest.raises(UsageError, match=r"limits\.fp16\.relative_l2_max\.value"):
        parse(Validation, table, where="mine.toml")


def test_a_limit_needs_its_reason_and_a_validation_its_cases() -> None:
    table = read_toml(resources.folder("validate") / "dinov2.toml")
    table["limits"]["fp16"]["times_own_error_max"] = {"value": 2.0, "reason": "because", "resaon": "x"}
    table["cases"] = []
    with pytest.raises(UsageError) as caught:
        parse(Validation, table, where="mine.toml")
    assert "unknown key 'limits.fp16.times_own_error_max.resaon'. Did you mean 'reason'?" in caught.value.message
    assert "'limits.fp16.times_own_error_max.reason'" in caught.value.message
    assert "'cases'" in caught.value.message


names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ranges = st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(
    lambda ends: dict(zip(("min", "opt", "max"), sorted(ends), strict=True))
)
addresses = st.builds(
    "https://{}/{}".format,
    st.text(st.characters(codec="utf-8", exclude_characters="/@"), min_size=1),
    st.text(st.characters(codec="utf-8", exclude_characters="\n")),
)
weight_files = st.fixed_dictionaries(
    {"url": addresses, "sha256": st.from_regex(r"[0-9a-f]{64}", fullmatch=True)},
    optional={"size_bytes": st.integers(1, 10**13)},
)
tables = st.fixed_dictionaries(
    {
        "name": names,
        "family": names,
        "validation": names,
        "model": st.dictionaries(st.text(), json_values, max_size=4),
        "profile": st.dictionaries(st.text(), ranges, max_size=3),
    },
    optional={
        "precision": st.sampled_from(["fp32", "fp16", "bf16", "int8"]),
        "licence": st.text(),
        "graph": st.dictionaries(st.text(), json_values, max_size=4),
        "weights": st.lists(weight_files, max_size=2),
    },
)


@given(tables)
def test_a_recipe_survives_the_manifest(table: dict[str, Any]) -> None:
    """What a manifest stores of a recipe is the recipe."""
    original = parse(Recipe, table, where="generated")
    stored = json.loads(json.dumps(original.model_dump(mode="json")))
    assert parse(Recipe, stored, where="stored") == original


@examples(50)
@given(tables, st.text(min_size=1))
def test_no_unknown_key_passes(table: dict[str, Any], key: str) -> None:
    if key in Recipe.model_fields:
        return
    with pytest.raises(UsageError, match="unknown key"):
        parse(Recipe, table | {key: 1}, where="generated")


@pytest.mark.parametrize("name", recipe.variants())
def test_a_variants_file_repeats_nothing_of_its_base(name: str) -> None:
    table = recipe.read_toml(resources.folder("recipes") / f"{name}.toml")
    if (base := table.pop("base", None)) is None:
        return
    shared = recipe.read_toml(resources.folder("recipes/bases") / f"{base}.toml")

    def repeated(own: dict[str, Any], of_base: dict[str, Any]) -> list[str]:
        found = []
        for key in own.keys() & of_base.keys():
            if isinstance(own[key], dict) and isinstance(of_base[key], dict):
                found += repeated(own[key], of_base[key])
            elif own[key] == of_base[key]:
                found.append(key)
        return found

    assert not repeated(table, shared)
    assert set(table) | set(shared) >= {"name", "family", "validation", "licence", "model"}


def test_a_recipe_of_ones_own_may_start_from_a_familys_base(tmp_path: Path) -> None:
    """Without one of the published variants' weights: only what the family shares is taken over."""
    own = tmp_path / "own.toml"
    model = "embed_dim = 128\ndepth = 2\nnum_heads = 2\nfeed_forward = 'mlp'\nregister_count = 0"
    own.write_text(f"base = 'dinov2'\nname = 'own'\n[model]\n{model}\n")
    loaded = recipe.load(str(own))
    assert not loaded.weights and loaded.profile == recipe.load("vits14").profile
    own.write_text("base = 'vits14'\nname = 'own'\n")
    assert recipe.load(str(own)).weights == recipe.load("vits14").weights
    own.write_text("base = 'bases/dinov2'\nname = 'own'\n")
    with pytest.raises(UsageError, match="no variant 'bases/dinov2'"):
        recipe.load(str(own))


def test_of_many_wrong_keys_the_first_are_named() -> None:
    """Twenty thousand took more than a minute, and as many words."""
    table = {"name": "x", "family": "dinov2", "validation": "x", **{f"t{i}": {} for i in range(20_000)}}
    with pytest.raises(UsageError) as raised:
        parse(Recipe, table, where="x.toml")
    said = str(raised.value)
    assert "unknown key 't3'" in said and said.endswith(" more") and len(said) < 600

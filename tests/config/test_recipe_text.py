"""A recipe written as TOML and read again is the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dinoexport.config import recipe as recipes
from dinoexport.errors import UsageError
from dinoexport.models.dinov2.config import Architecture, GraphChoices
from dinoexport.spec import Dim


@pytest.mark.parametrize("name", recipes.variants())
def test_written_and_read_again(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    (tmp_path / "own.toml").write_text(recipes.to_toml(recipe))
    assert recipes.load(str(tmp_path / "own.toml")) == recipe


def test_defaults_are_not_written_and_every_table_has_its_head() -> None:
    text = recipes.to_toml(recipes.load("vits14"))
    assert text.endswith("\n") and not text.endswith("\n\n") and "\n\n[model]\n" in text
    assert all(" = " in line or line.startswith("[") for line in text.splitlines() if line), text


def test_profiles_are_tables_of_their_own_and_ranges_are_not() -> None:
    lines = recipes.to_toml(recipes.load("vits14")).splitlines()
    assert "[profile]" in lines and "[profile.batch]" not in lines
    assert "[profiles.latency]" in lines and "[profiles]" not in lines
    assert lines[lines.index("[profiles.latency]") + 1].startswith("batch = { min = 1, ")


@pytest.mark.parametrize(("keys", "more"), [(9, ""), (10, ""), (11, "; and 1 more"), (12, "; and 2 more")])
def test_ten_wrong_keys_are_named(keys: int, more: str) -> None:
    wrong = {f"wrong{number}": 1 for number in range(keys)}
    with pytest.raises(UsageError) as caught:
        recipes.parse(recipes.Range, {"min": 1, "opt": 1, "max": 1} | wrong, where="here")
    assert caught.value.message.count("unknown key") == min(keys, 10)
    assert caught.value.message.endswith(more or f"'wrong{keys - 1}'.")


def test_a_head_of_its_own_is_the_only_one_unless_there_are_several() -> None:
    own = recipes.load("vits14").changed(head={"kind": "mine", "size": 3}, heads={})
    assert own.with_head("mine").head == {"kind": "mine", "size": 3}
    with pytest.raises(UsageError, match="vits14 has its own head, mine, and takes no other"):
        own.with_head("other")
    assert own.changed(head={}).with_head("other").head == {"kind": "other"}


@pytest.mark.parametrize("more", [0, 1])
def test_a_recipe_is_no_longer_than_256_kib(more: int, tmp_path: Path) -> None:
    text = recipes.to_toml(recipes.load("vits14"))
    path = tmp_path / "own.toml"
    path.write_text(text + "#" * (262_144 - len(text) + more))
    if more:
        with pytest.raises(UsageError, match=r"own\.toml.*262,?144"):
            recipes.load(str(path))
    else:
        assert recipes.load(str(path)) == recipes.load("vits14")


def test_what_is_read_stays_as_it_is() -> None:
    batch = recipes.Range(min=1, opt=2, max=9)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(batch, "max", 8)  # noqa: B010
    assert batch.dim("batch") == Dim(name="batch", min=1, opt=2, max=9, multiple_of=1, step=1)
    assert batch.dim("batch", multiple_of=2, step=3) == Dim(
        name="batch", min=1, opt=2, max=9, multiple_of=2, step=3
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "of_heads", "judge"),
    [({}, "heads", "own"), ({"kind": "x"}, "heads", "heads"), ({"kind": "x"}, None, "own"), ({}, None, "own")],
)
def test_a_published_head_has_a_validation_of_its_own(head: dict[str, str], of_heads: str | None, judge: str) -> None:
    recipe = recipes.load("vits14").changed(validation="own", head=head, head_validation=of_heads)
    assert recipe.judged_by == judge


@pytest.mark.parametrize(("offset", "taken"), [(1 / 1000, True), (1 / 1001, False), (999 / 1000, True)])
def test_an_offset_is_a_fraction_of_at_most_a_thousand_parts(offset: float, taken: bool) -> None:
    model = recipes.load("vits14").model | {"interpolate_offset": offset}
    if taken:
        assert float(Architecture.model_validate(model).offset) == offset
    else:
        with pytest.raises(ValidationError, match=r"needs a fraction of at most 1000 parts, as 0\.1, has 0\.000999"):
            Architecture.model_validate(model)


@pytest.mark.parametrize("interface", ["transformers", "dinov2"])
@pytest.mark.parametrize("choice", [{}, {"input": "images"}, {"blocks": (1,)}, {"last_blocks": 2}])
def test_transformers_interface_has_one_form(interface: str, choice: dict[str, Any]) -> None:
    graph = {"interface": interface, **choice}
    if interface == "transformers" and choice:
        with pytest.raises(ValidationError, match="interface transformers takes normalised pixels and gives only the"):
            GraphChoices.model_validate(graph)
    else:
        assert GraphChoices.model_validate(graph).interface == interface

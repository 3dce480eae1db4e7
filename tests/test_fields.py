"""Bounds and defaults of everything that is read as data: recipes, targets, manifests, requests.

They are what users' files may hold, so a change is one for users too. After a change that is meant,
`python -m tests.test_fields` writes them again.

Values that are passed between stages cannot change, and nothing depends on the order of their fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

import dinoexport

GOLDEN = Path(__file__).parent / "data" / "fields.json"


# Work in progress, which is changed until it is done.
CHANGING = {"Form", "ImageRow", "PreparedImage", "ShardTask", "_Context", "_Worker"}
# So few fields that their order is their meaning.
BY_POSITION = {"Control", "Text", "Continuing", "Entry", "_Context"}


@cache
def modules() -> tuple[ModuleType, ...]:
    """Every module of the package, imported."""
    found = (module.name for module in pkgutil.walk_packages(dinoexport.__path__, "dinoexport."))
    return tuple(importlib.import_module(name) for name in found if not name.endswith("__main__"))


def models() -> dict[str, type[BaseModel]]:
    """Every pydantic model of the package, by its module and name."""
    modules()

    def below(parent: type[BaseModel]) -> list[type[BaseModel]]:
        return [found for child in parent.__subclasses__() for found in (child, *below(child))]

    return {f"{m.__module__}.{m.__name__}": m for m in below(BaseModel) if m.__module__.startswith("dinoexport.")}


def facts(model: type[BaseModel]) -> dict[str, str]:
    """Field -> its JSON schema, without the words, in which bounds of its parts stand too."""

    def plain(schema: Any) -> Any:
        if isinstance(schema, dict):
            return {key: plain(value) for key, value in schema.items() if key not in ("title", "description")}
        return [plain(value) for value in schema] if isinstance(schema, list) else schema

    properties = model.model_json_schema().get("properties", {})
    return {name: json.dumps(plain(schema), sort_keys=True) for name, schema in properties.items()}


def current() -> dict[str, dict[str, str]]:
    return {name: facts(model) for name, model in sorted(models().items())}


def test_bounds_and_defaults_are_what_was_meant() -> None:
    written = json.loads(GOLDEN.read_text())
    found = current()
    assert len(found) > 20
    assert found == written, "If this is meant: python -m tests.test_fields"


def dataclasses_of_the_package() -> dict[str, Any]:
    """Every dataclass at the top of a module, by its name."""
    return {
        name: value
        for module in modules()
        for name, value in vars(module).items()
        if "__dataclass_params__" in getattr(value, "__dict__", {}) and value.__module__ == module.__name__
    }


def test_values_are_frozen() -> None:
    found = dataclasses_of_the_package()
    assert len(found) > 130
    assert {name for name, value in found.items() if not value.__dataclass_params__.frozen} == CHANGING


def test_fields_are_given_by_name() -> None:
    by_position = {
        name
        for name, value in dataclasses_of_the_package().items()
        if not all(field.kw_only for field in dataclasses.fields(value))
    }
    assert by_position == BY_POSITION


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current(), indent=1) + "\n")

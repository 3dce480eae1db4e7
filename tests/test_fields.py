"""Bounds and defaults of everything that is read as data: recipes, targets, manifests, requests.

They are what users' files may hold, so a change is one for users too. After a change that is meant,
`python -m tests.test_fields` writes them again.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import dinoexport

GOLDEN = Path(__file__).parent / "data" / "fields.json"


def models() -> dict[str, type[BaseModel]]:
    """Every pydantic model of the package, by its module and name."""
    for module in pkgutil.walk_packages(dinoexport.__path__, "dinoexport."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

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


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current(), indent=1) + "\n")

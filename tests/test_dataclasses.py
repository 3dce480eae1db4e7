"""Values that are passed between stages cannot change, and nothing depends on the order of their fields."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import cache
from typing import Any

import dinoexport

# Work in progress, which is changed until it is done.
CHANGING = {"Form", "ImageRow", "PreparedImage", "ShardTask", "_Context", "_Worker"}
# So few fields that their order is their meaning.
BY_POSITION = {"Control", "Text", "Continuing", "Entry", "_Context"}


@cache
def dataclasses_of_the_package() -> dict[str, Any]:
    """Every dataclass at the top of a module, by its name."""
    modules = [m.name for m in pkgutil.walk_packages(dinoexport.__path__, "dinoexport.") if "__main__" not in m.name]
    return {
        name: value
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if "__dataclass_params__" in getattr(value, "__dict__", {}) and value.__module__ == module
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

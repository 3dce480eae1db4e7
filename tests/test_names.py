"""One word has one meaning: no two types of the shared packages have one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dinoexport"
# Families fill the same roles, each in a package of its own, with the same names.
SHARED = [path for path in PACKAGE.rglob("*.py") if "models" not in path.relative_to(PACKAGE).parts]


def types_in(module: ast.Module) -> set[str]:
    """The classes and type aliases of a module that others can import."""
    named = {node.name for node in module.body if isinstance(node, ast.ClassDef)}
    assigned = [node.targets[0] for node in module.body if isinstance(node, ast.Assign)]
    aliases = {target.id for target in assigned if isinstance(target, ast.Name) and not target.id.isupper()}
    return {name for name in named | aliases if name[0].isupper()}


def test_a_type_has_a_name_of_its_own() -> None:
    places = defaultdict(list)
    for path in SHARED:
        for name in types_in(ast.parse(path.read_text(encoding="utf-8"))):
            places[name].append(str(path.relative_to(PACKAGE)))
    assert len(SHARED) > 150 and "Manifest" in places
    assert {name: where for name, where in places.items() if len(where) > 1} == {}

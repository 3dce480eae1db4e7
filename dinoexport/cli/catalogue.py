"""What can be built: variants, heads and targets with their facts, and the schema of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dinoexport import family
from dinoexport.cli.formatting import TableRows
from dinoexport.cli.tables import cell
from dinoexport.config import recipe, resources
from dinoexport.config.recipe import Recipe, load
from dinoexport.config.target import load_target

# What is known of every variant; the rest are its family's facts.
_COMMON = ("variant", "parameters", "published_bytes", "licence")


def everything() -> dict[str, TableRows]:
    """Variants with their sizes and licences, and targets."""
    return {
        "variants": sorted(map(_variant, map(load, recipe.variants())), key=lambda row: row["parameters"]),
        "heads": _heads(),
        "targets": [
            {
                "target": t.name,
                "runtimes": list(t.runtimes),
                "SM": list(t.compute_capabilities),
                "precisions": list(t.precisions),
                "machine": t.description,
            }
            for t in map(load_target, resources.names("recipes/targets"))
        ],
    }


def variant_tables(variants: TableRows, columns: int) -> Iterator[tuple[str, TableRows]]:
    """Title and rows of a table for each set of facts that variants have; licences without their remarks.

    columns: of the terminal. A table that is wider leaves out facts, the last first, and its title names them.
    """
    groups: dict[tuple[str, ...], TableRows] = {}
    for row in variants:
        groups.setdefault(tuple(row), []).append({**row, "licence": row["licence"].split(" (")[0]})
    for rows in groups.values():
        shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        left_out: list[str] = []
        for name in [name for name in reversed(shown) if name not in _COMMON]:
            if _width(rows, shown) > columns:
                shown.remove(name)
                left_out.insert(0, name.replace("_", " "))
        more = f" (more with --json: {', '.join(left_out)})" if left_out else ""
        yield f"Variants{more}", [{name.replace("_", " "): row[name] for name in shown} for row in rows]


def _width(rows: TableRows, shown: list[str]) -> int:
    """The minimum width of a table in characters: only headings and licences break into lines, between words."""

    def longest(text: str, *, breaks: bool = True) -> int:
        return max(map(len, text.split() if breaks else [text]), default=0)

    cells = (max(longest(cell(row[name]), breaks=name == "licence") for row in rows) for name in shown)
    return 1 + sum(
        3 + max(longest(name.replace("_", " ")), cell_width) for name, cell_width in zip(shown, cells, strict=True)
    )


def _heads() -> TableRows:
    """Each head that is published, and the variants it is published for."""
    variants: dict[str, list[str]] = {}
    for loaded in map(load, recipe.variants()):
        for head in loaded.heads:
            variants.setdefault(head, []).append(loaded.name)
    return [{"head": head, "of": names} for head, names in variants.items()]


def _variant(loaded: Recipe) -> dict[str, Any]:
    model = family.find(loaded.family).model(loaded)
    optional = model.optional_tensors
    parameters = sum(math.prod(shape) for name, shape in model.tensors.items() if name not in optional)
    sizes = [file.size_bytes for file in loaded.weights]
    known = [size for size in sizes if size is not None]
    return {
        "variant": loaded.name,
        "parameters": parameters,
        **model.facts,
        "published_bytes": sum(known) if known and len(known) == len(sizes) else None,
        "licence": loaded.licence,
    }


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, with the tables of every installed family."""
    schema = Recipe.model_json_schema()
    schema["properties"]["base"] = {
        "type": "string",
        "description": "A shipped recipe, or a family's base, to start from; this file then holds only what differs.",
    }
    schemas = [family.find(name).table_schemas() for name in family.installed()]
    for table in ("model", "graph", "preprocess", "head"):
        options = [dict(tables[table]) for tables in schemas if table in tables]
        for option in options:  # references count from the root
            schema["$defs"] |= option.pop("$defs", {})
        schema["properties"][table] = {"anyOf": options, "description": schema["properties"][table]["description"]}
    # With `base` any key may be left out, at any depth: required keys are checked when the merged recipe is loaded.
    required = schema.pop("required")
    return {**_nothing_required(schema), "anyOf": [{"required": ["base"]}, {"required": required}]}


def _nothing_required(schema: Any) -> Any:
    if isinstance(schema, dict):
        kept = {key: value for key, value in schema.items() if key != "required" or not isinstance(value, list)}
        return {key: _nothing_required(value) for key, value in kept.items()}
    return [_nothing_required(item) for item in schema] if isinstance(schema, list) else schema

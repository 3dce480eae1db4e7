"""Format results of all commands, for tables and for JSON, as plain data."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport import bundle, family
from dinoexport.bundle import signing
from dinoexport.config import recipe, resources
from dinoexport.config.recipe import Recipe, load, load_target
from dinoexport.errors import UsageError, require
from dinoexport.spec import Runtime, Way
from dinoexport.system import changes, memory, timing, untrusted

if TYPE_CHECKING:
    from dinoexport.serving.triton.model_repository import Deployed
    from dinoexport.validation.error_analysis import Growth
    from dinoexport.validation.judge import Report, Row

Rows = list[dict[str, Any]]
# More rows than a build has; a user's images can give a hundred thousand.
_ROWS_MAX = 150
# Protobuf reads no larger message.
_ONNX_MAX_BYTES = (1 << 31) - 1
# What is known of every variant; the rest are its family's facts.
_COMMON = ("variant", "parameters", "published_bytes", "licence")


def everything() -> dict[str, Rows]:
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


def variant_tables(variants: Rows) -> dict[str, Rows]:
    """Variants with the same facts, each in a table of their own, by title; licences without their remarks."""
    tables: dict[str, Rows] = {}
    for row in variants:
        columns = ", ".join(name for name in row if name not in _COMMON)
        short = {**row, "licence": row["licence"].split(" (")[0]}
        tables.setdefault(f"Variants by {columns}", []).append(short)
    return tables


def _heads() -> Rows:
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


def of_path(path: Path) -> dict[str, Any]:
    """What a bundle or an ONNX file holds, by title: a dict of facts or a list of rows."""
    if path.suffix == ".onnx":
        return _of_onnx(path)
    changes.settle(path)
    manifest = bundle.read_manifest(path)
    report = manifest.report
    return {
        "Bundle": {
            "verdict": manifest.verdict,
            "variant": manifest.variant,
            "precision": precision(manifest),
            "target": manifest.target,
            "weights": manifest.checkpoint.source,
            "weights' SHA-256": manifest.checkpoint.sha256,
            **({"assumed": _assumed(manifest)} if manifest.checkpoint.assumed else {}),
            **({"about the weights": " ".join(manifest.checkpoint.notes)} if manifest.checkpoint.notes else {}),
            "licence": manifest.checkpoint.licence,
            **_head(manifest),
            "signed": f"by key {signer}, not verified here" if (signer := signing.signed_by(path)) else "no",
            "judged": f"{report['candidate']}, against {report['reference']}" if report else "never",
            **({} if (cpu := manifest.cpu) is None else {"runs on": f"{cpu.machine}, {cpu.usable_cpus} CPUs"}),
            "built": f"{manifest.created:%Y-%m-%d %H:%M} UTC with "
            + ", ".join(f"{package} {version}" for package, version in manifest.versions.items()),
            **manifest.card,
        },
        "Inputs and outputs": [
            {
                "graph": g.name,
                "": side,
                "name": t["name"],
                "dtype": t["dtype"],
                "shape": _shape(t["shape"]),
                "meaning": t["meaning"],
            }
            for g in manifest.graphs
            for side, tensors in (("in", g.inputs), ("out", g.outputs))
            for t in tensors
        ],
        **_engines(manifest),
        **_cpu(manifest),
        **_memory(manifest),
        "Dimensions": [dim for g in manifest.graphs for dim in g.dims],
        "Files": [
            {"file": f.name, "stage": f.stage, "bytes": f.size_bytes, "SHA-256": f.sha256} for f in manifest.files
        ],
    }


def _memory(manifest: bundle.Manifest) -> dict[str, dict[str, str]]:
    """What a graph that carries state needs of this machine's memory."""
    from dinoexport.runtime import carried_memory

    sizes = {file.name: file.size_bytes for file in manifest.files}
    found: dict[str, str] = {}
    for facts in manifest.graphs:
        carried = carried_memory.of(facts.graph())
        if carried is not None:
            found |= carried.facts(sizes.get(f"{facts.file}.data", sizes[facts.file]), memory.available_bytes())
    return {"Memory": found} if found else {}


def _head(manifest: bundle.Manifest) -> dict[str, str]:
    """A bundle's head: its kind, the source of its weights, and how many classes it names."""
    head = manifest.head
    if head is None:
        return {}
    classes = f"{len(head.classes)}: {', '.join(head.classes[:6])}{', …' if len(head.classes) > 6 else ''}"
    return {
        "head's weights": head.source or "in the checkpoint",
        **({"head's SHA-256": head.sha256} if head.sha256 else {}),
        **({"classes": classes} if head.classes else {}),
    }


def _assumed(manifest: bundle.Manifest) -> str:
    return "; ".join(f"{key} = {value}" for key, value in manifest.checkpoint.assumed.items())


def page_of(folder: Path) -> Path:
    """The path of the bundle's report, after checking its bytes; a UsageError when it has none."""
    changes.settle(folder)
    manifest = bundle.read_manifest(folder)
    pages = [file for file in manifest.files if file.name == bundle.REPORT_HTML]
    if not pages:
        raise UsageError(
            f"{folder} has no {bundle.REPORT_HTML}: it was never validated, or an older dinoexport built it.",
            next_step="dinoexport build makes one.",
        )
    bundle.check_files(folder, pages)
    return folder / bundle.REPORT_HTML


def precision(manifest: bundle.Manifest) -> str:
    """The precision in words; with `--precision auto`, the parts in fp32 and how many combinations were tried."""
    found = manifest.report.get("precision")
    if found is None:
        return manifest.precision.value
    kept, tried = ", ".join(found["fp32"]) or "nothing", len(found["trials"])
    return f"{manifest.precision} with {kept} in fp32: {tried} combinations tried"


def _engines(manifest: bundle.Manifest) -> dict[str, Rows]:
    rows = [
        {
            "engine": e.file,
            "runtime": f"{e.runtime} {e.runtime_version}",
            "SM": list(e.compute_capabilities),
            "precision": e.precision.value,
            "bytes": e.size_bytes,
            "profiles": list(e.profiles),
            "scratch bytes": e.scratch_bytes,
            "fused attention": f"{'?' if e.fused_attentions is None else e.fused_attentions} of {e.attentions}",
            "executed": e.executed,
        }
        for e in manifest.engines
    ]
    return {"Engines": rows} if rows else {}


def engine_lines(manifest: bundle.Manifest, not_run: str = "") -> list[str]:
    """For each engine: what it is, whether it was run (and why not), and cautions."""
    lines = []
    for e in manifest.engines:
        lines.append(
            f"Engine: {e.file} for SM {', '.join(e.compute_capabilities)}, {e.runtime} {e.runtime_version}, "
            f"{e.precision}, {e.size_bytes / 1e6:.1f} MB. Built; executed: {e.executed}."
        )
        if not_run:
            lines.append(f"        {not_run}")
        if e.fused_attentions is not None and e.fused_attentions < e.attentions:
            lines.append(
                f"        warning: attention is fused in {e.fused_attentions} of {e.attentions} places"
                + ("; TensorRT fuses it in fp16 only." if e.precision == "fp32" else ".")
            )
        if e.caution:
            lines.append(f"        caution: {e.caution}")
    return lines


def _cpu(manifest: bundle.Manifest) -> dict[str, Rows]:
    """What was measured to choose how the bundle runs on a CPU."""
    if manifest.cpu is None or not manifest.cpu.measured:
        return {}
    fastest_ms = manifest.cpu.measured[0].median_ms
    rows = [
        {
            "load": manifest.cpu.load,
            "runtime": timed.way.runtime,
            "precision": timed.way.precision.value,
            "threads": timed.way.threads,
            "median ms": f"{timed.median_ms:.1f}",
            "best ms": "" if timed.best_ms is None else f"{timed.best_ms:.1f}",
            "CPU ms": "" if timed.cpu_ms is None else f"{timed.cpu_ms:.1f}",
            "spread": f"{timed.spread:.0%}",
            "of the fastest": f"{timed.median_ms / fastest_ms:.2f}",
            "": "chosen" if timed.way == manifest.cpu.chosen else "",
        }
        for timed in manifest.cpu.measured
    ]
    return {"Measured on the CPU that built it": rows}


def proven(report: Report, *, own_images: bool, not_run: str, verified: bool) -> tuple[str, list[str]]:
    """What a passed verdict proves on this machine, and what it does not prove."""
    count = len({row.case for row in report.rows})
    asked = "those of your images that could be read" if own_images else f"the {count} cases the bundle carries"
    left_open = ["other inputs and sizes", "that the weights are the authors' own"]
    left_open += [f"{len(report.not_covered)} cases outside the engine's profiles"] if report.not_covered else []
    left_open += ["the engine, which was not run"] if not_run else []
    left_open += [] if verified else ["who made the bundle (--verify KEY)"]
    return f"{report.candidate}, on this machine, gives PyTorch's outputs for {asked}, within the limits", left_open


def signature_lines(signed_by: str | None, *, by_us: bool = False, verified: bool = False) -> list[str]:
    """Who signed a bundle, as far as known."""
    if signed_by is None:
        return []
    known = "just now" if by_us else "verified" if verified else "not verified; --verify KEY does that"
    return [f"Signed: by key {signed_by[:16]}, {known}"]


def cpu_lines(manifest: bundle.Manifest) -> list[str]:
    """How the bundle runs here: runtime, threads, arithmetic, the measurements behind the choice, and their noise."""
    facts = manifest.cpu
    if facts is None:
        return []
    ran = ", ".join(f"{count} products in {kind}" for kind, count in facts.arithmetic.items())
    lines = [
        f"Runs:   {_way(facts.chosen, facts.runtime_version)} ({ran}) on {facts.machine}, {facts.usable_cpus} CPUs"
    ]
    if not facts.measured:
        lines.append("        the only installed runtime for this precision; nothing was timed")
        return lines
    for timed in facts.measured:
        chosen = ", chosen" if timed.way == facts.chosen else ""
        lines.append(f"        {timed.median_ms:9.1f} ms for {facts.load}: {_way(timed.way)}{chosen}")
    lines += [f"        {runtime} was left out: {why}" for runtime, why in facts.refused.items()]
    if facts.times_fp32 is not None:
        lines.append(f"        {facts.times_fp32:.2f} times the time of the fastest fp32 there")
    if facts.others_share > timing.NOISY_SHARE:
        lines.append(
            f"        noisy: other processes had {facts.others_share:.0%} of the CPUs while this was measured; "
            "CPU time and the best of many visits decided too"
        )
    if facts.basis != "measured":
        lines.append(f"        {_BASES[facts.basis]}")
    return lines


_BASES = {
    "known": "ways that could not be told apart: chosen is what was faster here when the machine was quiet",
    "usual": "ways that could not be told apart: chosen is what is usually the faster one",
}


def _way(way: Way, version: str = "") -> str:
    threads = f"{way.threads} thread{'s' * (way.threads != 1)}"
    return f"{way.runtime}{version and f' {version}'}, {threads}, {way.precision}"


def deployed_facts(deployed: Deployed) -> dict[str, Any]:
    """What a repository serves now, ready for json.dumps."""
    plain = {"repository": str(deployed.repository), "models": list(deployed.models), "retired": list(deployed.retired)}
    return {**asdict(deployed), **plain}


def deployed_lines(deployed: Deployed) -> list[str]:
    """What the repository serves now, and how to make a running server load it."""
    before = f" (before: {deployed.previous})" if deployed.previous else ""
    where = "BUNDLE" if isinstance(deployed.repository, str) else shlex.quote(str(deployed.repository))
    return [
        f"Serving: {deployed.name} version {deployed.version}{before}, in {deployed.repository}",
        f"Models:  {', '.join(deployed.models)}",
        *([f"Note:    {deployed.note}"] if deployed.note else []),
        "Next, to make a running server load it:",
        *(f"         curl -X POST HOST:8000/v2/repository/models/{model}/unload" for model in deployed.retired),
        *(f"         curl -X POST HOST:8000/v2/repository/models/{model}/load" for model in deployed.models),
        f"         dinoexport check http://HOST:8000 {where} --model {deployed.name}",
    ]


def latency_rows(latency_ms: Mapping[str, float]) -> Rows:
    """A row for each case that was sent to the server."""
    return [{"case": case, "latency ms": f"{ms:.1f}"} for case, ms in latency_ms.items()]


def _of_onnx(path: Path) -> dict[str, Any]:
    require("export", "onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        raw = untrusted.read_bytes(path, max_bytes=_ONNX_MAX_BYTES)
        model = onnx.load_model_from_string(raw)
    except DecodeError as error:
        raise UsageError(f"{path} is not a readable ONNX file: {error}.", next_step="Check the path.") from None
    graph = model.graph
    weights = {id(t): math.prod(t.dims) for t in graph.initializer}
    facts = {
        "opset": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
        "nodes": f"{len(graph.node)}: "
        + ", ".join(f"{op} {n}" for op, n in Counter(n.op_type for n in graph.node).most_common()),
        "weights": f"{sum(weights.values()):,} in {len(weights)} tensors",
        "external data": ", ".join(
            sorted({e.value for t in graph.initializer for e in t.external_data if e.key == "location"})
        )
        or "none",
        **{prop.key: prop.value for prop in model.metadata_props},
    }
    tensors = [("in", value) for value in graph.input] + [("out", value) for value in graph.output]
    return {
        "ONNX": facts,
        "Inputs and outputs": [
            {
                "": side,
                "name": value.name,
                "dtype": onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
                "shape": _shape([d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]),
            }
            for side, value in tensors
        ],
    }


def _shape(shape: list[int | str]) -> str:
    return " x ".join(map(str, shape))


def report_rows(report: Report) -> Rows:
    """A row for each output of each case: its figures and, where it failed, the limits it missed.

    Of more than anybody reads, the rows that failed and those nearest to their limit.
    """
    if len(report.rows) <= _ROWS_MAX:
        return [_report_row(row) for row in report.rows]
    rest = f"and {len(report.rows) - _ROWS_MAX:,} more; --json has them all"
    shown = [_report_row(row) for row in sorted(report.rows, key=_closeness, reverse=True)[:_ROWS_MAX]]
    return [*shown, {column: rest if column == "case" else "" for column in shown[0]}]


def _closeness(row: Row) -> float:
    """A row's error divided by its limit; infinite if it failed."""
    if not row.passed:
        return math.inf
    return max((b.value / b.limit for b in row.bounds if b.figure == "relative_l2" and b.limit > 0), default=0.0)


def growth_rows(growth: Growth) -> Rows:
    """A row for each value inside the graph that was compared with PyTorch's."""
    return [
        {
            "value": step.name,
            "relative L2": f"{step.relative_l2:.1e}",
            "expected": f"{step.expected:.1e}",
            "mean norm": f"{step.norm:.4g}",
            "PyTorch's": f"{step.reference_norm:.4g}",
            "largest": f"{step.largest:.4g}",
            "times median": f"{step.times_median:.0f}",
            "fits fp16": f"{step.fp16_headroom:.3g} times",
            "verdict": "ok" if step.holds else "FIRST OVER" if step is growth.leaves else "over",
        }
        for step in growth.steps
    ]


def explained(report: Report, growth: Growth | None, manifest: bundle.Manifest) -> list[str]:
    """The explanation as text; without `growth`, the reason why inner values were not compared."""
    from dinoexport.runtime import runners
    from dinoexport.runtime.table import TABLE
    from dinoexport.validation import error_analysis

    if growth is None:
        way = runners.way_of(manifest)
        if way.runtime is not Runtime.ONNXRUNTIME:
            return [
                f"Inner values were not compared: {TABLE[way.runtime].title} runs this bundle and does not show them."
            ]
        return ["Inner values were not compared: no output has an error, or the family names no inner values."]
    return error_analysis.causes(report, growth) or [
        "The error is as expected everywhere."
        if growth.leaves is None
        else f"All limits hold, but the error is larger than expected from {growth.leaves.name} on."
    ]


def _report_row(row: Row) -> dict[str, Any]:
    figures = row.distance
    missed = "; ".join(f"{b.figure} {_figure(b.value)}, limit {_figure(b.limit)}" for b in row.bounds if not b.holds)
    largest = [b.value for b in row.bounds if b.figure == "largest"]
    limit = min((b.limit for b in row.bounds if b.figure == "relative_l2"), default=math.nan)
    return {
        "case": row.case,
        "output": row.output,
        "shape": _shape(list(row.shape)),
        "relative L2": "" if figures is None else f"{figures.relative_l2:.1e}",
        "limit": "" if math.isnan(limit) else f"{limit:.1e}",
        "worst vector": "" if figures is None else f"{figures.worst_l2:.1e}",
        "worst cosine": _direction(row),
        "largest abs": f"{largest[0]:.1e}" if largest else "" if figures is None else f"{figures.max_abs:.1e}",
        "verdict": "ok" if row.passed else f"FAILED {row.problem or missed}",
    }


def _direction(row: Row) -> str:
    """The worst vector's cosine; of a distribution, which has no direction, its mean divergence."""
    if row.divergence is not None:
        return f"KL {row.divergence.kl_mean:.1e}"
    return "" if row.distance is None else f"{row.distance.cosine_worst:.8f}"


def _figure(value: float) -> str:
    return json.dumps(float(f"{value:.4g}")) if math.isfinite(value) else str(value)

"""What a bundle or an ONNX file holds, by title, as plain data."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from dinoexport import bundle
from dinoexport.bundle import signing
from dinoexport.cli import formatting
from dinoexport.cli.formatting import TableRows
from dinoexport.errors import UsageError, require
from dinoexport.runtime import carried_memory
from dinoexport.system import changes, memory, untrusted

# Protobuf reads no larger message.
_ONNX_MAX_BYTES = (1 << 31) - 1


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
            "precision": formatting.precision(manifest),
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
                "shape": formatting.shape_of(t["shape"]),
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


def _engines(manifest: bundle.Manifest) -> dict[str, TableRows]:
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


def _cpu(manifest: bundle.Manifest) -> dict[str, TableRows]:
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
    weights = [math.prod(t.dims) for t in graph.initializer]
    facts = {
        "opset": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
        "nodes": f"{len(graph.node)}: "
        + ", ".join(f"{op} {n}" for op, n in Counter(n.op_type for n in graph.node).most_common()),
        "weights": f"{sum(weights):,} in {len(weights)} tensors",
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
                "shape": formatting.shape_of([d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]),
            }
            for side, value in tensors
        ],
    }

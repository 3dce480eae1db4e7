"""A bundle: one folder that says what it holds, proves it, and is complete or absent.

    manifest.json       what is here, what it was made from, what was measured
    NAME.onnx(.data)    the graphs with their external weights
    reference.npz       inputs and PyTorch's answers, to judge any runtime elsewhere without torch
    report.json         every figure of the verdict
    report.html         the same to look at, with pictures
    sbom.cdx.json       what went in: checkpoint, files, packages, as a CycloneDX bill of materials
    precision.json      with --precision auto: which parts stayed fp32, and every form that was tried
    NAME.rtx(.log)      engines compiled from the graphs, and what the compiler said; engines.json holds their facts
    model.sig           with --sign: OpenSSF's signature of all the others; not in the manifest, which it signs

Reading one trusts nothing in it: names are plain, sizes and hashes must be the manifest's, arrays are never unpickled.
"""

from dinoexport.bundle.checks import check_files, check_graphs, check_same, checked, verify
from dinoexport.bundle.manifest import (
    ENGINES,
    MANIFEST,
    MANIFEST_MAX_BYTES,
    PRECISION,
    REFERENCE,
    REPORT_HTML,
    REPORT_JSON,
    SBOM,
    SCHEMA,
    SIGNATURE,
    BundleFile,
    CheckpointFacts,
    CpuFacts,
    EngineFacts,
    FileName,
    GraphFacts,
    HeadManifest,
    Manifest,
    ShapeRange,
    Timed,
    Verdict,
    damaged,
    describe,
    read_manifest,
    rewrite,
    rewrite_manifest,
    unreadable,
)

__all__ = [
    "ENGINES",
    "MANIFEST",
    "MANIFEST_MAX_BYTES",
    "PRECISION",
    "REFERENCE",
    "REPORT_HTML",
    "REPORT_JSON",
    "SBOM",
    "SCHEMA",
    "SIGNATURE",
    "BundleFile",
    "CheckpointFacts",
    "CpuFacts",
    "EngineFacts",
    "FileName",
    "GraphFacts",
    "HeadManifest",
    "Manifest",
    "ShapeRange",
    "Timed",
    "Verdict",
    "check_files",
    "check_graphs",
    "check_same",
    "checked",
    "damaged",
    "describe",
    "read_manifest",
    "rewrite",
    "rewrite_manifest",
    "unreadable",
    "verify",
]

"""A bundle: one self-describing, verifiable folder that appears complete or not at all.

    manifest.json       the files, what they were built from, and what was measured
    NAME.onnx(.data)    the graphs with their external weights
    reference.npz       inputs, PyTorch's outputs and limits, to validate any runtime on another machine without torch
    report.json         every figure of the verdict
    report.html         the same as a page with pictures
    sbom.cdx.json       checkpoint, files and packages, as a CycloneDX bill of materials
    precision.json      with --precision auto: which parts stayed fp32, and every combination that was tried
    NAME.rtx(.log)      engines compiled from the graphs, and the compiler's messages; engines.json holds their facts
    model.sig           with --sign: OpenSSF's signature of all the others; not in the manifest, which it signs

Nothing in a bundle is trusted when it is read: names must be plain file names, sizes and hashes must be the manifest's,
arrays are never unpickled.
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

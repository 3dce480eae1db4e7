"""The files of a served model's version: copied from a bundle and checked in one pass, then put in their places."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from dinoexport import bundle
from dinoexport.bundle import Manifest, onnx_file
from dinoexport.config.target import triton_reads
from dinoexport.errors import UsageError
from dinoexport.serving.triton import served_models
from dinoexport.serving.triton.served_models import Backend, TritonModel
from dinoexport.spec import Progress, silent
from dinoexport.system import files
from dinoexport.system.untrusted import Unreadable

CONFIG = "config.pbtxt"
# Where the bundle's files are made ready; no model can be called so.
_COPIED = ".copied"


def wanted(manifest: Manifest, backend: Backend, tokenizer: str | None) -> set[str]:
    """The files of the bundle that a server reads, and those that decide how it is served."""
    if backend == "tensorrt_plan":
        return {bundle.REFERENCE} | {plan.file for plan in served_models.plans_of(manifest)}
    onnx = {name for facts in manifest.graphs for name in served_models.onnx_files(manifest, facts).values()}
    return {bundle.REFERENCE} | onnx | ({tokenizer} if tokenizer else set())


def copied(
    folder: Path, new: Path, manifest: Manifest, wanted: Collection[str], *, progress: Progress = silent
) -> Path:
    """A folder in `new` with copies of the `wanted` files, whose bytes are the manifest's; the rest is checked as well.

    Each byte is read once. From here on only these copies, which were checked, are inspected, measured and served.
    """
    copies = new / _COPIED
    copies.mkdir()
    rest = []
    for file in manifest.files:
        if file.name not in wanted:
            rest.append(file)
            continue
        try:
            files.copy(
                folder / file.name,
                copies / file.name,
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                progress=progress,
            )
        except Unreadable as error:
            raise bundle.unreadable(folder, file.name, error) from None
        except ValueError as error:
            raise bundle.damaged(str(error)) from None
    bundle.check_files(folder, rest, progress=progress)
    if any(facts.file in wanted for facts in manifest.graphs):
        bundle.check_graphs(copies, manifest)
    return copies


def check_readable(copied: Path, manifest: Manifest, triton: str | None) -> None:
    """Raises UsageError for a graph that the ONNX Runtime inside the Triton image `triton` would not read."""
    if triton is None:
        return
    tag = triton.partition("=")[0]
    reads = triton_reads(tag)
    for facts in manifest.graphs:
        ir, opset = onnx_file.versions(copied / facts.file)
        if reads is None or ir > reads.ir or opset > reads.opset:
            known = f"opset {reads.opset} and IR version {reads.ir} at most" if reads else "older ones"
            if reads and not reads.opset:
                known = "nothing: the image holds none"
            raise UsageError(
                f"{facts.file} has opset {opset} and IR version {ir}; the ONNX Runtime in Triton {tag} reads {known}.",
                next_step="Serve with a newer image, or in the Python backend, whose ONNX Runtime is yours: "
                "--backend python.",
            )


def write(copied: Path, folder: Path, model: TritonModel, version: int, uses: Counter[str]) -> None:
    """Writes a model's folder as if it were the first of its name, with files from `copied`.

    uses: how many models still need each file.
    """
    place = folder / str(version)
    place.mkdir(parents=True)
    for destination, source in model.files.items():
        (place / destination).parent.mkdir(exist_ok=True)
        uses[source] -= 1
        if uses[source]:  # never one file under two names: changing one would change the other
            files.copy(copied / source, place / destination)
        else:
            os.rename(copied / source, place / destination)
    if model.code:
        (place / "model.py").write_text(model.code, encoding="utf-8")
    if model.warmup:
        (folder / "warmup").mkdir()
    for file, array in model.warmup.items():
        (folder / "warmup" / file).write_bytes(array.tobytes())
    for config in (place / CONFIG, folder / CONFIG):
        config.write_text(model.config, encoding="utf-8")

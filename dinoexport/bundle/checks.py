"""Check a bundle's files against its manifest: sizes, hashes, content of graphs, and no change during use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dinoexport.bundle import onnx_file
from dinoexport.bundle.manifest import BundleFile, Manifest, damaged, read_manifest, unreadable
from dinoexport.errors import ValidationFailed
from dinoexport.spec import Progress, silent
from dinoexport.system import changes, files, untrusted
from dinoexport.system.untrusted import Identity, Unreadable


@contextmanager
def checked(
    folder: Path, *, signed: Manifest | None = None, graphs: bool = True, progress: Progress = silent
) -> Iterator[Manifest]:
    """Checks every byte of the bundle in `folder` and yields its manifest; the bundle does not change within the block.

    Runtimes open files by name, so what they read must be what was hashed: no other dinoexport changes the bundle
    within the block, and at its end each file must still be the unchanged one that was checked. If not,
    ValidationFailed is raised, and results of the block are invalid.

    signed: the manifest whose signature was verified; it is used instead of the one in the folder. graphs: whether to
    inspect the graphs too, before anything runs them.
    """
    with changes.reading(folder, progress=progress):
        manifest = read_manifest(folder) if signed is None else signed
        seen = check_files(folder, manifest.files, progress=progress)
        if graphs:
            check_graphs(folder, manifest)
        yield manifest
        check_same(folder, seen)


def verify(folder: Path, *, progress: Progress = silent) -> Manifest:
    """Checks size and hash of every file of the bundle in `folder` against its manifest, and returns the manifest."""
    with checked(folder, graphs=False, progress=progress) as manifest:
        return manifest


def check_files(folder: Path, wanted: Sequence[BundleFile], *, progress: Progress = silent) -> Mapping[str, Identity]:
    """Raises ValidationFailed at the first of `wanted` that is absent, a link, or has other bytes.

    Returns which files were checked, for `check_same`.
    """
    seen: dict[str, Identity] = {}
    for file in wanted:
        try:
            with untrusted.opened(folder / file.name, links=False) as opened:
                size = os.fstat(opened.fileno()).st_size
                if size != file.size_bytes:
                    raise damaged(f"{file.name} has {size} bytes, not {file.size_bytes}")
                seen[file.name] = untrusted.identity(opened)
                if files.sha256_of(opened, doing=f"hashing {file.name}", progress=progress) != file.sha256:
                    raise damaged(f"{file.name} does not have the SHA-256 in the manifest")
        except Unreadable as error:
            raise unreadable(folder, file.name, error) from None
    return seen


def check_same(folder: Path, seen: Mapping[str, Identity]) -> None:
    """Raises ValidationFailed if a file was replaced or changed since `check_files` checked it."""
    for name, before in seen.items():
        try:
            with untrusted.opened(folder / name, links=False) as opened:
                same = untrusted.identity(opened) == before
        except Unreadable:
            same = False
        if not same:
            raise ValidationFailed(
                f"{name} in {folder} was changed or replaced while it was used, so the results are invalid.",
                next_step="Find out who writes there, then run it again.",
            )


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Raises ValidationFailed for a graph with content that dinoexport does not write, or weights that are not listed.

    Its files must have passed `check_files`.
    """
    sizes = {file.name: file.size_bytes for file in manifest.files}
    for graph in manifest.graphs:
        try:
            onnx_file.check(folder / graph.file, data_bytes=sizes.get(f"{graph.file}.data"))
        except Unreadable as error:
            raise unreadable(folder, graph.file, error) from None
        except ValueError as error:
            raise ValidationFailed(
                f"{graph.file} is not from dinoexport: {error}.", next_step="Do not run it. Build the bundle again."
            ) from None

"""A build's stages: made once, kept beside the bundle until it is published, reused only if the key matches.

A stage's folder appears by rename, so a killed build leaves finished stages or nothing. The bundle appears as one
change (`system.changes`): its files are moved out of their stages, then its folder replaces the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dinoexport import bundle
from dinoexport.bundle import BundleFile, Manifest
from dinoexport.errors import DinoexportError, UsageError
from dinoexport.pipeline.shared_cache import INDEX, Index, SharedCache, shared_cache
from dinoexport.spec import Progress
from dinoexport.system import change_steps, changes, files, untrusted
from dinoexport.system.changes import Change


def key_of(**parts: Any) -> str:
    """A stage's key: the hash of everything its result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A finished stage: its files in `folder`, and whether they come from an earlier run."""

    name: str
    key: str
    folder: Path
    files: tuple[BundleFile, ...]
    reused: bool


# Writes a stage's files into a folder; returns the SHA-256 of those that it hashed while it wrote them.
Make = Callable[[Path], Mapping[str, str] | None]


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Where one bundle is being built. `out` is the bundle's path, `folder` the hidden folder beside it."""

    change: Change
    force: bool
    progress: Progress
    shared: SharedCache | None = None

    @property
    def out(self) -> Path:
        """The bundle's path."""
        return self.change.place

    @property
    def folder(self) -> Path:
        """The hidden folder beside it."""
        return self.change.folder

    def stage(self, name: str, key: str, make: Make, *, costly: bool = False) -> Stage:
        """The stage `name` for `key`: from an earlier run, from the bundle at `out`, or made now by `make(folder)`.

        costly: it takes longer to make than to send, so it is also looked up in the cache that machines share.
        """
        folder = self.folder / f"{name}-{key[:16]}"
        if not self.force:
            if (found := self._kept(key, folder)) is not None:
                return Stage(name=name, key=key, folder=folder, files=found, reused=True)
            if (found := self._from_previous(name, key)) is not None:
                return Stage(name=name, key=key, folder=self.out, files=found, reused=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial = self._empty(f"{name}.partial")
        shared = self.shared if costly else None
        if shared and not self.force and (taken := shared.take(name, key, partial, progress=self.progress)) is not None:
            self._finish(partial, key, folder, taken)
            return Stage(name=name, key=key, folder=folder, files=taken, reused=True)
        known = make(partial) or {}
        names = sorted(path.name for path in partial.iterdir())
        made = bundle.describe(partial, names, name, known=known, progress=self.progress)
        self._finish(partial, key, folder, made)
        if shared:
            shared.give(key, folder, made, progress=self.progress)
        return Stage(name=name, key=key, folder=folder, files=made, reused=False)

    def publish(
        self, stages: Mapping[str, Stage], manifest: Manifest, *, sign: Callable[[Manifest, str], bytes] | None = None
    ) -> None:
        """Moves all stages' files and the manifest to `out` in one step, and clears the workspace.

        sign: computes the signature of the files in a manifest, as those of a folder of the given name.
        """
        ready = self.change.new / "bundle"
        ready.mkdir()
        (ready / bundle.MANIFEST).write_bytes(manifest.to_bytes())
        if sign is not None:
            (ready / bundle.SIGNATURE).write_bytes(sign(manifest, self.out.name))
        steps = []
        for stage in stages.values():
            # Files of the replaced bundle are linked, not moved: it stays complete until the new one replaces it.
            put = change_steps.link if stage.folder == self.out else change_steps.move
            steps += [put(stage.folder / file.name, ready / file.name) for file in stage.files]
        steps.append(change_steps.move(ready, self.out))
        steps += [change_steps.remove(path) for path in self._stage_folders()]
        self.change.commit(steps, done=f"The bundle {self.out} is published.")

    def _stage_folders(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir() and path != self.change.new]

    def _empty(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _finish(self, partial: Path, key: str, folder: Path, made: tuple[BundleFile, ...]) -> None:
        (partial / INDEX).write_text(Index(key=key, files=made).model_dump_json())
        os.rename(partial, folder)

    def _kept(self, key: str, folder: Path) -> tuple[BundleFile, ...] | None:
        """The stage that an interrupted build finished, if its key is the same and no byte has changed."""
        try:
            index = Index.model_validate_json(
                untrusted.read_bytes(folder / INDEX, max_bytes=bundle.MANIFEST_MAX_BYTES, links=False)
            )
            bundle.check_files(folder, index.files, progress=self.progress)
        except (OSError, ValidationError, DinoexportError):
            return None
        return index.files if index.key == key else None

    def _from_previous(self, name: str, key: str) -> tuple[BundleFile, ...] | None:
        """The files of the same stage in the existing bundle at `out`, if their key and bytes are right."""
        try:
            manifest = bundle.read_manifest(self.out)
            if manifest.stage_keys.get(name) != key:
                return None
            made = tuple(file for file in manifest.files if file.stage == name)
            bundle.check_files(self.out, made, progress=self.progress)
        except DinoexportError:
            return None
        return made


@contextmanager
def workspace(out: Path, *, force: bool, progress: Progress) -> Iterator[Workspace]:
    """The workspace for a bundle at `out`, locked against other processes.

    Whatever happens inside, nothing half written remains: finished stages stay for the next run, the rest is removed.
    """
    doing = f"building {os.path.realpath(out)}"
    shared = shared_cache()
    with files.disk_errors(out), changes.changing(out, doing=doing, progress=progress) as change:
        work = Workspace(change=change, force=force, progress=progress, shared=shared)
        try:
            check_place(change.place)
            if force:
                _remove(change.folder, "*-*")
            yield work
        finally:
            _remove(change.folder, "*.partial")


def _remove(folder: Path, pattern: str) -> None:
    """Removes the stages in `folder` whose names match."""
    for stage in folder.glob(pattern):
        if stage.is_dir():
            shutil.rmtree(stage, ignore_errors=True)


def check_place(out: Path) -> None:
    """Refuses to replace a folder that is not a bundle: it is the user's data. A damaged or old bundle is replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = out / bundle.MANIFEST
    # Web apps and others have a file of this name too; only ours carries a hash of itself.
    content = b""
    if untrusted.is_regular(manifest, links=False):
        content = untrusted.read_bytes(manifest, max_bytes=bundle.MANIFEST_MAX_BYTES, links=False)
    if b'"manifest_sha256"' not in content:
        raise UsageError(f"{out} exists and is not a bundle.", next_step="Choose another --out, or remove it yourself.")
    listed = {bundle.MANIFEST, bundle.SIGNATURE} | {
        path.name for path in out.iterdir() if json.dumps(path.name).encode() in content
    }
    if added := sorted({path.name for path in out.iterdir()} - listed):
        raise UsageError(
            f"{out} holds files that no build wrote: {', '.join(added)}.",
            next_step="Move them away first, or choose another --out: a bundle is replaced as a whole.",
        )

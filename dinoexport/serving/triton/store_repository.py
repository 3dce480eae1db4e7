"""A Triton model repository in an object store: the same releases as on disk, without renames.

The change is made in a mirror of the repository, a local folder with its configurations and its record, by the code
that changes a repository on disk; then what is new in the mirror is sent. In this order:

    1. the new version's own configuration, as a name that must be free: two deployers never share a version
    2. all its other files, and the warm-up's; Triton serves none of them yet
    3. the record of releases, over the one that was read: a second writer sees the first one's release
    4. the configurations that name the version to serve

A deployer that is interrupted before 3 leaves a version that is not served, and after 3 a release that the next deploy
or rollback finishes: configurations follow the record.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dinoexport import bundle
from dinoexport.errors import BuildError, UsageError
from dinoexport.serving.triton import model_repository, releases, repository_state, served_models
from dinoexport.serving.triton.model_files import CONFIG
from dinoexport.serving.triton.model_repository import Deployed
from dinoexport.serving.triton.releases import Releases
from dinoexport.spec import Progress, silent
from dinoexport.system import changes
from dinoexport.system.store import RemotePlace

_RECORD = releases.record_name("")
# How often a deployer starts again because another one was faster.
_ATTEMPTS = 20
# Names that may become a path in the mirror. Anybody can choose names in a store.
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


class _VersionTaken(Exception):
    """Another deployer has this version of this model."""


def deploy(folder: Path, url: str, *, name: str | None = None, progress: Progress = silent, **how: Any) -> Deployed:
    """As `model_repository.deploy`, into the repository at `url`; `how` is passed on.

    Raises what that raises, MissingRequirement when the store cannot be reached or refuses.
    """
    place = RemotePlace(url)
    place.check_writable()
    known_as = name or bundle.read_manifest(folder).variant
    taken: set[str] = set()
    for _ in range(_ATTEMPTS):
        with TemporaryDirectory(prefix="dinoexport-") as scratch:
            mirror = _Mirror(place, Path(scratch), known_as, taken)
            with mirror.drafting():
                deployed = model_repository.deploy(folder, mirror.folder, name=name, progress=progress, **how)
            try:
                mirror.send(deployed, progress)
            except _VersionTaken as version:
                taken.add(str(version))
                continue
        changes.note_done(f"{url} serves {deployed.name} version {deployed.version}.")
        return replace(deployed, repository=url)
    raise BuildError(f"Others keep changing {url}.", next_step="Run it again when they are done.")


def rollback(url: str, name: str) -> Deployed:
    """As `model_repository.rollback`, in the repository at `url`."""
    place = RemotePlace(url)
    place.check_writable()
    with TemporaryDirectory(prefix="dinoexport-") as scratch:
        mirror = _Mirror(place, Path(scratch), name, set())
        if mirror.is_new:
            raise releases.unknown(name, mirror.others, url)
        with mirror.drafting():
            deployed = model_repository.rollback(mirror.folder, name)
        mirror.send(deployed, silent)
    changes.note_done(f"{url} serves {deployed.name} version {deployed.version}.")
    return replace(deployed, repository=url)


class _Mirror:
    """A local folder with the files that decide a change of the repository; its other files are empty."""

    def __init__(self, place: RemotePlace, scratch: Path, name: str, taken: set[str]) -> None:
        """taken: MODEL/VERSION of versions that belong to other deployers, whatever the store lists.

        others: what else was deployed there, by its records.
        """
        scratch = scratch.resolve()  # as it stands in errors
        self._place, self.folder, self._kept = place, scratch / "models", scratch / "before"
        self.folder.mkdir()
        self._kept.mkdir()
        self._before: dict[int, str] = {}
        self.others: set[str] = set()
        names = set()
        for found, _ in place.files():
            if "/" not in found and found.endswith(_RECORD):
                self.others.add(found.removesuffix(_RECORD))
            elif found.startswith(name) and all(_PART.fullmatch(part) for part in found.split("/")):
                names.add(found)
        record = releases.record_name(name)
        self._read, self._tag = place.read_tagged(record, max_bytes=releases.RECORD_MAX_BYTES)
        # Without one nothing was ever served here, whatever folders there are.
        self._add(record, self._read if self._tag else Releases(name=name).to_bytes())
        if self._tag:
            names |= _named_in(self._read, name)  # a listing may be late, and what the record names is there
        names |= {f"{version}/{CONFIG}" for version in taken}
        for path in sorted(names - {record}):
            content = b""
            if path.rpartition("/")[2] == CONFIG:
                with suppress(ValueError, FileNotFoundError):
                    content = place.read(path, max_bytes=repository_state.CONFIG_MAX_BYTES)
                if not content:
                    continue
            self._add(path, content)
        for version in taken:
            (self.folder / version).mkdir(parents=True, exist_ok=True)
        self._finish_others(name)

    @property
    def is_new(self) -> bool:
        """Whether the name was never served."""
        return not self._tag

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Errors name the store, not this folder, which is gone when they are read; nothing is done yet."""
        try:
            with changes.of_a_draft():
                yield
        except UsageError as error:
            if str(self.folder) not in error.message:
                raise
            message = error.message.replace(str(self.folder), str(self._place))
            raise UsageError(message, next_step=error.next_step) from None

    def _finish_others(self, name: str) -> None:
        """Adds the configuration of models whose first deployment, by another process, is not complete."""
        for folder in [path for path in self.folder.iterdir() if path.is_dir() and not (path / CONFIG).exists()]:
            for config in folder.glob(f"*/{CONFIG}"):
                content = config.read_bytes()
                if served_models.deployed_name(content.decode(errors="replace")) == name:
                    self._add(f"{folder.name}/{CONFIG}", content)
                    break

    def _add(self, name: str, content: bytes) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            return  # a store may have a file where it also has a folder; no deployment of ours has
        # Its other name holds the inode, by which a file that was moved is known.
        os.link(path, self._kept / str(len(self._before)))
        self._before[path.stat().st_ino] = name

    def send(self, deployed: Deployed, progress: Progress) -> None:
        """Changes the repository to the mirror's state. Raises _VersionTaken before anything is sent."""
        now = {path.stat().st_ino: path.relative_to(self.folder).as_posix() for path in _files(self.folder)}
        new = sorted(name for inode, name in now.items() if inode not in self._before)
        moved = {before: now[inode] for inode, before in self._before.items() if now.get(inode, before) != before}
        record = releases.record_name(deployed.name)
        last = [name for name in new if re.fullmatch(rf"[^/]+/{re.escape(CONFIG)}", name)]
        claims = [f"{model}/{deployed.version}/{CONFIG}" for model in deployed.models]
        for name in (claim for claim in claims if claim in new):
            try:
                self._place.upload(self.folder / name, name, new=True)
            except FileExistsError:
                raise _VersionTaken(name.rpartition("/")[0]) from None
        others = [name for name in new if name not in (record, *last, *claims)]
        for number, name in enumerate(others, start=1):
            progress(f"sending to {self._place}", number, len(others))
            self._place.upload(self.folder / name, name)
        for before, after in moved.items():
            with suppress(FileNotFoundError):
                self._place.copy(before, after)
        self._record(deployed, record)
        for name in last:
            self._place.write(name, (self.folder / name).read_bytes())
        for before in moved:
            self._place.remove(before)
        _settle(self._place, deployed.name)

    def _record(self, deployed: Deployed, record: str) -> None:
        """Puts the record over the one that was read. A deployment joins what others deployed meanwhile."""
        made = Releases.from_bytes((self.folder / record).read_bytes(), name=deployed.name)
        mine, tag = made.current, self._tag
        assert mine is not None
        known = Releases.from_bytes(self._read, name=deployed.name).releases if self._tag else ()
        for _ in range(_ATTEMPTS):
            try:
                self._place.write_over(record, made.to_bytes(), tag=tag)
            except FileExistsError:
                if mine in known:  # a rollback to it, and nobody knows what from by now
                    break
                raw, tag = self._place.read_tagged(record, max_bytes=releases.RECORD_MAX_BYTES)
                theirs = Releases.from_bytes(raw, name=deployed.name) if tag else Releases(name=deployed.name)
                made = theirs.with_deployed(mine)
            else:
                return
        raise BuildError(
            f"{self._place} was changed by another process meanwhile.",
            next_step="Check what it serves, and run it again.",
        )


def _settle(place: RemotePlace, name: str) -> None:
    """Writes the configurations that the record says are served, until the record did not change meanwhile."""
    before = None
    while True:
        raw, tag = place.read_tagged(releases.record_name(name), max_bytes=releases.RECORD_MAX_BYTES)
        if not tag or tag == before:
            return
        before = tag
        release = Releases.from_bytes(raw, name=name).current
        for model in release.models if release else ():
            assert release is not None
            with suppress(FileNotFoundError, ValueError):
                wanted = place.read(f"{model}/{release.version}/{CONFIG}", max_bytes=repository_state.CONFIG_MAX_BYTES)
                there, _ = place.read_tagged(f"{model}/{CONFIG}", max_bytes=repository_state.CONFIG_MAX_BYTES)
                if there != wanted:
                    place.write(f"{model}/{CONFIG}", wanted)


def _named_in(record: bytes, name: str) -> set[str]:
    """The configurations of all releases in a record."""
    found = Releases.from_bytes(record, name=name)
    each = ((model, release.version) for release in found.releases for model in release.models)
    return {path for model, version in each for path in (f"{model}/{CONFIG}", f"{model}/{version}/{CONFIG}")}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

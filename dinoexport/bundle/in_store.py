"""Bundles in an object store: sent file by file with the manifest last, and read into a complete local copy.

A store renames nothing, so while a bundle is replaced its files may belong to two bundles. A reader notices that: it
compares each file with the hash in the manifest, and reads the manifest again if they differ. A lock file, which only
one process can create, keeps two writers apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from dinoexport.bundle import checks
from dinoexport.bundle import manifest as manifests
from dinoexport.bundle.manifest import MANIFEST, MANIFEST_MAX_BYTES, SIGNATURE, BundleFile, Manifest
from dinoexport.errors import BuildError, DinoexportError, UsageError, ValidationFailed
from dinoexport.spec import Progress, silent
from dinoexport.system import changes, files, store
from dinoexport.system.cache import cache_folder
from dinoexport.system.store import RemotePlace

# A writer's own file; a process that finds another's does not write.
WRITING = ".writing.json"
_SIGNATURE_MAX_BYTES = 1 << 22
# How many times a bundle that is being replaced is read again.
_LOOKS = 5


def local_copy(bundle: str | Path, *, progress: Progress = silent) -> Path:
    """The folder of `bundle`; for a URL, of a copy in the cache, every file checked by the manifest's hash.

    The copy is named after its manifest, so it is downloaded once, and a replaced bundle gets another copy. Raises
    UsageError when there is no bundle, ValidationFailed for a damaged one, MissingRequirement for a store that refuses.
    """
    if not store.is_url(str(bundle)):
        return Path(bundle)
    place = store.RemotePlace(str(bundle))
    seen = b""
    for _ in range(_LOOKS):
        raw = _manifest(place)
        if raw == seen:
            break
        seen = raw
        with suppress(_Replaced):
            return _taken(place, raw, progress)
    raise ValidationFailed(
        f"{place} is damaged: its files are not those of its manifest.", next_step="Build it again, or send it again."
    )


def send(folder: Path, url: str, *, progress: Progress = silent) -> None:
    """Replaces the bundle at `url` by the one in `folder`: its files first, then its signature, its manifest last.

    Raises BuildError when another process is writing there, UsageError for a place that holds something else.
    """
    place = store.RemotePlace(url)
    place.check_writable()
    manifest = manifests.read_manifest(folder)
    with files.disk_errors(folder):
        _check_place(place)
        _claim(place)
        try:
            for number, file in enumerate(manifest.files, start=1):
                progress(f"sending {file.name} to {url}", number, len(manifest.files))
                place.upload(folder / file.name, file.name)
            if (folder / SIGNATURE).exists():
                place.write(SIGNATURE, (folder / SIGNATURE).read_bytes())
            else:
                place.remove(SIGNATURE)
            place.write(MANIFEST, (folder / MANIFEST).read_bytes())
            listed = {file.name for file in manifest.files} | {MANIFEST, SIGNATURE}
            for name in [name for name, _ in place.files() if name not in listed and name != WRITING]:
                place.remove(name)
        finally:
            place.remove(WRITING)


def check_reachable(url: str) -> None:
    """Raises the error for a place that cannot be written to, before hours of work."""
    place = store.RemotePlace(url)
    place.check_writable()
    _check_place(place)


@contextmanager
def destination(out: str | None, *, sending: Callable[[], AbstractContextManager[Progress]]) -> Iterator[Path | None]:
    """The folder in which to make the bundle for `out`; a bundle for a URL is sent there at the end of the block.

    What is made for a URL stays in the cache, so that the next build of it reuses finished stages. sending: gives what
    the progress of sending is reported to.
    """
    if out is None or not store.is_url(out):
        yield None if out is None else Path(out)
        return
    url = out.rstrip("/")
    check_reachable(url)
    folder = cache_folder() / "built" / hashlib.sha256(url.encode()).hexdigest()[:16] / (url.rpartition("/")[2] or "x")
    before = _content(folder / MANIFEST)
    try:
        yield folder
    finally:
        # A rejected bundle too, where that was asked for: it is published, and says so.
        if _content(folder / MANIFEST) not in (b"", before):
            with sending() as progress:
                send(folder, url, progress=progress)
            changes.note_done(f"The bundle {url} is published.")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


class _Replaced(Exception):
    """A file is not the manifest's: it was replaced since the manifest was read, or it is damaged."""


def _manifest(place: RemotePlace) -> bytes:
    try:
        return place.read(MANIFEST, max_bytes=MANIFEST_MAX_BYTES)
    except FileNotFoundError:
        raise UsageError(
            f"{place} is not a bundle: it has no {MANIFEST}.",
            next_step=f"dinoexport build VARIANT --out {place} makes one.",
        ) from None
    except ValueError as error:
        raise manifests.damaged(f"{MANIFEST} is not readable: {error}") from None


def _taken(place: RemotePlace, raw: bytes, progress: Progress) -> Path:
    """The copy in the cache, made now if it is missing."""
    manifest = Manifest.from_bytes(raw)
    # A signature also covers the folder's name.
    name = str(place).rstrip("/").rpartition("/")[2] or "bundle"
    folder = cache_folder() / "bundles" / hashlib.sha256(raw).hexdigest()[:32] / name
    partial = folder.with_name(f".{name}.{os.getpid()}.partial")
    with files.disk_errors(folder.parent):
        signature = b""
        with suppress(FileNotFoundError, ValueError):
            signature = place.read(SIGNATURE, max_bytes=_SIGNATURE_MAX_BYTES)
        if not _is_whole(folder, manifest):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                for file in manifest.files:
                    progress(f"taking {file.name} from {place}", 0, file.size_bytes)
                    _take(place, file, partial / file.name)
                (partial / MANIFEST).write_bytes(raw)
                with suppress(OSError):  # another process was faster and made the same copy
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        # A verdict that `validate` recorded in an earlier copy belongs to that call only.
        _put(folder / MANIFEST, raw)
        if signature:
            _put(folder / SIGNATURE, signature)
        else:
            (folder / SIGNATURE).unlink(missing_ok=True)
    return folder


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether an earlier copy is unchanged; a disk may have damaged it since."""
    try:
        checks.check_files(folder, manifest.files)
    except DinoexportError:
        return False
    return (folder / MANIFEST).exists()


def _take(place: RemotePlace, file: BundleFile, target: Path) -> None:
    try:
        place.fetch(file.name, target, max_bytes=file.size_bytes)
    except (FileNotFoundError, ValueError):
        raise _Replaced(file.name) from None
    if files.sha256(target) != file.sha256:
        raise _Replaced(file.name)


def _put(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(path)


def _check_place(place: RemotePlace) -> None:
    """Raises UsageError for a prefix that holds other files than a bundle's, because writing there removes them."""
    try:
        raw = place.read(MANIFEST, max_bytes=MANIFEST_MAX_BYTES)
    except (FileNotFoundError, ValueError):
        raw = b""
    if b'"manifest_sha256"' not in raw and (name := next((name for name, _ in place.files() if name != WRITING), "")):
        raise UsageError(
            f"{place} holds files that belong to no bundle, such as {name}.",
            next_step="Choose a separate prefix as --out.",
        )


def _claim(place: RemotePlace) -> None:
    who = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        place.write(WRITING, json.dumps(who).encode(), new=True)
    except FileExistsError:
        theirs: dict[str, object] = {}
        with suppress(ValueError, FileNotFoundError):
            theirs = dict(json.loads(place.read(WRITING, max_bytes=1 << 12)))
        since = f" since {theirs.get('since')}" if theirs.get("since") else ""
        raise BuildError(
            f"Another process is writing {place}{since}.",
            next_step=f"Wait for it; if it died, remove {place}/{WRITING}.",
        ) from None

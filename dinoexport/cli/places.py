"""Bundles that a command is given, or is to make, by a folder or by a URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dinoexport.cli.terminal import progress_lines

BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or its URL.")]


def folder_of(bundle: str) -> Path:
    """The bundle's folder; of a URL that of a copy in the cache, taken now if it is not there."""
    from dinoexport.bundle import in_store

    with progress_lines() as progress:
        return in_store.local_copy(bundle, progress=progress)


@contextmanager
def destination(out: str | None) -> Iterator[Path | None]:
    """Where to make the bundle that is to be at `out`; sent there afterwards if that is a URL and anything was made.

    What is made for a URL stays in the cache, so that the next build of it reuses finished stages.
    """
    import hashlib

    from dinoexport.bundle import MANIFEST, in_store
    from dinoexport.system import changes, store
    from dinoexport.system.cache import cache_folder

    if out is None or not store.is_url(out):
        yield None if out is None else Path(out)
        return
    url = out.rstrip("/")
    in_store.check_reachable(url)
    folder = cache_folder() / "built" / hashlib.sha256(url.encode()).hexdigest()[:16] / (url.rpartition("/")[2] or "x")
    before = _content(folder / MANIFEST)
    try:
        yield folder
    finally:
        # A rejected bundle too, where that was asked for: it is published, and says so.
        if _content(folder / MANIFEST) not in (b"", before):
            with progress_lines() as progress:
                in_store.send(folder, url, progress=progress)
            changes.note_done(f"The bundle {url} is published.")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

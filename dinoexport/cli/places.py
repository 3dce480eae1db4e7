"""Bundles that a command reads or makes, given as a folder or as a URL."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from dinoexport.cli.terminal import progress_lines

BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or its URL.")]


def folder_of(bundle: str) -> Path:
    """The bundle's folder; for a URL, that of a copy in the cache, which is downloaded now if it is missing."""
    from dinoexport.bundle import in_store

    with progress_lines() as progress:
        return in_store.local_copy(bundle, progress=progress)


def destination(out: str | None) -> AbstractContextManager[Path | None]:
    """The folder in which to make the bundle for `out`; a bundle for a URL is sent there at the end of the block."""
    from dinoexport.bundle import in_store

    return in_store.destination(out, sending=progress_lines)

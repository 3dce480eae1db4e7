"""Bundles that a command is given, or is to make, by a folder or by a URL."""

from __future__ import annotations

from contextlib import AbstractContextManager
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


def destination(out: str | None) -> AbstractContextManager[Path | None]:
    """Where to make the bundle that is to be at `out`; sent there afterwards if that is a URL and anything was made."""
    from dinoexport.bundle import in_store

    return in_store.destination(out, sending=progress_lines)

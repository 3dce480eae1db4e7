"""The cache folder of this machine: everything in it can be made or downloaded again."""

from __future__ import annotations

import os
from pathlib import Path

from dinoexport.system import store


def cache_folder() -> Path:
    """`$DINOEXPORT_CACHE` where it is a folder, else the XDG cache folder."""
    chosen = os.environ.get("DINOEXPORT_CACHE") or ""
    if chosen and not store.is_url(chosen):
        return Path(chosen).expanduser()
    return Path(f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/dinoexport").expanduser()

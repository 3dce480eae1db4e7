"""Pin files without a recorded hash: the hash of the first download is kept, and later downloads must have it.

This detects a file that changes, but not a file that was wrong from the beginning. Only a hash in the recipe detects
that; recipes with a hash do not use this module.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from dinoexport.config.recipe import WeightFile
from dinoexport.errors import WeightsError
from dinoexport.spec import Progress
from dinoexport.system import files
from dinoexport.system.cache import cache_folder
from dinoexport.weights import download


def with_hash(file: WeightFile, *, progress: Progress) -> WeightFile:
    """The file with the hash it must have: the recorded one, or that of its first download, which is done here."""
    if file.sha256 is not None:
        return file
    pin = _pin(file)
    if (known := _read(pin)) is not None:
        return file.changed(sha256=known)
    path = download.fetch_unknown(file, progress=progress)
    digest = files.sha256(path, progress=progress)
    pinned = file.changed(sha256=digest)
    place = download.cached_path(pinned)
    with files.disk_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
        pin.parent.mkdir(parents=True, exist_ok=True)
        partial = pin.with_name(f"{pin.name}.{os.getpid()}.partial")
        partial.write_text(f"{digest}  {file.url}\n", encoding="utf-8")
        os.replace(partial, pin)
    return pinned


def _pin(file: WeightFile) -> Path:
    return cache_folder() / "weights" / "pins" / f"{hashlib.sha256(file.url.encode()).hexdigest()}.txt"


def _read(pin: Path) -> str | None:
    """The hash in a pin; raises WeightsError if the pin's file does not hold one."""
    if not pin.is_file():
        return None
    found = re.match(r"[0-9a-f]{64}  ", pin.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise WeightsError(f"{pin} holds no SHA-256.", next_step="Remove that file, and check the weights.")
    return found[0].strip()

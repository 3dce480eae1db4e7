"""The outputs of a bundle's graph for labelled images, kept in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoexport import family
from dinoexport.bundle import Manifest, archive
from dinoexport.errors import UsageError
from dinoexport.family import CaseSource
from dinoexport.pipeline.fit.examples import LabelledImage
from dinoexport.pipeline.workspace import key_of
from dinoexport.runtime import cpu, runners
from dinoexport.spec import Array, Arrays, Candidate, Progress, silent
from dinoexport.system import files
from dinoexport.system.cache import cache_folder


def name_of(read: tuple[str, str]) -> str:
    """The name of one output in one form."""
    return f"{read[0]} {read[1]}"


def of_images(
    model: CaseSource,
    images: Path,
    candidate: Candidate,
    manifest: Manifest,
    wanted: Sequence[LabelledImage],
    progress: Progress,
) -> dict[str, dict[str, Array]]:
    """Image's digest -> the features of all kinds, float32; cached, so that another head takes only seconds.

    Images are decoded one at a time, and only those whose features are not there.
    """
    way = runners.way_of(manifest)
    key = key_of(
        graphs=[f.sha256 for f in manifest.files if ".onnx" in f.name],
        way=str(way),
        runtime=cpu.title(way.runtime),
        code=family.code_of(model),  # it prepares the images
    )
    place = cache_folder() / "features" / key[:32]
    found: dict[str, dict[str, Array]] = {}
    missing: dict[str, str] = {}
    for example in wanted:
        if example.digest not in found and (stored := _stored(place, example.digest)) is not None:
            found[example.digest] = stored
    for example in wanted:
        if example.digest not in found and example.digest not in missing.values():
            missing[example.name] = example.digest
    cases = model.cases_from(images, progress=silent, only=missing) if missing else ()
    for done, case in enumerate(cases, start=1):
        progress("computing features", done, len(missing))
        if not isinstance(case, str):
            found[missing[case.name]] = _of_image(candidate(case.inputs))
            _store(place, missing[case.name], found[missing[case.name]])
    if gone := sorted(name for name, digest in missing.items() if digest not in found):
        raise UsageError(f"{gone[0]} changed while it was read.", next_step="Run fit again.")
    return found


def _stored(place: Path, digest: str) -> dict[str, Array] | None:
    try:
        return archive.read(place / f"{digest}.npz")
    except Exception:  # absent, or damaged in any way: it is computed again
        return None


def _store(place: Path, digest: str, features: Mapping[str, Array]) -> None:
    import numpy as np

    partial = place / f"{digest}.npz.{os.getpid()}.partial"
    arrays: Any = features
    with files.disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, place / f"{digest}.npz")


def _of_image(outputs: Arrays) -> dict[str, Array]:
    """Every output of one image as it is, or its mean over the second axis if it has one."""
    import numpy as np

    return {
        name_of((name, "as is" if array.ndim == 2 else "mean")): (
            array[0] if array.ndim == 2 else array[0].mean(axis=0, dtype=np.float64)
        ).astype(np.float32)
        for name, array in outputs.items()
        if array.ndim in (2, 3)
    }

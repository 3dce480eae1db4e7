"""Read a Triton model repository: its releases, models' folders, and the version of each that is served."""

from __future__ import annotations

import re
from pathlib import Path

from dinoexport.serving.triton import releases, served_models
from dinoexport.serving.triton.model_files import CONFIG
from dinoexport.serving.triton.releases import Release, Releases
from dinoexport.serving.triton.signature import Served
from dinoexport.system import untrusted
from dinoexport.system.untrusted import Unreadable

RETIRED = "retired"
# A configuration takes 20 kB, most of it the recipe.
CONFIG_MAX_BYTES = 1 << 20
_VERSIONS = re.compile(r"^    versions: \[(\d{1,9})\]", re.MULTILINE)
_VERSION_FOLDER = re.compile(r"[1-9]\d{0,8}", re.ASCII)


def read_releases(repository: Path, name: str) -> Releases:
    """The releases of `name` in the repository; those of an older dinoexport are found from the folders."""
    try:
        raw = untrusted.read_bytes(
            repository / releases.record_name(name), max_bytes=releases.RECORD_MAX_BYTES, links=False
        )
    except Unreadable as error:
        if not error.absent:
            raise
        return _unrecorded(repository, name)
    return Releases.from_bytes(raw, name=name)


def _unrecorded(repository: Path, name: str) -> Releases:
    """Releases found from folders: any version may have been one, and was served if not newer than the served one.

    If several are served at once, it is unknown which was last, so none counts as served.
    """
    standing = deployed_as(repository, name)
    served = {version for path in standing if (version := _served_version(path)) is not None}
    found = sorted({version for path in standing for version in versions_of(path)})
    made = tuple(
        Release(version=v, models=tuple(path.name for path in standing if v in versions_of(path))) for v in found
    )
    now = served.pop() if len(served) == 1 else 0
    return Releases(name=name, releases=made, served=tuple(v for v in found if v <= now))


def home_of(repository: Path, model: str, known: Releases) -> Path:
    """The path of a model's folder: in the repository, or set aside in another model's folder."""
    places = [repository / model, *(repository / m / RETIRED / model for r in known.releases for m in r.models)]
    return next((place for place in places if is_folder(place)), places[0])


def is_whole(repository: Path, release: Release, known: Releases) -> bool:
    """Whether every model of the release still has its version."""
    return all(config_of(repository, model, release.version, known) is not None for model in release.models)


def config_of(repository: Path, model: str, version: int, known: Releases) -> str | None:
    """A version's own configuration; None if it is missing or not written by dinoexport."""
    config = _config(home_of(repository, model, known) / str(version))
    return config if config is not None and served_models.deployed_name(config) == known.name else None


def served_as(repository: Path, known: Releases) -> Served | None:
    """The facts of the first model of the release that is served; None if there is none, or they cannot be read."""
    if known.current is None:
        return None
    config = config_of(repository, known.current.models[0], known.current.version, known)
    return None if config is None else Served.of_text(config)


def _config(folder: Path) -> str | None:
    """The configuration in a folder of the repository; None if there is none, or if it must not be opened."""
    if not is_folder(folder):
        return None
    try:
        return untrusted.read_text(folder / CONFIG, max_bytes=CONFIG_MAX_BYTES, links=False)
    except Unreadable:
        return None


def is_folder(path: Path) -> bool:
    """A folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _folders(repository: Path) -> list[Path]:
    return [path for path in sorted(repository.iterdir()) if is_folder(path)] if repository.is_dir() else []


def names_in(repository: Path) -> set[str]:
    """The names under which models were deployed."""
    configs = filter(None, map(_config, _folders(repository)))
    return {found for config in configs if (found := served_models.deployed_name(config))}


def deployed_as(repository: Path, name: str) -> list[Path]:
    """The folders of the Triton models that were deployed as `name`, those of its graphs first."""
    found = ((path, _config(path)) for path in _folders(repository) if path.name.startswith(name))
    return [path for path, config in found if config and served_models.deployed_name(config) == name]


def versions_of(folder: Path) -> list[int]:
    """The versions that have a folder in a model's folder."""
    return sorted(int(path.name) for path in _folders(folder) if _VERSION_FOLDER.fullmatch(path.name))


def _served_version(folder: Path) -> int | None:
    found = _VERSIONS.search(_config(folder) or "")
    return int(found[1]) if found else None

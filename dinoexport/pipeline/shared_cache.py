"""Share finished stages between machines: `DINOEXPORT_CACHE=s3://bucket/prefix`.

    stages/KEY/stage.json   a stage's whole key, and its files' names, sizes and hashes; written last
    files/SHA256            a file's bytes, by their own hash: two stages with the same file have it once

A reader trusts nothing: the whole key must match, and every byte is hashed when it is read. Writers do not wait for
each other: a file's name follows from its bytes, so either writer's stage.json names complete files. As with any cache
of results, everyone who may write to the store decides what others build from: let only CI write to it.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from dinoexport.bundle import BundleFile
from dinoexport.config.recipe import Frozen
from dinoexport.errors import DinoexportError
from dinoexport.spec import Progress
from dinoexport.system import files, store
from dinoexport.system.store import Place

INDEX = "stage.json"
_INDEX_MAX_BYTES = 1 << 20


class Index(Frozen):
    """The record in a finished stage: its whole key, of which the folder's name holds only the beginning."""

    key: str
    files: tuple[BundleFile, ...]


class SharedCache:
    """The stages in a store. The first request must succeed; if a later one fails, the build continues without."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._answered = self._given_up = False
        self._wrong: set[str] = set()

    def take(self, name: str, key: str, folder: Path, *, progress: Progress) -> tuple[BundleFile, ...] | None:
        """Puts the stage's files into the empty `folder`; None, and an empty folder, if there is no complete stage.

        Raises MissingRequirement if the store cannot be reached, or refuses, at the first request.
        """
        try:
            found = None if self._given_up else self._index(name, key)
            for file in found.files if found else ():
                progress(f"taking {file.name} from {self._place}", 0, file.size_bytes)
                self._place.fetch(_named(file.sha256), folder / file.name, max_bytes=file.size_bytes)
                if files.sha256(folder / file.name, progress=progress) != file.sha256:
                    self._wrong.add(file.sha256)
                    raise FileNotFoundError(file.name)
        except (FileNotFoundError, ValueError):
            found = None
        except DinoexportError as error:
            self._give_up(error, progress)
            found = None
        if found is None:
            for path in folder.iterdir():
                path.unlink()
            return None
        return found.files

    def give(self, key: str, folder: Path, made: tuple[BundleFile, ...], *, progress: Progress) -> None:
        """Adds a finished stage. Files that are there already are not sent again, unless they were found damaged."""
        if self._given_up:
            return
        try:
            for file in made:
                if file.sha256 in self._wrong or self._place.size(_named(file.sha256)) != file.size_bytes:
                    progress(f"giving {file.name} to {self._place}", 0, file.size_bytes)
                    self._place.upload(folder / file.name, _named(file.sha256))
            index = Index(key=key, files=made).model_dump_json().encode()
            self._place.write(_index_name(key), index)
        except DinoexportError as error:
            self._give_up(error, progress)

    def _index(self, name: str, key: str) -> Index:
        try:
            found = Index.model_validate_json(self._place.read(_index_name(key), max_bytes=_INDEX_MAX_BYTES))
        except FileNotFoundError:
            self._answered = True
            raise
        except ValidationError as error:
            raise ValueError(str(error)) from None
        self._answered = True
        if found.key != key or any(file.stage != name for file in found.files):
            raise ValueError(f"{_index_name(key)} is of another stage")
        return found

    def _give_up(self, error: DinoexportError, progress: Progress) -> None:
        if not self._answered:
            raise error
        self._given_up = True
        progress(f"going on without the shared cache: {error.message}", 0, 0)


def shared_cache() -> SharedCache | None:
    """The cache that `DINOEXPORT_CACHE` names, if it is a URL; no request is sent yet."""
    chosen = os.environ.get("DINOEXPORT_CACHE") or ""
    if not store.is_url(chosen):
        return None
    place = store.RemotePlace(chosen)
    place.check_writable()
    return SharedCache(place)


def _index_name(key: str) -> str:
    return f"stages/{key}/{INDEX}"


def _named(sha256: str) -> str:
    return f"files/{sha256}"

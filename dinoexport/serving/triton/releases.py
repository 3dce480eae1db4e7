"""The releases of a served model: which versions belong together, which is served, and which were served before.

The record is a file beside the model folders, REPOSITORY/NAME.releases.json. Triton ignores it because it is not a
folder. It is plain data without paths: a repository in an object store has the same record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dinoexport.config.recipe import Frozen, Sha256
from dinoexport.errors import UsageError
from dinoexport.spec import closest

# Of a hundred releases of ten models each.
RECORD_MAX_BYTES = 1 << 20
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)]
Version = Annotated[int, Field(ge=1, le=10**9)]


class Release(Frozen):
    """The Triton models that were deployed together: each has a folder of this version.

    bundle: SHA-256 of the deployed bundle's manifest; None if an older dinoexport deployed it.
    """

    version: Version
    models: tuple[ModelName, ...] = Field(min_length=1)
    bundle: Sha256 | None = None
    deployed: datetime | None = None


class Releases(Frozen):
    """All releases of one name. served: the versions that were served, in this order; the last one is served now.

    Rolling back removes the last one, so that a rollback never leads to a release that was itself rolled back.
    """

    schema_version: Literal[1] = 1
    name: ModelName
    releases: tuple[Release, ...] = ()
    served: tuple[Version, ...] = ()

    @model_validator(mode="after")
    def _names_releases(self) -> Self:
        known = [release.version for release in self.releases]
        if len(set(known)) != len(known) or not set(self.served) <= set(known):
            raise ValueError("a version occurs twice, or is served and not listed")
        return self

    @property
    def current(self) -> Release | None:
        """The release that is served; None before the first."""
        return self._of(self.served[-1]) if self.served else None

    def _of(self, version: int) -> Release:
        return next(release for release in self.releases if release.version == version)

    def next_version(self, taken: Collection[int] = ()) -> int:
        """A version that neither a release nor a folder (`taken`) ever had."""
        return 1 + max((*taken, *(release.version for release in self.releases)), default=0)

    def with_deployed(self, release: Release) -> Releases:
        """The record after `release` was deployed; it is served."""
        return Releases(name=self.name, releases=(*self.releases, release), served=(*self.served, release.version))

    def rolled_back(self, is_whole: Callable[[Release], bool] = lambda _: True) -> Releases:
        """The record after going back to the last complete release before the served one.

        Raises UsageError if there is none.
        """
        before = self.served[:-1]
        while before and not is_whole(self._of(before[-1])):
            before = before[:-1]
        if not before:
            now = f"version before {self.served[-1]}" if self.served else "version"
            known = ", ".join(str(release.version) for release in self.releases if is_whole(release))
            raise UsageError(f"{self.name} has no {now}.", next_step=f"Versions there are: {known or 'none'}.")
        return self.changed(served=before)

    def to_bytes(self) -> bytes:
        """The record's content."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, raw: bytes, *, name: str) -> Releases:
        """The record in `raw`; raises UsageError if it is not a record of `name`."""
        try:
            found = cls.model_validate_json(raw)
            if found.name != name:
                raise ValueError(f"it belongs to {found.name!r}")
        except (ValidationError, ValueError) as error:
            lines = str(error).splitlines()
            raise UsageError(
                f"{record_name(name)} is not a record of releases ({lines[0] if lines else error!r}).",
                next_step="Move it away: releases are then found from their folders, as far as possible.",
            ) from None
        return found


def record_name(name: str) -> str:
    """The file that holds the record of `name`."""
    return f"{name}.releases.json"


def unknown(name: str, known: Collection[str], where: str) -> UsageError:
    """The error for a name that was never deployed. `where`: the repository."""
    return UsageError(
        f"{where} serves no {name!r}.{closest(name, sorted(known))}",
        next_step=f"It serves: {', '.join(sorted(known)) or 'nothing; dinoexport deploy adds a bundle'}.",
    )

"""Photographs for a head: prepared as its own evaluation does, for validation and in front of a server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport.family import FrontEnd
from dinoexport.models.dinov2 import serving as of_backbone
from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.spec import Array, Case, Graph, Progress

if TYPE_CHECKING:
    from dinoexport.models.dinov2 import Dinov2Model


def cases_from(
    head: Head,
    backbone: Dinov2Model,
    graph: Graph,
    folder: Path,
    *,
    progress: Progress,
    only: Collection[str] | None = None,
) -> Iterator[Case | str]:
    """A case for each readable image in `folder`."""
    return backbone.cases_from(folder, progress=progress, only=only)


def front_ends(head: Head, graph: Graph, samples: Path | None, *, progress: Progress) -> tuple[FrontEnd, ...]:
    """What is served in front of the graph."""
    return of_backbone.front_ends(graph, samples, progress=progress)


def prepare(
    backbone: Dinov2Model, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]
) -> dict[str, Array]:
    """The graph's input of encoded images."""
    return backbone.prepare(front_end, settings, encoded)

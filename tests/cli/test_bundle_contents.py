"""What `inspect` says of a bundle's head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.bundle import HeadManifest
from dinoexport.cli import contents


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1: a"), (6, "6: a, b, c, d, e, f"), (7, "7: a, b, c, d, e, f, …"), (0, None)]
)
def test_a_heads_first_classes(count: int, shown: str | None) -> None:
    head = HeadManifest(kind="k", dataset="d", terms="t", classes=tuple("abcdefg"[:count]), source="head.pth")
    manifest: Any = SimpleNamespace(head=head)
    assert contents._head(manifest).get("classes") == shown


@pytest.mark.parametrize(("source", "sha256"), [("head.pth", "0" * 64), ("", None)])
def test_where_a_heads_weights_are_from(source: str, sha256: str | None) -> None:
    manifest: Any = SimpleNamespace(head=HeadManifest(kind="k", dataset="d", terms="t", source=source, sha256=sha256))
    found = contents._head(manifest)
    assert found["head's weights"] == (source or "in the checkpoint") and found.get("head's SHA-256") == sha256
    without: Any = SimpleNamespace(head=None)
    assert contents._head(without) == {}

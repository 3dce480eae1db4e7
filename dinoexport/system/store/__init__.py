"""A folder on disk or a prefix in an object store (S3, Google, Azure, HTTP) behind one interface of whole files.

A file appears complete or not at all.
"""

from __future__ import annotations

from pathlib import Path

from dinoexport.system.store.local import LocalPlace
from dinoexport.system.store.place import Place
from dinoexport.system.store.remote import SCHEMES, RemotePlace

__all__ = ["SCHEMES", "LocalPlace", "Place", "RemotePlace", "is_url", "open_place"]


def is_url(place: str) -> bool:
    """Whether `place` names an object store or a server instead of a path."""
    return "://" in place


def open_place(place: str) -> Place:
    """The folder or the object-store prefix called `place`. Nothing is created, and no request is sent yet."""
    return RemotePlace(place) if is_url(place) else LocalPlace(Path(place))

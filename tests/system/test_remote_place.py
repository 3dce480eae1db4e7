"""An object store or a web server as a place, with a stand-in of the client: how it is asked, what breaks off."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.system.store import place as places
from dinoexport.system.store import remote

pytest.importorskip("obstore")


class Store:
    """Objects in pieces of three bytes. breaks: how often a transfer breaks off before it succeeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import obstore

        self.breaks, self.content, self.declared = 0, b"123456", 6
        self.listed: list[Any] = []
        self.opened: list[Any] = []
        self._error = obstore.exceptions.GenericError
        monkeypatch.setattr(obstore, "get", self.get)
        monkeypatch.setattr(obstore, "list", self.list)
        monkeypatch.setattr("obstore.store.from_url", self.open)
        assert sys.modules["obstore"] is obstore

    def open(self, url: str, **options: Any) -> str:
        self.opened.append((url, options))
        return "the store"

    def list(self, _store: Any, under: str | None, *, chunk_size: int) -> Any:
        self.listed.append((under, chunk_size))
        return [[{"path": "models/tiny/a.onnx", "size": 3}], [{"path": "models/tiny/b/c", "size": 4}]]

    def get(self, _store: Any, _name: str) -> Any:
        return SimpleNamespace(meta={"size": self.declared}, stream=self.stream)

    def stream(self, *, min_chunk_size: int) -> Iterator[bytes]:
        assert min_chunk_size == 8 * 1024 * 1024
        for at in range(0, len(self.content), 3):
            yield self.content[at : at + 3]
            if self.breaks:
                self.breaks -= 1
                raise self._error("it broke off")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


def test_a_store_is_opened_with_a_minute_of_patience(store: Store) -> None:
    for url, plain in (("s3://bucket/models", True), ("https://host/models", False)):
        list(remote.RemotePlace(url).files())
        assert store.opened.pop() == (
            url,
            {
                "client_options": {"allow_http": plain},
                "retry_config": {"retry_timeout": timedelta(minutes=1), "max_retries": 8},
            },
        )


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("https://host/models/tiny/", ["a.onnx", "b/c"]),
        ("https://host", ["models/tiny/a.onnx", "models/tiny/b/c"]),
        ("s3://bucket/models/tiny", ["models/tiny/a.onnx", "models/tiny/b/c"]),
    ],
)
def test_names_are_relative_to_the_place(url: str, names: list[str], store: Store) -> None:
    """A web server lists whole paths; of what a store's client lists nothing is taken off."""
    place = remote.RemotePlace(url)
    assert list(place.files()) == list(zip(names, (3, 4), strict=True))
    list(place.files("b"))
    assert store.listed == [(None, 1000), ("b", 1000)]


def test_a_transfer_is_begun_again_three_times(store: Store, tmp_path: Path) -> None:
    store.breaks = 3
    remote.RemotePlace("s3://bucket").fetch("name", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"123456" and store.breaks == 0
    store.breaks = 4
    with pytest.raises(MissingRequirement, match="the store cannot be reached or broke off"):
        remote.RemotePlace("s3://bucket").fetch("name", tmp_path / "broken")
    assert store.breaks == 0


def test_no_more_is_written_than_was_declared(store: Store, tmp_path: Path) -> None:
    place = remote.RemotePlace("s3://bucket")
    place.fetch("name", tmp_path / "whole", max_bytes=6)
    store.declared = 5
    with pytest.raises(ValueError, match="name has 6 bytes, more than 5"):
        place.fetch("name", tmp_path / "too long", max_bytes=5)
    assert (tmp_path / "too long").read_bytes() == b"123"


@pytest.mark.parametrize(
    ("url", "answer", "words"),
    [
        ("https://host", "405 Method Not Allowed", "this web server does not list its files"),
        ("https://host", "the status was 501", "this web server does not list its files"),
        ("s3://bucket", "HTTP status server error (503 Service Unavailable)", "the store answers 503"),
        ("https://host", "500 Internal Server Error", "the store cannot be reached or broke off"),
        ("s3://bucket", "400 Bad Request", "the store cannot be reached or broke off"),
    ],
)
def test_a_web_server_that_lists_nothing_says_so(
    url: str, answer: str, words: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    def refuse(*_: Any, **__: Any) -> None:
        raise obstore.exceptions.GenericError(answer)

    monkeypatch.setattr(obstore, "list", refuse)
    with pytest.raises((UsageError, MissingRequirement), match=words):
        list(remote.RemotePlace(url).files())


def test_a_new_object_is_written_once_and_a_known_one_over_its_own_content(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    asked: list[Any] = []
    monkeypatch.setattr(obstore, "put", lambda _store, name, _content, **how: asked.append((name, how)))
    (tmp_path / "file").write_bytes(b"1")
    place = remote.RemotePlace("s3://bucket")
    place.write("a", b"1")
    place.write("b", b"1", new=True)
    place.write_over("c", b"1", tag=None)
    place.write_over("d", b"1", tag=remote.Tag(e_tag="tag", version=None))
    place.upload(tmp_path / "file", "e")
    place.upload(tmp_path / "file", "f", new=True)
    assert asked == [
        ("a", {"mode": "overwrite", "use_multipart": False}),
        ("b", {"mode": "create", "use_multipart": False}),
        ("c", {"mode": "create", "use_multipart": False}),
        ("d", {"mode": {"e_tag": "tag"}, "use_multipart": False}),
        ("e", {}),
        ("f", {"mode": "create", "use_multipart": False}),
    ]
    with pytest.raises(UsageError, match="is a web server, which cannot be written to"):
        remote.RemotePlace("https://host").write("a", b"1")


@pytest.mark.parametrize(("name", "shown"), [("a.b_c-1", "a-b-c-1"), ("", "host"), ("ü", "-")])
def test_a_machines_name_can_stand_in_a_files(name: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: name)
    assert places.host() == shown

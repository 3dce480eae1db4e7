"""Bundles at a place that is a dict: what is sent in which order, what a copy holds, and who is refused."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.bundle import in_store
from dinoexport.errors import BuildError, UsageError, ValidationFailed
from dinoexport.spec import Progress
from dinoexport.system import store
from dinoexport.system.cache import cache_folder
from tests.bundle.test_bundle import listed, manifest

URL = "s3://bucket/models/tiny"
FILES = ("model.onnx", "model.onnx.data", bundle.REFERENCE)


class Place:
    """All that a bundle needs of an object store. done: the calls that changed or fetched something."""

    held: dict[str, bytes]
    done: list[str]

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def files(self) -> Iterator[tuple[str, int]]:
        return iter([(name, len(content)) for name, content in sorted(self.held.items())])

    def read(self, name: str, *, max_bytes: int) -> bytes:
        if name not in self.held:
            raise FileNotFoundError(name)
        if len(self.held[name]) > max_bytes:
            raise ValueError("too large")
        return self.held[name]

    def fetch(self, name: str, target: Path, *, max_bytes: int) -> None:
        self.done.append(f"fetch {name}")
        target.write_bytes(self.read(name, max_bytes=max_bytes))

    def write(self, name: str, content: bytes, *, new: bool = False) -> None:
        if new and name in self.held:
            raise FileExistsError(name)
        self.done.append(f"write {name}")
        self.held[name] = content

    def upload(self, source: Path, name: str) -> None:
        self.write(name, source.read_bytes())

    def remove(self, name: str) -> None:
        self.done.append(f"remove {name}")
        self.held.pop(name, None)

    def check_writable(self) -> None:
        self.done.append("check")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Place]:
    """An empty place, and an empty cache."""
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "RemotePlace", type("Held", (Place,), {"held": {}, "done": []}))
    return store.RemotePlace  # type: ignore[return-value]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("signature", [b"", b"signed"], ids=["unsigned", "signed"])
def test_sent_files_first_and_the_manifest_last(signature: bytes, small: Path, place: type[Place]) -> None:
    """What the last bundle left is removed at the end, an old signature too, and the lock as the last."""
    place.held |= {"old.onnx": b"old", bundle.SIGNATURE: b"old", bundle.MANIFEST: b'{"manifest_sha256": ""}'}
    if signature:
        (small / bundle.SIGNATURE).write_bytes(signature)
    told: list[tuple[str, int, int]] = []
    in_store.send(small, URL, progress=lambda *words: told.append(words))
    assert told == [(f"sending {name} to {URL}", i, 3) for i, name in enumerate(FILES, start=1)]
    assert place.done == [
        "check",
        f"write {in_store.WRITING}",
        *(f"write {name}" for name in FILES),
        f"{'write' if signature else 'remove'} {bundle.SIGNATURE}",
        f"write {bundle.MANIFEST}",
        "remove old.onnx",
        f"remove {in_store.WRITING}",
    ]
    assert place.held == contents(small)


def test_a_place_that_holds_something_else(small: Path, place: type[Place]) -> None:
    place.held["photo.jpg"] = b""
    for held in (b"", b"{}"):
        if held:
            place.held[bundle.MANIFEST] = held
        with pytest.raises(UsageError, match=r"holds files that belong to no bundle, such as (photo|manifest)"):
            in_store.check_reachable(URL)
    place.held.clear()
    place.held[in_store.WRITING] = b"{}"
    in_store.check_reachable(URL)
    assert place.done == ["check"] * 3


@pytest.mark.parametrize(
    ("theirs", "since"),
    [
        (b'{"since": "2025-01-02T03:04:05+00:00"}', " since 2025-01-02T03:04:05+00:00"),
        (b'{"since": "yesterday"}'.ljust(4096), " since yesterday"),
        (b'{"since": "yesterday"}'.ljust(4097), ""),
        (b"{}", ""),
        (b"no json", ""),
    ],
)
def test_another_writer_is_named(theirs: bytes, since: str, small: Path, place: type[Place]) -> None:
    place.held[in_store.WRITING] = theirs
    with pytest.raises(BuildError) as caught:
        in_store.send(small, URL)
    assert caught.value.message == f"Another process is writing {URL}{since}."
    assert place.held == {in_store.WRITING: theirs}


def test_the_lock_says_who_writes(small: Path, place: type[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(place, "upload", lambda self, *_: said.append(json.loads(self.held[in_store.WRITING])))
    in_store.send(small, URL)
    assert said[0]["host"] == socket.gethostname() and said[0]["pid"] == os.getpid()
    assert said[0]["since"].endswith("+00:00") and in_store.WRITING not in place.held


def test_a_copy_is_taken_once(small: Path, place: type[Place]) -> None:
    """Under the manifest's hash and the place's own name, which a signature covers."""
    place.held |= contents(small) | {bundle.SIGNATURE: b"signed"}
    told: list[tuple[str, int, int]] = []
    copy = in_store.local_copy(f"{URL}/", progress=lambda *words: told.append(words))
    digest = hashlib.sha256(place.held[bundle.MANIFEST]).hexdigest()
    assert copy == cache_folder() / "bundles" / digest[:32] / "tiny" and contents(copy) == place.held
    assert told == [(f"taking {name} from {URL}/", 0, len(place.held[name])) for name in FILES]
    assert [path.name for path in copy.parent.iterdir()] == ["tiny"]
    assert in_store.local_copy(f"{URL}/") == copy and place.done == [f"fetch {name}" for name in FILES]
    assert in_store.local_copy(str(small)) == small


@pytest.mark.parametrize(("size", "taken"), [(4 << 20, True), ((4 << 20) + 1, False)])
def test_what_is_too_large_for_a_signature_is_not_copied(
    size: int, taken: bool, small: Path, place: type[Place]
) -> None:
    place.held |= contents(small) | {bundle.SIGNATURE: bytes(size)}
    copy = in_store.local_copy(URL)
    assert (copy / bundle.SIGNATURE).exists() == taken and bundle.verify(copy).verdict == "passed"


def test_what_was_recorded_in_a_copy_is_undone(small: Path, place: type[Place]) -> None:
    place.held |= contents(small)
    copy = in_store.local_copy(URL)
    for name in (bundle.MANIFEST, bundle.SIGNATURE):
        (copy / name).write_bytes(b"mine")
    assert contents(in_store.local_copy(URL)) == place.held
    (copy / bundle.MANIFEST).unlink()
    assert contents(in_store.local_copy(URL)) == place.held
    (copy / "model.onnx").write_bytes(b"grapj")
    assert contents(in_store.local_copy(URL)) == place.held
    assert len(place.done) == 9, "the lost manifest and the damage cost a copy each"


@pytest.mark.parametrize("damage", [b"grapj", b"graph and more", None], ids=["changed", "longer", "missing"])
def test_a_damaged_place(damage: bytes | None, small: Path, place: type[Place]) -> None:
    place.held |= contents(small)
    del place.held["model.onnx"]
    if damage is not None:
        place.held["model.onnx"] = damage
    with pytest.raises(ValidationFailed, match="is damaged: its files are not those of its manifest"):
        in_store.local_copy(URL)
    assert place.done == ["fetch model.onnx"], "the manifest is the same at the second look"
    assert not [*(cache_folder() / "bundles").rglob("*.partial")]


@pytest.mark.parametrize(("replaced", "whole"), [(4, True), (5, False)])
def test_a_bundle_that_is_being_replaced_is_looked_at_five_times(
    replaced: int, whole: bool, small: Path, place: type[Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each look it has another manifest, whose file comes one look later."""
    contents_of = [b"%d" % i for i in range(6)]
    raw = [manifest(files=(listed("model.onnx", content),)).to_bytes() for content in contents_of]
    looks = iter(range(10))

    def read(self: Place, name: str, *, max_bytes: int) -> bytes:
        if name == bundle.SIGNATURE:
            raise FileNotFoundError(name)
        if name == bundle.MANIFEST:
            look = next(looks)
            self.held["model.onnx"] = contents_of[look if look >= replaced else look + 1]
            return raw[look]
        return self.held[name]

    monkeypatch.setattr(place, "read", read)
    if whole:
        assert (in_store.local_copy(URL) / "model.onnx").read_bytes() == b"%d" % replaced
    else:
        with pytest.raises(ValidationFailed, match="is damaged"):
            in_store.local_copy(URL)


def test_what_is_no_bundle(place: type[Place]) -> None:
    with pytest.raises(UsageError, match=f"{URL} is not a bundle: it has no {bundle.MANIFEST}"):
        in_store.local_copy(URL)
    place.held[bundle.MANIFEST] = b"{"
    with pytest.raises(ValidationFailed, match="is not readable"):
        in_store.local_copy(URL)


@pytest.mark.parametrize(
    ("make", "sent"),
    [
        (lambda folder, new: (folder / bundle.MANIFEST).write_bytes(new), True),
        (lambda folder, new: None, False),
        (lambda folder, new: (folder / bundle.MANIFEST).unlink(missing_ok=True), False),
    ],
    ids=["made", "left", "removed"],
)
@pytest.mark.parametrize("before", [False, True])
def test_what_is_made_for_a_place_is_sent_there(
    before: bool, make: Callable[[Path, bytes], Any], sent: bool, place: type[Place], tmp_path: Path
) -> None:
    """Made in the cache, under the address's hash and its last part, which the next build finds again."""
    empty = manifest(files=(), graphs=()).to_bytes()
    used: list[str] = []

    @contextmanager
    def sending() -> Iterator[Progress]:
        used.append("sending")
        yield lambda *_: None

    folder = cache_folder() / "built" / hashlib.sha256(URL.encode()).hexdigest()[:16] / "tiny"
    folder.mkdir(parents=True)
    if before:
        (folder / bundle.MANIFEST).write_bytes(manifest(files=(), graphs=(), card={"old": ""}).to_bytes())
    with in_store.destination(f"{URL}/", sending=sending) as given:
        assert given == folder
        make(folder, empty)
    assert used == (["sending"] if sent else [])
    assert place.held == ({bundle.MANIFEST: empty} if sent else {})


def test_a_folder_of_one_s_own_is_used_as_it_is(tmp_path: Path) -> None:
    for out, wanted in ((None, None), (str(tmp_path), tmp_path)):
        with in_store.destination(out, sending=pytest.fail) as given:
            assert given == wanted

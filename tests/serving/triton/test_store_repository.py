"""A model repository in an object store that is held in memory: what is sent, in which order, and who else deploys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import BuildError, UsageError
from dinoexport.serving.triton import model_repository, store_repository
from dinoexport.serving.triton.model_repository import Deployed
from dinoexport.system import changes
from dinoexport.system.store import RemotePlace
from tests.serving.triton.conftest import CONTENT, Given
from tests.serving.triton.test_made_models import PLAIN

obstore = pytest.importorskip("obstore")
URL = "s3://bucket/models"
OURS = b"# dinoexport deployed this as tiny\n"


class Store:
    """The repository, seen by a client of its own, and what deployers did to it: (kind, name)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder, held = folder, obstore.store.MemoryStore()
        monkeypatch.setattr("obstore.store.from_url", lambda *_, **__: held)
        self.sent: list[tuple[str, str]] = []
        self.place = RemotePlace(URL)
        for kind in ("upload", "write", "write_over", "copy", "remove"):
            monkeypatch.setattr(RemotePlace, kind, self._noted(kind, getattr(RemotePlace, kind)))

    def _noted(self, kind: str, real: Callable[..., None]) -> Any:
        def call(place: Any, *args: Any, **how: Any) -> None:
            if place is not self.place:
                self.sent.append((kind, args[1] if kind in ("upload", "copy") else args[0]))
            real(place, *args, **how)

        return call

    def deploy(self, **options: Any) -> Deployed:
        return store_repository.deploy(self._folder, URL, **{"name": "tiny"} | options)

    def names(self) -> set[str]:
        return {name for name, _ in self.place.files()}

    def served(self, model: str = "tiny") -> tuple[list[int], str]:
        """(versions in the order in which they were served, the version that Triton reads)."""
        record = json.loads(self.place.read("tiny.releases.json"))
        return record["served"], self.place.read(f"{model}/config.pbtxt").decode().partition("versions: [")[2][0]


@pytest.fixture
def store(given: Given, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    return Store(monkeypatch, tmp_path / "bundle")


VERSION = ["config.pbtxt", "model.onnx/model.onnx", "model.onnx/model.onnx.data", "reference.npz"]


def of(version: int) -> list[str]:
    return [f"tiny/{version}/{file}" for file in VERSION] + [f"tiny/warmup/{version}-{i}-0" for i in (0, 1)]


def test_files_are_sent_first_then_the_record_and_the_configuration_last(store: Store) -> None:
    shown: list[tuple[str, int, int]] = []
    before = changes.done()
    first = store.deploy(progress=lambda *step: shown.append(step))
    assert (first.repository, first.name, first.version, first.previous) == (URL, "tiny", 1, None)
    uploads = [("upload", name) for name in of(1)]
    last = [("write", "tiny/config.pbtxt")]
    assert store.sent == [*uploads, ("write_over", "tiny.releases.json"), ("write", "tiny.releases.json"), *last]
    assert [step for step in shown if step[0].startswith("sending")] == [
        (f"sending to {URL}", number, 5) for number in range(1, 6)
    ]
    assert changes.done() == (*before, f"{URL} serves tiny version 1.")
    store.sent.clear()
    second = store.deploy()
    assert (second.version, second.previous) == (2, 1) and store.served() == ([1, 2], "2")
    uploads = [("upload", name) for name in of(2)]
    assert store.sent == [*uploads, ("write_over", "tiny.releases.json"), *last]
    assert store.names() == {"tiny.releases.json", "tiny/config.pbtxt", *of(1), *of(2)}
    assert store.place.read("tiny/2/model.onnx/model.onnx") == CONTENT["model.onnx"]
    back = store_repository.rollback(URL, "tiny")
    assert (back.repository, back.version, back.previous) == (URL, 1, 2) and store.served() == ([1], "1")
    assert changes.done()[len(before) :] == tuple(f"{URL} serves tiny version {version}." for version in (1, 2, 1))
    with pytest.raises(UsageError, match="tiny has no version before 1"):
        store_repository.rollback(URL, "tiny")


def test_the_name_is_the_variants_unless_another_is_given(store: Store) -> None:
    assert [store.deploy(name=None).version, store.deploy(name=None).version] == [1, 2]
    assert [store.deploy(name="own").version, store.deploy(name="own").version] == [1, 2]
    with pytest.raises(UsageError) as refused:
        store.place.write("readme", b"")
        store.place.write("deep/other.releases.json", b"")
        store_repository.rollback(URL, "tinny")
    assert refused.value.message == f"{URL} serves no 'tinny'. Did you mean 'tiny'?"
    assert refused.value.next_step == "It serves: own, tiny."


def test_models_that_are_not_in_a_release_are_moved_inside_the_store(store: Store, given: Given) -> None:
    store.deploy()
    given.ends = (PLAIN,)
    assert [store.deploy().models, store.deploy().version] == [("tiny", "tiny_images_prepare", "tiny_images"), 3]
    whole = store.names()
    store_repository.rollback(URL, "tiny")
    assert store.names() == whole and store.served("tiny_images") == ([1, 2], "2")
    store.sent.clear()
    assert store_repository.rollback(URL, "tiny").retired == ("tiny_images_prepare", "tiny_images")
    moved = {name for name in whole if name.startswith("tiny_images")}
    assert store.names() == whole - moved | {f"tiny/retired/{name}" for name in moved}
    assert {name for kind, name in store.sent if kind == "remove"} == moved
    assert store.deploy().version == 4 and moved < store.names()


def interrupted(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, meanwhile: Callable[[], Any], *, always: bool = False
) -> None:
    """Before `name` is sent by `kind`, something else happens, once unless it does so each time."""
    real, happened = getattr(RemotePlace, kind), SimpleNamespace(count=0)

    def call(place: Any, target: str, *args: Any, **how: Any) -> None:
        if target == name and (always or not happened.count):
            happened.count += 1
            meanwhile()
        real(place, target, *args, **how)

    monkeypatch.setattr(RemotePlace, kind, call)


def test_a_version_belongs_to_one_deployer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose list is late: the next free version is taken, and the other one's file stays."""
    monkeypatch.setattr(RemotePlace, "files", lambda *_: iter(()))
    for version in (1, 2):
        store.place.write(f"tiny/{version}/config.pbtxt", OURS)
    assert store.deploy().version == 3
    assert store.sent[:3] == [("upload", f"tiny/{version}/config.pbtxt") for version in (1, 2, 3)]
    assert [store.place.read(f"tiny/{version}/config.pbtxt") for version in (1, 2)] == [OURS, OURS]
    assert store.deploy().previous == 3, "the record names what the list lacks"


def test_a_deployment_is_tried_twenty_times(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared each time is made up: a version that somebody else has."""

    def prepare(_folder: Path, repository: Path, **_: Any) -> Deployed:
        (repository / "tiny" / "1").mkdir(parents=True, exist_ok=True)
        (repository / "tiny" / "1" / "config.pbtxt").write_bytes(OURS)
        return Deployed(repository=repository, name="tiny", version=1, previous=None, models=("tiny",))

    def taken(_place: Any, _source: Path, name: str, *, new: bool = False) -> None:
        store.sent.append((str(new), name))
        raise FileExistsError

    monkeypatch.setattr(model_repository, "deploy", prepare)
    monkeypatch.setattr(RemotePlace, "upload", taken)
    with pytest.raises(BuildError) as refused:
        store.deploy()
    assert refused.value.message == f"Others keep changing {URL}."
    assert store.sent == [("True", "tiny/1/config.pbtxt")] * 20


@pytest.mark.parametrize("late", [True, False])
def test_what_somebody_else_has_under_the_name_is_named_in_the_store(
    late: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it appears only when the first version is sent, and where its configuration is empty."""
    store.place.write("tiny/1/config.pbtxt", b"")
    if late:
        monkeypatch.setattr(RemotePlace, "files", lambda *_: iter(()))
    else:
        store.place.write("tiny/1/model.onnx", b"theirs")
    with pytest.raises(UsageError) as refused:
        store.deploy()
    assert refused.value.message == f"{URL}/tiny is there already and was not deployed under this name."
    assert refused.value.next_step == "Choose another --name, or move it away."
    assert store.sent == ([("upload", "tiny/1/config.pbtxt")] if late else [])


def test_a_release_that_others_made_meanwhile_stays_in_the_record(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.deploy()
    with monkeypatch.context() as patch:
        interrupted(patch, "write_over", "tiny.releases.json", store.deploy)
        assert store.deploy().version == 2
    assert store.served() == ([1, 3, 2], "2")
    with monkeypatch.context() as patch:
        interrupted(patch, "write_over", "tiny.releases.json", store.deploy)
        with pytest.raises(BuildError) as refused:
            store_repository.rollback(URL, "tiny")
    assert refused.value.message == f"{URL} was changed by another process meanwhile."
    assert store.served() == ([1, 3, 2, 4], "4")


def test_the_first_record_is_joined_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, "write_over", "tiny.releases.json", store.deploy)
    assert store.deploy().version == 1 and store.served() == ([2, 1], "1")


def test_a_record_that_changes_each_time_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.deploy()

    def touched() -> None:
        record = json.loads(store.place.read("tiny.releases.json"))
        store.place.write("tiny.releases.json", json.dumps(record).encode())

    store.sent.clear()
    interrupted(monkeypatch, "write_over", "tiny.releases.json", touched, always=True)
    with pytest.raises(BuildError, match="was changed by another process meanwhile"):
        store.deploy()
    assert store.sent.count(("write_over", "tiny.releases.json")) == 20 and store.served() == ([1], "1")


def test_configurations_follow_the_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes a configuration late finds that the record names another version, and writes that one's."""
    interrupted(monkeypatch, "write", "tiny/config.pbtxt", store.deploy)
    assert store.deploy().version == 1
    assert store.served() == ([1, 2], "2")


class CutOff(Exception):
    pass


def test_what_a_dead_deployer_left_is_finished(store: Store, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote the record and no configuration; of a model that another name has none is made up."""

    def die() -> None:
        raise CutOff

    given.ends = (PLAIN,)
    before = changes.done()
    with monkeypatch.context() as patch:
        interrupted(patch, "write", "tiny/config.pbtxt", die)
        with pytest.raises(CutOff):
            store.deploy()
    assert changes.done() == before, "its last words do not say that the store serves it"
    assert "tiny/config.pbtxt" not in store.names() and "tiny.releases.json" in store.names()
    store.place.write("tiny_own/1/config.pbtxt", b"# dinoexport deployed this as tiny_own\n")
    found = store.deploy()
    assert (found.version, found.previous) == (2, 1) and store.served() == ([1, 2], "2")
    assert "tiny_own/config.pbtxt" not in store.names()


@pytest.mark.parametrize(
    ("name", "size_bytes", "known"),
    [
        ("tiny_x/config.pbtxt", 0, True),
        ("tiny_x/config.pbtxt", 1024 * 1024, True),
        ("tiny_x/config.pbtxt", 1024 * 1024 + 1, False),
        ("tiny x/config.pbtxt", 0, False),
        ("tiny_x/.1/config.pbtxt", 0, False),
    ],
)
def test_which_models_count_as_deployed_under_the_name(name: str, size_bytes: int, known: bool, store: Store) -> None:
    """A configuration that is too long, or below what is no name for a folder, is not read."""
    store.place.write(name, OURS.ljust(size_bytes))
    if known:
        with pytest.raises(UsageError, match="tiny_x would stay behind in the previous version"):
            store.deploy()
    else:
        assert store.deploy().version == 1


def test_a_name_that_is_a_file_and_a_folder_is_no_error(store: Store) -> None:
    for name in ("tiny_x", "tiny_x/y", "tiny_x/y/z"):
        store.place.write(name, b"theirs")
    assert store.deploy().version == 1 and store.place.read("tiny_x/y") == b"theirs"

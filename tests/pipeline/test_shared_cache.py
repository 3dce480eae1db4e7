"""Stages shared by machines: taken by their whole key, believed by their hash, whoever writes at the same time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.pipeline import shared_cache
from dinoexport.pipeline.shared_cache import SharedCache
from dinoexport.pipeline.workspace import Stage, key_of, workspace
from dinoexport.spec import silent
from dinoexport.system import hardware, store
from tests.pipeline.made_bundles import Maker, manifest_of
from tests.stores.s3_server import S3Server, missing

KEY = key_of(weights="a")


def build(
    out: Path, make: Callable[[Path], None], cache: SharedCache | None, patch: pytest.MonkeyPatch, **how: Any
) -> Stage:
    """A build of one costly stage on a machine of its own."""
    patch.setattr("dinoexport.pipeline.workspace.shared_cache", lambda: cache)
    with workspace(out, force=how.get("force", False), progress=how.get("progress", silent)) as work:
        stage = work.stage("export", how.get("key", KEY), make, costly=True)
        work.publish({"export": stage}, manifest_of(stage))
    return stage


@pytest.fixture
def place(tmp_path: Path) -> store.LocalPlace:
    """A folder in the place of the store."""
    return store.LocalPlace(tmp_path / "shared")


def test_a_second_machine_makes_nothing(place: store.LocalPlace, tmp_path: Path, monkeypatch: Any) -> None:
    make = Maker(content=b"graph" * 1000)
    assert not build(tmp_path / "one", make, SharedCache(place), monkeypatch).reused
    assert build(tmp_path / "two", make, SharedCache(place), monkeypatch).reused
    assert make.calls == 1
    assert (tmp_path / "two" / "model.onnx").read_bytes() == make.content
    assert not build(tmp_path / "three", make, SharedCache(place), monkeypatch, key=key_of(weights="b")).reused
    assert len(list(place.files("files"))) == 1, "one file of two stages lies there once"
    assert not build(tmp_path / "four", make, SharedCache(place), monkeypatch, force=True).reused
    assert make.calls == 3


def test_what_is_taken_is_told_from_its_first_byte(place: store.LocalPlace, tmp_path: Path, monkeypatch: Any) -> None:
    make = Maker(content=b"graph" * 1000)
    build(tmp_path / "one", make, SharedCache(place), monkeypatch)
    told: list[tuple[str, int, int | None]] = []
    build(tmp_path / "two", make, SharedCache(place), monkeypatch, progress=lambda *words: told.append(words))
    assert (f"taking model.onnx from {place}", 0, 5000) in told
    assert all(0 <= done <= total for _, done, total in told if total is not None), told


def test_what_is_cheap_is_not_sent(place: store.LocalPlace, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("dinoexport.pipeline.workspace.shared_cache", lambda: SharedCache(place))
    with workspace(tmp_path / "out", force=False, progress=silent) as work:
        work.stage("judge", KEY, Maker())
    assert not list(place.files())


@pytest.mark.parametrize(
    "damage", ["other bytes", "cut short", "no file", "another key", "another stage", "no JSON", "huge"]
)
def test_what_is_wrong_there_is_made_again_and_mended(
    damage: str, place: store.LocalPlace, tmp_path: Path, monkeypatch: Any
) -> None:
    assert place.local is not None
    make = Maker(content=b"graph" * 1000)
    build(tmp_path / "one", make, SharedCache(place), monkeypatch)
    (file,) = (place.local / "files").iterdir()
    index = place.local / "stages" / KEY / shared_cache.INDEX
    said = json.loads(index.read_text())
    if damage == "other bytes":
        file.write_bytes(b"graff" * 1000)
    elif damage == "cut short":
        file.write_bytes(make.content[:-1])
    elif damage == "no file":
        file.unlink()
    elif damage == "another key":
        index.write_text(json.dumps({**said, "key": key_of(weights="b")}))
    elif damage == "another stage":
        index.write_text(json.dumps({**said, "files": [{**said["files"][0], "stage": "engine"}]}))
    elif damage == "no JSON":
        index.write_text("<html>")
    else:
        index.write_bytes(b" " * (2 << 20) + index.read_bytes())
    assert not build(tmp_path / "two", make, SharedCache(place), monkeypatch).reused
    assert (tmp_path / "two" / "model.onnx").read_bytes() == make.content
    assert build(tmp_path / "three", make, SharedCache(place), monkeypatch).reused and make.calls == 2


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/b", ".."])
def test_no_name_leads_out(name: str, place: store.LocalPlace, tmp_path: Path, monkeypatch: Any) -> None:
    assert place.local is not None
    build(tmp_path / "one", Maker(), SharedCache(place), monkeypatch)
    index = place.local / "stages" / KEY / shared_cache.INDEX
    said = json.loads(index.read_text())
    index.write_text(json.dumps({**said, "files": [{**said["files"][0], "name": name}]}))
    assert not build(tmp_path / "two", Maker(), SharedCache(place), monkeypatch).reused
    assert not list(tmp_path.rglob("escaped*"))


def test_several_writers(place: store.LocalPlace, tmp_path: Path) -> None:
    """Engines differ from build to build: whoever comes first or last, what is taken is one of them, whole."""
    folders = []
    for i in range(6):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "model.plan").write_bytes(bytes([i]) * 10_000)
        folders.append(folder)

    def give(folder: Path) -> None:
        from dinoexport import bundle

        made = bundle.describe(folder, ["model.plan"], "engine", progress=silent)
        SharedCache(place).give(KEY, folder, made, progress=silent)

    writers = []
    for folder in folders:
        pid = os.fork()
        if not pid:
            give(folder)
            os._exit(0)
        writers.append(pid)
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in writers)
    (tmp_path / "taken").mkdir()
    assert SharedCache(place).take("engine", KEY, tmp_path / "taken", progress=silent)
    content = (tmp_path / "taken" / "model.plan").read_bytes()
    assert len(content) == 10_000 and len(set(content)) == 1


class Breaking(store.LocalPlace):
    """A store that answers so often, and then no more."""

    def __init__(self, folder: Path, answers: int) -> None:
        super().__init__(folder)
        self.answers = answers

    def _count(self) -> None:
        self.answers -= 1
        if self.answers < 0:
            raise MissingRequirement("s3://bucket: the store cannot be reached or broke off.", next_step="Check it.")

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        self._count()
        return super().read(name, max_bytes=max_bytes)

    def fetch(self, name: str, target: Path, *, max_bytes: int | None = None) -> None:
        self._count()
        target.write_bytes(b"half")
        super().fetch(name, target.with_name("x"), max_bytes=max_bytes)

    def size(self, name: str) -> int | None:
        self._count()
        return super().size(name)


def test_a_store_that_never_answers_stops_the_build_and_one_that_breaks_off_does_not(
    tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(MissingRequirement, match="cannot be reached"):
        build(tmp_path / "out", Maker(), SharedCache(Breaking(tmp_path / "shared", 0)), monkeypatch)
    assert not (tmp_path / "out").exists()
    build(tmp_path / "first", Maker(), SharedCache(store.LocalPlace(tmp_path / "shared")), monkeypatch)
    for answers in (1, 2):
        said: list[str] = []
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        stage = build(
            tmp_path / "out",
            make := Maker(),
            SharedCache(Breaking(tmp_path / "shared", answers)),
            monkeypatch,
            progress=lambda doing, *_: said.append(doing),  # noqa: B023
        )
        assert (stage.reused, make.calls) == (False, 1)
        assert (tmp_path / "out" / "model.onnx").read_bytes() == b"graph"
        assert any("going on without the shared cache" in words for words in said) or answers == 2


class Measured(store.LocalPlace):
    """Records how much was copied."""

    copied: list[int]

    def fetch(self, name: str, target: Path, *, max_bytes: int | None = None) -> None:
        self.copied = [*getattr(self, "copied", []), 0]
        try:
            super().fetch(name, target, max_bytes=max_bytes)
        finally:
            self.copied[-1] = target.stat().st_size


def test_a_file_larger_than_recorded_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store cannot fill the disk: what it holds is refused by its size, before it is hashed."""
    place = Measured(tmp_path / "shared")
    build(tmp_path / "one", make := Maker(), SharedCache(place), monkeypatch)
    (file,) = (tmp_path / "shared" / "files").iterdir()
    os.truncate(file, 1 << 26)
    assert not build(tmp_path / "two", make, SharedCache(place), monkeypatch).reused
    assert place.copied == [0]
    assert build(tmp_path / "three", make, SharedCache(place), monkeypatch).reused


def test_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dinoexport.system.cache import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("DINOEXPORT_CACHE", "s3://bucket/cache")
    assert cache_folder() == tmp_path / "dinoexport" and shared_cache.shared_cache() is not None
    monkeypatch.setenv("DINOEXPORT_CACHE", "https://example.org/cache")
    with pytest.raises(UsageError, match="cannot be written to"):
        shared_cache.shared_cache()
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" and shared_cache.shared_cache() is None


def test_like_cards_share_an_engine_and_others_do_not() -> None:
    """The whole key holds GPU, driver and TensorRT, and not which of several like cards it was."""
    from dinoexport.pipeline.stages.engine import gpu_facts

    card = hardware.Gpu(
        index=0, name="NVIDIA L4", uuid="GPU-1", compute_capability="8.9", memory_bytes=24 << 30, driver="580.1"
    )
    from dataclasses import replace

    assert gpu_facts(card) == gpu_facts(replace(card, index=3, uuid="GPU-2"))
    for changes in (
        {"driver": "590.1"},
        {"name": "NVIDIA L40"},
        {"memory_bytes": 48 << 30},
        {"compute_capability": "9.0"},
    ):
        assert gpu_facts(card) != gpu_facts(replace(card, **changes))
    assert gpu_facts(None) is None


def test_on_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := missing():
        pytest.skip(reason)
    server = S3Server()
    try:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DINOEXPORT_CACHE", "s3://bucket/cache")
        make = Maker(content=bytes(range(256)) * 40_000)  # 10 MB: two parts of an upload
        monkeypatch.setattr("dinoexport.pipeline.workspace.shared_cache", shared_cache.shared_cache)
        for name, reused in (("one", False), ("two", True)):
            with workspace(tmp_path / name, force=False, progress=silent) as work:
                stage = work.stage("export", KEY, make, costly=True)
                work.publish({"export": stage}, manifest_of(stage))
            assert stage.reused == reused
        assert make.calls == 1 and (tmp_path / "two" / "model.onnx").read_bytes() == make.content
        place = store.open_place("s3://bucket/cache")
        (name,) = (name for name, _ in place.files("files"))
        place.write(name, b"of somebody else")
        monkeypatch.setenv("DINOEXPORT_CACHE", "s3://bucket/cache")
        with workspace(tmp_path / "three", force=False, progress=silent) as work:
            assert not work.stage("export", KEY, make, costly=True).reused
        assert place.size(name) == len(make.content), "mended"
    finally:
        server.stop()


class Answering:
    """A store that does as a test says, and counts what it is asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def __str__(self) -> str:
        return "s3://bucket"

    def __getattr__(self, name: str) -> Any:
        def asked(*words: Any, **options: Any) -> Any:
            self.asked.append((name, options))
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return asked


BROKEN = MissingRequirement("it broke", next_step="")


def test_a_store_that_answered_once_may_break_off(tmp_path: Path) -> None:
    """That there is no such stage is an answer too. It is given up in one line, and not asked again."""
    told: list[tuple[Any, ...]] = []
    place = Answering(read=FileNotFoundError("no stage"), size=None, upload=BROKEN)
    cache = SharedCache(place)  # type: ignore[arg-type]
    (tmp_path / "a").write_bytes(b"x")
    (made,) = bundle.describe(tmp_path, ["a"], "export")

    def give() -> None:
        cache.give(KEY, tmp_path, (made,), progress=lambda *step: told.append(step))

    (tmp_path / "empty").mkdir()
    assert cache.take("export", KEY, tmp_path / "empty", progress=silent) is None
    assert place.asked == [("read", {"max_bytes": 1 << 20})]
    give()
    assert told == [("giving a to s3://bucket", 0, 1), ("going on without the shared cache: it broke", 0, 0)]
    assert [name for name, _ in place.asked] == ["read", "size", "upload"]
    give()
    assert cache.take("export", KEY, tmp_path / "empty", progress=silent) is None
    assert len(place.asked) == 3 and len(told) == 2


def test_a_store_that_never_answered_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingRequirement, match="it broke"):
        SharedCache(Answering(read=BROKEN)).take("export", KEY, tmp_path / "empty", progress=silent)  # type: ignore[arg-type]

"""A model repository in a real S3 server: releases as on disk, whoever else deploys, wherever it is cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dinoexport import cli
from dinoexport.errors import BuildError, UsageError
from dinoexport.serving.triton import model_repository, releases, store_repository
from dinoexport.system import store
from tests.stores.s3_server import S3Server
from tests.stores.test_bundles import url


def served(there: str, name: str = "tiny_swiglu") -> tuple[int, str]:
    """(version by the record, configuration that Triton reads)."""
    place = store.RemotePlace(there)
    record = releases.Releases.from_bytes(place.read(f"{name}.releases.json"), name=name)
    assert record.current is not None
    return record.current.version, place.read(f"{name}/config.pbtxt").decode()


def is_whole(there: str) -> int:
    """The version that is served, after its configuration was found to be its own and its files to be there."""
    version, config = served(there)
    names = {name for name, _ in store.RemotePlace(there).files()}
    assert config == store.RemotePlace(there).read(f"tiny_swiglu/{version}/config.pbtxt").decode()
    assert f"versions: [{version}]" in config
    assert f"tiny_swiglu/{version}/model.onnx/model.onnx" in names
    return version


def test_the_same_as_on_disk(server: S3Server, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    there, disk = url(request) + "/models", tmp_path / "models"
    for number in (1, 2):
        for to in (there, str(disk)):
            shown = CliRunner().invoke(cli.app, ["deploy", str(tiny), "--to", to, "--json"])
            assert shown.exit_code == 0, shown.output
            facts = json.loads(shown.stdout)
            assert (facts["version"], facts["repository"]) == (number, to)
    place = store.RemotePlace(there)
    names = {name for name, _ in place.files()}
    assert names == {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()}
    for name in names - {"tiny_swiglu.releases.json"}:
        if not name.endswith("config.pbtxt"):  # their delays were measured a moment apart
            assert place.read(name) == (disk / name).read_bytes(), name
    assert is_whole(there) == 2
    for to in (there, str(disk)):
        shown = CliRunner().invoke(cli.app, ["rollback", to, "tiny_swiglu", "--json"])
        assert shown.exit_code == 0 and json.loads(shown.stdout)["version"] == 1, shown.output
    assert is_whole(there) == 1
    with pytest.raises(UsageError, match="no version before 1"):
        store_repository.rollback(there, "tiny_swiglu")
    with pytest.raises(UsageError, match="serves no 'other'"):
        store_repository.rollback(there, "other")
    assert store_repository.deploy(tiny, there).version == 3


def test_files_first_and_the_configuration_last(
    server: S3Server, tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    for kind in ("upload", "write", "write_over"):
        real = getattr(store.RemotePlace, kind)

        def noted(self: Any, *args: Any, real: Any = real, kind: str = kind, **how: Any) -> None:
            sent.append(args[1] if kind == "upload" else args[0])
            real(self, *args, **how)

        monkeypatch.setattr(store.RemotePlace, kind, noted)
    store_repository.deploy(tiny, url(request))
    sent = [name for i, name in enumerate(sent) if name not in sent[:i]]
    last = sent.index("tiny_swiglu.releases.json")
    assert sent[0] == "tiny_swiglu/1/config.pbtxt"
    assert all(name.count("/") == 1 and name.endswith("/config.pbtxt") for name in sent[last + 1 :])
    assert not any(name.count("/") == 1 and name.endswith("/config.pbtxt") for name in sent[:last])


def test_cut_off_at_every_request(
    server: S3Server, tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever request is the last one: what is served is whole, and the next deploy serves its own."""
    there = url(request)
    place = store.RemotePlace(there)

    class CutOff(Exception):
        pass

    for number in range(1, 60):
        left = number

        def counted(real: Any) -> Any:
            def call(self: Any, *args: Any, **how: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise CutOff
                return real(self, *args, **how)

            return call

        with monkeypatch.context() as patch:
            for kind in ("upload", "write", "write_over", "copy", "remove"):
                patch.setattr(store.RemotePlace, kind, counted(getattr(store.RemotePlace, kind)))
            try:
                store_repository.deploy(tiny, there)
            except CutOff:
                pass
            else:
                break
        config, _ = place.read_tagged("tiny_swiglu/config.pbtxt", max_bytes=1 << 20)
        if config:  # what Triton would serve is whole, whether or not the record is further already
            version = config.decode().partition("versions: [")[2].partition("]")[0]
            assert place.size(f"tiny_swiglu/{version}/model.onnx/model.onnx.data"), number
    else:
        raise AssertionError("it never ended")
    assert number > 3 and is_whole(there)
    assert store_repository.rollback(there, "tiny_swiglu").version == is_whole(there)


def test_two_deployers_at_once(server: S3Server, tiny: Path, request: pytest.FixtureRequest) -> None:
    """Four at once, as processes: each has a version of its own, all are in the record, and the last one is served."""
    there = url(request)
    words = [sys.executable, "-m", "dinoexport", "deploy", str(tiny), "--to", there, "--json"]
    deployers = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in deployers]
    assert all(process.returncode == 0 for process in deployers), said
    versions = sorted(json.loads(out)["version"] for out, _ in said)
    assert len(set(versions)) == 3
    raw = store.RemotePlace(there).read("tiny_swiglu.releases.json")
    record = releases.Releases.from_bytes(raw, name="tiny_swiglu")
    assert sorted(release.version for release in record.releases) == versions
    assert is_whole(there) == record.served[-1]


def test_somebody_deploys_between_reading_and_writing(
    server: S3Server, tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = url(request)
    store_repository.deploy(tiny, there)
    real, told = store.RemotePlace.write_over, threading.Event()

    def meanwhile(self: Any, *args: Any, **how: Any) -> None:
        if not told.is_set():
            told.set()
            store_repository.deploy(tiny, there)
        real(self, *args, **how)

    monkeypatch.setattr(store.RemotePlace, "write_over", meanwhile)
    assert store_repository.deploy(tiny, there).version == 2
    record = json.loads(store.RemotePlace(there).read("tiny_swiglu.releases.json"))
    assert (sorted(r["version"] for r in record["releases"]), record["served"]) == ([1, 2, 3], [1, 3, 2])
    assert is_whole(there) == 2
    told.clear()
    with pytest.raises(BuildError, match="changed by another process"):
        store_repository.rollback(there, "tiny_swiglu")
    assert is_whole(there) == 4


def test_a_late_listing(
    server: S3Server, tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that lists what was there an hour ago: no version is written over, and none is forgotten."""
    there = url(request)
    store_repository.deploy(tiny, there)
    place = store.RemotePlace(there)
    place.write("tiny_swiglu/2/config.pbtxt", b"somebody's, who has not deployed it yet")
    monkeypatch.setattr(store.RemotePlace, "files", lambda self, under="": iter(()))
    assert store_repository.deploy(tiny, there).version == 3
    assert place.read("tiny_swiglu/2/config.pbtxt").startswith(b"somebody's")
    assert store_repository.rollback(there, "tiny_swiglu").version == 1
    assert served(there)[0] == 1


def test_models_that_go_are_set_aside(
    server: S3Server, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A release with more models, rolled back from and deployed again: what is on disk is in the store."""
    there, disk = url(request), tmp_path / "models"
    (tmp_path / "samples").mkdir()
    from tests.embed.conftest import picture

    for i in range(3):
        (tmp_path / "samples" / f"{i}.jpg").write_bytes(picture(i, size=(96, 80)))
    for how in ({}, {"samples": tmp_path / "samples"}):
        model_repository.deploy(tiny, disk, **how)
        store_repository.deploy(tiny, there, **how)
    on_disk, in_it = model_repository.rollback(disk, "tiny_swiglu"), store_repository.rollback(there, "tiny_swiglu")
    assert (on_disk.models, on_disk.retired) == (in_it.models, in_it.retired)
    names = {name for name, _ in store.RemotePlace(there).files()}
    assert names == {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()}


def test_names_that_are_no_paths_are_left_alone(
    server: S3Server, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    there = url(request)
    place = store.RemotePlace(there)
    strange = ["tiny_swiglu/..hidden/config.pbtxt", "tiny_swiglu/a b/config.pbtxt", "another/1/model.onnx"]
    for name in strange:
        place.write(name, b"theirs")
    assert store_repository.deploy(tiny, there).version == 1
    assert all(place.read(name) == b"theirs" for name in strange)

"""A bundle is published whole, or the one before it stays; nobody's own files are replaced."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.errors import BuildError, UsageError
from dinoexport.pipeline.workspace import key_of, workspace
from dinoexport.spec import silent
from dinoexport.system import change_steps, changes
from tests.kills import every_moment
from tests.pipeline.made_bundles import KEY, Maker, build, everything_below, manifest_of


@pytest.mark.usefixtures("_exchanging")
def test_killed_at_every_file_operation(place: Path) -> None:
    """With a stage of the bundle that is there: there always is a whole bundle, and building again ends it."""
    out = place / "out"

    def again() -> None:
        with workspace(out, force=False, progress=silent) as work:
            stages = [work.stage("export", KEY, Maker()), work.stage("page", key_of(b="new"), Maker("page", b"new"))]
            work.publish({stage.name: stage for stage in stages}, manifest_of(*stages))

    build(out, Maker())
    before = files_in(out)
    again()
    after = files_in(out)
    shutil.rmtree(out)
    build(out, Maker())
    for number in every_moment(again):
        changes.settle(out)
        bundle.verify(out)
        assert files_in(out) in (before, after), f"neither at operation {number}"
        again()
        assert files_in(out) == after and everything_below(place) == ["out", *(f"out/{name}" for name in sorted(after))]
        assert all(path.stat().st_nlink == 1 for path in out.iterdir()), "ONNX opens no weights that have two names"
        shutil.rmtree(out)
        build(out, Maker())


@pytest.fixture(params=["one system call", "two renames"])
def _exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(change_steps, "_renameat2", lambda: None)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_rename_that_fails_brings_the_old_bundle_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "out"
    build(out, Maker(content=b"old"))
    rename = os.rename

    def failing(old: Any, new: Any) -> None:
        if Path(new) == out and "new" in str(old):
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(change_steps, "_renameat2", lambda: None)
        patch.setattr(os, "rename", failing)
        with pytest.raises(BuildError, match="Input/output error"):
            build(out, Maker(content=b"new"), key=key_of(weights="b"))
    assert (out / "model.onnx").read_bytes() == b"old"
    bundle.verify(out)  # a reader finishes the change first
    assert (out / "model.onnx").read_bytes() == b"new" and everything_below(place) == [
        "out", "out/manifest.json", "out/model.onnx",
    ]  # fmt: skip


def test_a_users_own_hidden_folders_are_left_alone(place: Path) -> None:
    out = place / "out"
    (place / ".out.previous").mkdir()
    (place / ".out.previous" / "thesis").write_text("five years")
    build(out, Maker())
    build(out, Maker(content=b"new"), key=key_of(weights="b"))
    (place / ".out.work").mkdir()
    (place / ".out.work" / "thesis").write_text("five years")
    with pytest.raises(UsageError, match="did not write: thesis"):
        build(out, Maker(), force=True)
    assert (place / ".out.previous" / "thesis").exists() and (place / ".out.work" / "thesis").exists()


def test_an_old_bundle_is_replaced_whole(place: Path) -> None:
    """Nobody who looks sees a mixture: the old files go with the old folder."""
    out = place / "out"
    build(out, Maker("old.onnx"))
    build(out, Maker("new.onnx"), key=key_of(weights="b"))
    assert everything_below(place) == ["out", "out/manifest.json", "out/new.onnx"]


@pytest.mark.parametrize(
    "names",
    [
        {"thesis.txt": "five years"},
        {"manifest.json": '{"name": "a web app", "icons": []}', "index.html": "<html>"},
        {"model.onnx": "weights", "sub/deep.txt": "more"},
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(place: Path, names: dict[str, str], force: bool) -> None:
    out = place / "out"
    for name, content in names.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    before = everything_below(place)
    with pytest.raises(UsageError, match="is not a bundle") as caught:
        build(out, Maker(), force=force)
    assert "--out" in caught.value.next_step
    assert everything_below(place) == before
    assert all((out / name).read_text() == content for name, content in names.items())


def test_a_bundle_with_a_users_file_in_it_is_not_replaced(place: Path) -> None:
    out = place / "out"
    build(out, Maker())
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        build(out, Maker(), key=key_of(weights="b"))
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_is_never_replaced(place: Path) -> None:
    (place / "out").write_text("mine")
    with pytest.raises(UsageError, match="is not a bundle"):
        build(place / "out", Maker())
    assert (place / "out").read_text() == "mine"


def test_an_empty_folder_may_be_used(place: Path) -> None:
    (place / "out").mkdir()
    build(place / "out", Maker())
    bundle.verify(place / "out")


def test_a_bundle_of_another_schema_may_be_replaced(place: Path) -> None:
    out = place / "out"
    build(out, Maker())
    raw = (out / bundle.MANIFEST).read_text()
    (out / bundle.MANIFEST).write_text(raw.replace('"schema_version": 1', '"schema_version": 0'))
    build(out, Maker())
    bundle.verify(out)


def test_a_link_stays_a_link(place: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real", target_is_directory=True)
    for content in (b"one", b"two", b"three"):
        build(place / "link", Maker(content=content), key=key_of(content=content.decode()))
        assert (place / "link").is_symlink()
        assert (place / "real" / "model.onnx").read_bytes() == content
    assert everything_below(place) == ["link", "real", "real/manifest.json", "real/model.onnx"]

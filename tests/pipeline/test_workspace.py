"""A build's stages and its publishing: reused only when nothing differs, and complete or absent whatever happens."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.bundle import CheckpointFacts, Manifest
from dinoexport.errors import BuildError, DinoexportError, MissingRequirement, UsageError
from dinoexport.pipeline.workspace import Stage, Workspace, key_of, workspace
from dinoexport.spec import Precision, silent
from dinoexport.system import change_steps, changes, locks
from tests.kills import every_moment

KEY = key_of(weights="a")


class Maker:
    """Makes a stage of one file and counts how often it did."""

    def __init__(self, name: str = "model.onnx", content: bytes = b"graph") -> None:
        self.name, self.content, self.calls = name, content, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / self.name).write_bytes(self.content)


def manifest_of(*stages: Stage) -> Manifest:
    return Manifest(
        variant="vits14",
        family="dinov2",
        precision=Precision.FP32,
        target="cpu",
        verdict="unjudged",
        recipe={},
        checkpoint=CheckpointFacts(source="synthetic:0", sha256=key_of(), licence="none"),
        graphs=(),
        files=tuple(file for stage in stages for file in stage.files),
        stage_keys={stage.name: stage.key for stage in stages},
        versions={},
        card={},
        report={},
        created=datetime(2025, 1, 1, tzinfo=UTC),
    )


def build(
    out: Path, make: Callable[[Path], None], *, key: str = KEY, force: bool = False, publish: bool = True
) -> Stage:
    """One build of a bundle of one stage."""
    with workspace(out, force=force, progress=silent) as work:
        stage = work.stage("export", key, make)
        if publish:
            work.publish({"export": stage}, manifest_of(stage))
    return stage


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to build in."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# Stages


def test_a_bundle_is_all_that_is_left(place: Path) -> None:
    make = Maker()
    stage = build(place / "deep" / "out", make)
    assert not stage.reused
    assert everything_below(place / "deep") == ["out", "out/manifest.json", "out/model.onnx"]
    assert bundle.verify(place / "deep" / "out").stage_keys == {"export": KEY}


def test_a_finished_stage_is_reused_by_the_next_run_only_for_the_same_key(place: Path) -> None:
    out, make = place / "out", Maker()
    assert not build(out, make, publish=False).reused
    assert everything_below(place)  # the stage waits
    again = build(out, make, publish=False)
    assert (again.reused, make.calls) == (True, 1)
    assert [file.name for file in again.files] == ["model.onnx"]
    assert not build(out, make, key=key_of(weights="b"), publish=False).reused
    assert make.calls == 2
    assert build(out, make).reused
    assert (make.calls, everything_below(place)) == (2, ["out", "out/manifest.json", "out/model.onnx"])


def test_a_key_that_begins_alike_is_another_key(place: Path) -> None:
    out, make = place / "out", Maker()
    build(out, make, key=KEY, publish=False)
    assert not build(out, make, key=KEY[:-1] + ("0" if KEY[-1] != "0" else "1"), publish=False).reused


def test_the_key_holds_everything(place: Path) -> None:
    keys = {key_of(**parts) for parts in ({}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": {"b": 1}}, {"a": "1"}, {"a": [1]})}
    assert len(keys) == 7
    assert key_of(a=1, b=2) == key_of(b=2, a=1)


@pytest.mark.parametrize("damage", ["changed", "longer", "missing", "index", "index of another kind", "no index"])
def test_a_damaged_stage_is_made_again(place: Path, damage: str) -> None:
    out, make = place / "out", Maker()
    folder = build(out, make, publish=False).folder
    file, index = folder / "model.onnx", folder / "stage.json"
    if damage == "changed":
        file.write_bytes(b"grapH")
    elif damage == "longer":
        file.write_bytes(b"graph ")
    elif damage == "missing":
        file.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-5])
    elif damage == "index of another kind":
        index.write_text("3")
    else:
        index.unlink()
    stage = build(out, make)
    assert (stage.reused, make.calls) == (False, 2)
    assert (out / "model.onnx").read_bytes() == b"graph"


def test_a_name_in_the_index_cannot_lead_elsewhere(place: Path) -> None:
    out, make = place / "out", Maker()
    index = build(out, make, publish=False).folder / "stage.json"
    (place / "secret").write_bytes(b"graph")
    content = json.loads(index.read_text())
    content["files"][0]["name"] = "../../secret"
    index.write_text(json.dumps(content))
    assert not build(out, make, publish=False).reused


def test_force_makes_everything_again(place: Path) -> None:
    out, make = place / "out", Maker()
    build(out, make, publish=False)
    assert not build(out, make, force=True, publish=False).reused
    assert not build(out, make, force=True).reused
    assert not build(out, make, force=True).reused
    assert make.calls == 4


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), BuildError("broken")])
def test_a_stage_that_breaks_leaves_nothing(place: Path, error: BaseException) -> None:
    def half(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        build(place / "out", half)
    assert everything_below(place) == []


def test_a_stage_that_breaks_keeps_those_before_it(place: Path) -> None:
    out, first = place / "out", Maker()

    def half(folder: Path) -> None:
        (folder / "reference.npz").write_bytes(b"half")
        raise RuntimeError("broken")

    def two_stages(second: Callable[[Path], None]) -> None:
        with workspace(out, force=False, progress=silent) as work:
            stages = {"export": work.stage("export", KEY, first), "reference": work.stage("reference", KEY, second)}
            work.publish(stages, manifest_of(*stages.values()))

    with pytest.raises(RuntimeError):
        two_stages(half)
    assert not out.exists()
    assert not list(place.rglob("*.partial"))
    two_stages(Maker("reference.npz"))
    assert first.calls == 1
    assert {file.name for file in bundle.verify(out).files} == {"model.onnx", "reference.npz"}


def test_what_a_killed_build_left_half_made_is_not_used(place: Path) -> None:
    partial = place / ".out.work" / "export.partial"
    partial.mkdir(parents=True)
    (partial / "rubbish").write_bytes(b"half")
    stage = build(place / "out", Maker())
    assert [file.name for file in stage.files] == ["model.onnx"]
    assert everything_below(place) == ["out", "out/manifest.json", "out/model.onnx"]


# The bundle that stands there already


def test_the_previous_bundles_stage_is_taken_over_when_the_key_matches(place: Path) -> None:
    out, make = place / "out", Maker()
    build(out, make)
    stage = build(out, make)
    assert (stage.reused, make.calls) == (True, 1)
    assert bundle.verify(out).files == stage.files
    assert everything_below(place) == ["out", "out/manifest.json", "out/model.onnx"]


def test_the_previous_bundles_stage_is_not_taken_over_for_another_key(place: Path) -> None:
    out = place / "out"
    build(out, Maker(content=b"old"))
    stage = build(out, Maker(content=b"new"), key=key_of(weights="b"))
    assert not stage.reused
    assert (out / "model.onnx").read_bytes() == b"new"
    assert bundle.verify(out).stage_keys == {"export": key_of(weights="b")}


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_damaged_bundle_is_not_taken_over_but_replaced(place: Path, name: str) -> None:
    out, make = place / "out", Maker()
    build(out, make)
    content = bytearray((out / name).read_bytes())
    content[3] ^= 1
    (out / name).write_bytes(content)
    assert not build(out, make).reused
    assert make.calls == 2
    bundle.verify(out)


def test_a_build_that_breaks_leaves_the_previous_bundle(place: Path) -> None:
    out = place / "out"
    build(out, Maker(content=b"old"))

    def half(folder: Path) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        build(out, half, key=key_of(weights="b"))
    with pytest.raises(RuntimeError):
        build(out, half, force=True)
    bundle.verify(out)
    assert (out / "model.onnx").read_bytes() == b"old"


# Publishing


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


# Others at the same place


def test_a_second_build_of_the_same_place_is_refused(place: Path) -> None:
    out = place / "out"
    (place / "link").symlink_to(place, target_is_directory=True)
    code = (
        "import sys; from pathlib import Path; from dinoexport.pipeline.workspace import workspace\n"
        "from dinoexport.errors import BuildError\n"
        "try:\n"
        "    with workspace(Path(sys.argv[1]), force=False, progress=print): print('entered')\n"
        "except BuildError as error: print(error.message, '|', error.next_step)\n"
    )

    def other(where: Path) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(where)], check=True, capture_output=True, text=True, cwd=place
        ).stdout

    with workspace(out, force=False, progress=silent) as work:
        stage = work.stage("export", KEY, Maker())
        for same in (out, place / "link" / "out", place / "x" / ".." / "out", Path("out")):
            said = other(same)
            assert f"Another process is building {out}." in said
            assert "Wait for it" in said
        assert other(place / "elsewhere") == "entered\n"
        work.publish({"export": stage}, manifest_of(stage))
    assert other(out) == "entered\n"
    bundle.verify(out)


# Disks


@pytest.mark.parametrize("parts", [("file", "out"), ("file", "deep", "out")])
def test_a_place_below_a_file_gives_one_sentence(place: Path, parts: tuple[str, ...]) -> None:
    (place / "file").write_text("mine")
    with pytest.raises(MissingRequirement, match="cannot be written") as caught:
        build(place.joinpath(*parts), Maker())
    assert str(place.joinpath(*parts)) in caught.value.message
    assert "Choose a place" in caught.value.next_step
    assert (place / "file").read_text() == "mine"


def test_a_folder_without_permission_gives_one_sentence(place: Path) -> None:
    place.chmod(0o500)
    if os.access(place, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        with pytest.raises(MissingRequirement, match="cannot be written"):
            build(place / "out", Maker())
        with pytest.raises(MissingRequirement, match="cannot be written"):
            build(place / "deep" / "out", Maker())
    finally:
        place.chmod(0o700)


@pytest.mark.parametrize("call", ["mkdir", "is_dir"])
def test_a_refusal_of_the_system_gives_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The same for root: the system's answer is simulated."""
    out = place / "out"
    build(out, Maker())
    real = getattr(Path, call)

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if place in (path, *path.parents):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, call, denied)
    with pytest.raises(MissingRequirement, match="cannot be written: Permission denied"):
        build(out, Maker(), key=key_of(weights="b"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_nothing_half_made(place: Path, number: int) -> None:
    def full(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(MissingRequirement, match="No room left") as caught:
        build(place / "out", full)
    assert "Free some space" in caught.value.next_step
    assert everything_below(place) == []


def test_a_disk_that_fills_while_publishing_keeps_the_old_bundle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "out"
    build(out, Maker(content=b"old"))
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == bundle.MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(MissingRequirement):
            build(out, Maker(content=b"new"), key=key_of(weights="b"))
    assert not list(place.rglob("*.partial"))
    bundle.verify(out)
    assert (out / "model.onnx").read_bytes() == b"old"
    assert build(out, Maker(content=b"new"), key=key_of(weights="b")).reused


def test_a_limit_on_file_sizes_is_a_full_disk(place: Path) -> None:
    """The system's own refusal, not a simulated one: no file of this process may grow past 64 kB."""
    code = (
        "import sys; from pathlib import Path; from dinoexport.pipeline.workspace import workspace\n"
        "from dinoexport.errors import MissingRequirement\n"
        "make = lambda folder: (folder / 'model.onnx').write_bytes(bytes(1 << 20))\n"
        "try:\n"
        "    with workspace(Path(sys.argv[1]), force=False, progress=lambda *_: None) as work:\n"
        "        work.stage('export', 'a' * 64, make)\n"
        "except MissingRequirement as error: print(error.message, '|', error.next_step)\n"
    )
    result = subprocess.run(
        [sys.executable, "-B", "-c", code, str(place / "out")],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert "No room left while writing" in result.stdout
    assert everything_below(place) == []


def test_a_disk_without_links_gets_copies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    out, make = place / "out", Maker()
    build(out, make)
    assert build(out, make).reused
    bundle.verify(out)


def test_no_cache_is_needed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the home folder is often nobody's to write to."""
    (place / "file").write_text("")
    monkeypatch.setenv("DINOEXPORT_CACHE", str(place / "file" / "cache"))
    build(place / "out", Maker())
    assert everything_below(place) == ["file", "out", "out/manifest.json", "out/model.onnx"]


def test_a_lock_whose_file_was_removed_is_taken_anew(place: Path) -> None:
    """Two builds in turn: the first one removes the lock's file as it ends, and the second must not hold a ghost."""
    first = locks.exclusive(place / "lock", doing="building")
    with first:
        (place / "lock").unlink()
        with locks.exclusive(place / "lock", doing="building"):
            assert (place / "lock").exists()
            with pytest.raises(BuildError, match="Another process"), locks.exclusive(place / "lock", doing="building"):
                pass


def test_errors_of_our_own_pass_unchanged(place: Path) -> None:
    class Own(DinoexportError):
        pass

    def broken(folder: Path) -> None:
        raise Own("mine", next_step="yours")

    with pytest.raises(Own, match="mine"):
        build(place / "out", broken)


def test_progress_is_told_what_is_hashed(place: Path) -> None:
    told: list[str] = []
    with workspace(place / "out", force=False, progress=lambda doing, done, total: told.append(doing)) as work:
        assert isinstance(work, Workspace)
        work.stage("export", KEY, Maker())
    assert told == ["hashing model.onnx"]

"""A build's stages: reused only when nothing differs, and complete or absent whatever happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.errors import BuildError, DinoexportError, UsageError
from dinoexport.pipeline.workspace import Workspace, key_of, workspace
from dinoexport.spec import silent
from dinoexport.system import change_steps, locks
from tests.pipeline.made_bundles import KEY, Maker, build, everything_below, manifest_of

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


# What is believed


def test_a_hash_that_was_computed_while_writing_is_kept(place: Path) -> None:
    def make(folder: Path) -> dict[str, str]:
        for name in ("a", "b"):
            (folder / name).write_bytes(b"x")
        return {"a": "f" * 64}

    with workspace(place / "out", force=False, progress=silent) as work:
        made = work.stage("export", KEY, make).files
    assert [(file.name, file.sha256[:4], file.size_bytes) for file in made] == [("a", "ffff", 1), ("b", "2d71", 1)]


def test_files_of_the_replaced_bundle_stay_in_it_until_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are linked; what was made now is moved."""
    build(place / "out", Maker())
    put: list[tuple[str, str]] = []
    for how in ("link", "move"):
        whole = getattr(change_steps, how)

        def recorded(source: Path, to: Path, *, how: str = how, whole: Callable[..., object] = whole) -> object:
            put.append((how, source.name))
            return whole(source, to)

        monkeypatch.setattr(change_steps, how, recorded)
    with workspace(place / "out", force=False, progress=silent) as work:
        old, new = work.stage("export", KEY, Maker()), work.stage("judge", KEY, Maker("report.json"))
        work.publish({"export": old, "judge": new}, manifest_of(old, new))
    assert put[:2] == [("link", "model.onnx"), ("move", "report.json")]


@pytest.mark.parametrize("linked", ["stage.json", "manifest.json"])
def test_no_link_is_followed_to_what_is_believed(linked: str, place: Path) -> None:
    """A record that lies elsewhere may be of anybody."""
    out, make = place / "out", Maker()
    folder = build(out, make, publish=linked == "manifest.json").folder if linked == "stage.json" else place / "out"
    if linked == "manifest.json":
        build(out, make)
    (folder / linked).rename(place / "elsewhere")
    (folder / linked).symlink_to(place / "elsewhere")
    if linked == "stage.json":
        assert not build(out, make, publish=False).reused
    else:
        with pytest.raises(UsageError, match="exists and is not a bundle"):
            build(out, make)


def test_only_finished_stages_are_cleared_away(tmp_path: Path) -> None:
    """Neither what is being published nor the records of the change are stages."""
    for name in ("export-1", "page-2", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "journal").write_text("record")
    change: Any = SimpleNamespace(folder=tmp_path, new=tmp_path / "new")
    work = Workspace(change=change, force=False, progress=silent)
    assert sorted(path.name for path in work._stage_folders()) == ["export-1", "page-2"]


def test_half_a_stage_that_cannot_be_removed_stops_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in nobody's way: the next build of the stage begins by removing it."""
    removed: list[tuple[str, bool]] = []

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        removed.append((path.name, ignore_errors))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with workspace(place / "out", force=False, progress=silent) as work:
        (work.folder / "export.partial").mkdir()
    assert ("export.partial", True) in removed

"""A repository is never half changed: killed at any moment, on a full disk, beside others."""

from __future__ import annotations

import errno
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.errors import DinoexportError, MissingRequirement, ValidationFailed
from dinoexport.pipeline import build as pipeline
from dinoexport.serving.triton import batching, model_repository, served_models
from dinoexport.system import changes, files, locks
from tests.conftest import DATA
from tests.kills import every_moment
from tests.serving.triton.repositories import VERBS, plain, served_by, snapshot

pytestmark = pytest.mark.usefixtures("fixed_latencies")


@pytest.mark.parametrize("fail_at", range(8))
def test_a_full_disk_leaves_what_was_served(
    built: Path, tmp_path: Path, fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write fails, every configuration still names a version that is complete."""
    repository = tmp_path / "models"
    model_repository.deploy(built, repository, backend="python")
    before = snapshot(repository)
    calls = iter(range(100))
    real = files.copy

    def full(*args: Any) -> None:
        if next(calls) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def copy(source: Path, destination: Path, **how: Any) -> str:
        full()
        return real(source, destination, **how)

    write_text = Path.write_text
    monkeypatch.setattr(files, "copy", copy)
    monkeypatch.setattr(Path, "write_text", lambda path, *a, **k: (full(), write_text(path, *a, **k))[1])
    with pytest.raises(MissingRequirement, match="No room left"):
        model_repository.deploy(built, repository, backend="python")
    monkeypatch.undo()
    assert snapshot(repository) == before and [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize(
    ("before", "verb"),
    [
        ((), "first"), (("first",), "second"), (("first",), "with another front end"),
        (("first", "second"), "rollback"), (("first", "second", "second"), "rollback"),
        (("first", "with another front end"), "rollback"),
        (("first", "with another front end", "rollback"), "with another front end"),
    ],
)  # fmt: skip
def test_killed_at_every_file_operation(
    built: Path, tmp_path: Path, before: tuple[str, ...], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same verb again gives what an undisturbed run gives; no server ever sees two releases."""
    monkeypatch.setattr(served_models, "_measured", lambda *_: batching.unmeasured((), "", 4))  # opens no runtime
    start, undisturbed, models = tmp_path / "start", tmp_path / "undisturbed", tmp_path / "place" / "models"
    start.mkdir()
    for step in before:
        VERBS[step](built, start)
    shutil.copytree(start, undisturbed)
    VERBS[verb](built, undisturbed)
    shutil.copytree(start, models)
    done = 0
    for number in every_moment(lambda: VERBS[verb](built, models), stride=5):
        changes.settle(models)
        now = plain(models)
        assert now in (plain(start), plain(undisturbed)), f"half switched at operation {number}"
        assert len(set(served_by(models).values())) <= 1
        if now == plain(start):  # else it is done, and doing it again is another release
            VERBS[verb](built, models)
            assert plain(models) == plain(undisturbed), f"another state after operation {number}"
        else:
            done += 1
            if verb != "rollback":
                model_repository.rollback(models, "tiny") if before else None
                assert served_by(models).items() >= served_by(start).items()
        assert [path.name for path in models.parent.iterdir()] == ["models"] or now == plain(undisturbed)
        shutil.rmtree(models.parent)
        shutil.copytree(start, models)
    assert done > 0


@pytest.mark.parametrize("verb", ["second", "rollback"])
def test_interrupted_at_every_file_operation(built: Path, tmp_path: Path, verb: str) -> None:
    models, start = tmp_path / "models", tmp_path / "start"
    for _ in range(2):
        model_repository.deploy(built, start, name="tiny")
    shutil.copytree(start, models)
    for number in every_moment(lambda: VERBS[verb](built, models), by=signal.SIGTERM, stride=5):
        assert len(set(served_by(models).values())) == 1, f"half switched at operation {number}"
        assert not (tmp_path / ".models.work" / "change.json").exists()
        shutil.rmtree(models)
        shutil.copytree(start, models)


def test_what_was_checked_is_what_is_deployed(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are swapped after they were hashed; or before, and then nothing is deployed."""
    other = tmp_path / "bundle"
    shutil.copytree(built, other)
    real = served_models.of_bundle

    def swapped(*args: Any, **how: Any) -> Any:
        found = real(*args, **how)
        data = other / "model.onnx.data"
        data.write_bytes(bytes(data.stat().st_size))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(served_models, "of_bundle", swapped)
        model_repository.deploy(other, tmp_path / "models", name="tiny")
    deployed = tmp_path / "models/tiny/1/model.onnx/model.onnx.data"
    assert deployed.read_bytes() == (built / "model.onnx.data").read_bytes() != (other / "model.onnx.data").read_bytes()
    with pytest.raises(ValidationFailed, match=r"model\.onnx\.data does not have the SHA-256"):
        model_repository.deploy(other, tmp_path / "others")
    assert not (tmp_path / "others").exists() or list((tmp_path / "others").iterdir()) == []


def test_a_deploy_reads_each_byte_once(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: Counter[str] = Counter()
    real = files._hashed

    def counted(file: Any, copy_to: Any, doing: str, progress: Any) -> str:
        hashed[doing.rsplit(maxsplit=1)[-1]] += 1
        return real(file, copy_to, doing, progress)

    monkeypatch.setattr(files, "_hashed", counted)
    model_repository.deploy(built, tmp_path / "models")
    assert hashed == dict.fromkeys((file.name for file in bundle.read_manifest(built).files), 1)


def test_what_is_deployed_is_a_file_of_its_own(built: Path, tmp_path: Path) -> None:
    """Under two names a change of one would be one of the other, and ONNX opens no weights that have two."""
    model_repository.deploy(built, tmp_path / "models")
    for path in (*(tmp_path / "models").rglob("*"), *built.iterdir()):
        assert path.is_dir() or path.stat().st_nlink == 1, path


def test_a_build_waits_while_a_bundle_is_deployed(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(built, folder)
    monkeypatch.setattr(changes, "WAIT_S", 0.1)
    real, refused = served_models.of_bundle, []

    def meanwhile(*args: Any, **how: Any) -> Any:
        with pytest.raises(DinoexportError, match="reading") as caught:
            pipeline.build(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:1", out=folder))
        refused.append(caught.value)
        return real(*args, **how)

    monkeypatch.setattr(served_models, "of_bundle", meanwhile)
    model_repository.deploy(folder, tmp_path / "models", name="tiny")
    assert (
        refused
        and (tmp_path / "models/tiny/1/model.onnx/model.onnx.data").read_bytes()
        == (built / "model.onnx.data").read_bytes()
    )


def test_two_at_once_are_refused(built: Path, tmp_path: Path) -> None:
    with (
        locks.exclusive(tmp_path / ".models.work" / "lock", doing="deploying"),
        pytest.raises(DinoexportError, match="Another process"),
    ):
        model_repository.deploy(built, tmp_path / "models")
    assert not (tmp_path / "models").exists()

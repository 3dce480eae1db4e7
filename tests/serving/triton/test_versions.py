"""The next version, the way back, and what each leaves behind in the repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dinoexport import bundle
from dinoexport.cli import formatting
from dinoexport.errors import UsageError
from dinoexport.serving.triton import model_repository
from tests.command_line import run
from tests.serving.triton.repositories import IMAGES, parsed, served_by, snapshot

pytestmark = pytest.mark.usefixtures("fixed_latencies")


def test_next_version_and_rollback(built: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    model_repository.deploy(built, repository, backend="python")
    first = snapshot(repository)
    again = model_repository.deploy(built, repository, backend="onnxruntime")
    assert (again.version, again.previous) == (2, 1)
    now = snapshot(repository)
    assert all(now[name] == content for name, content in first.items() if name.count("/") > 1)  # version 1 untouched
    assert parsed(repository / "tiny_swiglu" / "config.pbtxt").backend == "onnxruntime"
    back = model_repository.rollback(repository, "tiny_swiglu")
    assert (back.version, back.previous) == (1, 2) and set(back.models) == set(again.models)
    for name in again.models:
        assert snapshot(repository)[f"{name}/config.pbtxt"] == first[f"{name}/config.pbtxt"]
    with pytest.raises(UsageError, match="no version before 1"):
        model_repository.rollback(repository, "tiny_swiglu")
    assert model_repository.deploy(built, repository).version == 3
    with pytest.raises(UsageError, match="Did you mean 'tiny_swiglu'"):
        model_repository.rollback(repository, "tiny_swigl")


def with_head(built: Path, copy: Path, kind: str) -> Path:
    """A copy of a bundle that says it has this head; only its manifest is changed."""
    manifest = bundle.read_manifest(built)
    shutil.copytree(built, copy)
    changed = manifest.model_copy(update={"recipe": {**manifest.recipe, "head": {"kind": kind}}})
    (copy / bundle.MANIFEST).write_bytes(changed.to_bytes())
    return copy


def test_another_head_does_not_become_the_next_version_unasked(built: Path, tmp_path: Path) -> None:
    """All heads of a variant have its name by default; clients of one cannot use the next one's answers."""
    repository = tmp_path / "models"
    nyu, kitti = (with_head(built, tmp_path / kind, kind) for kind in ("nyu_linear", "kitti_linear"))
    model_repository.deploy(built, repository)
    before = snapshot(repository)
    with pytest.raises(
        UsageError, match=r"serves tiny_swiglu with no head \(outputs class_token.*nyu_linear"
    ) as caught:
        model_repository.deploy(nyu, repository)
    assert "--name tiny_swiglu" in caught.value.next_step and snapshot(repository) == before
    # Asked for by name it is the next version, and then the same head needs no name.
    assert model_repository.deploy(nyu, repository, name="tiny_swiglu").version == 2
    assert model_repository.deploy(nyu, repository).version == 3
    with pytest.raises(UsageError, match=r"with the head nyu_linear.*has the head kitti_linear"):
        model_repository.deploy(kitti, repository)
    assert model_repository.deploy(kitti, repository, name="kitti").version == 1
    # What is served counts, not what was deployed last; and a configuration that says nothing refuses nothing.
    model_repository.rollback(repository, "tiny_swiglu")
    model_repository.rollback(repository, "tiny_swiglu")
    assert model_repository.deploy(built, repository).version == 4
    config = repository / "tiny_swiglu" / "4" / "config.pbtxt"
    config.write_text("\n".join(line for line in config.read_text().splitlines() if "string_value" not in line))
    assert model_repository.deploy(kitti, repository).version == 5


def test_no_front_end_is_left_behind(built: Path, tmp_path: Path) -> None:
    """Its other half would be that of another version."""
    model_repository.deploy(built, tmp_path / "models", samples=IMAGES)
    before = snapshot(tmp_path / "models")
    with pytest.raises(UsageError, match=r"tiny_swiglu_sized_images.* stay behind"):
        model_repository.deploy(built, tmp_path / "models")
    assert snapshot(tmp_path / "models") == before
    assert model_repository.deploy(built, tmp_path / "models", samples=IMAGES).version == 2


def test_rollback_goes_to_what_was_really_served(built: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for _ in range(3):
        model_repository.deploy(built, models, name="tiny")
    (models / "tiny" / "9").mkdir()  # no release ever had it
    assert model_repository.rollback(models, "tiny").version == 2
    assert model_repository.deploy(built, models, name="tiny").version == 10
    back = model_repository.rollback(models, "tiny")
    assert (back.version, back.previous) == (2, 10), "not 3, which was left"
    assert model_repository.rollback(models, "tiny").version == 1
    with pytest.raises(UsageError, match="no version before 1"):
        model_repository.rollback(models, "tiny")


def test_a_version_that_was_removed_is_passed_over(built: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for _ in range(3):
        model_repository.deploy(built, models, name="tiny")
    shutil.rmtree(models / "tiny_images" / "2")
    assert model_repository.rollback(models, "tiny").version == 1


def test_models_that_a_release_did_not_have_are_set_aside(built: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    model_repository.deploy(built, models, name="tiny")
    model_repository.deploy(built, models, name="tiny", samples=IMAGES)
    back = model_repository.rollback(models, "tiny")
    retired = ("tiny_sized_images", "tiny_sized_images_prepare")
    assert set(back.retired) == set(retired) and set(served_by(models)) == {
        "tiny",
        "tiny_images",
        "tiny_images_prepare",
    }
    assert all(f"/v2/repository/models/{name}/unload" in "\n".join(formatting.deployed_lines(back)) for name in retired)
    again = model_repository.deploy(built, models, name="tiny", samples=IMAGES)
    assert again.version == 3 and set(served_by(models).values()) == {3} and set(served_by(models)) >= set(retired)
    assert (models / "tiny_sized_images" / "2").is_dir()


def test_a_repository_of_an_older_dinoexport(built: Path, tmp_path: Path) -> None:
    """It has no record: the folders tell."""
    models = tmp_path / "models"
    for _ in range(3):
        model_repository.deploy(built, models, name="tiny")
    (models / "tiny.releases.json").unlink()
    assert model_repository.rollback(models, "tiny").version == 2
    (models / "tiny.releases.json").unlink()
    config = models / "tiny_images" / "config.pbtxt"
    config.write_bytes((models / "tiny_images" / "3" / "config.pbtxt").read_bytes())
    with pytest.raises(UsageError, match="several versions of tiny at once"):
        model_repository.rollback(models, "tiny")
    assert model_repository.deploy(built, models, name="tiny").version == 4
    assert set(served_by(models).values()) == {4}


def test_command(built: Path, tmp_path: Path) -> None:
    to = ("--to", str(tmp_path / "models"))
    shown = run("deploy", str(built), *to, "--backend", "python", "--samples", str(IMAGES))
    assert shown.exit_code == 0 and "tiny_swiglu version 1" in shown.stdout and "dinoexport check" in shown.stdout
    assert "tiny_swiglu_sized_images" in shown.stdout
    told = json.loads(run("deploy", str(built), *to, "--samples", str(IMAGES), "--json").stdout)
    assert (told["version"], told["previous"], told["backend"]) == (2, 1, "onnxruntime")
    back = json.loads(run("rollback", str(tmp_path / "models"), "tiny_swiglu", "--json").stdout)
    assert back["version"] == 1
    wrong = run("deploy", str(built), *to, "--backend", "pythn")
    assert wrong.exit_code == 2 and "Did you mean 'python'?" in wrong.stderr
    assert run("rollback", str(tmp_path / "models"), "tiny_swiglu").exit_code == 2
    absent = run("deploy", str(tmp_path / "absent"), *to)
    assert absent.exit_code == 2 and "not a bundle" in absent.stderr

"""A bundle becomes a model repository: what is in it, that it is right by Triton's own schema, and never half there."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.cli import formatting
from dinoexport.errors import DinoexportError, MissingRequirement, UsageError, ValidationFailed
from dinoexport.pipeline import build as pipeline
from dinoexport.serving.triton import batching, model_repository, served_models
from dinoexport.serving.triton.signature import Served
from dinoexport.spec import Dim, Precision, Runtime, Way
from dinoexport.system import changes, files, locks
from tests.conftest import DATA, as_if_chosen
from tests.kills import every_moment

IMAGES = DATA.parent.parent / "validate" / "images"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle, built once."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    pipeline.build(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=out))
    return out


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are made up here, so that what follows from them can be told."""
    monkeypatch.setattr(batching, "measure", lambda *_, **__: {1: 10.0, 2: 18.0, 4: 36.0})


def parsed(config: Path) -> Any:
    """The configuration as Triton's own schema reads it: an unknown field or type is an error."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())


def config_of(repository: Path, name: str) -> str:
    return (repository / name / "config.pbtxt").read_text()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("tag", "limited"), [(None, True), ("24.10", False), ("26.07", False), ("26.08", True)])
def test_queues_have_limits_where_triton_can_keep_them(
    built: Path, tmp_path: Path, tag: str | None, limited: bool
) -> None:
    model_repository.deploy(built, tmp_path / "models", name="tiny", backend="python", triton=tag)
    for name in ("tiny", "tiny_images_prepare"):
        path = tmp_path / "models" / name / "config.pbtxt"
        config = parsed(path)
        assert config.HasField("dynamic_batching") == (name == "tiny")
        assert config.dynamic_batching.HasField("default_queue_policy") == (limited and name == "tiny")
        assert ("no limits to the queue" in path.read_text()) == (not limited and name == "tiny")


@pytest.mark.parametrize("tag", ["latest", "26.8", "24.1O", "", "26.08-py3"])
def test_what_is_no_tag_is_refused_whatever_is_served(built: Path, tmp_path: Path, tag: str) -> None:
    with pytest.raises(UsageError, match="not a tag of a Triton image") as caught:
        model_repository.deploy(built, tmp_path / "models", backend="python", triton=tag)
    assert "--triton 26.08" in caught.value.next_step and not (tmp_path / "models").exists()


def test_a_precision_that_the_server_does_not_have_is_said(built: Path, tmp_path: Path) -> None:
    """The tokens are right all the same; it is the time that is not what was measured."""
    assert model_repository.deploy(built, tmp_path / "models").note == ""
    other = as_if_chosen(built, tmp_path / "int8", Way(runtime=Runtime.OPENVINO, precision=Precision.INT8, threads=2))
    deployed = model_repository.deploy(other, tmp_path / "models", name="int8")
    assert all(part in deployed.note for part in ("int8 in OpenVINO", "in fp32", "--backend python"))
    assert deployed.note in "\n".join(formatting.deployed_lines(deployed))
    # Python's backend runs it as it was judged, with as many threads as the server's machine has.
    deployed = model_repository.deploy(other, tmp_path / "models", name="python", backend="python")
    config = parsed(tmp_path / "models" / "python" / "config.pbtxt")
    served = Served.model_validate_json(config.parameters["dinoexport"].string_value)
    assert deployed.note == "" and served.way == Way(runtime=Runtime.OPENVINO, precision=Precision.INT8)


def test_named_sizes_get_forms_in_the_python_backend(built: Path, tmp_path: Path) -> None:
    model_repository.deploy(built, tmp_path / "models", name="tiny", backend="python", sizes=["28x42"])
    config = parsed(tmp_path / "models" / "tiny" / "config.pbtxt")
    served = Served.model_validate_json(config.parameters["dinoexport"].string_value)
    assert served.recipe["sizes"] == ["28x42"]
    for backend, size, said in (
        ("onnxruntime", "28x42", "compiles no forms"),
        ("python", "28x4300", "4300"),
        ("python", "small", "is no size"),
    ):
        with pytest.raises(UsageError, match=said):
            model_repository.deploy(built, tmp_path / "others", backend=backend, sizes=[size])  # type: ignore[arg-type]
    assert not (tmp_path / "others").exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_what_is_written(built: Path, tmp_path: Path, backend: served_models.Backend) -> None:
    deployed = model_repository.deploy(built, tmp_path / "models", name="tiny", backend=backend)
    assert (deployed.version, deployed.previous, deployed.backend) == (1, None, backend)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {*deployed.models, "tiny.releases.json"}
    assert set(deployed.models) == {"tiny", "tiny_images", "tiny_images_prepare"}
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    folder = tmp_path / "models" / "tiny"
    # The layout Triton wants for external data: a folder of the graph's name.
    for name in ("model.onnx", "model.onnx.data"):
        assert (folder / "1" / "model.onnx" / name).read_bytes() == (built / name).read_bytes()
    assert (folder / "1" / "model.py").exists() == (backend == "python")
    for name in deployed.models:
        config = parsed(tmp_path / "models" / name / "config.pbtxt")
        assert config.name == name and config.max_batch_size == 4
        assert list(config.version_policy.specific.versions) == [1]
    config = parsed(folder / "config.pbtxt")
    assert config.backend == backend and config.platform == ("onnxruntime_onnx" if backend == "onnxruntime" else "")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("pixels", 11, [3, -1, -1])]
    assert [(o.name, list(o.dims)) for o in config.output] == [("class_token", [96]), ("patch_tokens", [-1, 96])]
    assert not config.response_cache.enable and not config.instance_group[0].HasField("rate_limiter")


@pytest.mark.parametrize(
    ("target", "backend", "kind"),
    [("cpu", "onnxruntime", "KIND_CPU"), ("a100", "onnxruntime", "KIND_AUTO"), ("a100", "python", "KIND_CPU")],
)
def test_the_kind_of_the_instance(
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    backend: served_models.Backend,
    kind: str,
) -> None:
    """A bundle for a GPU leaves the choice to Triton's ONNX Runtime; the Python backend runs on the CPU."""
    manifest = bundle.read_manifest(built).changed(target=target)
    monkeypatch.setattr(bundle, "read_manifest", lambda *_: manifest)
    model_repository.deploy(built, tmp_path / "models", name="tiny", backend=backend)
    (group,) = parsed(tmp_path / "models" / "tiny" / "config.pbtxt").instance_group
    assert group.Kind.Name(group.kind) == kind


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_configurations_are_these_to_the_letter(built: Path, tmp_path: Path, backend: served_models.Backend) -> None:
    """`data/served/BACKEND/MODEL.pbtxt`, whose long string of facts is cut: what Triton obeys, and what people read.

    After a wanted change read the difference, then write them anew with UPDATE_GOLDEN=1 in the environment.
    """
    deployed = model_repository.deploy(built, tmp_path / "models", name="tiny", backend=backend)
    for name in deployed.models:
        written = re.sub(r'string_value: ".*"', 'string_value: "..."', config_of(tmp_path / "models", name))
        golden = DATA / "served" / backend / f"{name}.pbtxt"
        if os.environ.get("UPDATE_GOLDEN"):
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(written)
        assert written == golden.read_text(), golden


def test_derived_lines_say_what_they_were_derived_from(built: Path, tmp_path: Path) -> None:
    model_repository.deploy(built, tmp_path / "models", backend="python")
    config = parsed(tmp_path / "models" / "tiny_swiglu" / "config.pbtxt")
    assert list(config.dynamic_batching.preferred_batch_size) == [2]  # 9 ms an item, and 4 gain nothing on that
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    policy = config.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 1024 and policy.default_timeout_microseconds == 10_000_000
    text = (tmp_path / "models" / "tiny_swiglu" / "config.pbtxt").read_text()
    for line in (
        "preferred_batch_size: [2]  # measured where it was deployed, with 3x28x42, ms a batch: 1 in 10, 2 in",
        "max_queue_delay_microseconds: 1000  # a tenth",
        "max_batch_size: 4  # the largest batch of the profile",
        "dims: [3, -1, -1]  # height 14 to 1022, width 14 to 1022",
    ):
        assert line in text


def test_warmup_is_what_the_bundle_passed_on(built: Path, tmp_path: Path) -> None:
    model_repository.deploy(built, tmp_path / "models", backend="python")
    folder = tmp_path / "models" / "tiny_swiglu"
    reference = reference_file.read(built / bundle.REFERENCE)
    known = {e.case.inputs["pixels"][:1].tobytes() for e in reference.expectations}
    samples = parsed(folder / "config.pbtxt").model_warmup
    assert len(samples) == 2
    for sample in samples:
        value = sample.inputs["pixels"]
        raw = (folder / "warmup" / value.input_data_file).read_bytes()
        assert raw in known and len(raw) == 4 * np.prod(value.dims)


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


def test_what_is_refused_leaves_nothing(built: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(built, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.onnx.data").write_bytes(b"other")
    unjudged = pipeline.export_only(
        pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=tmp_path / "unjudged")
    ).folder
    with pytest.raises(ValidationFailed, match="unjudged"):
        model_repository.deploy(unjudged, repository)
    with pytest.raises(ValidationFailed, match="damaged"):
        model_repository.deploy(tmp_path / "damaged", repository)
    for name in ("../evil", "A", "", "a" * 65):
        with pytest.raises(UsageError, match="not a name"):
            model_repository.deploy(built, repository, name=name or " ")
    with pytest.raises(UsageError, match="no TensorRT plan"):
        model_repository.deploy(built, repository, backend="tensorrt_plan")
    with pytest.raises(UsageError, match="no folder"):
        model_repository.deploy(built, repository, samples=tmp_path / "absent")
    assert not repository.exists()


def test_a_rejected_bundle_is_refused(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "rejected")
    manifest = bundle.read_manifest(built).model_copy(update={"verdict": "rejected"})
    (tmp_path / "rejected" / bundle.MANIFEST).write_bytes(manifest.to_bytes())
    with pytest.raises(ValidationFailed, match="rejected"):
        model_repository.deploy(tmp_path / "rejected", tmp_path / "models")


def test_a_strangers_model_is_never_touched(built: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "models" / "tiny_swiglu_images"
    (stranger / "1").mkdir(parents=True)
    (stranger / "config.pbtxt").write_text('backend: "python"\n')
    before = snapshot(tmp_path / "models")
    with pytest.raises(UsageError, match="was not deployed under"):
        model_repository.deploy(built, tmp_path / "models")
    assert snapshot(tmp_path / "models") == before


def test_no_front_end_is_left_behind(built: Path, tmp_path: Path) -> None:
    """Its other half would be that of another version."""
    model_repository.deploy(built, tmp_path / "models", samples=IMAGES)
    before = snapshot(tmp_path / "models")
    with pytest.raises(UsageError, match=r"tiny_swiglu_sized_images.* stay behind"):
        model_repository.deploy(built, tmp_path / "models")
    assert snapshot(tmp_path / "models") == before
    assert model_repository.deploy(built, tmp_path / "models", samples=IMAGES).version == 2


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


def served_by(repository: Path) -> dict[str, Any]:
    """What a server would answer from: each model's version, and what each ensemble asks; no version is incomplete."""
    found: dict[str, Any] = {}
    for config in repository.glob("*/config.pbtxt"):
        parsed_config = parsed(config)
        (version,) = parsed_config.version_policy.specific.versions
        assert (config.parent / str(version) / "config.pbtxt").read_bytes() == config.read_bytes()
        found[config.parent.name] = version
        for step in parsed_config.ensemble_scheduling.step:
            assert step.model_version == version, f"{config} asks another release"
    return found


def plain(repository: Path) -> dict[str, bytes]:
    """Every file, without what the clock writes."""
    found = snapshot(repository)
    for name, content in found.items():
        if name.endswith(".releases.json"):
            record = json.loads(content)
            found[name] = json.dumps(record["served"]).encode()
    return found


VERBS = {
    "first": lambda built, models: model_repository.deploy(built, models, name="tiny"),
    "second": lambda built, models: model_repository.deploy(built, models, name="tiny", backend="python"),
    "with another front end": lambda built, models: model_repository.deploy(built, models, name="tiny", samples=IMAGES),
    "rollback": lambda _, models: model_repository.rollback(models, "tiny"),
}


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


def hostile(models: Path, kind: str, secret: Path) -> None:
    """A repository somebody else could write to."""
    if kind == "a version's configuration is a link":
        (models / "tiny" / "1" / "config.pbtxt").unlink()
        (models / "tiny" / "1" / "config.pbtxt").symlink_to(secret)
    elif kind == "a version is a link":
        shutil.rmtree(models / "tiny" / "1")
        (models / "tiny" / "1").symlink_to(secret.parent)
    elif kind == "a pipe":
        (models / "tiny" / "1" / "config.pbtxt").unlink()
        os.mkfifo(models / "tiny" / "1" / "config.pbtxt")
    elif kind == "a neighbour with a pipe":
        (models / "tiny_other").mkdir()
        os.mkfifo(models / "tiny_other" / "config.pbtxt")
    elif kind == "a neighbour with a device":
        (models / "tiny_other").mkdir()
        (models / "tiny_other" / "config.pbtxt").symlink_to("/dev/zero")
    elif kind == "the record is a link":
        (models / "tiny.releases.json").unlink()
        (models / "tiny.releases.json").symlink_to(secret)
    elif kind == "the record is huge":
        (models / "tiny.releases.json").write_bytes(b" " * (2 << 20))
    elif kind == "another record":
        (models / "tiny.releases.json").write_text('{"name": "tiny", "served": [7]}')
    else:
        (models / "tiny" / "config.pbtxt").write_text("version_policy {\n" * 50_000)


HOSTILE = [
    "a version's configuration is a link", "a version is a link", "a pipe", "a neighbour with a pipe",
    "a neighbour with a device", "the record is a link", "the record is huge", "another record", "a quadratic policy",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused_or_harmless(built: Path, tmp_path: Path, kind: str) -> None:
    models, secret = tmp_path / "models", tmp_path / "elsewhere" / "config.pbtxt"
    secret.parent.mkdir()
    secret.write_text("# dinoexport deployed this as tiny\nthe secret\n")
    for _ in range(2):
        model_repository.deploy(built, models, name="tiny")
    hostile(models, kind, secret)
    started = time.monotonic()
    for verb in ("rollback", "second"):
        with suppress(DinoexportError):
            VERBS[verb](built, models)
        for path in models.glob("*/config.pbtxt"):
            if path.is_file() and not path.is_symlink():
                assert "the secret" not in path.read_text()
    assert secret.read_text().endswith("the secret\n") and time.monotonic() - started < 20


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


@pytest.mark.parametrize("address", ["s3://bucket/models", "gs://b/m", "https://host/models", "S3:/b"])
def test_an_address_is_no_folder(built: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is an address"):
        model_repository.deploy(built, Path(address))
    assert not list(tmp_path.glob("[sSgh]*"))


def _plan_engine(file: str, cc: str, *, version: str = "11.2.1.2", profiles: int = 1) -> Any:
    """Facts of a classic plan, as a build for a data-centre GPU records them."""
    shapes = [((1, 3, 14, 14), (b, 3, 224, 224), (4, 3, 518, 518)) for b in (1, 4)[:profiles]]
    return SimpleNamespace(
        file=file,
        graph="model",
        runtime=Runtime.TENSORRT,
        version_compatible=False,
        stripped=False,
        runtime_version=version,
        compute_capabilities=(cc,),
        profiles={f"p{i}": {"pixels": shape} for i, shape in enumerate(shapes)},
    )


def with_plans(monkeypatch: pytest.MonkeyPatch, built: Path, *engines: Any) -> None:
    """The bundle, as if it held these plans: no machine of ours can build one."""
    manifest = bundle.read_manifest(built)
    for engine in engines:
        (built / engine.file).write_bytes(b"a plan")
    listed = bundle.describe(built, [engine.file for engine in engines], "engine")
    manifest = manifest.model_copy(update={"engines": engines, "files": (*manifest.files, *listed)})
    monkeypatch.setattr(manifest.__class__, "to_bytes", lambda _: b"")
    monkeypatch.setattr(bundle, "read_manifest", lambda *_: manifest)


def test_plans(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    plans = [_plan_engine(f"model.sm{cc.replace('.', '')}.plan", cc, profiles=2) for cc in ("8.0", "9.0")]
    with_plans(monkeypatch, tmp_path / "bundle", *plans)
    deployed = model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton="26.08")
    assert deployed.backend == "tensorrt_plan"
    config = parsed(tmp_path / "models" / "tiny_swiglu" / "config.pbtxt")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert dict(config.cc_model_filenames) == {"8.0": "model.sm80.plan", "9.0": "model.sm90.plan"}
    assert {p.name for p in (tmp_path / "models/tiny_swiglu/1").glob("*.plan")} == {
        "model.sm80.plan",
        "model.sm90.plan",
    }
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 4]
    (group,) = config.instance_group
    assert group.kind == group.KIND_GPU and list(group.profile) == ["0", "1"]
    strategy = config.parameters["execution_context_allocation_strategy"].string_value
    assert strategy == "ON_PROFILE_CHANGE"


def test_one_plan_of_one_profile(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    with_plans(monkeypatch, tmp_path / "bundle", _plan_engine("model.plan", "8.0"))
    model_repository.deploy(tmp_path / "bundle", tmp_path / "models")
    config = parsed(tmp_path / "models" / "tiny_swiglu" / "config.pbtxt")
    assert config.default_model_filename == "model.plan" and not config.cc_model_filenames
    assert not config.instance_group[0].profile
    assert "execution_context_allocation_strategy" not in config.parameters


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("26.07", "Triton 26.07 has 11.1.0"),
        ("26.10=11.4.0", "has 11.4.0"),
        ("26.10", "is not known here"),
    ],
)
def test_a_plan_that_cannot_load_is_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str, words: str
) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    with_plans(monkeypatch, tmp_path / "bundle", _plan_engine("model.plan", "8.0"))
    with pytest.raises(UsageError, match=words):
        model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton=tag)
    assert not (tmp_path / "models").exists()
    model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton="26.10=11.2.1")


def test_stripped_and_version_compatible_plans(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    plan = _plan_engine("model.plan", "8.0")
    plan.stripped = True
    with_plans(monkeypatch, tmp_path / "bundle", plan)
    with pytest.raises(UsageError, match="holds no weights"):
        model_repository.deploy(tmp_path / "bundle", tmp_path / "models")
    model_repository.deploy(tmp_path / "bundle", tmp_path / "models", backend="onnxruntime", triton="26.07")
    plan.stripped, plan.version_compatible = False, True
    assert model_repository.deploy(tmp_path / "bundle", tmp_path / "models", triton="26.07").backend == "tensorrt_plan"
    assert "version-compatible=true" in (tmp_path / "models" / "tiny_swiglu" / "config.pbtxt").read_text()


def test_it_is_measured_with_what_is_most_likely(built: Path) -> None:
    graph = bundle.read_manifest(built).graphs[0].graph()
    items = served_models.judged_items(graph, reference_file.read(built / bundle.REFERENCE))
    assert [item["pixels"].shape for item in items] == [(1, 3, 28, 42), (1, 3, 30, 69)]
    for side, expected in ((14, 42), (28, 42), (518, 69)):
        dims = tuple(Dim(name=d.name, min=d.min, opt=side, max=d.max) for d in graph.dims)
        likely = served_models._most_likely(dataclasses.replace(graph, dims=dims), items)
        assert likely["pixels"].shape[-1] == expected


def test_command(built: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dinoexport import cli

    def run(*args: str) -> Any:
        return CliRunner().invoke(cli.app, list(args))

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


def test_two_at_once_are_refused(built: Path, tmp_path: Path) -> None:
    with (
        locks.exclusive(tmp_path / ".models.work" / "lock", doing="deploying"),
        pytest.raises(DinoexportError, match="Another process"),
    ):
        model_repository.deploy(built, tmp_path / "models")
    assert not (tmp_path / "models").exists()

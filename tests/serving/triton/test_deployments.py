"""Deploying and rolling back, file by file, with a bundle that is written down: no build and no server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.runtime import cpu
from dinoexport.serving.triton import model_repository, repository_state, served_models
from dinoexport.serving.triton.releases import Release, Releases
from dinoexport.serving.triton.served_models import TensorRTPlan
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way
from dinoexport.system.untrusted import Unreadable
from tests.serving.triton.conftest import CONTENT, Given
from tests.serving.triton.test_made_models import FINISHING, PLAIN, engine, manifest, reference


def deployed(tmp_path: Path, **options: Any) -> model_repository.Deployed:
    return model_repository.deploy(tmp_path / "bundle", tmp_path / "models", **{"name": "tiny"} | options)


def tree(tmp_path: Path) -> set[str]:
    models = tmp_path / "models"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") and path.is_dir()], "nothing is left"
    return {str(path.relative_to(models)) for path in models.rglob("*") if path.is_file()}


VERSION = ("config.pbtxt", "model.onnx/model.onnx", "model.onnx/model.onnx.data", "reference.npz")


def of(version: int, model: str = "tiny") -> set[str]:
    return {f"{model}/{version}/{file}" for file in VERSION} | {f"{model}/warmup/{version}-{i}-0" for i in (0, 1)}


def record(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "models" / "tiny.releases.json").read_text())


def test_a_release_after_another_and_back(given: Given, tmp_path: Path) -> None:
    """Earlier files stay; only the configuration that names the served version changes."""
    first = deployed(tmp_path)
    assert (first.version, first.previous, first.models, first.backend) == (1, None, ("tiny",), "onnxruntime")
    assert (first.name, first.note, first.retired, first.repository) == ("tiny", "", (), tmp_path / "models")
    around = {"tiny.releases.json", "tiny/config.pbtxt"}
    assert tree(tmp_path) == around | of(1)
    models = tmp_path / "models" / "tiny"
    for name, path in (("model.onnx", "1/model.onnx/model.onnx"), ("reference.npz", "1/reference.npz")):
        assert (models / path).read_bytes() == CONTENT[name]
    smallest = reference(9, 3).expectations[1].case.inputs["pixels"][:1]
    assert (models / "warmup" / "1-0-0").read_bytes() == smallest.tobytes()
    second = deployed(tmp_path)
    assert (second.version, second.previous) == (2, 1)
    assert tree(tmp_path) == around | of(1) | of(2)
    configs = [(models / str(version) / "config.pbtxt").read_text() for version in (1, 2)]
    assert "versions: [1]" in configs[0] and "versions: [2]" in configs[1]
    assert (models / "config.pbtxt").read_text() == configs[1]
    found = record(tmp_path)
    assert [release.pop("deployed") is not None for release in found["releases"]] == [True, True]
    sha256 = hashlib.sha256(b"manifest").hexdigest()
    assert found == {
        "schema_version": 1, "name": "tiny", "served": [1, 2],
        "releases": [{"version": version, "models": ["tiny"], "bundle": sha256} for version in (1, 2)],
    }  # fmt: skip
    back = model_repository.rollback(tmp_path / "models", "tiny")
    assert (back.version, back.previous, back.models, back.retired) == (1, 2, ("tiny",), ())
    assert (models / "config.pbtxt").read_text() == configs[0] and record(tmp_path)["served"] == [1]
    assert tree(tmp_path) == around | of(1) | of(2)
    with pytest.raises(UsageError) as refused:
        model_repository.rollback(tmp_path / "models", "tiny")
    assert refused.value.message == "tiny has no version before 1."
    assert refused.value.next_step == "Versions there are: 1, 2."
    assert deployed(tmp_path).version == 3, "a number is never used twice"


def test_models_that_are_not_in_a_release_are_set_aside(given: Given, tmp_path: Path) -> None:
    """The first release has no front end: rolling back retires it, and deploying again brings it back."""
    deployed(tmp_path)
    given.ends = (PLAIN,)
    with_end = deployed(tmp_path)
    assert with_end.models == ("tiny", "tiny_images_prepare", "tiny_images")
    prepare = tmp_path / "models" / "tiny_images_prepare" / "2" / "model.py"
    assert "PrepareModel" in prepare.read_text()
    back = model_repository.rollback(tmp_path / "models", "tiny")
    assert back.retired == ("tiny_images_prepare", "tiny_images")
    assert not prepare.exists()
    assert (tmp_path / "models" / "tiny" / "retired" / "tiny_images_prepare" / "2" / "model.py").exists()
    again = deployed(tmp_path)
    assert again.version == 3 and {path.name for path in prepare.parent.parent.iterdir()} == {"2", "3", "config.pbtxt"}
    assert not list((tmp_path / "models" / "tiny" / "retired").iterdir())
    # A model that would stay behind in its version is named.
    given.ends = ()
    with pytest.raises(UsageError, match=r"^tiny_images, tiny_images_prepare would stay behind"):
        deployed(tmp_path)


def test_python_backend_has_code_and_a_copy_of_its_own(given: Given, tmp_path: Path) -> None:
    given.ends = (PLAIN, FINISHING)
    found = deployed(tmp_path, backend="python")
    assert found.backend == "python" and (tmp_path / "models" / "tiny" / "1" / "model.py").exists()
    assert found.models == (
        "tiny", "tiny_images_prepare", "tiny_images", "tiny_maps_prepare", "tiny_maps_finish", "tiny_maps",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("way", "backend", "note"),
    [
        (Way(runtime=Runtime.OPENVINO, precision=Precision.INT8), "onnxruntime", True),
        (Way(runtime=Runtime.OPENVINO, precision=Precision.INT8), "python", False),
        (Way(runtime=Runtime.OPENVINO, precision=Precision.FP32), "onnxruntime", False),
        (Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.INT8), "onnxruntime", False),
        (None, "onnxruntime", False),
    ],
)
def test_a_precision_that_the_server_lacks_is_said(
    way: Way | None, backend: Any, note: bool, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given.changes = {"cpu": way and SimpleNamespace(chosen=way)}
    monkeypatch.setattr(cpu, "way_here", lambda way: way)
    found = deployed(tmp_path, backend=backend).note
    assert found.startswith("this bundle has int8 in OpenVINO; ONNX Runtime, which Triton runs it in") == note
    assert bool(found) == note


@pytest.mark.parametrize(("tag", "limits"), [(None, True), ("26.08", True), ("27.01", True), ("26.07", False)])
def test_queues_have_limits_from_a_tag_on(
    tag: str | None, limits: bool, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_repository.model_files, "check_readable", lambda *_: None)
    deployed(tmp_path, triton=tag)
    assert ("max_queue_size" in (tmp_path / "models" / "tiny" / "config.pbtxt").read_text()) == limits


# What is refused


def test_the_variants_name_is_for_one_head(given: Given, tmp_path: Path) -> None:
    """Who gives the name replaces what is served; who does not is told what is there."""
    assert deployed(tmp_path, name=None).name == "tiny"
    given.head = SimpleNamespace(kind="logreg", classes=("a", "b"))
    model = given.model()
    there = given.model()
    given.head = None
    served = iter([model])
    given.model = lambda: next(served, SimpleNamespace(**{**vars(there), "head_facts": None}))  # type: ignore[method-assign]
    with pytest.raises(UsageError) as refused:
        deployed(tmp_path, name=None)
    assert refused.value.message == (
        f"{tmp_path / 'models'} serves tiny with no head (outputs score, tokens); this bundle has the head logreg of 2 "
        "classes (outputs score, tokens)."
    )
    assert deployed(tmp_path).version == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "Tiny"}, "'Tiny' is not a name"), ({"name": "a" * 65}, "is not a name"),
        ({"triton": "26.8"}, "is not a tag"), ({"triton": "26.08x"}, "is not a tag"),
        ({"backend": "pythn"}, "'pythn' is unknown. Did you mean 'python'?"),
        ({"backend": "tensorrt_plan"}, "holds no TensorRT plan"), ({"answers": ["png"]}, "no form 'png'"),
        ({"sizes": ["4x9"]}, "onnxruntime backend compiles no forms"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_leaves_nothing(
    options: dict[str, Any], words: str, given: Given, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        deployed(tmp_path, **options)
    assert words in refused.value.message and not (tmp_path / "models").exists()
    assert deployed(tmp_path, name="a" * 64).name == "a" * 64


@pytest.mark.parametrize("verdict", ["failed", "unjudged"])
def test_only_what_passed_is_served(verdict: str, given: Given, tmp_path: Path) -> None:
    given.verdict = verdict
    with pytest.raises(ValidationFailed, match=f"is {verdict}; only bundles that passed are deployed"):
        deployed(tmp_path)
    with pytest.raises(UsageError, match="is an address, not a folder"):
        model_repository.deploy(tmp_path / "bundle", "s3://bucket/models")  # type: ignore[arg-type]


def test_folders_of_others_are_left_alone(given: Given, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"models/tiny is there already and was not deployed under this name"):
        deployed(tmp_path)
    (tmp_path / "models" / "tiny").rmdir()
    deployed(tmp_path)
    for name in ("warmup", "retired"):
        folder = tmp_path / "models" / "tiny" / name
        if folder.exists():
            folder.rename(tmp_path / name)
        folder.symlink_to(tmp_path)
        with pytest.raises(UsageError, match=f"{name} is a link or no folder"):
            deployed(tmp_path)
        folder.unlink()
    assert deployed(tmp_path).version == 2


def test_names_that_were_never_deployed(given: Given, tmp_path: Path) -> None:
    for models, step in (("none", "nothing; dinoexport deploy adds a bundle"), ("models", "tiny")):
        if models == "models":
            deployed(tmp_path)
        with pytest.raises(UsageError) as refused:
            model_repository.rollback(tmp_path / models, "tinny")
        said = " Did you mean 'tiny'?" if models == "models" else ""
        assert refused.value.message == f"{tmp_path / models} serves no 'tinny'.{said}"
        assert refused.value.next_step == f"It serves: {step}."


def plan(version: str = "10.1.0", **changed: Any) -> TensorRTPlan:
    facts = {
        "file": "a.plan", "graph": "model", "tensorrt_version": version, "compute_capability": "8.0",
        "version_compatible": False, "stripped": False, "profiles": (),
    }  # fmt: skip
    return TensorRTPlan(**(facts | changed))


@pytest.mark.parametrize(
    ("plans", "triton", "words"),
    [
        ([plan()], None, ""), ([], "99.99", ""), ([plan()], "99.99=10.1.0", ""), ([plan()], "99.99=10.1.0.9", ""),
        ([plan("10.1.0.9")], "99.99=10.1.0", ""),
        ([plan("9.9.9", version_compatible=True)], "99.99=10.1.0", ""),
        ([plan(), plan("10.1.1", file="b.plan")], "99.99=10.1.0", "b.plan was built by TensorRT 10.1.1; Triton 99.99"),
        ([plan("10.2.0")], "99.99=10.1.0", "a.plan was built by TensorRT 10.2.0"),
        ([plan()], "99.99", "The TensorRT inside Triton 99.99 is not known here."),
        ([plan(), plan(file="b.plan", stripped=True)], None, "b.plan holds no weights, and Triton cannot refit them"),
    ],
)  # fmt: skip
def test_plans_that_a_server_loads(plans: list[TensorRTPlan], triton: str | None, words: str) -> None:
    if not words:
        model_repository._refuse_unloadable(plans, triton)
    else:
        with pytest.raises(UsageError) as refused:
            model_repository._refuse_unloadable(plans, triton)
        assert refused.value.message.startswith(words)


@pytest.mark.parametrize(
    ("backend", "plans", "chosen"),
    [(None, [], "onnxruntime"), (None, [plan()], "tensorrt_plan"), ("python", [plan()], "python"),
     ("tensorrt_plan", [plan()], "tensorrt_plan"), ("onnxruntime", [plan()], "onnxruntime")],
)  # fmt: skip
def test_plans_are_served_where_there_are_any(backend: Any, plans: list[TensorRTPlan], chosen: str) -> None:
    assert model_repository._chosen(backend, plans) == chosen
    assert model_repository._chosen_for_text(None) == model_repository._chosen_for_text("python") == "python"
    with pytest.raises(UsageError, match="keeps no cache from one token to the next"):
        model_repository._chosen_for_text("onnxruntime")


def test_plans_are_not_looked_at_where_onnx_runtime_serves(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the graph is, which a TensorRT plan's server never reads."""
    given.changes = {"engines": (engine(stripped=True),)}
    with pytest.raises(UsageError, match=r"^model\.plan holds no weights"):
        deployed(tmp_path)
    read: list[Any] = []
    monkeypatch.setattr(model_repository.model_files, "check_readable", lambda *asked: read.append(asked[2]))
    assert deployed(tmp_path, backend="onnxruntime", triton="26.08").version == 1
    assert deployed(tmp_path, backend="python", triton="26.08").version == 2
    assert read == ["26.08", None]


def test_the_plans_of_a_bundle() -> None:
    """The first card of a plan is the one it was built for; plans of TensorRT for RTX are not Triton's."""
    both: Any = manifest(engines=(engine(), engine(Runtime.TENSORRT_RTX)))
    (found,) = served_models.plans_of(both)
    assert found == plan("10.1", file="model.plan", version_compatible=True, profiles=((2, 4),))


def test_sizes_are_for_graphs_of_images_in_the_python_backend() -> None:
    """They come after the recipe's own."""
    sides = (Dim(name="height", min=1, opt=4, max=8), Dim(name="width", min=1, opt=4, max=8))
    tensor = Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning="")
    graph = Graph(
        name="model", inputs=(tensor,), outputs=(), dims=(Dim(name="batch", min=1, opt=1, max=2), *sides)
    )  # fmt: skip
    decoder = dataclasses.replace(graph, outputs=(tensor,), carried={"pixels": "pixels"})
    of: Any = manifest(recipe={"sizes": ["2x2"], "a": 1}, changed=lambda *, recipe: recipe)

    def recipe(*sizes: str, graphs: Any = (graph, decoder)) -> Any:
        return model_repository._with_sizes(of, SimpleNamespace(graphs=graphs), "python", sizes)  # type: ignore[arg-type]

    assert recipe("4x8", "2x4x8") == {"sizes": ["2x2", "4x8", "2x4x8"], "a": 1}
    assert recipe() is of
    with pytest.raises(UsageError, match="9"):
        recipe("4x9")
    with pytest.raises(UsageError, match=r"^A text model's sizes change with every token\.$"):
        recipe("4x8", graphs=(decoder,))


# The record of releases


def release(version: int) -> Release:
    return Release(version=version, models=("tiny",), deployed=datetime(2025, 1, 1, tzinfo=UTC))


def test_a_release_that_is_not_whole_is_passed_over() -> None:
    known = Releases(name="tiny")
    assert known.current is None and known.next_version() == 1 and known.next_version([4, 2]) == 5
    for version in (1, 2, 3):
        known = known.with_deployed(release(version))
    assert known.current == release(3) and known.next_version([1]) == 4 and known.served == (1, 2, 3)
    assert known.rolled_back().served == (1, 2)
    assert known.rolled_back(lambda release: release.version != 2).served == (1,)
    with pytest.raises(UsageError) as refused:
        known.rolled_back(lambda release: release.version == 3)
    assert (refused.value.message, refused.value.next_step) == (
        "tiny has no version before 3.", "Versions there are: 3.",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"^tiny has no version\.$") as refused:
        Releases(name="tiny").rolled_back()
    assert refused.value.next_step == "Versions there are: none."
    assert Releases.from_bytes(known.to_bytes(), name="tiny") == known


def test_a_record_is_read_by_people_too() -> None:
    assert (
        Releases(name="tiny").with_deployed(release(1)).to_bytes().decode()
        == """{
 "schema_version": 1,
 "name": "tiny",
 "releases": [
  {
   "version": 1,
   "models": [
    "tiny"
   ],
   "bundle": null,
   "deployed": "2025-01-01T00:00:00Z"
  }
 ],
 "served": [
  1
 ]
}
"""
    )


@pytest.mark.parametrize("kind", ["short", "longest", "too long", "a link"])
def test_what_is_read_of_a_repository_that_anybody_can_write_to(kind: str, tmp_path: Path) -> None:
    """A record and a configuration are files of a mebibyte at most; a folder without a readable one is not ours."""
    model_folder(tmp_path, "tiny", 1, served=1)
    known = Releases(name="tiny").with_deployed(release(1))
    record, config = tmp_path / "tiny.releases.json", tmp_path / "tiny" / "1" / "config.pbtxt"
    record.write_bytes(known.to_bytes())
    for path in (record, config):
        if kind == "a link":
            path.rename(tmp_path / path.name)
            if path == config:
                path.symlink_to(tmp_path / path.name)
            else:
                (tmp_path / path.name).rename(tmp_path / "elsewhere")
                path.symlink_to(tmp_path / "elsewhere")
        elif kind != "short":
            more = 1024 * 1024 - path.stat().st_size + (kind == "too long")
            path.write_bytes(path.read_bytes() + b" " * more)
    whole = repository_state.config_of(tmp_path, "tiny", 1, known)
    if kind in ("short", "longest"):
        assert repository_state.read_releases(tmp_path, "tiny") == known and whole is not None
        assert repository_state.config_of(tmp_path, "tiny", 1, Releases(name="tiny_own")) is None
    else:
        assert whole is None
        with pytest.raises(Unreadable):
            repository_state.read_releases(tmp_path, "tiny")


@pytest.mark.parametrize(
    "changed",
    [{"name": "other"}, {"served": [1, 9]}, {"releases": 2 * [{"version": 1, "models": ["tiny"]}]}, {"more": 1},
     {"schema_version": 2}],
)  # fmt: skip
def test_a_record_that_is_none(changed: dict[str, Any]) -> None:
    content = {"name": "tiny", "releases": [{"version": 1, "models": ["tiny"]}], "served": [1]}
    assert Releases.from_bytes(json.dumps(content).encode(), name="tiny").served == (1,)
    for raw in (json.dumps(content | changed).encode(), b"", b"{"):
        with pytest.raises(UsageError, match=r"tiny\.releases\.json is not a record of releases"):
            Releases.from_bytes(raw, name="tiny")


def model_folder(models: Path, name: str, *versions: int, served: int, of: str = "tiny") -> None:
    for version in (*versions, 0):
        folder = models / name / str(version) if version else models / name
        folder.mkdir(parents=True, exist_ok=True)
        of_version = version or served
        entries = served_models.identity(name, of_version)
        content = served_models.config_text(SimpleNamespace(name=of), entries)  # type: ignore[arg-type]
        (folder / "config.pbtxt").write_text(content)


def test_releases_of_an_older_dinoexport_are_found_from_their_folders(tmp_path: Path) -> None:
    """Each version that has a folder was one; those above the served one were not."""
    model_folder(tmp_path, "tiny", 1, 2, 3, served=2)
    model_folder(tmp_path, "tiny_images", 2, served=2)
    model_folder(tmp_path, "tinier", 7, served=7, of="tinier")
    (tmp_path / "tiny" / "01").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "tiny_link").symlink_to(tmp_path / "tinier")
    known = repository_state.read_releases(tmp_path, "tiny")
    assert [(r.version, r.models) for r in known.releases] == [
        (1, ("tiny",)), (2, ("tiny", "tiny_images")), (3, ("tiny",)),
    ]  # fmt: skip
    assert known.served == (1, 2) and repository_state.names_in(tmp_path) == {"tiny", "tinier"}
    model_folder(tmp_path, "tiny_images", 2, 3, served=3)
    assert repository_state.read_releases(tmp_path, "tiny").served == (), "which was served last is unknown"
    with pytest.raises(UsageError, match="serves several versions of tiny at once"):
        model_repository.rollback(tmp_path, "tiny")
    assert repository_state.read_releases(tmp_path / "none", "tiny") == Releases(name="tiny")

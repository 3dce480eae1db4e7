"""A bundle with a fitted head: what is fitted, what it is judged by, what its manifest says, and what is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dinoexport.bundle import BundleFile
from dinoexport.errors import ValidationFailed
from dinoexport.pipeline.fit import flow, publishing
from dinoexport.pipeline.fit.classifiers import Fitted, HeldOutScores
from dinoexport.pipeline.fit.examples import Examples, LabelledImage
from dinoexport.spec import Case, Expectation, HeadFacts, Precision, silent

WEIGHT = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.5]], np.float32)
FITTED = Fitted(tensors={"fitted.weight": WEIGHT, "fitted.bias": np.zeros(3, np.float32)}, facts={"C": 1.0})
READS = (("token", "as is"), ("patches", "mean"))


def image(name: str, label: str) -> LabelledImage:
    return LabelledImage(name=name, label=label, digest=hashlib.sha256(name.encode()).hexdigest())


FOUND = Examples(
    classes=("é", "b"), fitted=(image("1", "é"), image("2", "b"), image("3", "b")), held_out=(image("4", "é"),),
    said=("skipped one",),
)  # fmt: skip
HELD = HeldOutScores(
    images=1, right=1, accuracy=1.0, interval=(0.2, 1.0), recall={"é": 1.0, "b": 0.0}, counts={"é": 1, "b": 0},
    confusions=(),
)  # fmt: skip


# What is fitted


def test_a_head_is_fitted_on_what_it_reads_in_the_order_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out images are judged, never fitted on; what is published reads the same outputs."""
    calls: dict[str, Any] = {}
    told: list[Any] = []
    features = {
        e.digest: {"token as is": np.array([float(e.name)]), "patches mean": np.array([10 * float(e.name)]),
                   "unread as is": np.array([0.0])}
        for e in (*FOUND.fitted, *FOUND.held_out)
    }  # fmt: skip
    model = SimpleNamespace(fits={"knn": READS}, fitted_head=lambda kind: f"fitted_{kind}")
    monkeypatch.setattr(flow, "parse", lambda *_, **__: SimpleNamespace(changed=lambda **changes: changes))
    monkeypatch.setattr(flow.family, "find", lambda _name: SimpleNamespace(model=lambda _recipe: model))
    monkeypatch.setattr(flow, "_refuse", lambda *_: None)
    monkeypatch.setattr(flow.examples, "read", lambda *_, seed, progress: FOUND)
    monkeypatch.setattr(flow, "_replaced", lambda *_, force: ("replaced another",))
    monkeypatch.setattr(flow.runners, "open_candidate", lambda *given: given)
    monkeypatch.setattr(flow.runners, "way_of", lambda _manifest: "way")
    monkeypatch.setattr(flow.features, "of_images", lambda *given: calls.update(asked=given) or features)
    monkeypatch.setattr(flow.classifiers, "fit", lambda *given, **more: calls.update(fit=(given, more)) or NEAREST)
    monkeypatch.setattr(flow.classifiers, "probabilities", lambda kind, fitted, x: calls.update(held=x) or "shares")
    monkeypatch.setattr(flow.classifiers, "judge", lambda *given: calls.update(judge=given) or HELD)
    monkeypatch.setattr(flow, "_confused", lambda *_: ())
    nothing: Any = None
    made = publishing.FittedBundle(folder=Path("out"), manifest=nothing, held=HELD, report=nothing, said=("said",))
    monkeypatch.setattr(flow.publishing, "publish", lambda *given: calls.update(publish=given) or made)
    graph = SimpleNamespace(file="model.onnx", graph=lambda: "graph")
    manifest: Any = SimpleNamespace(recipe={}, family="toy", graphs=(graph,))
    report = lambda *step: told.append(step)  # noqa: E731
    found = flow._fitted(Path("in"), manifest, Path("photos"), "knn", False, Path("out"), True, report)
    assert calls["asked"][2] == (model, {Path("in/model.onnx"): "graph"}, "way")
    assert calls["asked"][4] == (*FOUND.fitted, *FOUND.held_out)
    (kind, x, labels), settings = calls["fit"]
    assert (kind, x.tolist(), labels.tolist()) == ("knn", [[1, 10], [2, 20], [3, 30]], [0, 1, 1])
    assert settings == {"classes": 2, "balanced": False, "seed": 0} and told == [("fitting", 0, 0)]
    assert calls["held"].tolist() == [[4, 40]] and calls["judge"] == ("shares", ["é"], ["4"], ("é", "b"))
    changed = {"head": {"kind": "fitted_knn", "classes": ["é", "b"], "neighbours": 2}}
    assert calls["publish"][:7] == (Path("in"), Path("out"), manifest, changed, FOUND, NEAREST, HELD)
    assert calls["publish"][8:11] == (READS, "knn", True) and found.said == ("replaced another", "said")


NEAREST = Fitted(tensors={}, facts={}, table={"neighbours": 2})


# What it is judged by


def test_a_fitted_head_is_expected_on_pytorchs_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: logits are the weights by (token, mean of the patches). The lead is of the best over the second."""
    token = np.array([[1.0, -1.0], [0.0, 3.0]], np.float32)
    patches = np.array([[[1.0], [3.0]], [[-1.0], [0.0]]], np.float32)
    case = Case(name="one", why="", inputs={}, neighbours=True, shown=True)
    backbone: Any = SimpleNamespace(
        expectations=(Expectation(case=case, outputs={"token": token, "patches": patches}),), refusals=("refused",),
        limits=SimpleNamespace(changed=lambda **changes: {"relative_l2_max": 0.5} | changes), name="PyTorch",
    )  # fmt: skip
    monkeypatch.setattr(publishing, "load_validation", lambda name, beside: (name, None))
    of_heads = SimpleNamespace(probability_difference_max=0.125)
    monkeypatch.setattr(publishing.evaluate, "limits_for", lambda *asked: {("heads", Precision.FP32): of_heads}[asked])
    monkeypatch.setattr(publishing.evaluate, "kinds_of", lambda graphs: {"probabilities": ("probabilities", "")})
    model: Any = SimpleNamespace(fitted_validation="heads", graphs=())
    manifest: Any = SimpleNamespace(precision=Precision.FP32)
    found = publishing._expected(backbone, model, manifest, FITTED, READS, "logreg")
    logits = np.array([[5.0, -1.0, 1.0], [-1.0, 3.0, 1.25]])
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    (expectation,) = found.expectations
    assert expectation.case == Case(name="one", why="", inputs={}, neighbours=False, shown=True)
    np.testing.assert_allclose(expectation.outputs["probabilities"], shares, rtol=1e-6)
    assert expectation.outputs["class_index"].tolist() == [0, 1]
    np.testing.assert_allclose(
        expectation.leads["class_index"], [shares[0, 0] - shares[0, 2], shares[1, 1] - shares[1, 2]], rtol=1e-6
    )
    assert [a.dtype for a in (*expectation.outputs.values(), *expectation.leads.values())] == [
        np.float32, np.int32, np.float32,
    ]  # fmt: skip
    limits: Any = found.limits
    assert limits == {"relative_l2_max": 0.5, "probability_difference_max": 0.125}
    assert (found.name, found.refusals) == ("PyTorch; the fitted head in float64", ("refused",))
    assert found.kinds == {"probabilities": ("probabilities", "")}


# What is written


def test_the_files_of_a_fitted_head(tmp_path: Path) -> None:
    """The backbone's weights and nothing else of the old bundle; the names of classes as people write them."""
    source, folder = tmp_path / "source", tmp_path / "new"
    source.mkdir()
    folder.mkdir()
    listed = []
    for name in ("model.onnx", "model.onnx.data", "report.html"):
        (source / name).write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        listed.append(BundleFile(name=name, stage="export", sha256=digest, size_bytes=len(name)))
    manifest: Any = SimpleNamespace(graphs=(SimpleNamespace(file="model.onnx"),), files=tuple(listed))
    extension: Any = SimpleNamespace(
        tensors=FITTED.tensors, write=lambda old, new: new.write_text(f"{old.read_text()} with a head")
    )
    publishing._write(source, folder, manifest, extension, ("é", "b"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "head.safetensors", "labels.json", "model.onnx", "model.onnx.data",
    ]  # fmt: skip
    assert (folder / "model.onnx").read_text() == "model.onnx with a head"
    assert (folder / "labels.json").read_bytes() == '[\n "é",\n "b"\n]\n'.encode()
    stored = load_file(folder / "head.safetensors")
    assert stored.keys() == FITTED.tensors.keys() and stored["fitted.weight"].tolist() == WEIGHT.tolist()


def test_the_manifest_of_a_fitted_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without engines, which compute features; with the hash of the head's own file."""
    monkeypatch.setattr(publishing.GraphFacts, "of", lambda graph, file: (graph, file))
    head = HeadFacts(kind="fitted", dataset="photos", terms="yours", classes=("é", "b"))
    model: Any = SimpleNamespace(head_facts=head, card={"use": "classes"})
    files = [
        BundleFile(name=name, stage="export", sha256=digit * 64, size_bytes=1)
        for name, digit in (("model.onnx", "1"), ("head.safetensors", "2"))
    ]
    made: Any = {"export": SimpleNamespace(key="key", files=tuple(files))}
    old: Any = SimpleNamespace(changed=lambda **changes: changes)
    recipe: Any = SimpleNamespace(model_dump=lambda mode: {"name": "tiny"})
    report: Any = SimpleNamespace(to_json=lambda: {"rows": []})
    found: Any = publishing._manifest(old, recipe, model, "graph", "model.onnx", made, report, {"images": 4})
    assert found.pop("created").tzinfo is not None
    assert found.pop("head").model_dump() == {
        "kind": "fitted", "dataset": "photos", "terms": "yours", "value_range": None, "classes": ("é", "b"),
        "source": "head.safetensors", "sha256": "2" * 64, "file": "head.safetensors",
    }  # fmt: skip
    assert found == {
        "recipe": {"name": "tiny"}, "graphs": (("graph", "model.onnx"),), "engines": (), "files": tuple(files),
        "stage_keys": {"export": "key"}, "card": {"use": "classes"}, "report": {"rows": [], "fit": {"images": 4}},
    }  # fmt: skip


# What is published


class Publishing:
    """`publish` with stand-ins for what runs, and what its neighbours are given."""

    def __init__(self, work: Any, patch: pytest.MonkeyPatch) -> None:
        self.report = SimpleNamespace(passed=True, failures=())
        self.calls: dict[str, Any] = {}
        self.published: Any = None
        work.publish = lambda stages, manifest: setattr(self, "published", (list(stages), manifest))
        model = SimpleNamespace(graphs=(GRAPH,), head_facts=None)
        patch.setattr(publishing.family, "find", lambda _name: SimpleNamespace(model=lambda _recipe: model))
        patch.setattr(publishing.family, "code_of", lambda _model: "code")
        patch.setattr(publishing, "replace", lambda graph, **changes: changes)
        patch.setattr(publishing, "versions_of", lambda packages: dict.fromkeys(packages, "1"))
        patch.setattr(publishing, "_write", self.recorded("write"))
        patch.setattr(publishing.reference_file, "read", lambda path: path)
        patch.setattr(publishing.reference_file, "write", lambda path, content: path.write_text("reference"))
        patch.setattr(publishing, "_expected", lambda *given: REFERENCE)
        patch.setattr(publishing.runners, "built_way", lambda _manifest: "way")
        patch.setattr(publishing.runners, "open_candidate", lambda *given: given[1:])
        patch.setattr(publishing.runners, "candidate_name", lambda *_: "ONNX Runtime")
        patch.setattr(publishing.html_report, "keeping", lambda candidate, *_: candidate)
        patch.setattr(publishing.evaluate, "judged", self.recorded("judged", self.report))
        patch.setattr(publishing, "record_verdict", lambda *_: stage("judge"))
        patch.setattr(publishing, "_manifest", self.recorded("manifest", MANIFEST))
        patch.setattr(publishing, "_page", self.recorded("page", stage("page")))
        patch.setattr(publishing, "list_materials", lambda *_: stage("sbom"))

        @contextmanager
        def workspace(_out: Path, **_: Any) -> Iterator[Any]:
            yield work

        patch.setattr(publishing, "workspace", workspace)

    def recorded(self, name: str, answer: Any = None) -> Any:
        return lambda *given, **_: self.calls.update({name: given}) or answer

    def publish(self) -> publishing.FittedBundle:
        recipe: Any = SimpleNamespace(
            family="toy", head={"kind": "fitted_logreg"}, model_dump=lambda mode: {"sizes": 1, "head": {"b": 1, "a": 2}}
        )
        return publishing.publish(
            Path("in"), Path("out"), OLD, recipe, FOUND, FITTED, HELD, (), READS, "logreg", False, silent
        )


GRAPH: Any = SimpleNamespace()
REFERENCE: Any = SimpleNamespace(expectations=(), limits="limits")
MANIFEST: Any = SimpleNamespace(with_stage=lambda *_: MANIFEST)
OLD: Any = SimpleNamespace(
    graphs=(SimpleNamespace(file="model.onnx", graph=lambda: SimpleNamespace(dims="old dims")),), files=(),
    stage_keys={}, engines=("an engine",), precision=Precision.FP32, cpu=None,
)  # fmt: skip


def stage(name: str) -> Any:
    return SimpleNamespace(name=name, key="key", files=())


def test_a_head_is_published_with_what_it_was_fitted_on(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Publishing(work, monkeypatch)
    found = seen.publish()
    dropped = "the bundle's engines output features and were left out; only the ONNX has the head"
    assert found.said == ("skipped one", dropped) and (found.folder, found.held) == (Path("out"), HELD)
    assert seen.calls["manifest"][-1] == {
        "head": "logreg", "images": 4, "fitted_on": 3, "images_sha256": FOUND.digest, "seed": 0, "C": 1.0,
        "held_out": {
            "images": 1, "right": 1, "accuracy": 1.0, "interval": (0.2, 1.0), "recall": {"é": 1.0, "b": 0.0},
            "counts": {"é": 1, "b": 0}, "confusions": (),
        },
        "notes": ["skipped one", dropped], "versions": {"scikit-learn": "1", "numpy": "1"},
    }  # fmt: skip
    *_, extension, classes = seen.calls["write"]
    assert extension.metadata == {
        "dinoexport.head": "fitted_logreg", "dinoexport.classes": json.dumps(("é", "b")),
        "dinoexport.recipe": '{"head": {"a": 2, "b": 1}, "sizes": 1}',
    }  # fmt: skip
    assert extension.features == READS and extension.graph == {"dims": "old dims"} and classes == ("é", "b")
    assert seen.calls["judged"] == (
        ({work.folder / "export" / "model.onnx": {"dims": "old dims"}}, "way"), REFERENCE,
        "ONNX Runtime, with a fitted head",
    )  # fmt: skip
    assert seen.published == (["export", "reference", "judge", "page", "sbom"], MANIFEST)


def test_a_head_whose_graph_is_wrong_is_not_published(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four outputs that are not as expected, by name, each once."""
    seen = Publishing(work, monkeypatch)
    seen.report.passed = False
    seen.report.failures = tuple(SimpleNamespace(case=name, output="p") for name in "edcbaab")
    with pytest.raises(ValidationFailed, match=r"PyTorch's tokens \(a/p, b/p, c/p, d/p\)\.$"):
        seen.publish()
    assert seen.published is None

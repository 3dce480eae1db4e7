"""The tables of two bundles side by side, of manifests and outputs that are written down here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dinoexport.bundle import BundleFile, HeadManifest
from dinoexport.errors import UsageError
from dinoexport.spec import Case, Expectation
from dinoexport.validation import bundle_diff
from tests.report.test_page_parts import manifest


def file(name: str, digit: str, size: int) -> BundleFile:
    return BundleFile(name=name, stage="export", sha256=digit * 64, size_bytes=size)


def test_only_facts_that_differ_are_listed() -> None:
    """A recipe key by key; its precision is a fact of its own."""
    head = HeadManifest(kind="nyu", dataset="", terms="", sha256="a" * 64)
    ours = manifest(recipe={"precision": "fp16", "graph": {"a": 1, "b": 2}}, versions={"torch": "2.1"}, head=head)
    theirs = manifest(recipe={"precision": "fp32", "graph": {"a": 1, "b": 3}, "more": "x"}, target="a100", head=None)
    assert bundle_diff._differences(ours, theirs) == [
        {"what": "target", "first": "cpu", "second": "a100"},
        {"what": "head's SHA-256", "first": "a" * 64, "second": ""},
        {"what": "version of torch", "first": "2.1", "second": ""},
        {"what": "recipe.graph.b", "first": "2", "second": "3"},
        {"what": "recipe.more", "first": "", "second": "x"},
    ]
    assert bundle_diff._differences(ours, ours) == []
    assert bundle_diff._facts(manifest(head=head.changed(sha256=None)))["head's SHA-256"] == ""


def test_files_side_by_side() -> None:
    ours = manifest(files=(file("a", "1", 10), file("b", "2", 10), file("c", "3", 0)))
    theirs = manifest(files=(file("a", "1", 10), file("b", "3", 25), file("d", "4", 7)))
    titles = ("file", "first, bytes", "second, bytes", "second / first", "same bytes")
    assert bundle_diff._files(ours, theirs) == [
        dict(zip(titles, row, strict=True))
        for row in (
            ("a", 10, 10, "1.00", "yes"), ("b", 10, 25, "2.50", "no"), ("c", 0, "", "", "no"), ("d", "", 7, "", "no"),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "shown"),
    [
        (None, [[3.0, 4.5]], [[3.0, 4.0]], "1.0e-01"), (None, None, [[1.0]], "not there"),
        (None, [[1.0]], None, "not there"),
        (None, [[1.0]], [[1.0, 2.0]], "shape (1, 1) where the reference has (1, 2)"),
        ("labels", [1, 2, 3, 4], [1, 2, 3, 5], "25.00% differ"), ("labels", [1], [1, 2], "another shape"),
        ("labels", [1], [1], "0.00% differ"),
    ],
)  # fmt: skip
def test_how_far_outputs_are_apart(kind: Any, ours: Any, theirs: Any, shown: str) -> None:
    arrays = [None if each is None else np.array(each) for each in (ours, theirs)]
    assert bundle_diff._apart(kind, *arrays) == shown


def side(candidate: Any, **facts: Any) -> Any:
    inputs = facts.pop("inputs", [])
    return SimpleNamespace(
        folder=Path(facts.pop("folder", "first")), candidate=candidate, inputs=inputs,
        manifest=SimpleNamespace(**({"family": "dinov2", "verdict": "passed"} | facts)),
    )  # fmt: skip


def test_outputs_and_times_of_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are asked in turn, six times each; the first answer is compared, and the median of the others shown."""
    now_s = [0.0]
    asked: list[str] = []
    monkeypatch.setattr(bundle_diff, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    times_s = {"a": iter([9, 1, 5, 2, 3, 4]), "b": iter([9, 2, 10, 4, 6, 8])}

    def candidate(which: str, value: float) -> Any:
        def answer(_inputs: Any) -> Any:
            asked.append(which)
            now_s[0] += next(times_s[which])
            return {"tokens": np.array([[3.0, value]])}

        return answer

    expectation = Expectation(case=Case(name="one", why="", inputs={}), outputs={"tokens": np.array([[3.0, 4.0]])})
    reference: Any = SimpleNamespace(expectations=(expectation,), kinds={})
    told: list[Any] = []
    outputs, speed = bundle_diff._asked(
        side(candidate("a", 4.0)), side(candidate("b", 4.5)), reference, lambda *step: told.append(step)
    )
    assert asked == ["a", "b"] * 6 and told == [("asking both", 1, 1)]
    assert outputs == [
        {"case": "one", "output": "tokens", "second from first": "1.0e-01", "first from PyTorch": "0.0e+00",
         "second from PyTorch": "1.0e-01"},
    ]  # fmt: skip
    assert speed == [{"case": "one", "first, ms": "3000.0", "second, ms": "6000.0", "second / first": "2.00"}]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"family": "llama"}, "first and second do not take the same inputs"),
        ({"inputs": [1]}, {"inputs": [2]}, "first and second do not take the same inputs"),
        ({"verdict": "unjudged"}, {}, "first was exported without a reference"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(first: Any, second: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"^{words}"):
        bundle_diff._compared(side(None, **first), side(None, folder="second", **second), lambda *_: None)


def test_operations_that_differ_are_counted(tmp_path: Path) -> None:
    """Over all graphs of a bundle, by their nodes alone: the weights' file is not opened."""
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="not here")

    def side(name: str, *graphs: str) -> Any:
        (tmp_path / name).mkdir()
        files = []
        for i, kinds in enumerate(graphs):
            nodes = [helper.make_node(kind, ["x", "w"], ["y"]) for kind in kinds.split()]
            onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], [weight])), tmp_path / name / f"{i}.onnx")
            files.append(SimpleNamespace(file=f"{i}.onnx"))
        return SimpleNamespace(folder=tmp_path / name, manifest=SimpleNamespace(graphs=files))

    first, second = side("a", "Add Mul Add", "Mul"), side("b", "Add Sub Add", "Mul")
    assert bundle_diff._operations(first, second) == [
        {"operation": "Mul", "first": 2, "second": 1}, {"operation": "Sub", "first": 0, "second": 1},
        {"operation": "all", "first": 4, "second": 4},
    ]  # fmt: skip

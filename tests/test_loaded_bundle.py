"""What a loaded bundle does with inputs and devices, with stand-ins of the model and of all that opens it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import api
from dinoexport.api import OutputsDiffer
from dinoexport.errors import InputRefused, MissingRequirement, UsageError
from dinoexport.runtime import cpu, runners
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way

IMAGES = Tensor(name="images", dtype="uint8", shape=("batch", 4), meaning="pixels")
SCALE = Tensor(name="scale", dtype="float32", shape=(1,), meaning="factor")
GRAPH = Graph(name="model", inputs=(IMAGES,), outputs=(), dims=(Dim(name="batch", min=1, opt=1, max=2),))
FRONT_ENDS = tuple(
    SimpleNamespace(name=name, graph="model", settings=SimpleNamespace(of=name)) for name in ("plain", "resized")
)


class Opened:
    """A bundle, and what was opened and called of it. `missing`: why this machine cannot run it on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.missing = ""
        self.calls: list[Any] = []
        self.way: Any = None
        self.model: Any = SimpleNamespace(front_ends=lambda *_, **__: FRONT_ENDS, prepare=self.prepare)
        monkeypatch.setattr(api, "parse", lambda *_, **__: SimpleNamespace(sizes=("8x8",), front_end={}))
        monkeypatch.setattr(api.family, "find", lambda _name: SimpleNamespace(model=lambda _recipe: self.model))
        monkeypatch.setattr(api.changes, "reading", nullcontext)
        monkeypatch.setattr(api.bundle, "check_same", lambda *_: None)
        monkeypatch.setattr(runners, "open_on_gpu", self.on_gpu)
        monkeypatch.setattr(runners, "driven", lambda _model, _opened: self.candidate)
        monkeypatch.setattr(runners, "way_of", lambda _m: Way(runtime=Runtime.OPENVINO, precision=Precision.FP32))
        monkeypatch.setattr(runners, "candidate_name", lambda _p, way, _a: f"{way.runtime} on the CPU")
        monkeypatch.setattr(cpu, "open_for_sizes", self.on_cpu)

    def bundle(self, *, engines: int = 0, target: str = "cpu", graph: Graph = GRAPH, **settings: Any) -> api.Bundle:
        made: Any = SimpleNamespace(
            recipe={}, family="f", target=target, precision=Precision.FP32, verdict="passed", variant="tiny",
            cpu=SimpleNamespace(chosen=Way(runtime=Runtime.OPENVINO, precision=Precision.FP32)),
            graphs=(SimpleNamespace(file="model.onnx", graph=lambda: graph),),
            engines=tuple(SimpleNamespace(file=f"{n}.plan", runtime=Runtime.TENSORRT) for n in range(engines)),
        )  # fmt: skip
        return api.Bundle(Path("bundle"), made, **({"threads": 3, "device": None} | settings))

    def candidate(self, inputs: Any) -> Any:
        self.calls.append(inputs)
        return {"out": np.array([len(self.calls)])}

    def prepare(self, name: str, settings: Any, encoded: list[bytes]) -> Any:
        return {"images": (name, settings.of, encoded)}

    def on_gpu(self, _model: Any, _folder: Path, manifest: Any, *, trusted: bool) -> runners.OnGpu:
        if self.missing:
            raise MissingRequirement(self.missing, next_step="")
        what = "an engine" if manifest.engines else "the graph"
        return runners.OnGpu(candidate=self.candidate, name=f"{what} on an L4", device="an L4")

    def on_cpu(self, _graphs: Any, way: Way, *, named: tuple[str, ...]) -> Any:
        self.way = (way.threads, named)
        return {}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


@pytest.mark.parametrize(
    ("engines", "target", "device", "missing", "runs_on"),
    [
        (2, "l4", None, "", "an engine on an L4"),
        (2, "l4", "gpu", "", "an engine on an L4"),
        (2, "l4", "cpu", "", "openvino on the CPU"),
        (2, "l4", None, "no GPU", "openvino on the CPU"),
        (2, "l4", "gpu", "no GPU", "no GPU"),
        (0, "l4", None, "", "the graph on an L4"),
        (0, "l4", "gpu", "", "the graph on an L4"),
        (0, "l4", "cpu", "", "openvino on the CPU"),
        (0, "l4", None, "no GPU", "openvino on the CPU"),
        (0, "l4", "gpu", "no GPU", "no GPU"),
        (0, "cpu", None, "", "openvino on the CPU"),
        (0, "cpu", "cpu", "", "openvino on the CPU"),
        (0, "cpu", "gpu", "", "bundle has no engine for a GPU."),
    ],
)
def test_what_a_bundle_has_for_a_device_is_opened(
    engines: int, target: str, device: Any, missing: str, runs_on: str, opened: Opened
) -> None:
    opened.missing = missing
    loaded = opened.bundle(engines=engines, target=target, device=device, sizes=("16x16",))
    if " on " in runs_on:
        assert loaded.runs_on == runs_on
        assert opened.way == ((3, ("8x8", "16x16")) if runs_on.endswith("CPU") else None)
    else:
        with pytest.raises((MissingRequirement, UsageError)) as caught:
            _ = loaded.runs_on
        assert caught.value.message == runs_on


def test_a_closed_bundle_is_called_no_more(opened: Opened) -> None:
    with opened.bundle() as loaded:
        loaded({"images": 1})
    with pytest.raises(UsageError, match="bundle was closed"):
        loaded({"images": 1})
    assert opened.calls == [{"images": 1}]


def test_arrays_go_to_the_only_input_and_mappings_as_they_are(opened: Opened) -> None:
    array = np.zeros((1, 4), np.uint8)
    opened.bundle()(array)
    assert list(opened.calls[0]) == ["images"] and opened.calls[0]["images"] is array
    two = Graph(name="model", inputs=(IMAGES, SCALE), outputs=(), dims=())
    with pytest.raises(InputRefused, match="One array is not enough: the graphs take images, scale"):
        opened.bundle(graph=two)(array)


@pytest.mark.parametrize(
    ("most", "front_end", "batches"),
    [
        (2, None, [("plain", [b"0", b"1"]), ("plain", [b"2", b"3"]), ("plain", [b"4"])]),
        (2, "resized", [("resized", [b"0", b"1"]), ("resized", [b"2", b"3"]), ("resized", [b"4"])]),
        (None, None, [("plain", [item]) for item in (b"0", b"1", b"2", b"3", b"4")]),
    ],
)
def test_images_are_prepared_in_batches_that_the_graph_takes(
    most: int | None, front_end: str | None, batches: list[Any], opened: Opened
) -> None:
    dims = () if most is None else (Dim(name="other", min=1, opt=1, max=9), Dim(name="batch", min=1, opt=1, max=most))
    loaded = opened.bundle(graph=Graph(name="model", inputs=(IMAGES, SCALE), outputs=(), dims=dims))
    answers = loaded([b"0", b"1", b"2", b"3", b"4"], front_end=front_end)
    assert opened.calls == [{"images": (name, name, encoded)} for name, encoded in batches]
    assert answers["out"].tolist() == list(range(1, len(batches) + 1))
    with pytest.raises(InputRefused, match="no image in an empty sequence"):
        loaded([])
    with pytest.raises(UsageError, match="tiny has no front end 'none'"):
        loaded([b"0"], front_end="none")


def test_one_image_is_a_batch_of_its_own(opened: Opened) -> None:
    opened.bundle()(b"0")
    assert opened.calls == [{"images": ("plain", "plain", [b"0"])}]


def test_a_verdict_on_a_gpu_needs_the_gpu(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """And any other none."""
    validated: Any = SimpleNamespace(manifest=None, report=SimpleNamespace(passed=True))
    monkeypatch.setattr("dinoexport.validation.validate_bundle.validate", lambda *_, **__: validated)
    opened.missing = "no GPU here"
    with pytest.raises(MissingRequirement, match="no GPU here"):
        opened.bundle(engines=1, target="l4", device="gpu").validate()
    for device in (None, "cpu"):
        loaded = opened.bundle(engines=1, target="l4", device=device)
        assert loaded.validate() is validated and opened.way is None, "nothing was opened for it"


@pytest.mark.parametrize(
    ("engines", "device", "runtime"),
    [
        (1, None, None), (1, "cpu", Runtime.OPENVINO), (1, "gpu", Runtime.TENSORRT), (0, None, None),
        (0, "cpu", Runtime.OPENVINO), (0, "gpu", None),
    ],
)  # fmt: skip
def test_a_bundle_is_validated_where_it_is_used(
    engines: int, device: Any, runtime: Runtime | None, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def validate(folder: Path, **settings: Any) -> Any:
        asked.append((folder, settings["runtime"], settings["images"], settings["trust_plan"], settings["record"]))
        return SimpleNamespace(manifest="the manifest of now", report=SimpleNamespace(passed=len(asked) == 1))

    monkeypatch.setattr("dinoexport.validation.validate_bundle.validate", validate)
    loaded = opened.bundle(engines=engines, target="l4", device=device, record=False)
    assert loaded.validate().report.passed
    assert loaded.manifest == "the manifest of now"  # type: ignore[comparison-overlap]
    loaded = opened.bundle(engines=engines, target="l4", device=device, trusted=True)
    with pytest.raises(OutputsDiffer, match="bundle does not give PyTorch's outputs"):
        loaded.validate(images="photographs")
    assert asked == [
        (Path("bundle"), runtime, None, False, False), (Path("bundle"), runtime, Path("photographs"), True, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"device": "gpus"}, "device 'gpus' is unknown. Did you mean 'gpu'?"), ({"threads": -1}, "threads is -1.")],
)
def test_a_wrong_device_or_number_of_threads_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        api.load("nowhere", **settings)
    assert caught.value.message == why


@pytest.mark.parametrize(
    ("place", "settings", "expected"),
    [
        ("here", {}, ("here", False, True)),
        (Path("here"), {"trust_plan": True}, ("here", True, True)),
        ("here", {"verify": "key.pem"}, ("here", True, True)),
        ("s3://bucket/bundle", {}, ("a copy of/bucket/bundle", False, False)),
    ],
)
def test_who_is_trusted_and_where_results_are_recorded(
    place: Any, settings: dict[str, Any], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = SimpleNamespace(verdict="passed")
    monkeypatch.setattr(api.in_store, "local_copy", lambda url, progress: Path("a copy of", url.removeprefix("s3://")))
    monkeypatch.setattr(api.changes, "settle", lambda _path: None)
    monkeypatch.setattr(api.bundle, "read_manifest", lambda _path: manifest)
    monkeypatch.setattr("dinoexport.bundle.signing.verify", lambda *_: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(api, "Bundle", lambda path, _manifest, **how: (path, how))
    path, how = api.load(place, check=False, **settings)  # type: ignore[misc]
    assert (str(path), how["trusted"], how["record"]) == expected


@pytest.mark.parametrize("check", [None, True, False])
def test_every_file_is_checked_unless_it_is_not_wanted(check: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest: Any = SimpleNamespace(files=("a", "b"))
    monkeypatch.setattr(api.changes, "settle", lambda _path: None)
    monkeypatch.setattr(api.changes, "reading", nullcontext)
    monkeypatch.setattr(api.bundle, "read_manifest", lambda _path: manifest)
    checked: list[Any] = []
    monkeypatch.setattr(api.bundle, "check_files", lambda _path, files, progress: checked.append(files) or {"a": 1})
    monkeypatch.setattr(api.bundle, "check_graphs", lambda _path, manifest: checked.append(manifest))
    monkeypatch.setattr(api, "Bundle", lambda _path, _manifest, **how: how)
    how: Any = api.load("here", **({} if check is None else {"check": check}))
    assert checked == ([] if check is False else [("a", "b"), manifest])
    assert how == {
        "threads": 0, "device": None, "trusted": False, "sizes": (), "seen": {} if check is False else {"a": 1},
        "record": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("out", "asked", "recorded"),
    [(None, None, True), (Path("out"), "out", True), ("s3://bucket/out", "s3://bucket/out", False)],
)
def test_a_build_asks_for_what_was_given_and_its_bundle_is_trusted(
    out: Any, asked: str | None, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinoexport.pipeline import build as pipeline

    requests: list[Any] = []

    def build_request(*words: Any, **settings: Any) -> str:
        requests.append((words, settings))
        return "the request"

    def build(request: str, **settings: Any) -> Any:
        requests.append((request, settings))
        return SimpleNamespace(folder="folder", manifest="manifest")

    monkeypatch.setattr(pipeline, "build_request", build_request)
    monkeypatch.setattr(pipeline, "build", build)
    monkeypatch.setattr(api.in_store, "destination", lambda place, **_: nullcontext(place))
    monkeypatch.setattr(api, "Bundle", lambda *words, **how: (words, how))
    made: Any = api.build(
        "vits14", weights=Path("w.pth"), precision="bf16", runtime="openvino", profiles=["a"], out=out
    )
    assert made == (
        ("folder", "manifest"), {"threads": 0, "device": None, "trusted": True, "record": recorded}
    )  # fmt: skip
    (words, settings), (request, how) = requests
    del settings["progress"], how["progress"]
    assert (words, request, how) == (("vits14",), "the request", {"force": False, "keep_rejected": False})
    assert settings == {
        "weights": "w.pth", "head": None, "head_weights": None, "prefix": None, "precision": Precision.BF16,
        "target": None, "runtime": Runtime.OPENVINO, "engine_choices": {"profiles": ("a",)}, "out": asked,
        "judge_code": "plain",
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"precision 'fp31' is unknown\. Did you mean 'fp32'"):
        api.build("vits14", precision="fp31")


def test_an_array_has_axes_and_an_interface() -> None:
    """A Pillow image has the interface, and a tensor of another package axes."""
    assert api._is_array(np.zeros(1))
    assert not api._is_array(SimpleNamespace(__array_interface__={})) and not api._is_array(SimpleNamespace(ndim=2))
    assert api._items(b"one") == [b"one"] and api._items("one") == ["one"] and api._items(("a", "b")) == ["a", "b"]

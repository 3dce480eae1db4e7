"""What each stage of a build writes, by what it makes it again, and what it asks of its neighbours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import family
from dinoexport.bundle import BundleFile, HeadManifest
from dinoexport.engines.builder import BuiltEngine
from dinoexport.pipeline import versions
from dinoexport.pipeline.stages import engine, export, judge, precision, quantise, reference, tune, weights
from dinoexport.spec import Case, HeadFacts, Precision, Profile, Runtime, silent
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu

GRAPH: Any = SimpleNamespace(name="model")


def written(place: Path, content: Any) -> None:
    """JSON of a file that people read: a step of one space, and a line's end after the last line."""
    assert place.read_text() == json.dumps(content, indent=1) + "\n"


@pytest.fixture
def _plain_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys as the text of what they hold, and one version of all packages."""
    for stage in (engine, export, judge, precision, quantise, reference):
        monkeypatch.setattr(stage, "key_of", lambda **parts: json.dumps(parts, sort_keys=True, default=str))
        monkeypatch.setattr(stage, "versions_of", lambda packages: dict.fromkeys(reversed(packages), "1"))
    monkeypatch.setattr(family, "code_of", lambda _model: "code")


# Engines

CARD = Gpu(index=3, name="A100", uuid="GPU-1", compute_capability="8.0", memory_bytes=7, driver="550")
LOW = Profile(name="low", shapes={"image": ((1, 3), (2, 3), (4, 3))})


def test_which_of_several_equal_cards_compiled_an_engine_does_not_matter() -> None:
    assert engine.gpu_facts(None) is None
    assert engine.gpu_facts(CARD) == {
        "index": 0, "name": "A100", "uuid": "", "compute_capability": "8.0", "memory_bytes": 7, "driver": "550",
    }  # fmt: skip


@pytest.mark.usefixtures("_plain_keys")
def test_the_facts_of_an_engine(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def built(onnx: Path, graph: Any, folder: Path, **settings: Any) -> BuiltEngine:
        asked.append((onnx, graph.name, settings["gpu"], settings["compute_capabilities"]))
        (folder / "build.log").write_text("log")
        return BuiltEngine(
            path=folder / "model.plan", log=folder / "build.log", runtime_version="10.1", compute_capabilities=("8.0",),
            size_bytes=100, weight_bytes=90, scratch_bytes=5, attentions=12, fused_attentions=11, build_s=12.3456,
            peak_memory_bytes=1000, not_looked_at="No GPU.",
        )  # fmt: skip

    monkeypatch.setattr(engine.builder, "build", built)
    choices = SimpleNamespace(
        compatibility="this-gpu", version_compatible=True, strip_weights=True, model_dump=lambda mode: {"level": 3}
    )
    target = SimpleNamespace(
        compute_capabilities=("8.0",), cautions={Runtime.TENSORRT: "Old."}, model_dump=lambda mode: {"name": "a100"}
    )
    request: Any = SimpleNamespace(
        graphs=(GRAPH,), code="code", target=target, runtime=Runtime.TENSORRT, precision=Precision.FP16,
        choices=choices, profiles={"model": (LOW,)}, gpu=CARD,
    )  # fmt: skip
    exported = BundleFile(name="model.onnx", sha256="0" * 64, size_bytes=1, stage="export")
    monkeypatch.setattr(hardware, "installed", lambda _package: "10.1")
    stage = engine.compile_engines(work, request, Path("onnx"), [exported])
    assert asked == [(Path("onnx/model.onnx"), "model", CARD, ("8.0",))]
    facts = {
        "graph": "model", "file": "model.plan", "runtime": "tensorrt", "runtime_version": "10.1",
        "compute_capabilities": ["8.0"], "device": "A100", "compatibility": "this-gpu", "version_compatible": True,
        "stripped": True, "precision": "fp16", "profiles": {"low": {"image": [[1, 3], [2, 3], [4, 3]]}},
        "size_bytes": 100, "weight_bytes": 90, "scratch_bytes": 5, "attentions": 12, "fused_attentions": 11,
        "build_s": 12.3, "peak_memory_bytes": 1000, "log": "build.log",
        "log_sha256": hashlib.sha256(b"log").hexdigest(), "executed": "never", "report": {}, "caution": "Old. No GPU.",
    }  # fmt: skip
    written(stage.folder / "engines.json", [facts])
    key, costly = work.asked["engine"]
    assert costly and json.loads(key) == {
        "code": "code", "exported": ["0" * 64], "target": {"name": "a100"}, "runtime": "tensorrt",
        "choices": {"level": 3},
        "profiles": {"model": [{"name": "low", "shapes": {"image": [[1, 3], [2, 3], [4, 3]]}}]},
        "gpu": engine.gpu_facts(CARD), "versions": ["10.1", {"polygraphy": "1"}],
    }  # fmt: skip


# Graphs


@pytest.mark.usefixtures("_plain_keys")
def test_an_exported_graph_says_what_it_was_made_of(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same facts give the same bytes: what is JSON is sorted. Files for other tools lie beside the graph."""
    given: list[Any] = []

    def exported(graph: Any, calls: Any, folder: Path, **settings: Any) -> Any:
        given.append((graph, calls, settings["metadata"], settings["traces"]))
        return SimpleNamespace(data=folder / "model.onnx.data", data_sha256="abc")

    monkeypatch.setattr(export.onnx_writer, "export", exported)
    monkeypatch.setattr(export, "graph_recipe", lambda _request: {"sizes": 1, "arch": 2})
    monkeypatch.setattr(export.family, "HasCompanionFiles", SimpleNamespace)
    model = SimpleNamespace(
        graphs=(GRAPH,), calls=lambda graph, read: ("calls", graph, read), companion_files={"config.json": b"{}"},
        head_facts=None,
    )  # fmt: skip
    request: Any = SimpleNamespace(model=model, recipe=SimpleNamespace(name="tiny", licence="none"))
    checkpoint: Any = SimpleNamespace(sha256="0" * 64, read="read", head=None)
    stage = export.export_graphs(work, request, checkpoint, lambda: "traces")
    metadata = {
        "dinoexport.variant": "tiny", "dinoexport.checkpoint_sha256": "0" * 64, "dinoexport.licence": "none",
        "dinoexport.recipe": '{"arch": 2, "sizes": 1}',
        "dinoexport.versions": '{"numpy": "1", "onnx": "1", "onnx-ir": "1", "onnxscript": "1", "torch": "1"}',
    }  # fmt: skip
    assert given == [(GRAPH, ("calls", GRAPH, "read"), metadata, "traces")]
    assert work.known == {"model.onnx.data": "abc"} and (stage.folder / "config.json").read_bytes() == b"{}"
    key, costly = work.asked["export"]
    assert costly and json.loads(key) == {"code": "code", "metadata": metadata}


@pytest.mark.parametrize(
    ("asked", "traced", "usable", "forms"),
    [
        (Precision.FP32, Precision.FP32, (), {"onnxruntime": "plain", "openvino": "plain"}),
        (Precision.INT8, Precision.INT8, (), {"onnxruntime": "plain", "openvino": "plain"}),
        (Precision.INT8, Precision.FP32, (Runtime.OPENVINO,), {"openvino": "to_wide_int8"}),
        (Precision.INT8, Precision.FP32, (), {"onnxruntime": "to_int8"}),
    ],
)
def test_graphs_are_quantised_for_the_runtimes_that_are_there(
    asked: Precision, traced: Precision, usable: Any, forms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none is, for the first that was asked for; and nothing is quantised that is traced in its integers."""
    monkeypatch.setattr(quantise.autotune, "runtimes", lambda _precision, _among: usable)
    monkeypatch.setattr(quantise, "_quantised", lambda _work, _source, form: form.__name__)
    request: Any = SimpleNamespace(
        precision=asked, chosen=SimpleNamespace(traced=traced), cpu_runtimes=(Runtime.ONNXRUNTIME, Runtime.OPENVINO)
    )
    nothing: Any = None
    assert quantise.forms_of(nothing, request, "plain") == forms


@pytest.mark.usefixtures("_plain_keys")
def test_a_quantised_copy_has_the_other_files_too(work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is quantised, with its weights; whatever else lies there is copied as it is."""
    source = tmp_path / "source"
    source.mkdir()
    content = {"one.onnx": b"1", "one.onnx.data": b"2", "two.onnx": b"3", "config.json": b"{}"}
    files = []
    for name, data in content.items():
        (source / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files.append(BundleFile(name=name, stage="export", sha256=digest, size_bytes=len(data)))

    def form(graph: Path, folder: Path) -> None:
        (folder / graph.name).write_bytes(b"int8 " + graph.read_bytes())

    monkeypatch.setitem(quantise._INT8, Runtime.ONNXRUNTIME, form)
    monkeypatch.setattr(quantise.autotune, "runtimes", lambda _precision, _among: (Runtime.ONNXRUNTIME,))
    request: Any = SimpleNamespace(
        precision=Precision.INT8, chosen=SimpleNamespace(traced=Precision.FP32), cpu_runtimes=(Runtime.ONNXRUNTIME,)
    )
    plain: Any = SimpleNamespace(folder=source, files=tuple(files), key="key of the export")
    (stage,) = quantise.forms_of(work, request, plain).values()
    assert {path.name: path.read_bytes() for path in stage.folder.iterdir()} == {
        "one.onnx": b"int8 1", "two.onnx": b"int8 3", "config.json": b"{}",
    }  # fmt: skip
    assert work.told == [("quantising", 1, 2), ("quantising", 2, 2)]
    key, costly = work.asked["quantise"]
    assert costly and json.loads(key) == {
        "source": "key of the export", "form": "form",
        "versions": dict.fromkeys(("onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir"), "1"),
    }  # fmt: skip


# Precision


def search_of(work: Any, fp32: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stage, when the search finds `fp32` after two trials."""
    trials = tuple(SimpleNamespace(failed_by=why) for why in ("first", "last"))
    found = SimpleNamespace(fp32=fp32, trials=trials, to_json=lambda: {"fp32": list(fp32), "trials": []})
    monkeypatch.setattr(precision.mixed_precision, "search", lambda *_, **__: found)
    monkeypatch.setattr(precision.mixed_precision, "promoted", lambda _r, _m, parts: ("recipe of", parts))
    monkeypatch.setattr(precision, "replace", lambda request, **changes: changes)
    model = SimpleNamespace(promotable=("residual", "norms"))
    request: Any = SimpleNamespace(model=model, recipe=None, precision=Precision.FP16)
    outputs: Any = SimpleNamespace(stored=None, stage=SimpleNamespace(key="key of the reference"))
    nothing: Any = None
    return precision.search_precision(work, request, nothing, outputs)


@pytest.mark.usefixtures("_plain_keys")
def test_the_found_parts_are_kept_and_built_with(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, request = search_of(work, ("norms",), monkeypatch)
    written(stage.folder / "precision.json", {"fp32": ["norms"], "trials": []})
    assert request == {"recipe": "recipe of", "model": ["norms"]}
    key, costly = work.asked["precision"]
    assert costly and json.loads(key) == {
        "code": "code", "reference": "key of the reference",
        "runtimes": dict.fromkeys(("onnxruntime", "onnxruntime-gpu", "openvino", "numpy"), "1"),
    }  # fmt: skip


@pytest.mark.usefixtures("_plain_keys")
def test_where_no_parts_suffice_the_last_trial_says_why(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"^Nothing was published: fp16 misses its limits even with all of residual, norms in fp32 \(last\)\.$"
    with pytest.raises(precision.NothingHolds, match=words):
        search_of(work, None, monkeypatch)
    assert not list((work.folder / "precision").iterdir())


# Reference


@pytest.mark.usefixtures("_plain_keys")
def test_reference_outputs_depend_on_every_case(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.evaluate, "compute_reference", lambda *_, **__: "outputs")
    monkeypatch.setattr(reference.evaluate, "kinds_of", lambda _graphs: {})
    monkeypatch.setattr(reference.reference_file, "write", lambda path, content: path.write_text(content))
    monkeypatch.setattr(reference.reference_file, "read", lambda path: path.read_text() + " read")
    monkeypatch.setattr(reference, "graph_recipe", lambda _request: "recipe")
    case = Case(name="one", why="first", inputs={"x": np.arange(3, dtype=np.uint8)}, shown=True)
    request: Any = SimpleNamespace(
        model=SimpleNamespace(graphs=()), cases=(case,), limits=SimpleNamespace(model_dump=lambda mode: "limits"),
        precision=Precision.FP32, judge_code="plain",
    )  # fmt: skip
    checkpoint: Any = SimpleNamespace(identity="weights")
    found = reference.compute_reference(work, request, checkpoint)
    assert found.stored == "outputs read" and [p.name for p in found.stage.folder.iterdir()] == ["reference.npz"]
    key, costly = work.asked["reference"]
    digest = hashlib.sha256(b"\x00\x01\x02").hexdigest()
    assert costly and json.loads(key) == {
        "code": "code", "checkpoint": "weights", "recipe": "recipe", "limits": "limits", "judge_code": "plain",
        "cases": [["one", "first", False, False, True, [], {}, {"x": digest}]],
        "versions": dict.fromkeys(("torch", "onnx", "onnx-ir", "onnxscript", "numpy"), "1"),
    }  # fmt: skip


# Verdict


@pytest.mark.parametrize(
    ("on_cpu", "of_engine", "has_gpu", "on_gpu"),
    [
        (False, None, True, True), (False, None, False, False), (False, "engine", True, False),
        (True, None, True, False), (True, None, False, False),
    ],
)  # fmt: skip
def test_graphs_are_judged_where_they_will_run(
    on_cpu: bool, of_engine: Any, has_gpu: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a GPU's bundle on this machine's GPU; those of an engine on the CPU, as the engine itself is judged."""
    there = SimpleNamespace(candidate="on the GPU", name="its name")
    opened: list[Any] = []
    monkeypatch.setattr(judge.runners, "has_gpu_for_graphs", lambda: has_gpu)
    monkeypatch.setattr(judge.runners, "open_graphs_on_gpu", lambda *_, named_by: opened.append(named_by) or there)
    monkeypatch.setattr(judge.runners, "graph_way", lambda _precision: "plain way")
    monkeypatch.setattr(judge.runners, "candidate_name", lambda _precision, way, ran: f"{way} {ran}")
    monkeypatch.setattr(judge.runners, "open_candidate", lambda _model, _graphs, way: f"opened in {way}")
    monkeypatch.setattr(judge.runners, "with_one_thread", lambda _model, _graphs, way: f"one thread of {way}")
    for name in ("judged", "with_determinism", "with_ranges"):
        monkeypatch.setattr(judge.evaluate, name, lambda *given, **_: opened.append(given) or "report")
    monkeypatch.setattr(judge.html_report, "keeping", lambda candidate, *_: candidate)
    model = SimpleNamespace(workloads=(SimpleNamespace(inputs="most common"), SimpleNamespace(inputs="rare")))
    request: Any = SimpleNamespace(
        chosen=SimpleNamespace(on_cpu=on_cpu), engine=of_engine, model=model, precision=Precision.FP16, cases=(),
        graph_files=lambda folder: {folder / "model.onnx": GRAPH},
    )  # fmt: skip
    facts: Any = SimpleNamespace(chosen="chosen way", arithmetic={"fp32": 2}) if on_cpu else None
    stored: Any = SimpleNamespace(expectations=())
    found = judge.judge_graph(request, Path("made"), stored, facts, silent)
    way, ran = ("chosen way", {"fp32": 2}) if on_cpu else ("plain way", {})
    if on_gpu:
        assert opened[0] == "most common" and opened[1] == ("on the GPU", stored, "its name")
        assert opened[2][3] is None and set(found.kept) == {"its name"}
    else:
        assert opened[0] == (f"opened in {way}", stored, f"{way} {ran}")
        assert opened[1][3] == f"one thread of {way}" and set(found.kept) == {f"{way} {ran}"}


@pytest.mark.usefixtures("_plain_keys")
@pytest.mark.parametrize("measured", [False, True])
def test_a_verdict_is_written_whole(measured: bool, work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.platform, "machine", lambda: "x86_64")
    report: Any = SimpleNamespace(to_json=lambda: {"rows": [1.5]})
    growth: Any = SimpleNamespace(to_json=lambda: {"blocks": []}) if measured else None
    facts: Any = SimpleNamespace(model_dump=lambda mode: {"chosen": "way"}) if measured else None
    content = {
        "rows": [1.5], **({"growth": {"blocks": []}} if measured else {}),
        "cpu": {"chosen": "way"} if measured else None,
        "versions": dict.fromkeys(("numpy", "openvino", "onnxruntime-gpu", "onnxruntime"), "1"), "machine": "x86_64",
    }  # fmt: skip
    stage = judge.record_verdict(work, report, growth, facts)
    written(stage.folder / "report.json", content)
    key, costly = work.asked["judge"]
    assert not costly and json.loads(key) == {"report": content}


@pytest.mark.usefixtures("_plain_keys")
def test_a_verdict_holds_no_number_that_json_has_not(work: Any) -> None:
    report: Any = SimpleNamespace(to_json=lambda: {"rows": [float("nan")]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        judge.record_verdict(work, report, None, None)


# Tuning


@pytest.mark.parametrize(("asked", "later"), [(Precision.FP32, False), (Precision.INT8, True)])
def test_a_lower_precision_is_timed_beside_fp32(asked: Precision, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of its own form in each runtime, and the exported ones in all of them."""
    given: list[Any] = []
    monkeypatch.setattr(tune.autotune, "tune", lambda *asked, progress: given.append(asked) or "facts")
    request: Any = SimpleNamespace(
        precision=asked, chosen=SimpleNamespace(traced=Precision.FP32), model="model",
        cpu_runtimes=(Runtime.ONNXRUNTIME, Runtime.OPENVINO),
        graph_files=lambda folder: {folder / "model.onnx": GRAPH},
    )  # fmt: skip
    own: Any = {Runtime.OPENVINO: SimpleNamespace(folder=Path("wide"))}
    plain: Any = SimpleNamespace(folder=Path("plain"))
    assert tune.choose_runtime(request, own, plain, silent) == "facts"
    ((model, wanted, beside),) = given
    assert (model, wanted.precision) == ("model", asked)
    assert wanted.graphs == {Runtime.OPENVINO: {Path("wide/model.onnx"): GRAPH}}
    if not later:
        assert beside is None
        return
    there = {Path("plain/model.onnx"): GRAPH}
    assert beside.precision is Precision.FP32
    assert beside.graphs == {Runtime.ONNXRUNTIME: there, Runtime.OPENVINO: there}


def test_the_next_runtime_is_told_what_the_first_got_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four outputs by name, each once."""
    given: list[Any] = []
    monkeypatch.setattr(tune.autotune, "without_chosen", lambda *asked: given.append(asked) or "next")
    request: Any = SimpleNamespace(precision=Precision.INT8, model="model", graph_files=lambda _folder: {})
    report: Any = SimpleNamespace(failures=[SimpleNamespace(case=name, output="o") for name in "edcbaab"])
    facts: Any = "facts"
    assert tune.choose_another(request, {}, facts, report) == "next"
    assert given[0][2:] == ("facts", "its outputs are not PyTorch's (a/o, b/o, c/o, d/o)")


# Heads


@pytest.mark.parametrize("own_file", [False, True])
def test_a_head_is_told_with_the_source_of_its_weights(own_file: bool) -> None:
    """Which the checkpoint itself may be; a model without a head tells nothing."""
    facts = HeadFacts(kind="linear", dataset="ImageNet", terms="research", classes=("ant", "bee"))
    found = SimpleNamespace(source="head.pth", sha256="0" * 64) if own_file else None
    checkpoint: Any = SimpleNamespace(head=found)
    request: Any = SimpleNamespace(model=SimpleNamespace(head_facts=facts))
    assert weights.head_of(request, checkpoint) == HeadManifest(
        kind="linear", dataset="ImageNet", terms="research", classes=("ant", "bee"),
        source="head.pth" if own_file else "", sha256="0" * 64 if own_file else None,
    )  # fmt: skip
    assert weights.head_metadata(request, checkpoint) == {
        "dinoexport.head": "linear", "dinoexport.classes": '["ant", "bee"]',
        **({"dinoexport.head_sha256": "0" * 64} if own_file else {}),
    }  # fmt: skip
    request.model.head_facts = HeadFacts(kind="depth", dataset="NYU", terms="research")
    assert "dinoexport.classes" not in weights.head_metadata(request, checkpoint)
    request.model.head_facts = None
    assert weights.head_of(request, checkpoint) is None and weights.head_metadata(request, checkpoint) == {}


# Versions


def test_packages_that_are_not_here_are_told_to_a_stage_and_not_to_a_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.9", "numpy": "2.1"}
    monkeypatch.setattr(hardware, "installed", there.get)
    monkeypatch.setattr(versions.dinoexport, "__version__", "1.2")
    assert versions.versions_of(("torch", "onnx")) == {"dinoexport": "1.2", "torch": "2.9", "onnx": "not installed"}
    request: Any = SimpleNamespace(engine=None)
    python = versions.platform.python_version()
    assert versions.versions_in(request) == {"dinoexport": "1.2", **there, "python": python}

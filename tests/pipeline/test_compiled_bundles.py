"""Engines put into a bundle and bundles of two cards put together, with engines that are written down here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.bundle import BundleFile, EngineFacts, GraphFacts, Manifest, reference_file
from dinoexport.bundle.manifest import CpuFacts
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.pipeline import build, compile_bundle
from dinoexport.pipeline.compile_bundle import EnginesRejected
from dinoexport.pipeline.workspace import Stage, key_of
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way
from dinoexport.validation import evaluate
from dinoexport.validation.answers import Bound
from dinoexport.validation.judge import Report, Row
from tests.pipeline.made_bundles import manifest_of

GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="x", dtype="float32", shape=("batch", 3), meaning=""),),
    outputs=(Tensor(name="y", dtype="float32", shape=("batch", 3), meaning=""),),
    dims=(Dim(name="batch", min=1, opt=1, max=4),),
)


def engine(*capabilities: str, runtime: Runtime = Runtime.TENSORRT, **changed: Any) -> EngineFacts:
    facts: dict[str, Any] = {
        "graph": "model", "file": "model.plan", "log": "model.plan.log", "runtime": runtime, "runtime_version": "10.1",
        "compute_capabilities": capabilities, "precision": Precision.FP16, "size_bytes": 1, "weight_bytes": 1,
        "scratch_bytes": 1, "attentions": 0, "fused_attentions": 0, "build_s": 1.0, "peak_memory_bytes": 1,
        "log_sha256": "0" * 64,
        "profiles": {"p": {"x": ((1, 3), (1, 3), (4, 3))}},
    }  # fmt: skip
    return EngineFacts(**facts | changed)


def file(folder: Path, name: str, stage: str) -> BundleFile:
    raw = (folder / name).read_bytes()
    return BundleFile(name=name, stage=stage, sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))


def written(
    folder: Path, *engines: EngineFacts, graph: bytes = b"graph", answers: bytes = b"reference", **changed: Any
) -> Manifest:
    """A bundle in `folder` that passed, with the bytes of each engine named after its cards."""
    folder.mkdir()
    contents = {"model.onnx": ("export", graph), "reference.npz": ("reference", answers)}
    for each in engines:
        raw = " ".join(each.compute_capabilities).encode()
        contents |= {each.file: ("engine", raw), each.log: ("engine", b"log of " + raw)}
    for name, (_, raw) in contents.items():
        (folder / name).write_bytes(raw)
    stages = {stage: key_of(stage=stage) for stage, _ in contents.values()}
    manifest = manifest_of().changed(
        verdict="passed", files=tuple(file(folder, name, stage) for name, (stage, _) in contents.items()),
        graphs=(GraphFacts.of(GRAPH, "model.onnx"),), engines=engines, stage_keys=stages, **changed,
    )  # fmt: skip
    (folder / bundle.MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


@pytest.fixture(autouse=True)
def without_bills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_bundle, "find_spec", lambda _name: None)
    monkeypatch.setattr(bundle, "check_graphs", lambda *_: None)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Merging


def test_bundles_of_two_cards_are_one(tmp_path: Path) -> None:
    """Each engine has its cards in its name; of versions that differ the first's count."""
    of_first, of_second = {"torch": "1", "numpy": "1"}, {"torch": "2", "cuda": "2"}
    written(tmp_path / "a", engine("8.0"), target="a100", versions=of_first, card={"purpose": "first"})
    second = {"versions": of_second, "card": {"purpose": "second"}}
    written(tmp_path / "b", engine("8.6", "8.9"), target="l4", answers=b"others", **second)
    made = compile_bundle.merge(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    engines = {"model.sm80.plan", "model.sm80.plan.log", "model.sm86_sm89.plan", "model.sm86_sm89.plan.log"}
    assert names(tmp_path / "out") == {"manifest.json", "model.onnx", "reference.npz"} | engines
    assert (tmp_path / "out" / "model.sm86_sm89.plan").read_bytes() == b"8.6 8.9"
    assert (tmp_path / "out" / "model.sm80.plan.log").read_bytes() == b"log of 8.0"
    assert (tmp_path / "out" / "reference.npz").read_bytes() == b"reference", "the first's"
    found = bundle.verify(tmp_path / "out")
    assert found == made.manifest and made.folder == tmp_path / "out" and made.reused is False
    assert (found.target, found.versions) == ("a100 + l4", {"torch": "1", "numpy": "1", "cuda": "2"})
    assert [each.file for each in found.engines] == ["model.sm80.plan", "model.sm86_sm89.plan"]
    assert made.engines == evaluate.NO_ENGINE and found.card == {"purpose": "first"}
    assert made.notes == ("sbom.cdx.json was left out: cyclonedx-python-lib, which writes it, is not installed here.",)
    again = compile_bundle._for_cards(found.engines[0])
    assert again == found.engines[0], "one that is named so keeps its name"


def test_each_file_is_copied_once_into_a_merged_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines under their new names alone, which may be gigabytes; and of what is merged again nothing is copied."""
    copy, copied = compile_bundle.files.copy, []
    monkeypatch.setattr(compile_bundle.files, "copy", lambda *a, **more: copied.append(a[1].name) or copy(*a, **more))
    written(tmp_path / "a", engine("8.0"))
    written(tmp_path / "b", engine("8.6"))
    before = compile_bundle.merge(tmp_path / "a", tmp_path / "b", out=tmp_path / "out").manifest
    assert sorted(copied) == [
        "model.onnx", "model.sm80.plan", "model.sm80.plan.log", "model.sm86.plan", "model.sm86.plan.log",
        "reference.npz",
    ]  # fmt: skip
    copied.clear()
    again = compile_bundle.merge(tmp_path / "a", tmp_path / "b", out=tmp_path / "out").manifest
    assert again == before.changed(created=again.created) and copied == []


@pytest.mark.parametrize(
    ("first", "second", "graph", "words"),
    [
        ((), (engine("8.0"),), b"graph", "a holds no engine"), ((engine("8.0"),), (), b"graph", "b holds no engine"),
        ((engine("8.0"),), (engine("8.6"),), b"other", "a and .*b do not hold the same graphs"),
        ((engine("8.0"),), (engine("8.6", runtime=Runtime.TENSORRT_RTX),), b"graph",
         "Engines of tensorrt and tensorrt_rtx cannot be in one bundle"),
        ((engine("8.0", "8.6"),), (engine("8.6"),), b"graph", "Both bundles hold an engine of model for SM 8.6"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_bundle(first: Any, second: Any, graph: bytes, words: str, tmp_path: Path) -> None:
    written(tmp_path / "a", *first)
    written(tmp_path / "b", *second, graph=graph)
    with pytest.raises(UsageError, match=words):
        compile_bundle.merge(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Compiling


def row(*bounds: tuple[float, float], case: str = "one", problem: str = "") -> Row:
    made = tuple(
        Bound(figure="relative_l2", value=value, limit=limit, reason="a test", holds=value <= limit)
        for value, limit in bounds
    )
    return Row(case=case, why="", output="y", shape=(), distance=None, bounds=made, problem=problem)


def report(*rows: Row) -> Report:
    return Report(candidate="c", reference="r", rows=rows)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is compiled with: `verdict` is the engines' report, `memory` and `asked` what was checked."""
    facts: dict[str, Any] = {"verdict": report(row((0.1, 1.0))), "memory": [], "asked": []}
    request: Any = SimpleNamespace(
        target=SimpleNamespace(name="a100", memory_gb=40, memory_for_engine=lambda size: size // 2), gpu=None,
        graphs=(GRAPH,), profiles={"model": ()}, choices="choices", runtime=Runtime.TENSORRT,
    )  # fmt: skip
    monkeypatch.setattr(compile_bundle, "_request", lambda *_: ("model", request))
    monkeypatch.setattr(compile_bundle.preflight, "compiler", lambda _: None)
    monkeypatch.setattr(compile_bundle.hardware, "installed", lambda name: "10.1" if name == "tensorrt" else "")
    monkeypatch.setattr(compile_bundle.builder, "check_memory", lambda *_, **how: facts["memory"].append(how))
    monkeypatch.setattr(reference_file, "read", lambda path: path.read_bytes())

    def compile_engines(work: Any, _request: Any, _folder: Path, graph_files: Any) -> Stage:
        facts["asked"].append([each.name for each in graph_files])

        def make(into: Path) -> None:
            made = engine("8.0")
            (into / made.file).write_bytes(b"8.0")
            (into / made.log).write_bytes(b"log")
            (into / bundle.ENGINES).write_text(json.dumps([made.model_dump(mode="json")]))

        found: Stage = work.stage("engine", key_of(engine=1), make)
        return found

    def judge_engines(model: Any, engines: Any, graphs: Any, reference: Any, *, progress: Any) -> Any:
        assert (model, reference, [path.name for path in graphs]) == ("model", b"reference", ["model.onnx"])
        return evaluate.EngineVerdict(facts=tuple(engines.values()), report=facts["verdict"])

    monkeypatch.setattr(compile_bundle.engine_stage, "compile_engines", compile_engines)
    monkeypatch.setattr(evaluate, "judge_engines", judge_engines)
    facts["request"] = request
    return facts


@pytest.mark.parametrize("verdict", [report(row((0.1, 1.0))), None])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_engines_are_added_where_they_passed_or_could_not_run(
    elsewhere: bool, verdict: Any, compiled: dict[str, Any], tmp_path: Path
) -> None:
    """Old engines are replaced; the bundle's graphs stay, byte for byte; elsewhere everything is copied."""
    compiled["verdict"] = verdict
    before = written(tmp_path / "in", engine("7.5", file="old.plan", log="old.log"), versions={"torch": "2"})
    out = tmp_path / "out" if elsewhere else tmp_path / "in"
    made = compile_bundle.compile_bundle(tmp_path / "in", out=tmp_path / "out" if elsewhere else None)
    new = {"manifest.json", "model.onnx", "reference.npz", "model.plan", "model.plan.log", bundle.ENGINES}
    assert names(out) == new and made.folder == out and made.reused is False
    assert compiled["asked"] == [["model.onnx"]]
    found = bundle.verify(out)
    assert [each.compute_capabilities for each in found.engines] == [("8.0",)]
    assert found.target == "a100" and found.versions["torch"] == "2" and found.versions["tensorrt"] == "10.1"
    assert found.stage_keys == before.stage_keys | {"engine": key_of(engine=1)}
    if elsewhere:
        assert bundle.verify(tmp_path / "in") == before
    assert compiled["memory"] == [], "only onnx can tell"


def test_engines_of_the_same_key_are_compiled_again_only_when_forced(compiled: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "in")
    assert [compile_bundle.compile_bundle(tmp_path / "in", **more).reused for more in ({}, {}, {"force": True})] == [
        False, True, False,
    ]  # fmt: skip


def test_the_stages_of_a_bundle_that_stays_are_not_copied(tmp_path: Path) -> None:
    manifest = written(tmp_path / "in")
    work: Any = SimpleNamespace(out=tmp_path / "in")
    assert compile_bundle._kept(work, tmp_path / "in", manifest) == {
        name: Stage(name=name, key=key_of(stage=name), folder=tmp_path / "in", files=(file_,), reused=True)
        for name, file_ in zip(("export", "reference"), manifest.files, strict=True)
    }


def test_engines_that_are_wrong_change_nothing(compiled: dict[str, Any], tmp_path: Path) -> None:
    compiled["verdict"] = report(*(row((2.0, 1.0), case=name) for name in "edcbaa"), row((0.1, 1.0), case="right"))
    before = written(tmp_path / "in")
    for out, named in ((None, tmp_path / "in"), (tmp_path / "out", tmp_path / "out")):
        with pytest.raises(EnginesRejected) as refused:
            compile_bundle.compile_bundle(tmp_path / "in", out=out)
        assert refused.value.message == (
            f"{named} was left as it was: the engine's outputs are not PyTorch's (a/y, b/y, c/y, d/y)."
        )
    assert bundle.verify(tmp_path / "in") == before and not (tmp_path / "out").exists()


def test_a_signed_bundle_is_changed_by_who_can_sign_again(compiled: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "in")
    (tmp_path / "in" / bundle.SIGNATURE).write_bytes(b"signature")
    with pytest.raises(UsageError, match="in is signed, and engines added to it would make the signature invalid"):
        compile_bundle.compile_bundle(tmp_path / "in")
    compile_bundle.compile_bundle(tmp_path / "in", out=tmp_path / "out")
    assert bundle.SIGNATURE not in names(tmp_path / "out")
    signer: Any = SimpleNamespace(signature=lambda manifest, name: f"{manifest.target} {name}".encode())
    compile_bundle.compile_bundle(tmp_path / "in", signer=signer)
    assert (tmp_path / "in" / bundle.SIGNATURE).read_bytes() == b"a100 in"


@pytest.mark.parametrize(
    ("memory_gb", "gpu", "checked"),
    [
        (None, None, []), (40, None, [(20 * 10**9, "the smallest a100")]),
        (40, SimpleNamespace(memory_bytes=80, name="A100"), [(40, "A100")]),
        (None, SimpleNamespace(memory_bytes=80, name="A100"), [(40, "A100")]),
    ],
)  # fmt: skip
def test_the_memory_of_the_card_is_asked_first(
    memory_gb: int | None, gpu: Any, checked: Any, compiled: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compiled["request"].gpu, compiled["request"].target.memory_gb = gpu, memory_gb
    monkeypatch.setattr(compile_bundle, "find_spec", lambda name: "there" if name == "onnx" else None)
    written(tmp_path / "in")
    compile_bundle.compile_bundle(tmp_path / "in")
    assert [(how["memory_bytes"], how["where"]) for how in compiled["memory"]] == checked


def on_cpu(precision: Precision) -> dict[str, Any]:
    return {"cpu": SimpleNamespace(chosen=Way(runtime=Runtime.OPENVINO, precision=precision))}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""), (on_cpu(Precision.FP32), ""),
        (on_cpu(Precision.INT8), "is in int8 for a CPU"),
        (on_cpu(Precision.BF16), "is in bf16 for a CPU"),
        ({"verdict": "failed"}, "is failed; only bundles that passed are compiled"),
        ({"verdict": "unjudged"}, "is unjudged; only bundles that passed are compiled"),
    ],
)  # fmt: skip
def test_which_bundles_are_compiled(changed: Any, words: str) -> None:
    manifest: Any = SimpleNamespace(**({"verdict": "passed", "cpu": None} | changed))
    if not words:
        compile_bundle._check_compilable(Path("bundle"), manifest)
    else:
        with pytest.raises((UsageError, ValidationFailed), match=words):
            compile_bundle._check_compilable(Path("bundle"), manifest)


def test_a_default_target_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_bundle, "parse", lambda kind, content, **_: SimpleNamespace(
        engine={}, changed=lambda **_: "recipe"
    ))  # fmt: skip
    monkeypatch.setattr(compile_bundle.targets, "choose", lambda *_, **__: SimpleNamespace(
        target=SimpleNamespace(name="cpu"), runtime=Runtime.ONNXRUNTIME
    ))  # fmt: skip
    monkeypatch.setattr(
        compile_bundle.family, "find", lambda _: SimpleNamespace(model=lambda recipe: f"model of {recipe}")
    )
    made: list[Any] = [None, "request"]
    monkeypatch.setattr(compile_bundle, "engine_request", lambda *_: made.pop(0))
    manifest: Any = SimpleNamespace(recipe={}, precision=Precision.FP16, family="dinov2")
    gpus: list[Any] = []
    monkeypatch.setattr(compile_bundle.hardware, "gpus", lambda: gpus)
    with pytest.raises(UsageError, match="This machine has no GPU, so there is no default target"):
        compile_bundle._request(Path("b"), manifest, None, None, {})
    with pytest.raises(UsageError, match="There is no engine to compile for cpu with onnxruntime: b runs as it is"):
        compile_bundle._request(Path("b"), manifest, "cpu", None, {})
    gpus.append("one")
    assert compile_bundle._request(Path("b"), manifest, None, None, {}) == ("model of recipe", "request")


# Why a build is rejected


def cpu_facts(times_fp32: float | None) -> CpuFacts:
    return CpuFacts.model_construct(times_fp32=times_fp32)


@pytest.mark.parametrize(
    ("times_fp32", "slow"), [(0.999, False), (1.0, True), (1.5, True), (None, False)]
)  # fmt: skip
def test_what_is_not_faster_than_fp32_is_too_slow(times_fp32: float | None, slow: bool) -> None:
    assert build._too_slow(cpu_facts(times_fp32)) is slow and build._too_slow(None) is False


@pytest.mark.parametrize(
    ("rows", "times_fp32", "problem"),
    [
        ((), None, "its outputs are not PyTorch's ()"),
        (tuple(row((2.0, 1.0), case=name) for name in "edcbaa"), None,
         "its outputs are not PyTorch's (a/y, b/y, c/y, d/y)"),
        ((row((0.1, 1.0)),), 1.25, "int8 takes 1.25 times as long as fp32 on this machine"),
        ((row((2.0, 1.0)),), 1.25,
         "its outputs are not PyTorch's (one/y); int8 takes 1.25 times as long as fp32 on this machine"),
        ((row((2.0, 1.0)),), 0.5, "its outputs are not PyTorch's (one/y)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("published", [True, False])
def test_why_a_build_was_rejected(rows: Any, times_fp32: float | None, problem: str, published: bool) -> None:
    request: Any = SimpleNamespace(out=Path("out"), precision=Precision.INT8)
    facts = None if times_fp32 is None else cpu_facts(times_fp32)
    told = build._rejected(request, report(*rows), None, facts, evaluate.NO_ENGINE, published=published)
    begins = "out was published, marked rejected" if published else "Nothing was published"
    assert told.message == f"{begins}: {problem}." and told.report == report(*rows)
    engines = evaluate.EngineVerdict(facts=(), report=report(row((3.0, 1.0), case="engine")))
    told = build._rejected(request, report(*rows), None, None, engines, published=published)
    assert told.message == f"{begins}: its outputs are not PyTorch's (engine/y)."

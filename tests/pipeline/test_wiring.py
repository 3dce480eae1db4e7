"""What `pipeline.build` hands to each stage: every stage is a recorder, so that a neighbour's input is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.bundle import BundleFile
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.stages import engine
from dinoexport.spec import Graph, Precision, Runtime, silent
from dinoexport.validation.evaluate import EngineVerdict

# The functions themselves, which --quick replaces in their module: here no stage of theirs does anything.
build, export_only = pipeline.build, pipeline.export_only


class Recorded:
    """A request, and every stage's answer and arguments by the stage's name."""

    def __init__(self, patch: pytest.MonkeyPatch, **request: Any) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.published: dict[str, Any] = {}
        self.signed: Any = None
        self.forced: list[bool] = []
        self.passed, self.engines_passed, self.times_fp32 = True, True, None
        self.request = SimpleNamespace(
            out=Path("out"), model="model", recipe="recipe", weights="weights", auto=False, engine=None, **request
        )
        self.promoted = SimpleNamespace(**vars(self.request) | {"model": "promoted model"})
        self.plain, self.integer, self.after_search = map(self.stage, ("export", "quantise", "export"))
        self.reference = SimpleNamespace(stage=self.stage("reference"), stored="stored reference")
        self.facts = SimpleNamespace(chosen=SimpleNamespace(runtime=Runtime.OPENVINO), times_fp32=None)
        self.report = SimpleNamespace(passed=True, rows=(), failures=(), to_json=dict)
        self.judged = SimpleNamespace(report=self.report, kept={"graph": "answers"})
        self.engine, self.page, self.bill, self.verdict, self.search = map(
            self.stage, ("engine", "page", "sbom", "judge", "precision")
        )
        self._patch(patch)

    @staticmethod
    def stage(name: str) -> Any:
        file = SimpleNamespace(name=f"{name}.onnx")
        return SimpleNamespace(name=name, key=f"key of {name}", folder=object(), files=(file,), reused=False)

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        exports = iter((self.plain, self.after_search))

        def answering(name: str, answer: Any) -> None:
            def stage(*args: Any, **_: Any) -> Any:
                self.calls[name] = args
                return answer() if callable(answer) else answer

            patch.setattr(pipeline, name, stage)

        work = SimpleNamespace(publish=self._publish)

        @contextmanager
        def workspace(*_: Any, force: bool, **__: Any) -> Iterator[Any]:
            self.forced.append(force)
            yield work

        @contextmanager
        def tracing(request: Any, *, fresh: bool, **_: Any) -> Iterator[Any]:
            self.forced.append(fresh)
            yield "traces"

        self.work = work
        patch.setattr(pipeline, "workspace", workspace)
        patch.setattr(pipeline, "tracing", tracing)
        for check in ("packages", "weights_fit", "disk", "memory"):
            patch.setattr(pipeline.preflight, check, lambda *args, name=check: self.calls.update({name: args}))
        answering("open_weights", "checkpoint")
        answering("text_stage", dict)
        answering("export_graphs", lambda: next(exports))
        answering("compute_reference", self.reference)
        answering("search_precision", (self.search, self.promoted))
        answering("forms_of", {Runtime.ONNXRUNTIME: self.plain, Runtime.OPENVINO: self.integer})
        answering("choose_runtime", self.facts)
        answering("choose_another", None)
        answering("judge_graph", self.judged)
        answering("follow_error", "growth")
        answering("record_verdict", self.verdict)
        answering("compile_engines", self.engine)
        answering("judge_engines", EngineVerdict(facts=(), report=None))
        answering("render_report", self.page)
        answering("list_materials", self.bill)
        answering("tried", {"fp32": ["norms"]})
        patch.setattr(pipeline.bundle, "check_graphs", lambda *args: self.calls.update(check_graphs=args))
        graphs = tuple(SimpleNamespace(file=f"{name}.onnx") for name in ("export", "quantise"))
        self.manifest = SimpleNamespace(with_stage=lambda *args: self.manifest, graphs=graphs)
        answering("_manifest", self.manifest)

    def _publish(self, made: Any, manifest: Any, *, sign: Any) -> None:
        self.published, self.signed = dict(made), sign
        assert manifest is self.manifest


def on_cpu(precision: Precision = Precision.INT8) -> dict[str, Any]:
    return {"chosen": SimpleNamespace(on_cpu=True), "precision": precision}


def test_a_cpu_build_judges_and_publishes_the_form_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the fp32 graph beside it: the judged folder, the followed one and the published one are one."""
    seen = Recorded(monkeypatch, **on_cpu())
    built = build(seen.request)
    chosen = seen.integer
    assert seen.calls["forms_of"] == (seen.work, seen.request, seen.plain)
    assert seen.calls["choose_runtime"][1:3] == (
        {Runtime.ONNXRUNTIME: seen.plain, Runtime.OPENVINO: seen.integer},
        seen.plain,
    )
    assert seen.calls["judge_graph"] == (seen.request, chosen.folder, "stored reference", seen.facts, silent)
    assert seen.calls["follow_error"] == (
        seen.request, chosen.folder, "checkpoint", seen.report, seen.facts, silent,
    )  # fmt: skip
    assert seen.calls["record_verdict"] == (seen.work, seen.report, "growth", seen.facts)
    assert seen.calls["check_graphs"] == (chosen.folder, seen.manifest)
    assert list(seen.published.values()) == [chosen, seen.reference.stage, seen.verdict, seen.page, seen.bill]
    assert built.report is seen.report and "compile_engines" not in seen.calls and "memory" not in seen.calls


def test_a_form_that_misses_the_limits_is_followed_by_the_next_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is judged, followed and published is then that one."""
    seen = Recorded(monkeypatch, **on_cpu())
    second = SimpleNamespace(chosen=SimpleNamespace(runtime=Runtime.ONNXRUNTIME), times_fp32=None)
    missed = SimpleNamespace(report=SimpleNamespace(passed=False), kept={})
    answers = {id(seen.integer.folder): missed, id(seen.plain.folder): seen.judged}
    monkeypatch.setattr(pipeline, "judge_graph", lambda _, folder, *__: answers[id(folder)])
    asked: list[Any] = []
    monkeypatch.setattr(pipeline, "choose_another", lambda *args: asked.append(args) or second)
    build(seen.request)
    assert asked == [
        (seen.request, {Runtime.ONNXRUNTIME: seen.plain, Runtime.OPENVINO: seen.integer}, seen.facts, missed.report)
    ]
    assert seen.calls["follow_error"][1] is seen.plain.folder and seen.calls["record_verdict"][3] is second
    assert seen.plain in seen.published.values() and seen.integer not in seen.published.values()


def test_weights_reference_and_graph_come_from_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorded(monkeypatch, **on_cpu())
    build(seen.request)
    assert seen.calls["open_weights"] == (seen.request, silent)
    assert seen.calls["export_graphs"] == (seen.work, seen.request, "checkpoint", "traces")
    assert seen.calls["compute_reference"] == (seen.work, seen.request, "checkpoint")
    assert seen.calls["_manifest"][1] == "checkpoint"


def test_an_engine_is_compiled_from_the_judged_graph_and_judged_by_the_same_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = Recorded(monkeypatch, chosen=SimpleNamespace(on_cpu=False), precision=Precision.FP16)
    seen.request.engine = "engine request"
    build(seen.request)
    assert "choose_runtime" not in seen.calls
    exported = seen.calls["compile_engines"]
    judged = seen.calls["judge_graph"]
    assert exported == (seen.work, "engine request", judged[1], seen.plain.files) and judged[1] is seen.plain.folder
    assert seen.calls["memory"] == ("engine request", seen.plain.folder)
    assert seen.calls["judge_engines"] == (
        "model", seen.engine.folder, seen.plain.folder, "stored reference", seen.judged.kept,
    )  # fmt: skip
    assert seen.engine in seen.published.values()


def test_engines_are_judged_beside_the_graphs_that_they_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stripped engine takes its weights from the ONNX, which lies in another stage's folder than the engine."""
    folder, onnx = tmp_path / "engine", tmp_path / "onnx"
    folder.mkdir()
    (folder / engine.bundle.ENGINES).write_text('[{"file": "model.plan"}]')
    facts = SimpleNamespace(file="model.plan")
    monkeypatch.setattr(engine, "EngineFacts", SimpleNamespace(model_validate=lambda entry: facts))
    verdict = EngineVerdict(facts=(), report=SimpleNamespace(candidate="TensorRT"))
    asked: list[Any] = []
    monkeypatch.setattr(engine.evaluate, "judge_engines", lambda *args, **_: asked.append(args) or verdict)
    graph = SimpleNamespace(name="model")
    model, kept = SimpleNamespace(graphs=(graph,)), {"graph": "answers"}
    assert engine.judge_engines(model, folder, onnx, "reference", kept, progress=silent) is verdict
    assert asked == [(model, {folder / "model.plan": facts}, {onnx / "model.onnx": graph}, "reference")]
    assert set(kept) == {"graph", "TensorRT"}


def test_automatic_precision_goes_on_with_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the search the graph is exported again, from the promoted model, and all that follows is about that one."""
    seen = Recorded(monkeypatch, chosen=SimpleNamespace(on_cpu=False), precision=Precision.FP16)
    seen.request.auto = True
    build(seen.request)
    assert seen.calls["search_precision"] == (seen.work, seen.request, "checkpoint", seen.reference)
    assert seen.calls["export_graphs"] == (seen.work, seen.promoted, "checkpoint", "traces")
    assert seen.calls["forms_of"] == (seen.work, seen.promoted, seen.after_search)
    for name in ("judge_graph", "follow_error"):
        assert seen.calls[name][0] is seen.promoted, name
    assert seen.calls["_manifest"][0] is seen.promoted
    assert seen.search in seen.published.values()


def test_the_report_is_drawn_from_this_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorded(monkeypatch, **on_cpu())
    build(seen.request, signer=SimpleNamespace(signature="signature"))
    assert seen.signed == "signature"
    assert seen.calls["render_report"] == (
        seen.work, seen.request, seen.manifest, "stored reference", seen.judged, "growth",
    )  # fmt: skip
    assert seen.calls["_manifest"][3:] == ("passed", seen.report, seen.facts, pipeline.evaluate.NO_ENGINE)


@pytest.mark.parametrize("fault", ["the graph", "the engine", "too slow"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_rejected_build_publishes_nothing_unless_asked(
    fault: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorded(monkeypatch, chosen=SimpleNamespace(on_cpu=fault == "too slow"), precision=Precision.FP16)
    if fault == "the graph":
        seen.report.passed = False
    elif fault == "too slow":
        seen.facts.times_fp32 = 1.0
    else:
        seen.request.engine = "engine request"
        failed = SimpleNamespace(passed=False, rows=(), failures=(), to_json=dict)
        monkeypatch.setattr(pipeline, "judge_engines", lambda *_, **__: EngineVerdict(facts=(), report=failed))
    monkeypatch.setattr(pipeline.error_analysis, "causes", lambda report, growth: [f"caused by {growth}"])
    with pytest.raises(pipeline.Rejected) as caught:
        build(seen.request, keep_rejected=keep, signer=SimpleNamespace(signature="signature"))
    assert bool(seen.published) == keep and seen.signed is None
    assert ("marked rejected" in str(caught.value)) == keep
    if keep:
        assert seen.calls["_manifest"][3] == "rejected"
    if fault == "the engine":
        assert "caused by None" in str(caught.value), "the growth inside the graph explains no engine"
    elif fault == "the graph":
        assert "caused by growth" in str(caught.value) and "compile_engines" not in seen.calls


def test_an_export_writes_the_graphs_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorded(monkeypatch, **on_cpu(Precision.FP32))
    monkeypatch.setattr(pipeline, "require", lambda *_: None)
    export_only(seen.request)
    assert seen.calls["_manifest"][2:] == ({"export": seen.plain}, "unjudged")
    assert list(seen.published.values()) == [seen.plain, seen.bill]
    assert not {"compute_reference", "judge_graph", "choose_runtime"} & seen.calls.keys()


@pytest.mark.parametrize("command", [build, export_only])
@pytest.mark.parametrize("force", [False, True])
def test_only_what_is_forced_is_made_again(command: Any, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither kept stages nor kept traces are used then; by default both are."""
    seen = Recorded(monkeypatch, **on_cpu(Precision.FP32))
    monkeypatch.setattr(pipeline, "require", lambda *_: None)
    command(seen.request, **({"force": True} if force else {}))
    assert seen.forced == [force, force]


@pytest.mark.parametrize("left", [False, True])
def test_a_runtime_that_misses_the_limits_gives_way_to_the_next(left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own form is judged and published; without another the build is rejected."""
    seen = Recorded(monkeypatch, **on_cpu())
    first, other = seen.facts, SimpleNamespace(chosen=SimpleNamespace(runtime=Runtime.ONNXRUNTIME), times_fp32=None)
    missed = SimpleNamespace(report=SimpleNamespace(passed=False, rows=("row",), failures=(), to_json=dict), kept={})
    asked: list[Any] = []

    def judged(_request: Any, folder: Any, _reference: Any, facts: Any, _progress: Any) -> Any:
        asked.append((folder, facts))
        return missed if facts is first else seen.judged

    monkeypatch.setattr(pipeline, "judge_graph", judged)
    monkeypatch.setattr(pipeline, "choose_another", lambda *given: asked.append(given[2:]) or (other if left else None))
    monkeypatch.setattr(pipeline.error_analysis, "causes", lambda *_: ["rounding"])
    before = [(seen.integer.folder, first), (first, missed.report)]
    if not left:
        with pytest.raises(pipeline.Rejected, match=r"^Nothing was published: rounding\.$"):
            build(seen.request)
        assert asked == before and not seen.published
        return
    build(seen.request)
    assert asked == [*before, (seen.plain.folder, other)]
    assert seen.plain in seen.published.values() and seen.integer not in seen.published.values()


def test_a_graph_that_no_runtime_was_chosen_for_has_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorded(monkeypatch, chosen=SimpleNamespace(on_cpu=False), precision=Precision.FP16)
    seen.report.passed = False
    monkeypatch.setattr(pipeline.error_analysis, "causes", lambda *_: ["rounding"])
    with pytest.raises(pipeline.Rejected):
        build(seen.request)
    assert "choose_another" not in seen.calls and not seen.published


def test_a_verdict_is_never_told_as_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the page and the bill made of it, though their files may be those of an earlier build."""
    seen = Recorded(monkeypatch, chosen=SimpleNamespace(on_cpu=False), precision=Precision.FP16)
    seen.request.engine = "engine request"
    for stage in (seen.plain, seen.engine, seen.page, seen.bill, seen.verdict):
        stage.reused = True
    assert build(seen.request).reused == ("export", "engine")
    seen = Recorded(monkeypatch, **on_cpu(Precision.FP32))
    monkeypatch.setattr(pipeline, "require", lambda *_: None)
    assert export_only(seen.request).reused == ()
    seen = Recorded(monkeypatch, **on_cpu(Precision.FP32))
    seen.plain.reused = True
    assert export_only(seen.request).reused == ("export",)


@pytest.mark.parametrize("searched", [False, True])
def test_a_manifest_tells_what_was_made_of_what(searched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the report, and in it the search for a precision if there was one."""
    monkeypatch.setattr(pipeline, "tried", lambda stage: {"fp32": ["norms"], "by": stage.name})
    monkeypatch.setattr(pipeline, "versions_in", lambda _request: {"python": "3.11"})
    monkeypatch.setattr(pipeline, "head_of", lambda *_: None)
    request: Any = SimpleNamespace(
        recipe=SimpleNamespace(name="tiny", family="toy", licence="none", model_dump=lambda mode: {"name": "tiny"}),
        precision=Precision.FP16, chosen=SimpleNamespace(name="cpu"), prefix="backbone.",
        settled=SimpleNamespace(assumed={"heads": "4"}, notes=("a note",)),
        model=SimpleNamespace(graphs=(Graph(name="model", inputs=(), outputs=(), dims=()),), card={"use": "features"}),
    )  # fmt: skip
    stages = ["export", *(["precision"] if searched else [])]
    made: Any = {}
    for i, name in enumerate(stages):
        file = BundleFile(name="model.onnx" if i == 0 else "tried", stage=name, sha256="1" * 64, size_bytes=1)
        made[name] = SimpleNamespace(name=name, key=str(i) * 64, files=(file,))
    report: Any = SimpleNamespace(to_json=lambda: {"rows": []})
    checkpoint: Any = SimpleNamespace(source="synthetic:0", sha256="2" * 64)
    found = pipeline._manifest(request, checkpoint, made, "unjudged", report).model_dump(mode="json")
    expected = {
        "variant": "tiny", "family": "toy", "precision": "fp16", "target": "cpu", "verdict": "unjudged",
        "recipe": {"name": "tiny"}, "head": None, "engines": [], "cpu": None,
        "checkpoint": {
            "source": "synthetic:0", "sha256": "2" * 64, "licence": "none", "prefix": "backbone.",
            "assumed": {"heads": "4"}, "notes": ["a note"],
        },
        "files": [
            {"name": "model.onnx", "stage": "export", "sha256": "1" * 64, "size_bytes": 1},
            {"name": "tried", "stage": "precision", "sha256": "1" * 64, "size_bytes": 1},
        ][: len(stages)],
        "stage_keys": {name: str(i) * 64 for i, name in enumerate(stages)},
        "versions": {"python": "3.11"}, "card": {"use": "features"},
        "report": {"rows": []} | ({"precision": {"fp32": ["norms"], "by": "precision"}} if searched else {}),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert [graph["file"] for graph in found["graphs"]] == ["model.onnx"]

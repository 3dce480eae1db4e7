"""How a CPU bundle comes to its runtime: by the clock where there is a choice, never to a precision that gains none."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.bundle import CpuFacts, Timed
from dinoexport.cli import contents, formatting
from dinoexport.errors import BuildError, MissingRequirement, UsageError
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import autotune, choice, cpu, openvino, table
from dinoexport.spec import Graph, Precision, Runtime, Way
from dinoexport.system import timing
from dinoexport.validation import validate_bundle
from tests.conftest import DATA
from tests.runtime.test_openvino import needs_int8

TINY = str(DATA / "tiny_swiglu.toml")
BOTH = ("onnxruntime", "openvino")
needs_bf16 = pytest.mark.skipif(not openvino.computes(Precision.BF16), reason="this CPU has no bf16")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how long each way takes, in ms, in the place of the clock; returns the ways as they were visited."""

    def set_times(times: dict[tuple[str, str, int], float]) -> list[Way]:
        visited: list[Way] = []
        opened = cpu.open_graphs

        def remember(graphs: Any, way: Way) -> Any:
            visited.append(way)
            return opened(graphs, way)

        def clock(runs: Any, **_: Any) -> Any:
            runs[""]()
            way = visited[-1]
            return {"": timing.Latencies(samples_ms=(times[way.runtime, way.precision.value, way.threads],) * 3)}

        monkeypatch.setattr(cpu, "open_graphs", remember)
        monkeypatch.setattr(timing, "in_turn", clock)
        monkeypatch.setattr(cpu, "usable_cpus", lambda: 2)
        monkeypatch.setitem(autotune.RUNTIMES, Precision.FP32, BOTH)
        monkeypatch.setattr(autotune, "_BUDGET_S", 3600.0)  # however busy this machine is
        return visited

    return set_times


def build(out: Path, precision: Precision = Precision.FP32, **options: Any) -> pipeline.Built:
    return pipeline.build(pipeline.build_request(TINY, weights="synthetic:0", precision=precision, out=out), **options)


FP32 = {(runtime, "fp32", threads): 9.0 for runtime in BOTH for threads in (1, 2)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> autotune.GraphForms:
    request = pipeline.build_request(TINY, weights="synthetic:0", out=tmp_path_factory.mktemp("tuning") / "bundle")
    pipeline.export_only(request)
    graphs = {request.out / "model.onnx": request.model.graphs[0]}
    return autotune.GraphForms(precision=Precision.FP32, graphs=dict.fromkeys(BOTH, graphs))


@pytest.mark.parametrize("fastest", [*FP32])
def test_the_fastest_way_is_chosen(fastest: tuple[Any, str, int], slow: Any, exported: autotune.GraphForms) -> None:
    slow(FP32 | {fastest: 7.0})
    facts = autotune.tune(pipeline.build_request(TINY).model, exported)
    assert facts.chosen == Way(runtime=fastest[0], precision=Precision.FP32, threads=fastest[2])
    assert facts.measured_ms == 7.0 and len(facts.measured) == 4 and facts.times_fp32 is None
    assert set(facts.arithmetic) == {"f32"} and facts.load == "1 x 224 x 224"


def test_a_hopeless_way_is_not_visited_again(slow: Any, exported: autotune.GraphForms) -> None:
    visited = slow(FP32 | {("onnxruntime", "fp32", 2): 1.0, ("openvino", "fp32", 2): 1.4})
    autotune.tune(pipeline.build_request(TINY).model, exported)
    seen = [(way.runtime, way.threads) for way in visited]
    # There and back, then once more for what it computes in.
    assert seen[:4] == [("onnxruntime", 2), ("onnxruntime", 1), ("openvino", 2), ("openvino", 1)]
    assert seen[4:] == [("openvino", 2), ("onnxruntime", 2), ("onnxruntime", 2)]


def test_slow_graphs_are_visited_once_each(
    slow: Any, exported: autotune.GraphForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ways that disagree get up to eight visits each, unless all together take longer than the budget."""
    monkeypatch.setattr(choice, "settled", lambda _samples: False)
    visited = slow(FP32)
    autotune.tune(pipeline.build_request(TINY).model, exported)
    assert len(visited) == 8 * 4 + 1
    visited.clear()
    monkeypatch.setattr(autotune, "_BUDGET_S", 0.0)
    facts = autotune.tune(pipeline.build_request(TINY).model, exported)
    assert len(set(visited[:4])) == 4 and len(visited) == 4 + 1 and len(facts.measured) == 4


def test_a_runtime_that_refuses_the_graph_is_left_out_and_named(
    slow: Any, exported: autotune.GraphForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(FP32 | {("openvino", "fp32", 2): 1.0})
    opened = cpu.open_graphs

    def refuse(graphs: Any, way: Way) -> Any:
        if way.runtime == "openvino":
            raise BuildError("OpenVINO refuses model.onnx: no such operator", next_step="")
        return opened(graphs, way)

    monkeypatch.setattr(cpu, "open_graphs", refuse)
    facts = autotune.tune(pipeline.build_request(TINY).model, exported)
    assert facts.chosen.runtime == "onnxruntime" and {timed.way.runtime for timed in facts.measured} == {"onnxruntime"}
    assert facts.refused == {"openvino": "OpenVINO refuses model.onnx: no such operator"}
    monkeypatch.setattr(cpu, "open_graphs", lambda *_: (_ for _ in ()).throw(BuildError("no", next_step="")))
    with pytest.raises(BuildError):
        autotune.tune(pipeline.build_request(TINY).model, exported)


def test_what_was_measured_is_recorded_and_what_was_chosen_is_judged(
    slow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = slow(FP32 | {("openvino", "fp32", 2): 7.0})
    built = build(tmp_path / "bundle")
    assert len(set(visited[:4])) == 4 and visited[4:8] == visited[3::-1], "fp32 is not compared with itself"
    facts = built.manifest.cpu
    assert facts is not None and built.report is not None
    assert built.report.candidate.startswith("OpenVINO")
    assert bundle.verify(built.folder).cpu == facts
    assert json.loads((built.folder / bundle.REPORT_JSON).read_text())["cpu"] == facts.model_dump(mode="json")
    lines = "\n".join(formatting.cpu_lines(built.manifest))
    assert f"openvino {facts.runtime_version}, 2 threads, fp32 (" in lines
    assert "7.0 ms for 1 x 224 x 224: openvino, 2 threads, fp32, chosen" in lines and "1 thread, fp32" in lines
    (shown,) = [rows for title, rows in contents.of_path(built.folder).items() if title.startswith("Measured")]
    assert [row[""] for row in shown] == ["chosen", "", "", ""]
    assert validate_bundle.validate(built.folder).report.candidate.startswith("OpenVINO")
    # A server without OpenVINO takes the same file.
    monkeypatch.setattr(table, "installed", lambda among: tuple(r for r in among if r is Runtime.ONNXRUNTIME))
    assert validate_bundle.validate(built.folder).report.candidate.startswith("ONNX Runtime")


def test_one_runtime_leaves_nothing_to_the_clock(
    exported: autotune.GraphForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "in_turn", lambda *_: pytest.fail("nothing is to be timed"))
    facts = autotune.tune(pipeline.build_request(TINY).model, exported)
    assert facts.measured == () and facts.measured_ms is None
    assert facts.chosen == Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32, threads=cpu.usable_cpus())


def test_int8_is_published_where_it_is_faster_and_only_there(
    slow: Any, exported: autotune.GraphForms, tmp_path: Path
) -> None:
    slow(FP32 | {("onnxruntime", "int8", 2): 9.9, ("onnxruntime", "int8", 1): 12.0})
    with pytest.raises(pipeline.Rejected, match=r"int8 takes 1\.10 times as long as fp32 on this machine") as caught:
        build(tmp_path / "bundle", Precision.INT8)
    assert caught.value.report.passed and not (tmp_path / "bundle").exists()
    with pytest.raises(pipeline.Rejected):
        build(tmp_path / "bundle", Precision.INT8, keep_rejected=True)
    assert bundle.verify(tmp_path / "bundle").verdict == "rejected"

    slow(FP32 | {("onnxruntime", "int8", 2): 4.5, ("onnxruntime", "int8", 1): 8.0})
    built = build(tmp_path / "bundle", Precision.INT8)
    assert built.reused == ("quantise", "reference")
    assert built.manifest.cpu is not None and built.manifest.cpu.times_fp32 == 0.5
    assert built.manifest.cpu.arithmetic["int8"] > 10
    assert built.manifest.precision == built.manifest.recipe["precision"] == "int8"
    assert "0.50 times the time of the fastest fp32" in "\n".join(formatting.cpu_lines(built.manifest))
    (fp32,) = exported.graphs["onnxruntime"]
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (built.folder, fp32.parent)]
    assert sizes[0] < 0.35 * sizes[1]  # the patch kernel stays fp32, a tenth of this small model
    report = validate_bundle.validate(built.folder).report
    assert "products in int8" in report.candidate
    assert 1e-3 < max(row.distance.relative_l2 for row in report.rows if row.distance) < 0.05


@pytest.mark.parametrize("fastest", ["onnxruntime", pytest.param("openvino", marks=needs_int8)])
def test_int8_is_published_in_the_form_that_the_faster_runtime_takes(
    fastest: str, slow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(autotune.RUNTIMES, Precision.INT8, BOTH)
    slow(FP32 | {(r, "int8", threads): 4.0 if r == fastest else 5.0 for r in BOTH for threads in (1, 2)})
    built = build(tmp_path / "bundle", Precision.INT8)
    facts = built.manifest.cpu
    assert facts is not None and facts.chosen.runtime == fastest and facts.arithmetic["int8"] > 10
    kinds = {node.op_type for node in onnx.load(built.folder / "model.onnx", load_external_data=False).graph.node}
    assert ("MatMulInteger" in kinds, "DequantizeLinear" in kinds) == (fastest == "onnxruntime", fastest == "openvino")
    assert len(facts.measured) == 6 and facts.times_fp32 == 4 / 9
    assert "products in int8" in validate_bundle.validate(built.folder).report.candidate


def test_a_runtime_that_is_asked_for_is_the_only_one(
    slow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a server that has no other, however fast the other is here."""
    monkeypatch.setitem(autotune.RUNTIMES, Precision.INT8, BOTH)
    slow({(r, p, n): 9.0 if r == "onnxruntime" else 1.0 for r in BOTH for p in ("fp32", "int8") for n in (1, 2)}
         | {("onnxruntime", "int8", 2): 4.5})  # fmt: skip

    def build_request(precision: Precision) -> pipeline.BuildRequest:
        out = tmp_path / precision
        return pipeline.build_request(
            TINY, weights="synthetic:0", precision=precision, runtime=Runtime.ONNXRUNTIME, out=out
        )

    facts = pipeline.build(build_request(Precision.INT8)).manifest.cpu
    assert facts is not None and facts.chosen.runtime == "onnxruntime" and facts.times_fp32 == 0.5
    assert {timed.way.runtime for timed in facts.measured} == {"onnxruntime"}
    with pytest.raises(UsageError, match="onnxruntime has no bf16 on a CPU; openvino has"):
        pipeline.build(build_request(Precision.BF16))


@needs_bf16
def test_bf16_runs_in_openvino_from_the_fp32_file(slow: Any, exported: autotune.GraphForms, tmp_path: Path) -> None:
    slow(FP32 | {("openvino", "bf16", 2): 4.5, ("openvino", "bf16", 1): 8.0})
    built = build(tmp_path / "bundle", Precision.BF16)
    assert built.manifest.cpu is not None and set(built.manifest.cpu.arithmetic) == {"bf16"}
    assert built.report is not None and "products in bf16" in built.report.candidate
    (fp32,) = exported.graphs["openvino"]
    data = [(folder / "model.onnx.data").read_bytes() for folder in (built.folder, fp32.parent)]
    assert data[0] == data[1]
    shown = CliRunner().invoke(cli.app, ["validate", str(built.folder)])
    assert shown.exit_code == 0 and "products in bf16" in shown.stdout


def test_bf16_without_bf16_is_refused_before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", precision=Precision.BF16, out=tmp_path / "bundle")
    facts = table.TABLE[Runtime.OPENVINO]
    monkeypatch.setitem(table.TABLE, Runtime.OPENVINO, replace(facts, computes=lambda precision: precision != "bf16"))
    with pytest.raises(MissingRequirement, match="no bf16"):
        pipeline.build(request)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "openvino", None)
        with pytest.raises(MissingRequirement) as caught:
            pipeline.build(request)
    assert "dinoexport[openvino]" in caught.value.next_step
    assert list(tmp_path.iterdir()) == [] or not request.out.exists()


def test_int8_has_no_own_error_of_pytorch_to_be_held_to() -> None:
    request = pipeline.build_request(TINY, precision=Precision.INT8)
    with pytest.raises(UsageError, match="no int8"):
        request.model.reference(pytest.fail, [], precision=Precision.INT8, progress=lambda *_: None)


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", 3), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 3), ("", 3)]
)
def test_a_container_share_counts(text: str, cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert cpu.usable_cpus() == cpus


def test_the_next_runtime_follows_one_that_misses_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the times that were taken already; threads of the same runtime are no other arithmetic."""
    monkeypatch.setattr(autotune, "_arithmetic", lambda *_: {"f32": 3})
    model, wanted = pipeline.build_request(TINY).model, autotune.GraphForms(precision=Precision.INT8, graphs={})

    def timed(runtime: Runtime, precision: Precision, threads: int, median_ms: float) -> Timed:
        way = Way(runtime=runtime, precision=precision, threads=threads)
        return Timed(way=way, median_ms=median_ms, spread=0.1, samples=3)

    measured = (
        timed(Runtime.ONNXRUNTIME, Precision.INT8, 2, 4.0),
        timed(Runtime.ONNXRUNTIME, Precision.INT8, 1, 5.0),
        timed(Runtime.OPENVINO, Precision.INT8, 1, 7.0),
        timed(Runtime.OPENVINO, Precision.INT8, 2, 6.0),
        timed(Runtime.OPENVINO, Precision.FP32, 2, 8.0),
    )
    facts = CpuFacts(
        machine="x",
        usable_cpus=2,
        load="y",
        chosen=measured[0].way,
        runtime_version="1",
        arithmetic={"int8": 3},
        times_fp32=0.5,
        measured=measured,
        others_share=0.0,
    )
    other = autotune.without_chosen(model, wanted, facts, "it misses the limits")
    assert other is not None and other.chosen == measured[3].way
    assert other.times_fp32 == 0.75 and other.refused == {"onnxruntime": "it misses the limits"}
    assert autotune.without_chosen(model, wanted, other, "so does it") is None
    # Where others use the CPUs, medians say nothing: then CPU time decides as in the first choice.
    work = {Runtime.ONNXRUNTIME: 40.0, Runtime.OPENVINO: 44.0}
    crowded = tuple(
        t.changed(median_ms=50.0 - 5 * t.median_ms, best_ms=9.0, cpu_ms=work[t.way.runtime]) for t in measured
    )
    other = autotune.without_chosen(model, wanted, facts.changed(measured=crowded, others_share=0.9), "as before")
    assert other is not None and other.chosen == measured[3].way and other.basis == "measured"
    assert crowded[2].median_ms < crowded[3].median_ms and other.times_fp32 == 1.0


@pytest.mark.parametrize(("carried", "rest"), [({}, Precision.BF16), ({"past": "present"}, Precision.FP32)])
def test_ways_say_what_is_computed_besides_narrow_products(
    carried: dict[str, str], rest: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "computes", lambda _: True)
    for precision in (Precision.INT8, Precision.FP32):  # tests choose among ONNX Runtime alone
        monkeypatch.setitem(autotune.RUNTIMES, precision, (Runtime.ONNXRUNTIME, Runtime.OPENVINO))
    graph = Graph(name="model", inputs=(), outputs=(), dims=(), carried=carried)
    both = {runtime: {Path("model.onnx"): graph} for runtime in (Runtime.ONNXRUNTIME, Runtime.OPENVINO)}
    found = {way.runtime: way.rest for way in autotune.GraphForms(precision=Precision.INT8, graphs=both).ways}
    assert found == {Runtime.ONNXRUNTIME: None, Runtime.OPENVINO: rest}
    plain = autotune.GraphForms(precision=Precision.FP32, graphs=both).ways
    assert {way.rest for way in plain} == {None}

"""What opens a bundle's graphs or engines on a machine, and what it is called; nothing is opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.runtime import cpu, runners
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import hardware

ORT, OPENVINO = Runtime.ONNXRUNTIME, Runtime.OPENVINO
MODEL: Any = SimpleNamespace(drive=lambda opened, inputs: {"driven": opened, "with": inputs})


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _facts: "1.2")
    monkeypatch.setattr(runners.cpu.table, "installed", tuple)


@pytest.mark.parametrize(("threads", "cpus", "again"), [(0, 4, True), (2, 2, True), (1, 4, False), (2, 1, False)])
def test_threads_are_compared_with_one_where_there_are_more(
    threads: int, cpus: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(cpu, "open_graphs", lambda graphs, way: (graphs, way))
    way = Way(runtime=ORT, precision=Precision.FP32, threads=threads)
    graphs: Any = "the graphs"
    found = runners.with_one_thread(MODEL, graphs, way)
    assert (found is not None) is again
    if found is not None:
        alone = Way(runtime=ORT, precision=Precision.FP32, threads=1)
        assert found()({}) == {"driven": ("the graphs", alone), "with": {}}


@pytest.mark.parametrize(
    ("precision", "ran_in", "arithmetic", "name"),
    [
        (Precision.FP32, Precision.FP32, {}, "ONNX Runtime 1.2 on the CPU, fp32"),
        (
            Precision.BF16,
            Precision.FP32,
            {"f32": 3, "int8": 2},
            "ONNX Runtime 1.2 on the CPU, bf16 widened to fp32 (3 products in f32 and 2 products in int8)",
        ),
    ],
)
def test_a_candidate_is_called_by_what_it_really_computed(
    precision: Precision, ran_in: Precision, arithmetic: dict[str, int], name: str
) -> None:
    assert runners.candidate_name(precision, Way(runtime=ORT, precision=ran_in), arithmetic) == name


def built(precision: Precision, way: Way | None = None) -> Any:
    return SimpleNamespace(cpu=None if way is None else SimpleNamespace(chosen=way), precision=precision)


def test_a_graph_of_a_gpu_runs_on_a_cpu_in_a_runtime_that_has_its_precision() -> None:
    for precision, way in (
        (Precision.FP16, Way(runtime=ORT, precision=Precision.FP16)),
        (Precision.FP32, Way(runtime=ORT, precision=Precision.FP32)),
        (Precision.BF16, Way(runtime=OPENVINO, precision=Precision.FP32)),
    ):
        assert runners.graph_way(precision) == runners.built_way(built(precision)) == way


def test_another_runtime_is_asked_for_in_the_same_precision() -> None:
    chosen = Way(runtime=OPENVINO, precision=Precision.FP32, threads=2)
    manifest = built(Precision.FP32, chosen)
    here = Way(runtime=OPENVINO, precision=Precision.FP32, threads=0)
    assert runners.way_of(manifest) == runners.way_of(manifest, OPENVINO) == here
    assert runners.way_of(manifest, ORT) == Way(runtime=ORT, precision=Precision.FP32)
    for precision in (Precision.BF16, Precision.INT8):
        manifest = built(precision, Way(runtime=OPENVINO, precision=precision))
        with pytest.raises(UsageError) as caught:
            runners.way_of(manifest, ORT)
        assert caught.value.message == f"ONNX Runtime does not run this bundle's {precision} graph."
        assert caught.value.next_step == "It was built for OpenVINO: --runtime openvino."


class Engines:
    """Engines of one graph for two cards, and of another graph, of which this machine's were chosen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, compatible: bool) -> None:
        def facts(name: str, graph: str, *, stripped: bool) -> Any:
            shapes = {"x": ((1, 2), (3, 4), (5, 6))}
            return SimpleNamespace(
                file=name, graph=graph, version_compatible=compatible, runtime=Runtime.TENSORRT, stripped=stripped,
                profiles={"whole": shapes}, runtime_version="11.0", precision=f"{name} fp16",
            )  # fmt: skip

        self.all = (
            facts("other", "step", stripped=True),
            facts("mine", "step", stripped=True),
            facts("first", "prefill", stripped=False),
        )
        self.graphs: Any = {Path(f"{name}.onnx"): SimpleNamespace(name=name) for name in ("step", "prefill")}
        self.opened: list[Any] = []
        gpus = (SimpleNamespace(name="NVIDIA L4"), SimpleNamespace(name="NVIDIA A100"))
        monkeypatch.setattr(hardware, "gpus", lambda: gpus)
        monkeypatch.setattr(runners.engine_header, "for_this_machine", lambda *_: self.all[1:])
        monkeypatch.setattr(runners.engine_header, "check_runs_here", lambda _facts, gpus: gpus[0])
        monkeypatch.setattr(runners.trt, "open_engine", self.open)

    def open(self, path: Path, graph: Any, **settings: Any) -> str:
        (profile,) = settings.pop("profiles")
        assert (profile.name, profile.shapes) == ("whole", {"x": ((1, 2), (3, 4), (5, 6))})
        self.opened.append((str(path), graph.name, settings))
        return f"{path} opened"


@pytest.mark.parametrize("compatible", [False, True])
def test_this_machines_engine_of_each_graph_is_opened(compatible: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(monkeypatch, compatible=compatible)
    files: Any = {Path(facts.file): facts for facts in engines.all}
    there = runners.open_engines(MODEL, files, engines.graphs, trusted=compatible)
    assert there.candidate({}) == {"driven": {"step": "mine opened", "prefill": "first opened"}, "with": {}}
    assert (there.device, there.name) == ("NVIDIA L4", "tensorrt 11.0 on NVIDIA L4, mine fp16")
    how = {"runtime": Runtime.TENSORRT, "host_code": compatible}
    assert engines.opened == [
        ("mine", "step", how | {"weights_from": Path("step.onnx")}), ("first", "prefill", how | {"weights_from": None})
    ]  # fmt: skip
    assert runners.engines_here(engines.all) == engines.all[1:]
    assert runners.engines_here(engines.all[::2]) == engines.all[::2]


def test_one_engine_runs_on_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(monkeypatch, compatible=False)
    there = runners.open_engines(MODEL, {Path("first"): engines.all[2]}, engines.graphs, trusted=False)
    assert (there.device, there.name) == ("NVIDIA L4", "tensorrt 11.0 on NVIDIA L4, first fp16")


def test_a_plan_that_holds_code_of_an_unknown_author_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(monkeypatch, compatible=True)
    files: Any = {Path(facts.file): facts for facts in engines.all}
    with pytest.raises(MissingRequirement, match=r"^mine was not run: it is version-compatible, so it holds code"):
        runners.open_engines(MODEL, files, engines.graphs, trusted=False)
    assert not engines.opened


@pytest.mark.parametrize(
    ("engines", "target", "for_gpu"), [(0, "cpu", False), (1, "cpu", True), (0, "l4", True), (1, "l4", True)]
)
def test_a_bundle_is_for_a_gpu_by_its_engines_or_its_target(
    engines: int, target: str, for_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest: Any = SimpleNamespace(engines=("an engine",) * engines, target=target)
    assert runners.is_for_gpu(manifest) is for_gpu
    monkeypatch.setattr(runners.engine_header, "for_this_machine", lambda engines, _gpus: engines)
    for has in (True, False):
        monkeypatch.setattr(runners, "has_gpu_for_graphs", lambda has=has: has)
        assert runners.runs_on_gpu_here(manifest) is (bool(engines) or (for_gpu and has))

    def none(*_: Any) -> Any:
        raise MissingRequirement("another card", next_step="")

    monkeypatch.setattr(runners.engine_header, "for_this_machine", none)
    assert not runners.runs_on_gpu_here(manifest)


@pytest.mark.parametrize("without", ["", "a GPU", "the package", "its provider"])
def test_graphs_run_on_a_gpu_with_an_onnx_runtime_for_it(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: () if without == "a GPU" else ("an L4",))
    monkeypatch.setattr(runners, "find_spec", lambda name: None if without == "the package" else name)
    monkeypatch.setattr(runners.ort, "has_cuda", lambda: without != "its provider")
    assert runners.has_gpu_for_graphs() is (not without)


def test_graphs_of_a_gpu_are_opened_on_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name says the arithmetic only if inputs are there to see it by."""
    asked: list[Any] = []

    def open_graph(path: Path, graph: Any, **settings: Any) -> str:
        asked.append((path, settings))
        return f"{graph.name} opened"

    def arithmetic(_model: Any, opened: Any, inputs: Any) -> Any:
        return {"f16": len(opened) + len(inputs)}

    monkeypatch.setattr(runners, "require", lambda *_: None)
    monkeypatch.setattr(runners.ort, "open_graph", open_graph)
    monkeypatch.setattr(cpu, "arithmetic", arithmetic)
    facts = tuple(
        SimpleNamespace(file=f"{name}.onnx", graph=lambda name=name: SimpleNamespace(name=name)) for name in "ab"
    )
    manifest: Any = SimpleNamespace(engines=(), graphs=facts, precision=Precision.FP16)
    with pytest.raises(MissingRequirement, match=r"^This machine has no GPU, or no driver for it\.$"):
        runners.open_on_gpu(MODEL, Path("bundle"), manifest, trusted=False)
    gpus = (SimpleNamespace(name="NVIDIA L4"), SimpleNamespace(name="NVIDIA A100"))
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)
    name = "ONNX Runtime 1.2 on NVIDIA L4, fp16"
    for inputs, ran in ((None, ""), ({"x": 1}, " (3 products in f16)")):
        there = runners.open_on_gpu(MODEL, Path("bundle"), manifest, trusted=False, named_by=inputs)  # type: ignore[arg-type]
        assert (there.name, there.device) == (name + ran, "NVIDIA L4")
        assert there.candidate({}) == {"driven": {"a": "a opened", "b": "b opened"}, "with": {}}
    assert asked == [(Path(f"bundle/{name}.onnx"), {"cuda": True}) for name in "abab"]


def test_a_bundles_engines_are_opened_where_it_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(runners, "open_engines", lambda *words, **settings: opened.append((words, settings)))
    engine, of_graph = SimpleNamespace(file="model.plan"), SimpleNamespace(file="model.onnx", graph=lambda: "its graph")
    manifest: Any = SimpleNamespace(engines=(engine,), graphs=(of_graph,), precision=Precision.FP16)
    runners.open_on_gpu(MODEL, Path("bundle"), manifest, trusted=True)
    ((words, settings),) = opened
    assert words == (MODEL, {Path("bundle/model.plan"): engine}, {Path("bundle/model.onnx"): "its graph"})
    assert settings == {"trusted": True}

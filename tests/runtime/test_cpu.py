"""The CPU's name, which says what was measured is comparable with, and how a bundle's graphs run on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.runtime import Opened, cpu, sizes
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way

CPUINFO = "processor\t: {n}\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2{more}\ncache size\t: 512 KB\n\n"


def of(monkeypatch: pytest.MonkeyPatch, content: str) -> str:
    def read(path: Path, *_: Any, **__: Any) -> str:
        assert path == Path("/proc/cpuinfo")
        return content

    monkeypatch.setattr(Path, "read_text", read)
    return cpu.machine()


def test_a_cpu_s_name_says_which_instructions_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines give CPUs with and without AVX-512 one name, and one of them is three times as fast."""
    old = "".join(CPUINFO.format(n=n, more="") for n in range(2))
    new = "".join(CPUINFO.format(n=n, more=" avx512_vnni avx512f") for n in range(2))
    assert of(monkeypatch, old) == "AMD EPYC (avx2)"
    assert of(monkeypatch, new) == "AMD EPYC (avx2, avx512f, avx512_vnni)"


def test_an_arm_cpu_has_no_name_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert of(monkeypatch, "processor\t: 0\nFeatures\t: fp asimd asimddp bf16\n") == "aarch64 (asimddp, bf16)"
    assert of(monkeypatch, "") == "aarch64"


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000\n", 3), ("900000 100000\n", 3), ("200000 100000\n", 2), ("160000 100000\n", 2),
        ("140000 100000\n", 1), ("20000 100000\n", 1), ("no quota\n", 3), ("", 3), (None, 3),
    ],
)  # fmt: skip
def test_the_cpus_of_a_process_are_those_of_its_affinity_or_its_container(
    quota: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    monkeypatch.setattr(cpu, "Path", {"/sys/fs/cgroup/cpu.max": file}.__getitem__)
    monkeypatch.setattr("os.sched_getaffinity", {0: {4, 5, 7}}.__getitem__)
    assert cpu.usable_cpus() == cpus


def test_a_runtimes_version_is_empty_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, version in (("2.1", "2.1"), (None, "")):
        monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _facts, installed=installed: installed)
        assert cpu.version(Runtime.OPENVINO) == version
        assert cpu.title(Runtime.OPENVINO) == f"OpenVINO {version}"


ORT, OPENVINO = Runtime.ONNXRUNTIME, Runtime.OPENVINO


def test_another_runtimes_fp32_runs_in_onnx_runtime_where_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(cpu.table, "installed", lambda among, there=there: among if there else ())
        for precision in Precision:
            built = Way(runtime=OPENVINO, precision=precision, threads=2, rest=Precision.BF16)
            same = replace(built, threads=0)
            plain = Way(runtime=ORT, precision=Precision.FP32)
            assert cpu.way_here(built) == (same if there or precision is not Precision.FP32 else plain)


class Table:
    """OpenVINO's facts, with a function that opens nothing; asked: what it was to open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        monkeypatch.setattr(cpu, "TABLE", {OPENVINO: SimpleNamespace(open_graph=self.open_graph)})

    def open_graph(self, path: Path, graph: Graph, way: Way, shapes: Any) -> Any:
        self.asked.append((path, graph.name, way.threads, shapes))
        return Opened(run=lambda arrays: {"from": path}, arithmetic=lambda arrays: {"f32": len(arrays)})  # type: ignore[dict-item]


def graph(name: str, **carried: str) -> Graph:
    tensor = Tensor(name="x", dtype="float32", shape=("size",), meaning="values")
    return Graph(
        name=name, inputs=(tensor,), outputs=(), dims=(Dim(name="size", min=1, opt=4, max=9),), carried=carried
    )


def test_each_graph_is_opened_in_the_way_and_gets_forms_of_named_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    table, way = Table(monkeypatch), Way(runtime=OPENVINO, precision=Precision.FP32, threads=3)
    graphs = {Path("a.onnx"): graph("a"), Path("b.onnx"): graph("b", past="present")}
    opened = cpu.open_graphs(graphs, way)
    assert {name: found({}) for name, found in opened.items()} == {
        "a": {"from": Path("a.onnx")}, "b": {"from": Path("b.onnx")}
    }  # fmt: skip
    assert table.asked == [(Path("a.onnx"), "a", 3, None), (Path("b.onnx"), "b", 3, None)]
    spend = sizes.Budget(most=3, memory_bytes=1 << 40, often=1000)
    monkeypatch.setattr(sizes, "budget", lambda: spend)
    made: list[Any] = []
    monkeypatch.setattr(
        cpu, "Specialised", lambda graph, *_, **settings: made.append((graph.name, settings)) or "forms"
    )
    other = replace(spend, most=0)
    for given, spent in ((None, spend), (other, other)):
        opened_too = cpu.open_for_sizes(graphs, way, named=("7",), spend=given)
        assert opened_too["a"] == "forms" and isinstance(opened_too["b"], Opened)  # type: ignore[comparison-overlap]
        assert made.pop() == ("a", {"precision": Precision.FP32, "spend": spent, "named": [{"x": (7,)}]})
    assert not made


def test_a_runtime_of_engines_opens_no_graph_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TABLE", {OPENVINO: SimpleNamespace(open_graph=None)})
    for opens in (cpu.open_graphs, cpu.open_for_sizes):
        with pytest.raises(AssertionError, match="opens no graph on a CPU"):
            opens({}, Way(runtime=OPENVINO, precision=Precision.FP32))


def test_operations_are_counted_as_the_file_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each call of each graph; the arithmetic is that of each graph's first call."""
    asked: list[Any] = []

    def executed(path: Path, arrays: Any, **settings: Any) -> Any:
        asked.append((path, arrays, settings))
        return (SimpleNamespace(flops=100), SimpleNamespace(flops=len(asked)))

    def drive(opened: Any, inputs: Any) -> Any:
        for size in (1, 2):
            opened["step"]({"x": inputs["x"][:size]})
        return opened["first"](inputs)

    table = Table(monkeypatch)
    graphs = {Path("step.onnx"): graph("step"), Path("first.onnx"): graph("first")}
    opened = cpu.open_graphs(graphs, Way(runtime=OPENVINO, precision=Precision.FP32))
    monkeypatch.setattr(cpu.ort, "executed", executed)
    model: Any = SimpleNamespace(drive=drive)
    assert cpu.flops(model, graphs, opened, {"x": "abc", "y": ""}) == 306  # type: ignore[dict-item]
    assert asked == [
        (Path("step.onnx"), {"x": "a"}, {"optimised": False}),
        (Path("step.onnx"), {"x": "ab"}, {"optimised": False}),
        (Path("first.onnx"), {"x": "abc", "y": ""}, {"optimised": False}),
    ]
    assert cpu.arithmetic(model, opened, {"x": "abc", "y": ""}) == {"f32": 3} and len(table.asked) == 2  # type: ignore[dict-item]

"""What `bench` says of samples, of machines and of weights, worked out by hand; no model is run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import bench
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.runtime import cpu
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way, Workload, silent
from dinoexport.system import timing
from dinoexport.system.timing import Latencies

LOAD = Workload(name="3 x 98 x 98", inputs={}, items=3, unit="images")
# 101 of them: the n-th percentile is 200 + 2 n.
SAMPLES_MS = tuple(float(ms) for ms in range(200, 401, 2))


def row(*, pytorch: Latencies | None) -> bench.WorkloadTimes:
    peak = Latencies(samples_ms=(10.0, 20.0, 30.0))
    return bench.WorkloadTimes(
        workload=LOAD, gflop=60.0, ours=Latencies(samples_ms=SAMPLES_MS), peak=peak, pytorch=pytorch
    )


def found(*rows: bench.WorkloadTimes) -> bench.Bench:
    return bench.Bench(
        machine="a CPU", usable_cpus=2, candidate="c", peak_gflop_per_s=500.0, rows=rows, notes=("a note",)
    )


def test_the_matrix_product_takes_seventeen_gflop() -> None:
    assert bench.GEMM_GFLOP == 17.179869184


def test_the_table_is_worked_out_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 GFLOP in 300 ms are 200 GFLOP/s; 8 in 20 ms are 400."""
    monkeypatch.setattr(bench, "GEMM_GFLOP", 8.0)
    rows = found(row(pytorch=Latencies(samples_ms=(400.0,))), row(pytorch=None)).table()
    shown = {
        "load": "3 x 98 x 98",
        "median ms": "300.0",
        "p90": "380.0",
        "p99": "398.0",
        "images/s": "10.00",
        "GFLOP/s": "200",
        "of fp32 peak": "50%",
        "of PyTorch's time": "0.75",
        "spread": "33% noisy",
    }
    assert rows == [shown, shown | {"of PyTorch's time": ""}]


def test_the_json_has_every_figure_and_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GEMM_GFLOP", 8.0)
    workload = {
        "load": "3 x 98 x 98",
        "items": 3,
        "unit": "images",
        "gflop": 60.0,
        "median_ms": 300.0,
        "p90_ms": 380.0,
        "p99_ms": 398.0,
        "items_per_s": 10.0,
        "gflop_per_s": 200.0,
        "share_of_fp32_peak": 0.5,
        "times_pytorch": 0.75,
        "noisy": True,
        "samples_ms": SAMPLES_MS,
        "pytorch_samples_ms": (400.0,),
    }
    assert found(row(pytorch=Latencies(samples_ms=(400.0,))), row(pytorch=None)).to_json() == {
        "machine": "a CPU",
        "usable_cpus": 2,
        "candidate": "c",
        "peak_gflop_per_s": 500.0,
        "workloads": [workload, workload | {"times_pytorch": None, "pytorch_samples_ms": None}],
        "notes": ["a note"],
    }


@pytest.mark.parametrize(("samples_ms", "noisy"), [((95.0, 100.0, 105.0), False), ((90.0, 100.0, 110.2), True)])
def test_a_tenth_of_spread_is_not_noise(samples_ms: tuple[float, ...], noisy: bool) -> None:
    quiet = row(pytorch=None)
    assert bench.replace(quiet, ours=Latencies(samples_ms=samples_ms)).noisy is noisy
    assert not bench.replace(quiet, ours=Latencies(samples_ms=(90.0, 100.0, 110.0))).noisy


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def in_turn(runs: dict[str, Any], **settings: Any) -> dict[str, Latencies]:
        asked.update(settings, runs=list(runs))
        return {"": Latencies(samples_ms=(40.0, 20.0))}

    monkeypatch.setattr(timing, "in_turn", in_turn)
    monkeypatch.setattr(bench, "GEMM_GFLOP", 8.0)
    monkeypatch.setattr(bench, "_GEMM_SIDE", 2)
    assert bench.peak_gflop_per_s() == 400.0
    assert asked == {"runs": [""], "rounds": 5, "budget_s": 6.0}


def test_the_product_is_of_the_same_numbers_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of NumPy's normal distribution with the seed 0, by themselves."""
    monkeypatch.setattr(bench, "_GEMM_SIDE", 2)
    side = np.array([[1.7640524, 0.4001572], [0.978738, 2.2408931]], np.float32)
    np.testing.assert_allclose(bench.gemm()(), side @ side, rtol=1e-5)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is found of a bundle whose two loads take so many GFLOP, at a peak of 2 GFLOP/s."""
    model: Any = SimpleNamespace(
        workloads=(LOAD, Workload(name="large", inputs={"x": np.zeros(1)}, items=1, unit="images"))
    )
    monkeypatch.setattr(bench, "parse", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(bench.family, "find", lambda _name: SimpleNamespace(model=lambda _recipe: model))
    monkeypatch.setattr(cpu, "open_graphs", lambda *_: {})
    monkeypatch.setattr(cpu, "machine", lambda: "a CPU")
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 4)
    monkeypatch.setattr(cpu, "arithmetic", lambda _model, _opened, inputs: {"f32": len(inputs) + 1})
    monkeypatch.setattr(bench, "peak_gflop_per_s", lambda: 2.0)
    monkeypatch.setattr(bench, "gemm", lambda: lambda: None)
    monkeypatch.setattr(bench.runners, "candidate_name", lambda *words: " ".join(map(str, words)))
    for name in bench.BLAS_SETTINGS:
        monkeypatch.delenv(name, raising=False)

    def find(*flops: int, others: float = 0.0, pytorch: bool = True, verdict: str = "passed") -> Any:
        counts = iter(flops)
        monkeypatch.setattr(cpu, "flops", lambda *_: next(counts))
        monkeypatch.setattr(timing.Neighbours, "share", lambda _self: others)
        asked: list[Any] = []

        def in_turn(runs: dict[str, Any], **settings: Any) -> dict[str, Latencies]:
            asked.append((list(runs), settings))
            return {name: Latencies(samples_ms=(1.0,)) for name in runs}

        monkeypatch.setattr(timing, "in_turn", in_turn)
        why = "" if pytorch else "no PyTorch"
        monkeypatch.setattr(bench, "_pytorch", lambda *_: ((lambda _workload: None) if pytorch else None, why))
        manifest: Any = SimpleNamespace(
            verdict=verdict,
            recipe={},
            family="f",
            target="cpu",
            graphs=(),
            engines=(),
            cpu=None,
            precision=Precision.FP32,
        )
        monkeypatch.setattr(bench, "_way", lambda _manifest: Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32))
        told: list[tuple[str, int, int]] = []
        made = bench._timed(Path("bundle"), manifest, (None, None), (), lambda *words: told.append(words))
        return made, asked, told

    return find


def test_a_load_of_more_than_five_seconds_at_the_peak_is_left_out(timed: Any) -> None:
    made, asked, told = timed(10 * 10**9, 10_600_000_000)
    assert [(row.workload.name, row.gflop, row.pytorch) for row in made.rows] == [
        ("3 x 98 x 98", 10.0, Latencies(samples_ms=(1.0,)))
    ]
    assert made.notes == ("large was left out: 11 GFLOP take 5 s at this machine's peak",)
    assert asked == [(["ours", "peak", "pytorch"], {"rounds": 30, "budget_s": 6.0})]
    assert told == [("timing workloads", 1, 2), ("timing workloads", 2, 2)]
    assert (made.machine, made.usable_cpus, made.peak_gflop_per_s) == ("a CPU", 4, 2.0)
    assert made.candidate.endswith("{'f32': 1}")


def test_what_makes_figures_worth_less_is_noted(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked, _ = timed(1, 1, others=0.1, pytorch=False)
    assert made.notes == ("no PyTorch",) and asked[0][0] == ["ours", "peak"]
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made, _, _ = timed(1, 1, others=0.12)
    assert made.notes == (
        (
            "the peak was measured with OPENBLAS_CORETYPE=Haswell, OMP_NUM_THREADS=1 set: without it the machine may "
            "be faster"
        ),
        "noisy: other processes used 12% of the CPUs' time; ratios are more reliable than times",
    )
    with pytest.raises(ValidationFailed, match="bundle is marked rejected, so it is not timed"):
        timed(verdict="rejected")


@pytest.mark.parametrize(
    ("machine", "cpus", "threads"), [("a CPU", 4, 3), ("another", 4, 4), ("a CPU", 8, 4), (None, 4, 4)]
)
def test_the_recorded_threads_are_those_of_the_machine_that_chose_them(
    machine: str | None, cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "machine", lambda: "a CPU")
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 4)
    way = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32)
    monkeypatch.setattr(bench.runners, "way_of", lambda _manifest: way)
    facts = SimpleNamespace(machine=machine, usable_cpus=cpus, chosen=SimpleNamespace(threads=3))
    manifest: Any = SimpleNamespace(cpu=None if machine is None else facts)
    assert bench._way(manifest) == bench.replace(way, threads=threads)


SIZED = Graph(
    name="model",
    inputs=(Tensor(name="x", dtype="float32", shape=("batch", "length"), meaning="values"),),
    outputs=(),
    dims=(Dim(name="batch", min=1, opt=1, max=9), Dim(name="length", min=1, opt=8, max=99)),
)


def test_a_size_is_timed_in_the_general_form_and_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forms(bench.of_size.Specialised):
        def __init__(self, why: str) -> None:
            self.why = why

        def settle(self) -> None:
            pass

        @property
        def forms(self) -> Any:
            return (SimpleNamespace(state="no room" if self.why else "ready", why=self.why, memory_bytes=2_500_001),)

    asked: list[Any] = []

    def open_for_sizes(_graphs: Any, _way: Any, *, named: list[str], spend: Any) -> Any:
        asked.append((named, spend.most))
        return {"model": Forms("too large" if named == ["2x16"] else "")}

    monkeypatch.setattr(cpu, "open_for_sizes", open_for_sizes)
    way = Way(runtime=Runtime.OPENVINO, precision=Precision.FP32)
    model: Any = SimpleNamespace(workloads=(LOAD, Workload(name="other", inputs={}, items=1, unit="tokens")))
    notes: list[str] = []
    loads, forms = bench._own_forms(model, {Path("model.onnx"): SIZED}, way, ["3x8", "2x16"], notes)
    assert [(load.name, load.items, load.unit, load.inputs["x"].shape) for load in loads] == [
        ("3x8", 3, "images", (3, 8)),
        ("3x8, a form of its own", 3, "images", (3, 8)),
        ("2x16", 2, "images", (2, 16)),
        ("2x16, a form of its own", 2, "images", (2, 16)),
    ]
    assert list(forms) == ["3x8, a form of its own", "2x16, a form of its own"]
    assert asked == [(["3x8"], 1), (["2x16"], 1)]
    assert notes == [
        "3x8, a form of its own: ready; it takes 3 MB",
        "2x16, a form of its own: no room, too large; it takes 3 MB",
    ]
    for graphs in ({}, {Path("a"): SIZED, Path("b"): SIZED}, {Path("a"): bench.replace(SIZED, carried={"x": "y"})}):
        with pytest.raises(UsageError, match="no size of its own"):
            bench._own_forms(model, graphs, way, ["3x8"], notes)


@pytest.mark.parametrize(
    ("given", "source", "head", "answer"),
    [
        ((None, None), "synthetic:0", None, ("synthetic:0", None)),
        ((None, None), "absent.pth", None, "the weights that the bundle was built from as --weights"),
        (("other.pth", None), "absent.pth", None, ("other.pth", None)),
        ((None, None), "synthetic:0", ("sum", "", "synthetic:1"), ("synthetic:0", "synthetic:1")),
        ((None, None), "synthetic:0", ("sum", "", "absent.pth"), "the head that the bundle was built from as --head-"),
        ((None, None), "synthetic:0", ("sum", "head.pth", "absent.pth"), ("synthetic:0", "{folder}/head.pth")),
        ((None, "mine.pth"), "synthetic:0", ("sum", "", "absent.pth"), ("synthetic:0", "mine.pth")),
        ((None, None), "synthetic:0", (None, "", "absent.pth"), ("synthetic:0", None)),
    ],
)
def test_pytorch_gets_weights_that_are_here_and_downloads_none(
    given: tuple[str | None, str | None],
    source: str,
    head: tuple[str | None, str, str] | None,
    answer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "head.pth").touch()
    used: list[Any] = []

    def same_weights(_model: Any, _recipe: Any, _manifest: Any, source: str, _progress: Any, **more: Any) -> Any:
        used.append((source, more["head_weights"]))
        return SimpleNamespace(read=lambda name: name)

    monkeypatch.setattr(bench.evaluate, "same_weights", same_weights)
    monkeypatch.setattr("torch.set_num_threads", lambda _count: None)
    facts = None if head is None else SimpleNamespace(sha256=head[0], file=head[1], source=head[2])
    manifest: Any = SimpleNamespace(checkpoint=SimpleNamespace(source=source), head=facts)
    model: Any = SimpleNamespace(reference=lambda read, inputs, **_: (read("weight"), inputs))
    recipe: Any = None
    ask, why = bench._pytorch(tmp_path, model, recipe, manifest, given, silent)
    if isinstance(answer, str):
        assert ask is None and why.startswith(f"PyTorch was not timed: give {answer}") and not used
    else:
        assert used == [(answer[0], answer[1] and answer[1].format(folder=tmp_path))] and why == ""
        assert ask is not None and ask(LOAD) == ("weight", [{}])


def test_without_torch_pytorch_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda _name: None)
    nothing: Any = None
    answer = bench._pytorch(tmp_path, nothing, nothing, nothing, (None, None), silent)
    assert answer == (None, "PyTorch was not timed: torch is not installed")

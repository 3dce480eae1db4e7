"""How often each way to run a graph is visited, and what is told meanwhile: the visits themselves are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import BuildError
from dinoexport.runtime import autotune
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import timing

ORT, OPENVINO = Runtime.ONNXRUNTIME, Runtime.OPENVINO


def way(runtime: Runtime, threads: int, precision: Precision = Precision.FP32) -> Way:
    return Way(runtime=runtime, threads=threads, precision=precision)


WAYS = [way(ORT, 2), way(ORT, 1), way(OPENVINO, 2), way(OPENVINO, 1)]


class Visits:
    """The visits in order; a time for each way, in which they never agree unless `agree`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, agree: bool = False, seconds: float = 1.0) -> None:
        self.order: list[Way] = []
        self.told: list[tuple[int, int]] = []
        self.refuses: Runtime | None = None
        self.now_s = 0.0
        self.hopeless: set[Way] = set()
        self.behind: set[Way] = set()
        monkeypatch.setattr(autotune, "_visit", self.visit)
        monkeypatch.setattr(autotune, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(autotune.choice, "settled", lambda _samples: agree)
        monkeypatch.setattr(autotune.choice, "hopeful", self.hopeful)
        self.seconds = seconds

    def hopeful(self, samples: Any, *, behind: float = 1.1) -> list[Way]:
        without = self.hopeless if behind > 1.1 else self.hopeless | self.behind
        return [way for way in samples if way not in without]

    def visit(self, _model: Any, way: Way, _candidate: Any, _workload: Any) -> Any:
        self.order.append(way)
        self.now_s += self.seconds
        if way.runtime == self.refuses:
            raise BuildError(f"{way.runtime} refuses it")
        return [1.0]

    def measured(self, ways: list[Way] | None = None) -> Any:
        model: Any = None
        return autotune._measured(
            model, [(way, model) for way in ways or WAYS], model, lambda _, done, total: self.told.append((done, total))
        )


def test_twice_there_and_back_when_the_figures_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch, agree=True)
    samples, refused = visits.measured()
    assert visits.order == [*WAYS, *reversed(WAYS)] and refused == {}
    assert samples == {way: [1.0, 1.0] for way in WAYS}
    assert visits.told == [(done, 8) for done in range(9)]


def test_eight_times_at_most_and_never_more_than_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch)
    visits.measured()
    assert visits.order == [*WAYS, *reversed(WAYS)] * 4, "there and back"
    assert visits.told == [(done, 8) for done in range(9)]


@pytest.mark.parametrize(
    ("seconds", "turns"), [(100.0, 1), (5.7, 1), (5.625, 2), (3.8, 2), (3.7, 3), (2.9, 3), (2.8, 4), (1.4, 8)]
)
def test_no_turn_is_begun_that_would_not_end_in_time(
    seconds: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All turns within 45 s, each of four visits; the first is made whatever it takes."""
    visits = Visits(monkeypatch, seconds=seconds)
    visits.measured()
    assert len(visits.order) == turns * len(WAYS)


def test_a_hopeless_way_is_visited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch, agree=True)
    visits.hopeless = {WAYS[1]}
    visits.measured()
    assert [visits.order.count(way) for way in WAYS] == [2, 1, 2, 2]


def test_a_way_that_is_behind_is_visited_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch)
    visits.behind = {WAYS[1]}
    visits.measured()
    assert [visits.order.count(way) for way in WAYS] == [8, 2, 8, 8]


def test_a_runtime_that_refuses_one_of_two_precisions_leaves_both_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch, agree=True)
    visits.refuses = OPENVINO
    narrow = [way(ORT, 2, Precision.INT8), way(OPENVINO, 2, Precision.INT8)]
    samples, refused = visits.measured([WAYS[0], *narrow])
    assert list(samples) == [WAYS[0], narrow[0]] and list(refused) == [OPENVINO]


def test_a_runtime_that_refuses_the_graph_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch, agree=True)
    visits.refuses = OPENVINO
    samples, refused = visits.measured()
    assert list(samples) == WAYS[:2] and refused == {OPENVINO: "openvino refuses it"}
    assert visits.order == [*WAYS[:3], WAYS[1], WAYS[0]]
    last = Visits(monkeypatch, agree=True)
    last.refuses = OPENVINO
    with pytest.raises(BuildError, match="refuses"):
        last.measured([WAYS[0], way(OPENVINO, 1, Precision.BF16)])


@pytest.mark.parametrize(("run_s", "runs"), [(0.01, 10), (0.25, 3), (0.3, 3), (0.31, 2), (9.0, 1)])
def test_a_visit_ends_after_ten_runs_or_once_six_tenths_of_a_second_are_over(
    run_s: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the run that does not count: at least one."""
    now = [1000.0]
    clock: Any = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0)
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(autotune.cpu, "open_graphs", lambda graphs, _way: graphs)
    driven: list[tuple[Any, Any]] = []

    def drive(opened: Any, inputs: Any) -> None:
        driven.append((opened, inputs))
        now[0] += run_s

    model: Any = SimpleNamespace(drive=drive)
    forms: Any = SimpleNamespace(graphs={ORT: "the graphs for ONNX Runtime"})
    workload: Any = SimpleNamespace(inputs="the inputs")
    found = autotune._visit(model, WAYS[0], forms, workload)
    assert driven == [("the graphs for ONNX Runtime", "the inputs")] * (runs + 1)
    assert found.samples_ms == pytest.approx((run_s * 1e3,) * runs)


@pytest.mark.parametrize(("available", "bytes_"), [("MemAvailable:    4096 kB", 1 << 20), ("MemFree: 5 kB", 0)])
def test_forms_of_one_size_get_a_quarter_of_what_is_free(
    available: str, bytes_: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinoexport.runtime import sizes

    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\n{available}\nMore: 1 kB\n")
    monkeypatch.setattr(sizes, "Path", lambda place: tmp_path / Path(place).name)
    assert sizes.budget() == sizes.Budget(most=4, memory_bytes=bytes_, often=32)
    for place in ("meminfo", "nowhere"):
        assert sizes._kilobytes(tmp_path / place, "VmRSS:") == 0

"""The choice of a runtime beside other processes: with a simulated clock, and by what was chosen when it was quiet."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import MissingRequirement
from dinoexport.runtime import autotune, choice, cpu
from dinoexport.spec import Precision, Runtime, Way, Workload
from dinoexport.system import timing
from dinoexport.system.timing import Latencies

FAST = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32, threads=2)
SLOW = Way(runtime=Runtime.OPENVINO, precision=Precision.FP32, threads=2)
HALF = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32, threads=1)
MODEL: Any = SimpleNamespace(workloads=(Workload(name="1 x 224 x 224", inputs={}, items=1, unit="images"),))


class BusyMachine:
    """Runs as they come out on two CPUs with four other processes: mostly stretched, by up to four, in long spells.

    A run's CPU time grows by a little, as caches are shared; a few runs find the machine free.
    """

    def __init__(self, true_ms: dict[Way, float], seed: int, *, load: float) -> None:
        self._true_ms, self._random, self._load = true_ms, random.Random(seed), load
        self.visits: list[Way] = []
        self._spell = 1.0

    def visit(self, _model: Any, way: Way, *_: Any) -> Latencies:
        self.visits.append(way)
        self._spell = 1 + self._load * self._random.random()  # another one for each visit: nothing to trust
        walls, cpus = [], []
        for _run in range(4):
            free = self._random.random() < 0.3
            stretch = 1.0 if free else self._spell * (1 + 0.5 * self._random.random() * self._load)
            walls.append(self._true_ms[way] * stretch * (1 + 0.02 * self._random.random()))
            cpus.append(self._true_ms[way] * way.threads * (1 + 0.08 * self._random.random() * (self._load > 0)))
        return Latencies(samples_ms=tuple(walls), cpu_samples_ms=tuple(cpus))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The facts of a choice among ways that take so long."""
    (tmp_path / "model.onnx").write_bytes(b"graph")
    monkeypatch.setattr(timing.Neighbours, "share", lambda _self: 0.0)  # not this machine's

    def choose(machine: BusyMachine, ways: tuple[Way, ...]) -> Any:
        monkeypatch.setattr(autotune, "_visit", machine.visit)
        monkeypatch.setattr(autotune, "ways", lambda *_, **__: ways)
        monkeypatch.setattr(autotune, "_arithmetic", lambda *_: {"f32": 1})
        graphs: Any = {way.runtime: {tmp_path / "model.onnx": SimpleNamespace(carried={})} for way in ways}
        forms = autotune.GraphForms(precision=Precision.FP32, graphs=graphs)
        return autotune.tune(MODEL, forms)

    return choose


@pytest.mark.parametrize("load", [0.0, 1.0, 3.0], ids=["quiet", "busy", "four others"])
def test_the_faster_one_is_chosen_however_busy_the_machine(load: float, chosen: Any) -> None:
    """20 of 20, by a lead of 12 % that a median of disturbed runs does not see."""
    true_ms = {FAST: 30.0, SLOW: 33.6, HALF: 52.0}
    machines = [BusyMachine(true_ms, seed, load=load) for seed in range(20)]
    assert [chosen(machine, (FAST, HALF, SLOW)).chosen for machine in machines] == [FAST] * 20
    if not load:
        assert all(len(machine.visits) == 5 for machine in machines), "a quiet machine is asked twice"


def test_medians_alone_would_have_been_wrong(chosen: Any) -> None:
    """So that the test above can fail."""
    wrong = 0
    for seed in range(20):
        facts = chosen(BusyMachine({FAST: 30.0, SLOW: 33.6}, seed, load=3.0), (FAST, SLOW))
        wrong += facts.measured[0].way != FAST
    assert wrong >= 3


def test_what_cannot_be_told_apart_is_not_left_to_chance(chosen: Any) -> None:
    """One per cent: the usual order decides, the same each time."""
    facts = [chosen(BusyMachine({FAST: 30.0, SLOW: 30.3}, seed, load=3.0), (FAST, SLOW)) for seed in range(20)]
    assert {fact.chosen for fact in facts} == {SLOW}
    assert {fact.basis for fact in facts} == {"usual"}


def test_the_usual_order_of_four_bits_is_another() -> None:
    four = [replace(way, precision=Precision.INT4) for way in (SLOW, FAST)]
    same = Latencies(samples_ms=(30.0,) * 5, cpu_samples_ms=(60.0,) * 5)
    for ways, first in ((four, four[1]), ([FAST, SLOW], SLOW)):
        assert choice.choose(dict.fromkeys(ways, same)) == choice.ChosenWay(way=first, basis="usual")


def test_what_was_chosen_when_it_was_quiet_decides(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true_ms = {FAST: 30.0, SLOW: 30.9}
    first = chosen(BusyMachine({FAST: 30.0, SLOW: 33.0}, 0, load=0.0), (FAST, SLOW))
    assert (first.chosen, first.basis) == (FAST, "measured")
    facts = [chosen(BusyMachine(true_ms, seed, load=3.0), (FAST, SLOW)) for seed in range(10)]
    assert {fact.chosen for fact in facts} == {FAST} and "known" in {fact.basis for fact in facts}
    # Of other versions nothing is known, nor of another CPU.
    monkeypatch.setattr(cpu, "version", lambda runtime: "another")
    facts = [chosen(BusyMachine({FAST: 30.0, SLOW: 30.1}, seed, load=3.0), (FAST, SLOW)) for seed in range(10)]
    assert {fact.chosen for fact in facts} == {SLOW}


def test_a_busy_machine_teaches_nothing(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.Neighbours, "share", lambda _self: 0.6)
    chosen(BusyMachine({FAST: 30.0, SLOW: 40.0}, 0, load=0.0), (FAST, SLOW))
    facts = chosen(BusyMachine({FAST: 30.0, SLOW: 30.1}, 1, load=0.0), (FAST, SLOW))
    assert (facts.chosen, facts.basis) == (SLOW, "usual")


class CrowdedMachine(BusyMachine):
    """Others have most of both CPUs: no run is undisturbed, and CPU time grows by up to a half: caches are emptied."""

    def visit(self, _model: Any, way: Way, *_: Any) -> Latencies:
        walls, cpus = [], []
        for _run in range(self._random.choice((1, 1, 2, 4))):
            cpus.append(self._true_ms[way] * way.threads * (1 + 0.5 * self._random.random()))
            walls.append(cpus[-1] / way.threads * (2 + 6 * self._random.random()))
        return Latencies(samples_ms=tuple(walls), cpu_samples_ms=tuple(cpus))


def test_beside_many_others_the_choice_is_the_same(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 of 20, where all that can be told is that neither runtime does much more work than the other."""
    monkeypatch.setattr(timing.Neighbours, "share", lambda _self: 0.65)
    alone = Way(runtime=SLOW.runtime, precision=SLOW.precision, threads=1)
    true_ms = {FAST: 31.0, HALF: 52.0, SLOW: 30.0, alone: 50.0}  # the usual one, SLOW, is in fact the faster one
    facts = [chosen(CrowdedMachine(true_ms, seed, load=3.0), tuple(true_ms)) for seed in range(20)]
    assert [(fact.chosen, fact.basis) for fact in facts] == [(SLOW, "usual")] * 20
    true_ms |= {SLOW: 75.0, alone: 130.0}  # which it can tell
    facts = [chosen(CrowdedMachine(true_ms, seed, load=3.0), tuple(true_ms)) for seed in range(20)]
    assert [(fact.chosen, fact.basis) for fact in facts] == [(FAST, "measured")] * 20
    monkeypatch.setattr(timing.Neighbours, "share", lambda _self: 0.0)
    facts = [chosen(CrowdedMachine({FAST: 31.0, SLOW: 30.0}, seed, load=3.0), (FAST, SLOW)) for seed in range(20)]
    assert len({fact.chosen for fact in facts}) > 1, "by the wall clock it is left to chance"


def test_beside_many_others_a_precisions_gain_is_that_of_its_work() -> None:
    """Half the work: it is worth its error, whatever the clock said; where it is quiet, the clock decides."""
    fp32 = Latencies(samples_ms=(40.0, 70.0), cpu_samples_ms=(60.0, 62.0))
    int8 = Latencies(samples_ms=(90.0, 95.0), cpu_samples_ms=(30.0, 33.0))
    samples = {FAST: int8, SLOW: fp32}
    assert choice.times(FAST, [SLOW], samples, others_share=0.9) == 0.5
    assert choice.times(FAST, [SLOW], samples, others_share=0.0) == 2.25


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"runtime": "openvino"}', b"[" * 4000])
def test_a_record_that_is_none_is_passed_over(content: bytes) -> None:
    on = "0" * 64
    choice.remember(on, FAST)
    assert choice.remembered(on, [SLOW, FAST]) == FAST and choice.remembered(on, [SLOW]) is None
    choice._record(on).write_bytes(content)
    assert choice.remembered(on, [SLOW, FAST]) is None


def taken(median_ms: float, best_ms: float, cpu_ms: float | None) -> Any:
    return SimpleNamespace(median_ms=median_ms, best_ms=best_ms, cpu_ms=cpu_ms)


def test_equal_ways_are_alike_though_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_ALIKE", 1.0)
    same, slower = taken(30.0, 30.0, 60.0), taken(30.5, 30.5, 61.0)
    assert choice.agreed({FAST: same, SLOW: slower}) == FAST and choice.agreed({FAST: same, SLOW: same}) is None
    assert choice.choose({FAST: same, SLOW: same}) == choice.ChosenWay(way=SLOW, basis="usual")


def test_a_way_that_is_as_far_behind_as_it_may_be_is_visited_again() -> None:
    first, double = taken(20.0, 10.0, 20.0), taken(99.0, 20.0, 99.0)
    assert choice.hopeful({FAST: first, SLOW: double}, behind=2.0) == (FAST, SLOW)
    assert choice.hopeful({FAST: first, SLOW: double}, behind=1.99) == (FAST,)
    assert choice.hopeful({FAST: first, SLOW: taken(99.0, 11.5, 99.0)}) == (FAST,)


def test_while_figures_disagree_both_that_others_disturb_least_count() -> None:
    """10 and 20 ms against 22 and 12: 14.1 against 16.2 in the geometric mean, though the median says the opposite."""
    samples = {FAST: taken(50.0, 10.0, 40.0), SLOW: taken(30.0, 22.0, 24.0)}
    assert choice.choose(samples) == choice.ChosenWay(way=FAST, basis="measured")


@pytest.mark.parametrize(
    ("cpu_ms", "chosen_way"),
    [
        (90.0, choice.ChosenWay(way=SLOW, basis="usual")),
        (90.1, choice.ChosenWay(way=FAST, basis="measured")),
    ],
)
def test_beside_many_others_half_as_much_work_again_is_alike(cpu_ms: float, chosen_way: choice.ChosenWay) -> None:
    samples = {FAST: taken(1.0, 1.0, 60.0), SLOW: taken(1.0, 1.0, cpu_ms)}
    assert choice.choose(samples, others_share=0.41) == chosen_way


def test_at_two_fifths_of_others_the_clock_still_counts() -> None:
    samples = {FAST: taken(9.0, 9.0, 10.0), SLOW: taken(3.0, 3.0, 20.0)}
    assert choice.times(FAST, [SLOW], samples, others_share=0.4) == 3.0
    assert choice.times(FAST, [SLOW], samples, others_share=0.41) == 0.5


def test_ways_with_and_without_cpu_times_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        choice.settled({FAST: taken(1.0, 1.0, 1.0), SLOW: taken(1.0, 1.0, None)})


def test_the_latest_choice_is_remembered_in_a_cache_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "not" / "yet"))
    for way in (FAST, SLOW):
        choice.remember("0" * 64, way)
        assert choice.remembered("0" * 64, [FAST, SLOW]) == way
    record = tmp_path / "not" / "yet" / "choices" / f"{'0' * 64}.json"
    record.rename(tmp_path / "elsewhere")
    record.symlink_to(tmp_path / "elsewhere")
    assert choice.remembered("0" * 64, [FAST, SLOW]) is None, "a link may lead anywhere"
    content = (tmp_path / "elsewhere").read_bytes()
    for size_bytes, known in ((4096, SLOW), (4097, None)):
        record.unlink()
        record.write_bytes(content.ljust(size_bytes))
        assert choice.remembered("0" * 64, [FAST, SLOW]) == known
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "file"))
    choice.remember("0" * 64, FAST)
    assert choice.remembered("0" * 64, [FAST]) is None


def test_a_way_that_was_chosen_can_be_a_key() -> None:
    assert len({choice.ChosenWay(way=FAST, basis="usual"), choice.ChosenWay(way=FAST, basis="usual")}) == 1


TUNED: Any = SimpleNamespace(
    workloads=tuple(Workload(name=name, inputs={}, items=1, unit="images") for name in ("first", "second"))
)
INT8 = replace(FAST, precision=Precision.INT8)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What is found of ways that take so long, in ms, on a machine with two CPUs; the workloads asked for besides."""
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 2)
    monkeypatch.setattr(cpu, "machine", lambda: "a CPU")
    monkeypatch.setattr(cpu, "version", lambda runtime: f"{runtime} 1.0")
    (tmp_path / "small.onnx").write_bytes(b"1234")
    (tmp_path / "large.onnx").write_bytes(b"123456789")

    def tune(own_ms: dict[Way, float], plain_ms: dict[Way, float] | None = None, *, others: float = 0.0) -> Any:
        monkeypatch.setattr(timing.Neighbours, "share", lambda _self: others)
        precisions = {way.precision: ways for ways in (own_ms, plain_ms or {}) for way in ways}
        monkeypatch.setattr(autotune, "ways", lambda precision, *_, **__: tuple(precisions[precision]))
        all_ms = {**own_ms, **(plain_ms or {})}
        monkeypatch.setattr(
            autotune, "_visit", lambda _m, way, *_: Latencies(samples_ms=(all_ms[way],), cpu_samples_ms=(all_ms[way],))
        )
        monkeypatch.setattr(autotune, "_arithmetic", lambda _m, _w, _way, workload: {workload.name: 1})
        signature: Any = SimpleNamespace(carried={})
        graphs: Any = {
            FAST.runtime: {tmp_path / "small.onnx": signature},
            SLOW.runtime: {tmp_path / "large.onnx": signature},
        }
        wanted, plain = (
            autotune.GraphForms(precision=next(iter(ways)).precision, graphs=graphs) if ways else None
            for ways in (own_ms, plain_ms)
        )
        assert wanted is not None
        return autotune.tune(TUNED, wanted, plain), wanted

    return tune


def test_one_runtime_is_taken_with_all_cpus_and_without_a_measurement(tuned: Any) -> None:
    facts, _ = tuned({FAST: 9.0, HALF: 1.0})
    assert facts.model_dump() == {
        "machine": "a CPU",
        "usable_cpus": 2,
        "load": "first",
        "chosen": {"runtime": "onnxruntime", "precision": "fp32", "threads": 2},
        "runtime_version": "onnxruntime 1.0",
        "arithmetic": {"first": 1},
        "times_fp32": None,
        "measured": (),
        "refused": {},
        "others_share": 0.0,
        "basis": "measured",
    }


def test_a_narrow_precision_is_timed_beside_fp32_in_as_many_threads(tuned: Any) -> None:
    """One runtime, and still a choice: whether it is worth its error."""
    half, one = replace(INT8, threads=1), replace(SLOW, threads=1)
    facts, _ = tuned({INT8: 6.0, half: 8.0}, {FAST: 10.0, HALF: 2.0, SLOW: 12.0, one: 2.0})
    assert [(timed.way, timed.median_ms) for timed in facts.measured] == [
        (INT8, 6.0), (half, 8.0), (FAST, 10.0), (SLOW, 12.0)
    ]  # fmt: skip
    assert (facts.chosen, facts.times_fp32) == (INT8, 0.6)


@pytest.mark.parametrize(("others", "basis"), [(0.1, "known"), (0.11, "usual")])
def test_a_choice_beside_a_tenth_of_others_is_remembered(others: float, basis: str, tuned: Any) -> None:
    assert tuned({FAST: 10.0, SLOW: 20.0}, others=others)[0].basis == "measured"
    assert tuned({FAST: 10.0, SLOW: 10.1})[0].basis == basis


def test_a_choice_is_remembered_for_graphs_of_the_first_runtimes_size(tuned: Any, tmp_path: Path) -> None:
    tuned({FAST: 10.0, SLOW: 20.0})
    (tmp_path / "large.onnx").write_bytes(b"larger, with what another runtime needs")
    assert tuned({FAST: 10.0, SLOW: 10.1})[0].basis == "known"
    (tmp_path / "small.onnx").write_bytes(b"another graph")
    assert tuned({FAST: 10.0, SLOW: 10.1})[0].basis == "usual"


def test_the_next_best_runtime_is_found_in_what_was_measured(tuned: Any) -> None:
    facts, wanted = tuned({FAST: 10.0, SLOW: 20.0})
    found = autotune.without_chosen(TUNED, wanted, facts, "it differs")
    assert found is not None
    assert (found.chosen, found.runtime_version, found.refused) == (SLOW, "openvino 1.0", {"onnxruntime": "it differs"})
    assert (found.arithmetic, found.times_fp32, found.basis) == ({"first": 1}, None, "measured")
    assert autotune.without_chosen(TUNED, wanted, found, "it differs too") is None


@pytest.mark.parametrize(("cpus", "threads"), [(1, [1]), (2, [2, 1]), (3, [3, 1]), (8, [8, 4])])
def test_all_cpus_and_half_of_them_are_tried(cpus: int, threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "usable_cpus", lambda: cpus)
    found = autotune.ways(Precision.FP32, (Runtime.ONNXRUNTIME,))
    assert [way.threads for way in found] == threads
    assert {way.runtime for way in found} == {Runtime.ONNXRUNTIME}


def test_each_way_says_what_is_computed_beside_narrow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whether a graph carries state, which it does not unless that is said."""
    rests = {False: Precision.BF16, True: Precision.FP32}
    asked: list[Precision] = []

    def rest(precision: Precision, carried: bool) -> Precision:
        asked.append(precision)
        return rests[carried]

    facts = replace(autotune.TABLE[Runtime.OPENVINO], computes=lambda _precision: True, rest=rest)
    monkeypatch.setattr(autotune, "TABLE", {Runtime.OPENVINO: facts})
    monkeypatch.setattr(autotune.table, "installed", tuple)
    monkeypatch.setitem(autotune.RUNTIMES, Precision.INT8, (Runtime.OPENVINO,))
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 1)
    for settings, expected in (
        ({}, Precision.BF16),
        ({"carried": False}, Precision.BF16),
        ({"carried": True}, Precision.FP32),
    ):
        way = Way(runtime=Runtime.OPENVINO, precision=Precision.INT8, threads=1, rest=expected)
        assert autotune.ways(Precision.INT8, (Runtime.OPENVINO,), **settings) == (way,)
    assert asked == [Precision.INT8] * 3


def test_a_precision_that_no_runtime_here_has_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = replace(autotune.TABLE[Runtime.OPENVINO], computes=lambda _precision: False)
    monkeypatch.setattr(autotune, "TABLE", {**autotune.TABLE, Runtime.OPENVINO: facts})
    monkeypatch.setattr(autotune.table, "installed", tuple)
    with pytest.raises(MissingRequirement) as caught:
        autotune.ways(Precision.BF16, (Runtime.ONNXRUNTIME, Runtime.OPENVINO))
    assert caught.value.message == "This CPU has no bf16 arithmetic that OpenVINO would use."
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(autotune, "require", lambda *names: asked.append(names))
    with pytest.raises(MissingRequirement, match="This CPU has no int8"):
        monkeypatch.setattr(autotune.table, "installed", lambda _among: ())
        monkeypatch.setitem(autotune.RUNTIMES, Precision.INT8, (Runtime.ONNXRUNTIME, Runtime.OPENVINO))
        autotune.ways(Precision.INT8, (Runtime.OPENVINO,))
    assert asked == [("openvino", "openvino")], "of the runtimes that were asked for"

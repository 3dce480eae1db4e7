"""The choice of a runtime beside other processes: with a simulated clock, and by what was chosen when it was quiet."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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

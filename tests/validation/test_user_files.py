"""A user's own files: streamed, resumed after an interruption, judged together."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport.bundle.reference_file import Reference
from dinoexport.cli import formatting
from dinoexport.config.limits import Limits, load_validation
from dinoexport.errors import BuildError, OutsideProfile, UsageError
from dinoexport.spec import Arrays, Case, Expectation, Precision
from dinoexport.system.cache import cache_folder
from dinoexport.validation import judge, user_files
from dinoexport.validation.user_files import Aggregate

LIMITS = load_validation("dinov2", beside=None)[0].limits[Precision.FP32]


class Numbers:
    """Uses of a model that takes a number and answers with vectors made of it."""

    neighbours_by = classified_by = ("mean",)

    def features(self, outputs: Arrays) -> dict[str, Any]:
        return {"mean": outputs["tokens"][0].mean(axis=0)}

    def second_view(self, inputs: Arrays) -> dict[str, Any]:
        return {"number": inputs["number"] + 0.5}

    def matches(self, outputs: Arrays, of_view: Arrays) -> Any:
        return (outputs["tokens"][0] @ of_view["tokens"][0].T).argmax(axis=1)


def numbered(count: int, classes: int = 2) -> Iterator[Case]:
    for i in range(count):
        label = f"class{i % classes}"
        yield Case(name=f"{label}/{i}", why="a number", inputs={"number": np.array([float(i)])}, label=label)


def answer(inputs: Arrays, tokens: int = 4) -> dict[str, Any]:
    """(1, tokens, 8), of the number alone."""
    seed = int(2 * inputs["number"][0])
    return {"tokens": np.random.RandomState(seed).standard_normal((1, tokens, 8)).astype(np.float32)}


class Run:
    """`streamed.judge_own` over numbers, with what it asked PyTorch for."""

    def __init__(self, *, stop_at: int | None = None, candidate: Any = answer, held_to: Limits = LIMITS) -> None:
        self.asked: list[str] = []
        self.stop_at, self.candidate, self.held_to = stop_at, candidate, held_to

    def ask(self, chunk: Sequence[Case]) -> Reference:
        for case in chunk:
            if len(self.asked) == self.stop_at:
                raise KeyboardInterrupt
            self.asked.append(case.name)
        expectations = tuple(Expectation(case=case, outputs=answer(case.inputs)) for case in chunk)
        return Reference(name="exact", limits=self.held_to, expectations=expectations, refusals=())

    def judged(self, candidate: Any, reference: Reference) -> judge.Report:
        return judge.judge(
            candidate, reference.expectations, (), self.held_to, candidate_name="ours", reference_name="exact"
        )

    def __call__(self, some: Any, *, at_once: int = 4, identity: Sequence[str] = ("a bundle",)) -> Aggregate:
        return user_files.judge_own(
            Numbers(),
            some,
            self.candidate,
            self.held_to,
            ask=self.ask,
            exact=lambda inputs: [answer(arrays) for arrays in inputs],
            judged=self.judged,
            names=("ours", "exact"),
            identity=identity,
            at_once=at_once,
        )


def kept_files() -> list[Path]:
    return sorted((cache_folder() / "validated").rglob("*.npz"))


# Streamed and resumed


def test_all_are_judged_one_by_one_and_together() -> None:
    run = Run()
    aggregate = run(numbered(30))
    assert run.asked == [case.name for case in numbered(30)]
    assert aggregate.report.passed and aggregate.said == ()
    assert [row.case for row in aggregate.report.rows[:30]] == run.asked
    assert aggregate.agreement is not None
    found = {measure.figure: (measure.value, measure.items) for measure in aggregate.agreement.measures}
    assert found == dict.fromkeys(("recall", "knn_agreement", "probe_agreement", "correspondence"), (1.0, 30))
    assert kept_files() == [], "a verdict is made anew the next time"


def test_an_interrupted_run_goes_on_where_it_stopped() -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=13)(numbered(30))
    assert len(kept_files()) == 12, "three whole steps of four"
    run = Run()
    aggregate = run(numbered(30))
    assert run.asked == [case.name for case in numbered(30)][12:]
    assert aggregate.said == ("12 of 30 results come from an interrupted run",)
    at_one_go = Run()(numbered(30))
    assert aggregate.report.to_json() == at_one_go.report.to_json() and aggregate.agreement == at_one_go.agreement
    assert kept_files() == []


def test_what_is_kept_is_found_by_content_and_called_as_today() -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=8)(numbered(12))
    renamed = [Case(name=f"new/{i}", why="renamed", inputs={"number": np.array([float(i)])}) for i in (3, 50, 7)]
    run = Run()
    aggregate = run(renamed)
    assert run.asked == ["new/50"]
    assert [row.case for row in aggregate.report.rows if row.output == "tokens"] == ["new/3", "new/50", "new/7"]


@pytest.mark.parametrize("changed", ["bundle", "limits"])
def test_of_anything_else_nothing_is_taken_over(changed: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=8)(numbered(12))
    stricter = LIMITS.model_copy(update={"recall_min": None, "times_own_error_max": LIMITS.relative_l2_max})
    run = Run(held_to=stricter if changed == "limits" else LIMITS)
    aggregate = run(numbered(12), identity=("another bundle" if changed == "bundle" else "a bundle",))
    assert len(run.asked) == 12 and aggregate.said == ()


def test_what_is_damaged_is_asked_again_and_no_pickle_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=12)(numbered(16))
    truncated, hostile, empty, foreign, *_ = kept_files()
    truncated.write_bytes(truncated.read_bytes()[:200])

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was here"),)

    np.savez(hostile, **{"facts.json": np.array([Hostile()], dtype=object)})  # type: ignore[arg-type]
    empty.write_bytes(b"")
    np.savez(foreign, **{"facts.json": np.frombuffer(b'{"rows": 3}', np.uint8)})
    run = Run()
    aggregate = run(numbered(16))
    assert len(run.asked) == 4 + 4 and aggregate.report.passed
    assert aggregate.said == ("8 of 16 results come from an interrupted run",)
    assert not (tmp_path / "was here").exists()


def test_figures_that_are_not_finite_are_kept_as_they_are() -> None:
    def broken(inputs: Arrays) -> dict[str, Any]:
        return {"tokens": answer(inputs)["tokens"] * (np.nan if inputs["number"][0] == 2 else 1)}

    with pytest.raises(KeyboardInterrupt):
        Run(stop_at=4, candidate=broken)(numbered(24))
    aggregate = Run(candidate=broken)(numbered(24))
    assert aggregate.said[0].startswith("4 of 24")
    assert [row.case for row in aggregate.report.failures] == ["class0/2"]
    assert aggregate.agreement is not None
    assert "1 of 24 have no usable output and are left out here" in aggregate.agreement.said


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "file"))
    aggregate = Run()(numbered(24))
    assert aggregate.report.passed and "cannot be written" in aggregate.said[0]


def test_two_runs_at_once_do_not_harm_each_other() -> None:
    """One ends, and clears what it kept, while the other is in the middle."""

    def slow() -> Iterator[Case]:
        for i, case in enumerate(numbered(24)):
            if i == 13:
                assert Run()(numbered(24)).report.passed
                assert kept_files() == []
            yield case

    assert Run()(slow()).report.passed
    assert kept_files() == []


@pytest.mark.slow("judges ten thousand files, whose memory must not grow with their number")
def test_ten_thousand_are_streamed() -> None:
    """No more outputs live at once than a step has, and of ten thousand inputs no more either."""
    alive, most = 0, 0

    def counted(array: Any) -> Any:
        nonlocal alive, most

        def gone() -> None:
            nonlocal alive
            alive -= 1

        alive += 1
        most = max(most, alive)
        weakref.finalize(array, gone)
        return array

    def candidate(inputs: Arrays) -> dict[str, Any]:
        return {"tokens": counted(np.full((1, 2, 8), 1 + inputs["number"][0] % 7, np.float32))}

    def ask(chunk: Sequence[Case]) -> Reference:
        expectations = tuple(Expectation(case=case, outputs=candidate(case.inputs)) for case in chunk)
        return Reference(name="exact", limits=LIMITS, expectations=expectations, refusals=())

    def inputs() -> Iterator[Case]:
        for i in range(10_000):
            yield Case(name=str(i), why="a number", inputs={"number": counted(np.array([float(i)]))})

    def judged(recorded: Any, reference: Reference) -> judge.Report:
        for expectation in reference.expectations:
            recorded(expectation.case.inputs)
        bound = judge.Bound(figure="relative_l2", value=1.0, limit=2.0, reason="of the tests", holds=True)
        rows = (
            judge.Row(case=e.case.name, why="", output="tokens", shape=(), distance=None, bounds=(bound,))
            for e in reference.expectations
        )
        return judge.Report(candidate="ours", reference="exact", rows=tuple(rows))

    aggregate = user_files.judge_own(
        Numbers(),
        inputs(),
        candidate,
        LIMITS,
        ask=ask,
        exact=lambda views: [candidate(arrays) for arrays in views],
        judged=judged,
        names=("ours", "exact"),
        identity=(),
        at_once=50,
    )
    assert aggregate.agreement is not None and aggregate.agreement.measures[0].items == 10_000
    assert len(aggregate.report.rows) >= 10_000
    # Of each step: inputs, both sides' answers, views' answers; and those of the step before that are not gone yet.
    assert most < 10 * 50
    shown = formatting.report_rows(aggregate.report)
    assert len(shown) < 200 and "--json has them all" in shown[-1]["case"]


# A candidate that is wrong


def test_a_candidate_that_breaks_on_the_second_view_has_no_correspondence() -> None:
    def breaking(inputs: Arrays) -> dict[str, Any]:
        if inputs["number"][0] == 2.5:
            raise BuildError("broken")
        if inputs["number"][0] == 4.5:
            raise OutsideProfile("too large")
        return answer(inputs)

    aggregate = Run(candidate=breaking)(numbered(24))
    assert aggregate.agreement is not None
    (measure,) = [m for m in aggregate.agreement.measures if m.figure == "correspondence"]
    assert measure.items == 23 and [d.item for d in measure.differs] == ["class0/2"]
    assert measure.value == pytest.approx(22 / 23)


def test_what_the_profiles_leave_out_is_not_covered_and_has_no_features() -> None:
    def narrow(inputs: Arrays) -> dict[str, Any]:
        if inputs["number"][0] == 3:
            raise OutsideProfile("too large")
        return answer(inputs)

    aggregate = Run(candidate=narrow)(numbered(24))
    assert aggregate.report.not_covered == ("class1/3",)
    assert aggregate.agreement is not None and aggregate.agreement.measures[0].items == 23


def test_a_candidate_of_another_shape_or_name_is_left_out() -> None:
    for wrong in (lambda i: {"tokens": answer(i, tokens=5)["tokens"]}, lambda i: {"token": answer(i)["tokens"]}):
        aggregate = Run(candidate=wrong)(numbered(24))
        assert not aggregate.report.passed
        assert aggregate.agreement is not None and aggregate.agreement.measures == ()
        assert aggregate.agreement.said == ("24 of 24 have no usable output and are left out here",)


# Where results are kept


def result(name: str) -> user_files.CaseResult:
    item = user_files.ItemFeatures(name=name, label="", reference={}, candidate={}, matched=0.5)
    return user_files.CaseResult(rows=(), item=item, covered=True)


def test_results_are_files_by_the_first_digits_of_their_inputs(tmp_path: Path) -> None:
    keep = user_files.Keep(folder=tmp_path / "not" / "there" / "yet")
    for digest in ("ab1", "ab2", "c03"):
        keep.write(digest, result("x"))
    files = [str(path.relative_to(keep.folder)) for path in keep.folder.rglob("*") if path.is_file()]
    assert sorted(files) == ["ab/ab1.npz", "ab/ab2.npz", "c0/c03.npz"]
    asked = Case(name="now", why="a test", inputs={}, label="")
    assert keep.read("ab2", asked) == result("now") and keep.read("ab3", asked) is None


def test_the_folder_is_named_by_what_results_depend_on() -> None:
    """The first 128 bits of sha256 of the JSON list, as sha256sum prints them."""
    keep = user_files.Keep.named("ours", "exact")
    assert keep.folder == cache_folder() / "validated" / "53526285d000e3782fb53ece0d8630f3"


def test_the_report_names_candidate_and_reference() -> None:
    report = Run()(numbered(2)).report
    assert (report.candidate, report.reference) == ("ours", "exact")


def test_a_second_view_without_an_output_of_pytorch_is_an_error() -> None:
    """A result may not go to another file's view."""
    run = Run()
    with pytest.raises(ValueError, match="zip"):
        user_files.judge_own(
            Numbers(), numbered(3), answer, LIMITS, ask=run.ask, exact=lambda views: [answer(views[0])],
            judged=run.judged, names=("ours", "exact"), identity=(), at_once=3,
        )  # fmt: skip


# Which files


class Folder:
    """A family that finds cases, or a line for each file that is none."""

    def __init__(self, *found: Any) -> None:
        self.found = found
        self.asked: list[Any] = []

    def cases_from(self, folder: Path, *, progress: Any, only: Any) -> Iterator[Any]:
        self.asked.append((folder, only))
        yield from self.found


def test_files_that_cannot_be_used_are_told_and_the_others_come(tmp_path: Path) -> None:
    """The first is looked for at once, the others as they are asked for."""
    one, two = numbered(2)
    folder, skipped = Folder("a.txt: no image", one, "b.txt: no image", two), []
    cases = user_files.readable(folder, tmp_path, skipped, lambda *_: None)
    assert skipped == ["a.txt: no image"] and list(cases) == [one, two]
    assert skipped == ["a.txt: no image", "b.txt: no image"] and folder.asked == [(tmp_path, None)]


def test_a_folder_without_a_usable_file_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        user_files.readable(Folder("a.txt: no image", "b: empty"), tmp_path, [], lambda *_: None)
    assert refused.value.message == f"{tmp_path} holds no image that can be read.\n  a.txt: no image\n  b: empty"
    (tmp_path / "file").touch()
    for place in (tmp_path / "none", tmp_path / "file"):
        unasked = Folder(*numbered(1))
        with pytest.raises(UsageError, match=f"^There is no folder {place}"):
            user_files.readable(unasked, place, [], lambda *_: None)
        assert not unasked.asked


def test_a_verdict_in_json_has_what_was_said_and_measured() -> None:
    report = judge.Report(candidate="ours", reference="exact", rows=())
    measured = user_files.Agreement(measures=(), said=("too few",))
    assert Aggregate(report=report, agreement=measured, said=("12 of 30",)).to_json() == {
        "said": ["12 of 30"], "agreement": {"measures": [], "said": ["too few"]},
    }  # fmt: skip
    assert Aggregate(report=report, agreement=None, said=()).to_json() == {"said": [], "agreement": None}

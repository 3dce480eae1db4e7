"""Both pages in whole, of validations that are written down here: what is kept for them, and what they show."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import family
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.recipe import Recipe
from dinoexport.errors import UsageError
from dinoexport.report import html_report, mismatches
from dinoexport.report.html_report import HeldOut, Kept
from dinoexport.spec import Case, Dim, Expectation, Graph, Picture, Tensor
from dinoexport.validation.answers import Bound
from dinoexport.validation.downstream import Agreement, Differs, Measure
from dinoexport.validation.error_analysis import RANGE
from dinoexport.validation.judge import Report, Row
from tests.report.test_page_parts import growth, manifest, report, row

pytest.importorskip("jinja2")
HOSTILE = "<script>alert(1)</script>"


def text_of(page: str) -> str:
    """The page's visible words in one line."""
    body = re.sub(r"(?s)<(style|svg|head)\b.*?</\1>", " ", page)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def expectation(name: str, *, shown: bool = False, outputs: Any = None, **more: Any) -> Expectation:
    inputs = {"pixels": np.zeros((1, 3, 4, 8), np.float32)}
    choices = more.pop("choices", {})
    case = Case(name=name, why=f"why {name}", inputs=inputs, shown=shown, choices=choices)
    return Expectation(case=case, outputs=outputs or {}, **more)


def test_errors_are_kept_where_they_are_comparable() -> None:
    """Of outputs in the reference's shape that are neither choices nor labels; whole answers of pictures alone."""
    outputs = {name: np.array([[3.0, 4.0]]) for name in ("tokens", "absent", "wrong", "choice", "label")}
    asked = [
        expectation("photo", shown=True, outputs=outputs, choices={"choice": "logits"}, leads={"label": np.ones(1)}),
        expectation("noise", outputs={"tokens": np.array([[0.0, 2.0]])}),
    ]
    answers = {name: np.array([[3.0, 4.5]]) for name in ("tokens", "choice", "label", "more")}
    answers["wrong"] = np.zeros((1, 3))
    kept = Kept()
    candidate = html_report.keeping(lambda _inputs: answers, asked, kept)
    for each in asked:
        assert candidate(each.case.inputs) is answers
    assert candidate({"pixels": asked[0].case.inputs["pixels"]}) is answers, "inputs that are no case's"
    assert kept.answers == {"photo": answers}
    assert {name: [part.tolist() for part in parts] for name, parts in kept.errors.items()} == {
        "tokens": [[0.1], [pytest.approx((9 + 6.25) ** 0.5 / 2)]]
    }


def graph() -> Graph:
    dims = (Dim(name="height", min=2, opt=4, max=32), Dim(name="width", min=2, opt=4, max=64))
    pixels = Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning="")
    return Graph(name="model", inputs=(pixels,), outputs=(), dims=dims)


class Drawing:
    """Draws a picture of each candidate, in the order in which they are given."""

    graphs = (graph(),)

    def pictures(self, case: Case, _reference: Any, candidates: Any) -> Any:
        return tuple(
            (Picture(title=f"{case.name} by {name}", caption="", media_type="image/gif", data=b"GIF"),)
            for name in candidates
        )


def page(of: Any, found: Report, *cases: Expectation, kept: Any = None, grown: Any = None, held_out: Any = None) -> str:
    reference = Reference(name="r", limits=None, expectations=cases, refusals=())  # type: ignore[arg-type]
    return html_report.render(of, Drawing(), found, grown, reference, kept or {"c": Kept()}, held_out)  # type: ignore[arg-type]


def test_whose_pictures_are_drawn() -> None:
    """Of cases that are shown and answered; PyTorch's own in the candidate's precision comes first."""
    cases = [
        expectation("one", shown=True, own_outputs={"x": np.zeros(1)}), expectation("two", shown=True),
        expectation("three"), expectation("four", shown=True),
    ]  # fmt: skip
    answered = {"one": {}, "two": {}, "three": {}}
    kept = {"c": Kept(answers=answered), "d": Kept(answers={"two": {}})}  # type: ignore[arg-type]
    shown = text_of(page(manifest(), report(row(("relative_l2", 0.5, 1.0, "measured"))), *cases, kept=kept))
    found = re.findall(r"(?:one|two|three|four) by (?:PyTorch's own fp16|PyTorch&#39;s own fp16|[cd])\b", shown)
    assert [words.replace("&#39;", "'") for words in found] == [
        "one by PyTorch's own fp16", "one by c", "two by c", "two by d",
    ]  # fmt: skip


def test_names_of_users_are_no_markup() -> None:
    of = manifest(variant=HOSTILE, card={"note": HOSTILE})
    whole = page(of, report(row(("relative_l2", 0.5, 1.0, HOSTILE), output=HOSTILE)))
    assert HOSTILE not in whole and "&lt;script&gt;alert(1)" in whole


def test_a_page_has_what_there_is_and_no_more() -> None:
    rows = [
        row(("relative_l2", 0.5, 1.0, "measured")),
        row(("largest", 1000.0, 65504.0, "fp16's maximum"), output=RANGE),
    ]
    plain = text_of(page(manifest(), report(rows[0])))
    full = text_of(
        page(
            manifest(),
            report(*rows),
            expectation("one"),
            grown=growth((1e-3, 1e-2)),
            held_out=HeldOut(
                images=9, right=8, interval=(0.5, 0.99), recall={"cat": 0.75}, counts={"cat": 4}, confusions=(),
                notes=("one file was skipped",),
            ),
        )
    )  # fmt: skip
    for words in ("one file was skipped", "1 checks of 1 cases", "2 checks of 1 cases"):
        assert (words in full, words in plain) == ("1 checks" not in words, "1 checks" in words), words
    largest = "fp16 range The largest magnitude"
    assert largest in full and "1,000 of 65,504 fp16's maximum ok" in unescape(full) and largest not in plain
    assert full.count("class_token") == plain.count("class_token"), "a row of the range is in its own table alone"
    figures = Row(
        case="one", why="", output="depth", shape=(1,), distance=None, bounds=rows[0].bounds,
        figures={"within_1.25": 0.987, "mean_iou": 0.876},
    )  # fmt: skip
    measured = text_of(page(manifest(), report(rows[0], figures)))
    for words in ("within 1.25 times", "mIoU"):
        assert words in measured and words not in plain
    assert "same label" not in measured and "decided" not in measured


def test_synthetic_weights_are_said() -> None:
    assert html_report._about_weights(manifest()) == []
    of: Any = SimpleNamespace(synthetic="the head's weights")
    assert html_report._about_weights(of) == [
        "The head's weights are synthetic: what the model answers, and the pictures of it, mean nothing.",
        "The report shows that the model gives PyTorch's outputs for the same weights.",
    ]


def test_an_engine_is_a_fact() -> None:
    engine = SimpleNamespace(
        file="a.plan", runtime="tensorrt", runtime_version="10.1", size_bytes=123_456_789_012, executed="never"
    )
    of: Any = SimpleNamespace(
        head=None, report={}, checkpoint=manifest().checkpoint, precision="fp16", engines=(engine,)
    )  # fmt: skip
    assert html_report._facts(of)["engine a.plan"] == "tensorrt 10.1, 123456.8 MB; compiled; executed: never"


def test_limits_of_zero_and_bars_of_equal_length() -> None:
    """A limit that is tiny is no limit of zero; where all errors are equal, every bar is as long."""
    small = row(("relative_l2", 0.25, 0.5, ""), ("worst_l2", 2e-9, 1e-9, ""))
    assert html_report._closest(report(small)) == (small, small.bounds[1])
    bars = html_report._growth_bars(growth((0.5, 0.5), (5.0, 0.05)))
    assert [(bar.length, bar.mark) for bar in bars] == [(62.95, 62.95), (100.0, 25.9)]
    near = html_report._growth_bars(growth((2e-3, 5e-3)))
    assert [(bar.length, bar.mark) for bar in near] == [(43.07, 100.0)], "2 of 5, between 1 and 5"
    equal = html_report._growth_bars(growth((100.0, 100.0)))
    assert [(bar.length, bar.mark) for bar in equal] == [(0.0, 0.0)]


# The page of images that differ


def measure(*differs: Differs) -> Measure:
    bound = Bound(figure="recall_min", value=0.5, limit=0.9, reason="measured", holds=False)
    return Measure(figure="recall", of="v", value=0.5, items=9, detail="nearest", bound=bound, differs=differs)


def validated(*measures: Measure, skipped: tuple[str, ...] = (), uses: bool = True) -> Any:
    found = Agreement(measures=measures, said=("a remark",)) if uses else None
    aggregate = SimpleNamespace(agreement=found, said=("a note",), report=report())
    return SimpleNamespace(
        aggregate=aggregate, manifest=manifest(recipe={"any": 1}), report=report(row(("relative_l2", 0.5, 1.0, ""))),
        skipped=skipped,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The names whose images are read again; each thumbnail is the name itself."""
    wanted: list[Any] = []

    def cases_from(folder: Path, *, progress: Any, only: Any) -> Any:
        wanted.append((folder.name, sorted(only)))
        return (Case(name=name, why="", inputs={"name": np.array(name)}) for name in sorted(only))

    def thumbnail(inputs: Any) -> Picture:
        return Picture(title="", caption="", media_type="image/gif", data=str(inputs["name"]).encode())

    model = SimpleNamespace(uses=SimpleNamespace(thumbnail=thumbnail), cases_from=cases_from)
    monkeypatch.setattr(mismatches, "parse", lambda kind, recipe, **_: (kind is Recipe) and recipe)
    monkeypatch.setattr(family, "find", lambda _: SimpleNamespace(model=lambda _recipe: model))
    return wanted


def written(path: Path, of: Any) -> str:
    mismatches.write(path, of, Path("photos"), progress=lambda *_: None)
    return path.read_text()


def test_items_that_differ_are_shown_with_their_neighbours(asked: list[Any], tmp_path: Path) -> None:
    """The first 24, and three neighbours of each on either side."""
    differs = [
        Differs(item=f"i{i}", how=f"how {i}", lost=tuple(f"l{i}{j}" for j in range(5)), instead=(f"n{i}",))
        for i in range(26)
    ]
    whole = written(tmp_path / "page.html", validated(measure(*differs), skipped=(f"x.txt: {HOSTILE}",)))
    (found,) = asked
    expected = [name for i in range(24) for name in (f"i{i}", f"l{i}0", f"l{i}1", f"l{i}2", f"n{i}")]
    assert found == ("photos", sorted(expected))
    shown = text_of(whole)
    assert "how 23" in shown and "how 24" not in shown and "l03" not in re.sub(r"l0[0-2]", "", whole)
    assert whole.count("base64,") == len(expected) and "base64,aTA=" in whole  # i0
    assert HOSTILE not in whole and "&lt;script&gt;" in whole


@pytest.mark.parametrize("of", [validated(measure()), validated(), validated(uses=False)])
def test_nothing_is_read_where_nothing_differs(of: Any, asked: list[Any], tmp_path: Path) -> None:
    assert "base64," not in written(tmp_path / "page.html", of) and asked == []


def test_a_page_that_could_not_be_written_is_refused_at_once(asked: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--page shows images that differ, and none are given"):
        mismatches.check(tmp_path / "page.html", None)
    (tmp_path / "other.html").write_text("<html>of somebody else</html>")
    with pytest.raises(UsageError, match="was not written by dinoexport"):
        mismatches.check(tmp_path / "other.html", tmp_path)
    for _ in range(2):
        mismatches.check(tmp_path / "page.html", tmp_path)
        written(tmp_path / "page.html", validated(measure()))

"""Agreement on what features are for: each measure against its definition, worked out here without scikit-learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dinoexport.config.limits import Limit, Limits, load_validation
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2.uses import ImageUses
from dinoexport.validation import downstream, judge
from dinoexport.validation.downstream import Agreement, ItemFeatures, Measure, neighbours_for

REASON = "a limit of the tests, for what they know"
SHIPPED = load_validation("dinov2", beside=None)[0].limits
NO_LIMITS = next(iter(SHIPPED.values())).model_copy(
    update=dict.fromkeys(("knn_agreement_min", "recall_min", "probe_agreement_min", "correspondence_min"))
)


class ByVector:
    """Uses of one feature for everything."""

    neighbours_by = ("v",)
    classified_by = ("v", "w")


def limits(**least: float) -> Limits:
    return NO_LIMITS.model_copy(update={name: Limit(value=value, reason=REASON) for name, value in least.items()})


def items(
    exact: Any, ours: Any, labels: Sequence[str] | None = None, matched: Sequence[float] = ()
) -> list[ItemFeatures]:
    """Items with vectors `exact` (N, D) from PyTorch and `ours` from the candidate; w is v again, squared."""
    return [
        ItemFeatures(
            name=f"{i:03}.png",
            label=labels[i] if labels else "",
            reference={"v": exact[i].astype(np.float32), "w": exact[i].astype(np.float32) ** 2},
            candidate={"v": ours[i].astype(np.float32), "w": ours[i].astype(np.float32) ** 2},
            matched=matched[i] if matched else None,
        )
        for i in range(len(exact))
    ]


def measured(found: Agreement) -> dict[str, Measure]:
    return {measure.figure: measure for measure in found.measures}


def of(some: Sequence[ItemFeatures], held_to: Limits = NO_LIMITS) -> Agreement:
    return downstream.agreement(ByVector(), some, held_to)  # type: ignore[arg-type]


def clusters(per_class: int, classes: int, spread: float, seed: int = 0) -> tuple[Any, list[str]]:
    """Vectors around one direction a class, and the classes' names."""
    rng = np.random.RandomState(seed)
    centres = rng.standard_normal((classes, 24))
    vectors = np.concatenate([c + spread * rng.standard_normal((per_class, 24)) for c in centres])
    return vectors, [f"class{i // per_class}" for i in range(len(vectors))]


def cosines(vectors: Any) -> Any:
    unit = vectors.astype(np.float32).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    found = unit @ unit.T
    np.fill_diagonal(found, -2)
    return found


# By the definitions


def nearest_by_definition(vectors: Any, count: int) -> list[set[int]]:
    return [set(np.argsort(-row, kind="stable")[:count].tolist()) for row in cosines(vectors)]


def classes_by_definition(vectors: Any, labels: Sequence[str], count: int) -> list[str]:
    """The class with the most votes among each item's nearest others, a vote being exp(cosine / 0.07)."""
    said = []
    for row in cosines(vectors):
        votes: dict[str, float] = {}
        for j in np.argsort(-row, kind="stable")[:count]:
            votes[labels[j]] = votes.get(labels[j], 0.0) + np.exp(row[j] / 0.07)
        said.append(max(votes, key=lambda label: votes[label]))
    return said


def ridge_by_definition(fitted: Any, labels: Sequence[str], asked: Any) -> list[str]:
    """Least squares on +1 and -1 for each class with a penalty of 1 on the weights, none on the intercept."""
    names = sorted(set(labels))
    targets = np.array([[1.0 if label == name else -1.0 for name in names] for label in labels])
    x_mean, y_mean = fitted.mean(axis=0), targets.mean(axis=0)
    x = fitted - x_mean
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (targets - y_mean))
    return [names[i] for i in ((asked - x_mean) @ weights + y_mean).argmax(axis=1)]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.4, 2.0])
def test_recall_and_knn_are_their_definitions(noise: float) -> None:
    exact, labels = clusters(9, 4, spread=1.7)
    ours = exact + noise * np.random.RandomState(1).standard_normal(exact.shape)
    found = measured(of(items(exact, ours, labels)))
    near, nearly = nearest_by_definition(exact, 10), nearest_by_definition(ours, 10)
    assert found["recall"].value == pytest.approx(np.mean([len(a & b) / 10 for a, b in zip(near, nearly, strict=True)]))
    theirs, mine = classes_by_definition(exact, labels, 10), classes_by_definition(ours, labels, 10)
    assert found["knn_agreement"].value == pytest.approx(np.mean([a == b for a, b in zip(theirs, mine, strict=True)]))
    differ = {f"{i:03}.png" for i in range(36) if theirs[i] != mine[i]}
    assert {d.item for d in found["knn_agreement"].differs} == differ
    right = np.mean([a == b for a, b in zip(theirs, labels, strict=True)])
    assert f"PyTorch {right:.1%}" in found["knn_agreement"].detail and right < 1, "too easy to tell anything"
    assert (found["recall"].value == 1) == (noise == 0)
    if noise == 2.0:
        assert differ


@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
def test_the_probe_is_its_definition(noise: float) -> None:
    """Fitted on PyTorch's features of four fifths, asked about the fifth that it has not seen."""
    exact, labels = clusters(10, 3, spread=2.0)
    ours = exact + noise * np.random.RandomState(2).standard_normal(exact.shape)
    joined, joined_ours = (
        np.concatenate([v.astype(np.float32), v.astype(np.float32) ** 2], axis=1).astype(float) for v in (exact, ours)
    )
    theirs, mine = {}, {}
    for fold in range(5):
        asked = [i for i in range(30) if i % 10 // 2 == fold]  # two of each class, in their order
        rest = [i for i in range(30) if i not in asked]
        kept = [labels[i] for i in rest]
        theirs |= dict(zip(asked, ridge_by_definition(joined[rest], kept, joined[asked]), strict=True))
        mine |= dict(zip(asked, ridge_by_definition(joined[rest], kept, joined_ours[asked]), strict=True))
    found = measured(of(items(exact, ours, labels)))["probe_agreement"]
    differ = [f"{i:03}.png" for i in range(30) if theirs[i] != mine[i]]
    assert [d.item for d in found.differs] == differ
    assert found.value == pytest.approx(1 - len(differ) / 30) and found.of == "v + w"
    assert found.detail.startswith("in 5 folds; right: PyTorch ")
    assert bool(differ) == (noise > 0)


def test_a_probe_fitted_on_what_it_is_asked_would_know_everything() -> None:
    """Of features of chance, a probe asked what it was fitted on knows all; an honest one is as good as luck."""
    rng = np.random.RandomState(3)
    exact, labels = rng.standard_normal((40, 60)), [f"class{i % 2}" for i in range(40)]
    detail = measured(of(items(exact, exact, labels)))["probe_agreement"].detail
    assert float(detail.split("PyTorch ")[1].split("%")[0]) < 80


# What a candidate may do to its features


def test_equal_features_agree_in_everything() -> None:
    exact, labels = clusters(6, 5, spread=1.0)
    found = of(items(exact, exact, labels, matched=[1.0] * 30), limits(knn_agreement_min=1.0, recall_min=1.0))
    assert [measure.value for measure in found.measures] == [1.0] * 4
    assert all(not measure.differs for measure in found.measures) and all(row.passed for row in found.rows)
    assert len(found.rows) == 2, "a measure without a limit decides nothing"


def test_other_lengths_are_the_same_neighbours() -> None:
    exact, labels = clusters(8, 3, spread=1.0)
    found = measured(of(items(exact, exact * np.linspace(0.5, 2, 24)[:, None], labels)))
    assert found["recall"].value == found["knn_agreement"].value == 1


def test_channels_in_another_order_are_the_same_neighbours_and_another_probe() -> None:
    """Distances do not see it. Whoever has fitted a classifier on PyTorch's features does."""
    exact, labels = clusters(8, 3, spread=0.3)
    found = measured(of(items(exact, exact[:, ::-1], labels)))
    assert found["recall"].value == found["knn_agreement"].value == 1
    assert found["probe_agreement"].value < 0.8


def test_two_items_exchanged_are_named() -> None:
    """As a batch whose answers come back in the wrong order: an item of one class has another's features."""
    exact, labels = clusters(12, 3, spread=0.2)
    ours = exact.copy()
    ours[[3, 30]] = ours[[30, 3]]
    found = of(items(exact, ours, labels), limits(knn_agreement_min=0.99, probe_agreement_min=0.99, recall_min=0.99))
    for figure in ("knn_agreement", "probe_agreement"):
        differs = measured(found)[figure].differs
        assert [d.item for d in differs] == ["003.png", "030.png"]
        assert differs[0].how == "PyTorch says class0, the candidate class2; it is class0"
        assert measured(found)[figure].value == pytest.approx(34 / 36)
    lost = measured(found)["recall"].differs
    assert {lost[0].item, lost[1].item} == {"003.png", "030.png"} and lost[0].how.startswith("0 of 10 kept, lost: ")
    assert not any(row.passed for row in found.rows) and len(found.rows) == 3
    assert f"{downstream.KNN}: one of 36 decisions may differ, though the limit is 0.99" in found.said
    assert set(lost[0].lost) <= {f"{i:03}.png" for i in range(12)} and len(lost[0].lost) == 10
    assert set(lost[0].instead) <= {f"{i:03}.png" for i in range(24, 36)} and len(lost[0].instead) == 10
    assert any(line.startswith("recall differs: 003.png: 0 of 10 kept") for line in found.lines)
    assert any("more; --json names them all" in line for line in found.lines)


def test_a_limit_is_held_exactly_at_its_value() -> None:
    exact, labels = clusters(12, 3, spread=0.2)
    ours = exact.copy()
    ours[[3, 30]] = ours[[30, 3]]
    for least, holds in ((34 / 36, True), (34 / 36 + 1e-9, False)):
        (row,) = of(items(exact, ours, labels), limits(knn_agreement_min=least)).rows
        assert row.passed == holds and row.bounds[0].reason == REASON and row.output == "knn_agreement"


@pytest.mark.parametrize(("least", "holds"), [(0.99, True), (1.0, False)])
def test_one_decision_alone_fails_nothing_but_a_limit_of_one(least: float, holds: bool) -> None:
    """Of 36, one is 2.8 %: more than most limits grant, and no evidence. Two are."""
    exact, labels = clusters(12, 3, spread=0.2)
    ours = exact.copy()
    ours[3] = exact[30] + 0.01
    found = of(items(exact, ours, labels), limits(knn_agreement_min=least))
    assert measured(found)["knn_agreement"].value == pytest.approx(35 / 36)
    assert found.rows[0].passed == holds
    assert (found.rows[0].bounds[0].limit == 1) == (not holds)


def test_copies_of_one_item_are_each_right() -> None:
    """Of thirty copies any ten are the ten nearest; rounding that differs from side to side must not decide."""
    rng = np.random.RandomState(4)
    exact = np.repeat(rng.standard_normal((2, 24)), 30, axis=0)
    ours = exact + 0.0
    ours[::2] *= 3.0
    found = measured(of(items(exact, ours)))
    assert found["recall"].value == 1


def test_correspondence_is_the_mean_and_names_the_worst_first() -> None:
    exact, _ = clusters(5, 1, spread=1.0)
    found = of(items(exact, exact, matched=[1.0, 0.5, 1.0, 0.75, 1.0]), limits(correspondence_min=0.9))
    measure = measured(found)["correspondence"]
    assert measure.value == pytest.approx(0.85) and "worst 50.0%" in measure.detail
    assert [d.item for d in measure.differs] == ["001.png", "003.png"]
    assert "50.0% of its parts" in measure.differs[0].how
    assert [row.passed for row in found.rows] == [False]


# Too little to measure


@pytest.mark.parametrize(
    ("count", "neighbours"), [(1, 0), (2, 0), (3, 1), (4, 1), (11, 5), (12, 5), (20, 9), (21, 10), (5000, 10)]
)
def test_never_more_neighbours_than_half_of_the_others(count: int, neighbours: int) -> None:
    assert neighbours_for(count) == neighbours


def test_eleven_are_measured_by_fewer_neighbours_and_it_is_said() -> None:
    rng = np.random.RandomState(5)
    found = of(items(rng.standard_normal((11, 24)), rng.standard_normal((11, 24))))
    assert any("of the 5 nearest, not 10, because there are only 11; 10 needs 21" in line for line in found.said)
    assert measured(found)["recall"].value < 0.9, "features of chance would be perfect among ten of ten"


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_have_no_neighbours_and_it_is_said(count: int) -> None:
    vectors = np.random.RandomState(6).standard_normal((count, 24))
    found = of(items(vectors, vectors, matched=[1.0] * count))
    assert measured(found).keys() == {"correspondence"}
    assert any(
        line.startswith(f"recall: left out, because it needs 3 items and there are {count}") for line in found.said
    )
    assert any("k-NN classification and linear probe: left out" in line for line in found.said)


def test_a_class_with_one_item_is_left_out_by_name() -> None:
    exact, labels = clusters(8, 3, spread=0.2)
    labels[0], labels[1] = "alone", ""
    found = of(items(exact, exact, labels))
    assert any(line.endswith("no other item of their class remains to learn from: alone") for line in found.said)
    assert any(line.endswith("items without a class are left out: 1") for line in found.said)
    assert measured(found)["knn_agreement"].items == measured(found)["probe_agreement"].items == 22
    assert measured(found)["recall"].items == 24


@pytest.mark.parametrize("labels", [None, ["one"] * 24, ["one"] * 23 + ["two"]])
def test_without_two_classes_nothing_is_classified_and_it_is_said(labels: list[str] | None) -> None:
    exact, _ = clusters(8, 3, spread=0.2)
    found = of(items(exact, exact, labels))
    assert measured(found).keys() == {"recall"}
    assert any("needs two classes (subfolders) with at least two items each" in line for line in found.said)


def test_items_without_a_usable_answer_are_counted() -> None:
    exact, _ = clusters(8, 3, spread=0.2)
    some = items(exact, exact)
    some[:2] = [dataclasses.replace(item, candidate={}) for item in some[:2]]
    found = of(some)
    assert found.said[0] == "2 of 24 have no usable output and are left out here"
    assert measured(found)["recall"].items == 22
    none = of([dataclasses.replace(item, candidate={}) for item in some])
    assert none.measures == () and none.said == ("24 of 24 have no usable output and are left out here",)


def test_the_json_names_every_item_that_differs() -> None:
    rng = np.random.RandomState(7)
    found = of(items(rng.standard_normal((30, 24)), rng.standard_normal((30, 24)))).to_json()
    (recall,) = found["measures"]
    assert len(recall["differs"]) == 30 and recall["bound"] is None and recall["of"] == "v"


# DINOv2


def test_features_are_the_class_token_and_the_mean_patch_token() -> None:
    rng = np.random.RandomState(8)
    outputs = {"class_token": rng.standard_normal((1, 6)), "patch_tokens": rng.standard_normal((1, 5, 6))}
    found = ImageUses(preprocessing=Preprocessing()).features(outputs)
    assert found.keys() == set(ImageUses.classified_by) and ImageUses.neighbours_by == ("class_token",)
    assert found["class_token"] == pytest.approx(outputs["class_token"][0])
    assert found["mean_patch_token"] == pytest.approx(sum(outputs["patch_tokens"][0]) / 5)


def test_the_second_view_is_the_mirror_image() -> None:
    rng = np.random.RandomState(9)
    pixels, pictures = rng.standard_normal((1, 3, 4, 6)), rng.randint(0, 256, (1, 4, 6, 3), dtype=np.uint8)
    (mirrored,) = ImageUses(preprocessing=Preprocessing()).second_view({"pixels": pixels}).values()
    assert all(np.array_equal(mirrored[..., x], pixels[..., 5 - x]) for x in range(6))
    (mirrored,) = ImageUses(preprocessing=Preprocessing()).second_view({"images": pictures}).values()
    assert all(np.array_equal(mirrored[:, :, x], pictures[:, :, 5 - x]) for x in range(6))


def test_matches_are_the_nearest_patches_by_cosine() -> None:
    """A model that sees nothing but each patch's content finds every patch of an image again in its mirror image."""
    tokens = np.random.RandomState(10).standard_normal((1, 12, 8))
    order = np.random.RandomState(11).permutation(12)
    lengths = np.linspace(0.1, 9, 12)[:, None]  # of no account to a cosine
    found = ImageUses(preprocessing=Preprocessing()).matches(
        {"patch_tokens": tokens}, {"patch_tokens": tokens[:, order] * lengths}
    )
    assert [order[j] for j in found] == list(range(12))


@pytest.mark.parametrize(
    ("holds", "limit", "verdict"), [(None, "none", "no limit"), (True, "99.00%", "ok"), (False, "99.00%", "FAILED")]
)
def test_the_table_says_how_each_measure_came_out(holds: bool | None, limit: str, verdict: str) -> None:
    """A measure that failed is never shown as one without a limit, nor the other way round."""
    bound = None if holds is None else judge.Bound(figure="knn", value=0.97, limit=0.99, reason="", holds=holds)
    measure = downstream.Measure(
        figure="knn", of="class_token", value=0.97, items=100, detail="of ten neighbours", bound=bound, differs=()
    )
    agreement = downstream.Agreement(measures=(measure,), said=())
    assert agreement.table == [
        {
            "measure": "knn",
            "by": "class_token",
            "items": 100,
            "agreement": "97.00%",
            "limit": limit,
            "differ": 0,
            "": "of ten neighbours",
            "verdict": verdict,
        }
    ]
    assert len(agreement.rows) == (holds is not None)
    assert all(row.passed is holds for row in agreement.rows)


# What is said, in whole


def test_enough_items_leave_nothing_to_say() -> None:
    """With 21 items, two for each class or more, all measures use what they were made for."""
    exact, _ = clusters(7, 3, spread=0.2)
    labels = ["pair"] * 2 + ["many"] * 19
    steps: list[tuple[Any, ...]] = []
    found = downstream.agreement(
        ByVector(),  # type: ignore[arg-type]
        items(exact, exact, labels),
        NO_LIMITS,
        progress=lambda *step: steps.append(step),
    )
    assert found.said == () and found.lines == []
    assert {figure: (m.items, m.detail.partition(";")[0]) for figure, m in measured(found).items()} == {
        "recall": (21, "of the 10 nearest neighbours by cosine"),
        "knn_agreement": (21, "by 10 neighbours"),
        "probe_agreement": (21, "in 2 folds"),
    }
    assert steps == [("comparing decisions", 0, 0), ("comparing decisions", 1, 1)]


def test_how_often_each_side_is_right() -> None:
    """Of four in the plane, each has one neighbour; the candidate's third lies in the other class."""
    exact = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    ours = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [0.1, 1.0]])
    found = of(items(exact, ours, ["x", "x", "y", "y"]))
    assert found.said == (
        "recall: of the 1 nearest, not 10, because there are only 4; 10 needs 21",
        "k-NN classification: by the 1 nearest, not 10, because there are only 4",
    )
    knn = measured(found)["knn_agreement"]
    assert knn.detail == "by 1 neighbours; right: PyTorch 100.0%, candidate 75.0%"
    assert [(d.item, d.how) for d in knn.differs] == [("002.png", "PyTorch says y, the candidate x; it is y")]


def test_how_many_neighbours_are_kept() -> None:
    """On a fan of directions, each item's ten nearest are known; the candidate exchanges the two at one end."""
    angles = np.linspace(0, 1.2, 21) ** 2
    fan = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    exchanged = fan.copy()
    exchanged[[0, 20]] = exchanged[[20, 0]]
    kept = {d.item: d.how for d in measured(of(items(fan, exchanged)))["recall"].differs}
    assert kept["001.png"] == "9 of 10 kept, lost: 000.png"
    assert kept["019.png"] == "9 of 10 kept, lost: 020.png"
    assert kept["000.png"].startswith("1 of 10 kept, lost: 001.png, 002.png, ")


@pytest.mark.parametrize(("count", "more"), [(5, []), (6, ["and 1 more"]), (9, ["and 4 more"])])
def test_five_that_differ_are_named(count: int, more: list[str]) -> None:
    differs = tuple(downstream.Differs(item=f"{i}.png", how="another") for i in range(count))
    measure = Measure(figure="knn", of="v", value=0.5, items=10, detail="", bound=None, differs=differs)
    assert Agreement(measures=(measure,), said=("a remark",)).lines == [
        "a remark",
        *(f"knn differs: {i}.png: another" for i in range(5)),
        *(f"knn differs: {words}; --json names them all" for words in more),
    ]


def test_how_many_parts_match_otherwise() -> None:
    exact, _ = clusters(4, 1, spread=1.0)
    measure = measured(of(items(exact, exact, matched=[1.0, 0.5, 0.25, 1.0])))["correspondence"]
    assert [(d.item, d.how) for d in measure.differs] == [
        ("002.png", "75.0% of its parts have a different match"),
        ("001.png", "50.0% of its parts have a different match"),
    ]


@pytest.mark.parametrize("below_one", [1 / 24, 1.5 / 24, 0.5])
def test_a_limit_that_grants_one_decision_stays(below_one: float) -> None:
    exact, labels = clusters(12, 2, spread=0.2)
    found = of(items(exact, exact, labels), limits(knn_agreement_min=1 - below_one))
    assert [row.bounds[0].limit for row in found.rows] == [1 - below_one] and found.said == ()

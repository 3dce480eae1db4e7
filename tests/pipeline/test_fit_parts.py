"""Fitting a classifier by its parts: which images are held out, what is said of them, and what is fitted."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import family
from dinoexport.errors import BuildError, UsageError, ValidationFailed
from dinoexport.pipeline.fit import classifiers, examples, features, flow, publishing
from dinoexport.pipeline.fit.classifiers import Fitted
from dinoexport.pipeline.fit.examples import Examples, LabelledImage
from dinoexport.runtime import runners
from dinoexport.spec import Case, Picture

# Which images


def image(name: str, label: str = "a", digest: str = "") -> LabelledImage:
    return LabelledImage(name=name, label=label, digest=digest or hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize(
    ("count", "held"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3), (100, 20)]
)  # fmt: skip
def test_a_fifth_of_a_class_and_at_least_one_is_held_out(count: int, held: int) -> None:
    """The first in the order of a hash of seed and bytes; the other images do not matter."""
    found = [image(f"{i}.png") for i in range(count)]
    fitted, held_out = examples.split([*found, *(image(f"b{i}", "b") for i in range(2))], seed=3)
    order = sorted(found, key=lambda e: hashlib.sha256(f"3:{e.digest}".encode()).digest())
    assert [e for e in held_out if e.label == "a"] == order[:held]
    assert [e for e in fitted if e.label == "a"] == order[held:]


def test_a_class_with_two_copies_of_one_image_cannot_be_split() -> None:
    found = [image("1", "b"), image("2", "b"), image("3", "c", "00"), image("4", "c", "00"), image("5", "a")]
    with pytest.raises(UsageError, match=r"^a, c: a class with one image"):
        examples.split(found, seed=0)
    assert len(examples.split(found[:2], seed=0)[0]) == 1


@pytest.mark.parametrize(
    ("count", "words"), [(1, "0"), (8, "0, 1, 2, 3, 4, 5, 6, 7"), (9, "0, 1, 2, 3, 4, 5, 6, 7 and 1 more")]
)
def test_eight_names_are_listed(count: int, words: str) -> None:
    assert examples.listed([str(i) for i in range(count)]) == words


def folder_of(tmp_path: Path, **counts: int) -> Any:
    """A folder with so many images for each class, and its source."""
    for label, count in counts.items():
        (tmp_path / label).mkdir()
        for i in range(count):
            (tmp_path / label / f"{i:02}.txt").write_text(f"{label} {i}")

    def cases_from(folder: Path, *, progress: Any, only: Any = None) -> Any:
        for path in sorted(folder.rglob("*.txt")):
            name = path.relative_to(folder).as_posix()
            yield Case(name=name, why="", inputs={}, label=name.partition("/")[0] if "/" in name else "")

    return SimpleNamespace(cases_from=cases_from)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"a": 2, "b": 19}, ()),
        ({"a": 2, "b": 20},
         ("classes are imbalanced: b has 20 images, a has 2; --balanced gives them the same weight",)),
        ({"b": 2, "c": 20, "a": 2, "d": 20},
         ("classes are imbalanced: d has 20 images, a has 2; --balanced gives them the same weight",)),
    ],
)  # fmt: skip
def test_ten_times_the_smallest_class_is_imbalance(
    counts: dict[str, int], said: tuple[str, ...], tmp_path: Path
) -> None:
    found = examples.read(folder_of(tmp_path, **counts), tmp_path, seed=0)
    assert found.said == said and found.classes == tuple(sorted(counts))
    lines = sorted(
        f"{share} {hashlib.sha256((tmp_path / e.name).read_bytes()).hexdigest()} {e.name}\n"
        for share, of in (("fitted", found.fitted), ("held out", found.held_out))
        for e in of
    )
    assert found.digest == hashlib.sha256("".join(lines).encode()).hexdigest() and len(lines) == sum(counts.values())


@pytest.mark.parametrize(
    ("copies", "said"),
    [(0, ()), (1, ("1 file is a copy of another; copies are on the same side of the split",)),
     (2, ("2 files are copies of others; copies are on the same side of the split",))],
)  # fmt: skip
def test_copies_are_counted(copies: int, said: tuple[str, ...], tmp_path: Path) -> None:
    source = folder_of(tmp_path, a=3, b=3)
    for i in range(copies):
        (tmp_path / "a" / f"copy{i}.txt").write_text("a 0")
    assert examples.read(source, tmp_path, seed=0).said == said


def test_one_image_in_two_classes_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path, a=3, b=3)
    (tmp_path / "b" / "again.txt").write_text("a 1")
    (tmp_path / "b" / "twice.txt").write_text("a 0")
    with pytest.raises(UsageError, match=r"classes: a/00\.txt and b/twice\.txt, a/01\.txt and b/again\.txt\.$"):
        examples.read(source, tmp_path, seed=0)


def test_images_in_no_class_are_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path, a=2, b=2)
    (tmp_path / "stray.txt").write_text("x")
    with pytest.raises(UsageError, match=r"^stray\.txt of .* are in no subfolder"):
        examples.read(source, tmp_path, seed=0)


# What is fitted


def test_strengths_that_are_tried() -> None:
    exponents = (-5, -4.25, -3.5, -2.75, -2, -1.25, -0.5, 0.25, 1, 1.75, 2.5, 3)
    assert pytest.approx([10.0**e for e in exponents]) == list(classifiers.C_VALUES)


def blobs(per_class: int, classes: int = 3, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.RandomState(seed)
    labels = np.repeat(np.arange(classes), per_class)
    return (3 * np.eye(classes, 4)[labels] + rng.standard_normal((len(labels), 4))).astype(np.float32), labels


@pytest.mark.parametrize(
    ("kind", "classes", "balanced"), [("logreg", 2, False), ("linear", 2, True), ("linear", 3, False)]
)
def test_probabilities_are_scikit_learns_own(
    kind: Any, classes: int, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a pipeline in scikit-learn with the same C, also where there are two classes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setattr(classifiers, "_chosen_c", lambda *_, **__: (0.1, {"0.1": 0.5}))
    x, y = blobs(4, classes)
    x, y = x[:-2], y[:-2]
    fitted = classifiers.fit(kind, x, y, classes=classes, balanced=balanced, seed=0)
    assert fitted.facts == {"C": 0.1, "balanced": balanced, "accuracy_by_C": {"0.1": 0.5}}
    assert {name: array.shape for name, array in fitted.tensors.items()} == {
        "fitted.weight": (classes, 4), "fitted.bias": (classes,),
    }  # fmt: skip
    scaler = StandardScaler(with_mean=kind == "linear", with_std=kind == "linear")
    regression = LogisticRegression(C=0.1, class_weight="balanced" if balanced else None)
    whole = make_pipeline(scaler, regression).fit(x.astype(np.float64), y)
    found = classifiers.probabilities(kind, fitted, x)
    np.testing.assert_allclose(found, whole.predict_proba(x.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize(("fewest", "folds"), [(1, 0), (2, 2), (4, 4), (5, 5), (9, 5)])
def test_as_many_folds_as_the_smallest_class_allows(fewest: int, folds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one image in a class there is nothing to choose by, and C is 1."""
    solved: list[Any] = []

    def solve(x: Any, y: Any, c: float, *, balanced: bool) -> Any:
        solved.append((len(x), c, balanced))
        return SimpleNamespace(score=lambda _x, _y: {0.5: 0.7, 2.0: 0.9, 8.0: 0.9}[c])

    monkeypatch.setattr(classifiers, "C_VALUES", (0.5, 2.0, 8.0))
    monkeypatch.setattr(classifiers, "_solved", solve)
    labels = np.array([0] * 10 + [1] * fewest)
    chosen, scores = classifiers._chosen_c(np.zeros((len(labels), 2)), labels, balanced=True, seed=0)
    assert len(solved) == 3 * folds
    assert (chosen, scores) == ((2.0, {"0.5": 0.7, "2": 0.9, "8": 0.9}) if folds else (1.0, {}))


def test_neighbours_vote_by_their_similarity() -> None:
    """By hand: the bank's directions in fp16, as many as the smallest class has, and a softmax of cosines / 0.07."""
    x = np.array([[2.0, 0.0], [0.0, 0.5], [3.0, 3.0], [0.0, 1.0]], np.float32)
    fitted = classifiers.fit("knn", x, np.array([0, 1, 0, 1]), classes=2, balanced=False, seed=0)
    bank = np.array([[1, 0], [0, 1], [0.5**0.5] * 2, [0, 1]]).astype(np.float16).astype(np.float32)
    assert fitted.tensors["fitted.bank"].tolist() == bank.tolist()
    assert fitted.tensors["fitted.votes"].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert fitted.facts == fitted.table == {"bank": 4, "neighbours": 2, "temperature": 0.07}
    found = classifiers.probabilities("knn", fitted, np.array([[0.0, 2.0], [0.1, 0.0], [0.0, 0.0]], np.float32))
    near, far = 1.0 / 0.07, float(bank[2, 0]) / 0.07
    share = float(np.exp(near) / (np.exp(near) + np.exp(far)))
    assert found == pytest.approx(np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])) and share > 0.98
    with pytest.raises(UsageError, match="features are all zero"):
        classifiers.fit("knn", 0 * x, np.array([0, 1, 0, 1]), classes=2, balanced=False, seed=0)


@pytest.mark.parametrize(("smallest", "neighbours"), [(1, 1), (19, 19), (20, 20), (21, 20), (30, 20)])
def test_twenty_neighbours_vote_or_as_many_as_the_smallest_class_has(smallest: int, neighbours: int) -> None:
    labels = np.repeat([0, 1], [40, smallest])
    features = np.ones((len(labels), 2), np.float32)
    fitted = classifiers.fit("knn", features, labels, classes=2, balanced=False, seed=0)
    assert fitted.table["neighbours"] == neighbours


def test_one_thread_fits_and_large_logits_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order would give other bytes; exp(1000) is no float64."""
    threads: list[int] = []
    monkeypatch.setattr("threadpoolctl.threadpool_limits", lambda *, limits: threads.append(limits) or nullcontext())
    classifiers.fit("knn", np.eye(2, dtype=np.float32), np.array([0, 1]), classes=2, balanced=False, seed=0)
    assert threads == [1]
    tensors = {"fitted.weight": np.array([[500.0], [499.0]], np.float32), "fitted.bias": np.zeros(2, np.float32)}
    found = classifiers.probabilities("logreg", Fitted(tensors=tensors, facts={}), np.array([[2.0], [-2.0]]))
    share = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(found, [[share, 1 - share], [1 - share, share]], rtol=1e-12)


def test_confusions_are_listed_worst_first_and_then_by_name() -> None:
    shares = np.array([[0.4, 0.6], [0.1, 0.9], [0.4, 0.6], [1.0, 0.0]])
    held = classifiers.judge(shares, ["a", "a", "a", "b"], ["z", "m", "b", "x"], ("a", "b"))
    assert [row[0] for row in held.confusions] == ["x", "m", "b", "z"] and held.recall == {"a": 0.0, "b": 0.0}
    for labels, names in ((["a", "b"], list("zmbx")), (["a", "b", "a", "a"], list("zmb"))):
        with pytest.raises(ValueError, match="zip"):
            classifiers.judge(shares, labels, names, ("a", "b"))


@pytest.mark.parametrize(("right", "of"), [(1, 3), (5, 10), (99, 100), (1, 1000), (15, 16), (20, 21)])
def test_wilsons_interval_ends_where_the_share_is_just_believed(right: int, of: int) -> None:
    """At both ends p the share is 1.96 standard deviations away, those of p: sqrt(p (1 - p) / n)."""
    low, high = classifiers.wilson(right, of)
    assert low < right / of < high
    for p in (low, high):
        assert abs(right / of - p) / (p * (1 - p) / of) ** 0.5 == pytest.approx(1.959963984540054, rel=1e-9)
    z2 = 1.959963984540054**2
    assert classifiers.wilson(0, of) == pytest.approx((0.0, z2 / (of + z2)), abs=1e-15)
    assert classifiers.wilson(of, of) == pytest.approx((of / (of + z2), 1.0), abs=1e-15)
    assert classifiers.wilson(0, of)[0] >= 0.0 and classifiers.wilson(of, of)[1] <= 1.0


# What is said of the bundle


@pytest.mark.parametrize(
    ("size", "engines", "said"),
    [
        (25_000_000, (), []),
        (25_000_001, (), ["the graph holds 50 MB of features; --head logreg holds a few kB instead"]),
        (1, ("one",), ["the bundle's engines output features and were left out; only the ONNX has the head"]),
    ],
)
def test_what_a_bundle_with_a_head_gives_up(size: int, engines: Any, said: list[str]) -> None:
    fitted = Fitted(tensors={"fitted.bank": SimpleNamespace(size=size)}, facts={})  # type: ignore[dict-item]
    assert publishing._warnings(fitted, SimpleNamespace(engines=engines)) == said  # type: ignore[arg-type]
    assert publishing._warnings(Fitted(tensors={}, facts={}), SimpleNamespace(engines=())) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "kept"), [(50, 50), (51, 51), (52, 51), (1000, 51)])
def test_fifty_notes_are_kept(count: int, kept: int) -> None:
    notes = [str(i) for i in range(count)]
    found = publishing._shortened(notes)
    assert len(found) == kept and found[:25] == tuple(notes[:25]) and found[-25:] == tuple(notes[-25:])
    assert (f"and {count - 50} more" in found) == (count > 50)


# The flow around it


@pytest.mark.parametrize(
    ("verdict", "kinds", "graphs", "words"),
    [
        ("passed", ("knn",), 1, ""), ("failed", ("knn",), 1, "is failed; a head is fitted only on validated features"),
        ("passed", ("logreg",), 1, "gives no features"), ("passed", ("knn",), 2, "gives no features"),
    ],
)  # fmt: skip
def test_which_bundles_a_head_is_fitted_on(verdict: str, kinds: tuple[str, ...], graphs: int, words: str) -> None:
    manifest: Any = SimpleNamespace(verdict=verdict, graphs=(None,) * graphs)
    model: Any = SimpleNamespace(fits=kinds)
    if not words:
        flow._refuse(Path("bundle"), manifest, model, "knn")
    else:
        with pytest.raises((UsageError, ValidationFailed), match=words):
            flow._refuse(Path("bundle"), manifest, model, "knn")


FOUND = Examples(classes=("a", "b"), fitted=(), held_out=(), said=())


@pytest.mark.parametrize(
    ("head", "fitted", "words"),
    [
        (None, None, "has no fitted head"), (("a", "b"), None, "has no fitted head"),
        (("a", "c"), {}, "has no fitted head"),
        (("a", "c"), {"images": 3, "images_sha256": "x"}, "was fitted on other classes: a, c"),
        (("a", "b"), {"images": 3, "images_sha256": "x"}, ("replaced the bundle that was fitted on 3 other images",)),
        (("a", "b"), {"images": 3, "images_sha256": FOUND.digest}, ()),
    ],
)  # fmt: skip
def test_which_bundles_are_replaced(head: Any, fitted: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other classes, or without a head, with --force alone; one that cannot be read is nothing to lose."""
    old = SimpleNamespace(head=None if head is None else SimpleNamespace(classes=head), report={"fit": fitted})
    monkeypatch.setattr(flow.bundle, "read_manifest", lambda _: old)
    if isinstance(words, tuple):
        assert flow._replaced(Path("out"), FOUND, force=False) == words
        return
    with pytest.raises(UsageError, match=f"^out {words}. It would be replaced"):
        flow._replaced(Path("out"), FOUND, force=False)
    assert flow._replaced(Path("out"), FOUND, force=True) == ()

    def damaged(_: Any) -> Any:
        raise BuildError("damaged")

    monkeypatch.setattr(flow.bundle, "read_manifest", damaged)
    assert flow._replaced(Path("out"), FOUND, force=False) == ()


def test_confused_images_are_drawn_worst_first() -> None:
    """24 of them, and none that cannot be read any more."""
    rows = tuple((f"{i:02}", "a", "b", 0.999 - i / 100) for i in range(30))
    asked: list[Any] = []

    def cases_from(_folder: Path, *, progress: Any, only: Any) -> Any:
        asked.append(sorted(only))
        return [f"{i:02}: gone" if i == 3 else Case(name=f"{i:02}", why="", inputs={}) for i in reversed(range(24))]

    def thumbnail(_inputs: Any) -> Picture:
        return Picture(title="", caption="", media_type="image/png", data=b"")

    model: Any = SimpleNamespace(cases_from=cases_from, uses=SimpleNamespace(thumbnail=thumbnail))
    held: Any = SimpleNamespace(confusions=rows)
    drawn = flow._confused(model, Path("photos"), held)
    assert asked == [[f"{i:02}" for i in range(24)]]
    assert [picture.title for picture in drawn] == [f"{i:02}" for i in range(24) if i != 3]
    assert drawn[1].caption == "a, taken for b with 99%"
    assert flow._confused(SimpleNamespace(uses=None), Path("photos"), held) == ()  # type: ignore[arg-type]
    assert flow._confused(model, Path("photos"), SimpleNamespace(confusions=())) == ()  # type: ignore[arg-type]
    assert len(asked) == 1


def test_the_options_of_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By default logistic regression, beside the bundle, and nothing is forced."""
    given: list[Any] = []
    monkeypatch.setattr(flow, "require", lambda *_: None)
    monkeypatch.setattr(flow.examples, "check_folder", lambda _: None)
    monkeypatch.setattr(flow.bundle, "checked", lambda folder, **_: nullcontext("manifest"))
    monkeypatch.setattr(flow, "_fitted", lambda *options: given.append(options[:-1]))
    flow.fit(tmp_path / "b", tmp_path / "i")
    flow.fit(tmp_path / "b", tmp_path / "i", kind="knn", out=tmp_path / "out", force=True)
    flow.fit(tmp_path / "b", tmp_path / "i", kind="linear", balanced=True)
    before = (tmp_path / "b", "manifest", tmp_path / "i")
    assert given == [
        (*before, "logreg", False, tmp_path / "b-logreg", False), (*before, "knn", False, tmp_path / "out", True),
        (*before, "linear", True, tmp_path / "b-linear", False),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="knn has no weights of classes to balance"):
        flow.fit(tmp_path / "b", tmp_path / "i", kind="knn", balanced=True)
    with pytest.raises(UsageError, match="is the bundle the features come from"):
        flow.fit(tmp_path / "b", tmp_path / "i", out=tmp_path / "b")


# Features


def test_features_are_computed_once_for_each_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each output as it is, or its mean; copies are asked once, and what is damaged in the cache again."""
    asked: list[str] = []
    monkeypatch.setattr(runners, "way_of", lambda _: SimpleNamespace(runtime="onnxruntime"))
    monkeypatch.setattr(features.cpu, "title", lambda _: "ONNX Runtime 1.2")
    monkeypatch.setattr(family, "code_of", lambda _: "code")
    told: list[Any] = []

    def cases_from(_folder: Path, *, progress: Any, only: Any) -> Any:
        return [Case(name=name, why="", inputs={"name": np.array(name)}) for name in sorted(only)]

    def candidate(inputs: Any) -> Any:
        name = str(inputs["name"])
        asked.append(name)
        value = float(ord(name))
        return {
            "token": np.full((1, 3), value), "patches": np.stack([np.full((4, 2), value), np.zeros((4, 2))]),
            "map": np.zeros((1, 2, 3, 4)), "number": np.zeros(1),
        }  # fmt: skip

    manifest: Any = SimpleNamespace(files=(SimpleNamespace(name="model.onnx", sha256="0"),))
    model: Any = SimpleNamespace(cases_from=cases_from)
    wanted = [image("a", digest="11"), image("b", digest="22"), image("c", digest="11")]

    def found() -> Any:
        asked.clear()
        told.clear()
        return features.of_images(model, tmp_path, candidate, manifest, wanted, lambda *step: told.append(step))

    first = found()
    assert asked == ["a", "b"] and told == [("computing features", 1, 2), ("computing features", 2, 2)]
    assert {name: array.tolist() for name, array in first["22"].items()} == {
        "token as is": [98.0] * 3, "patches mean": [98.0] * 2,
    }  # fmt: skip
    assert first["11"]["token as is"].dtype == np.float32
    again = found()
    assert asked == told == [] and again["11"]["patches mean"].tolist() == [97.0] * 2
    (stored,) = features.cache_folder().rglob("22.npz")
    assert len(stored.parent.name) == 32
    stored.write_bytes(b"damaged")
    assert found()["22"]["token as is"].tolist() == [98.0] * 3 and asked == ["b"]
    manifest.files = (*manifest.files, SimpleNamespace(name="report.html", sha256="1"))
    assert found() and asked == []
    manifest.files = (SimpleNamespace(name="model.onnx", sha256="2"),)
    assert found() and asked == ["a", "b"]
    wanted.append(image("d", digest="33"))
    model.cases_from = lambda *_, **__: ["d: unreadable"]
    with pytest.raises(UsageError, match=r"^d changed while it was read\.$"):
        found()

"""`fit`: the graph's probabilities are scikit-learn's own, nothing held out is fitted on, bad folders are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.config import resources
from dinoexport.config.limits import load_validation
from dinoexport.errors import UsageError
from dinoexport.models.dinov2.heads import layouts
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.fit import classifiers, examples, flow, publishing
from dinoexport.pipeline.fit import features as of_images
from dinoexport.report import html_report
from dinoexport.runtime import ort
from dinoexport.spec import Case, Runtime, silent
from dinoexport.validation import validate_bundle
from tests.conftest import DATA

CLASSES = ("chelsea.png", "china.jpg", "coffee.png", "rocket.jpg")


def crops(folder: Path, each: int) -> Path:
    """Crops of the four photographs; each photograph is a class."""
    random = np.random.RandomState(0)
    for name in CLASSES:
        image = Image.open(resources.folder("validate") / "images" / name).convert("RGB")
        (folder / Path(name).stem).mkdir(parents=True)
        for i in range(each):
            side = random.randint(120, 220)
            left, top = random.randint(image.width - side), random.randint(image.height - side)
            image.crop((left, top, left + side, top + side)).save(folder / Path(name).stem / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "tokens"
    recipe = str(DATA / "tiny_heads.toml")
    request = pipeline.build_request(recipe, weights="synthetic:3", target="cpu", runtime=Runtime.ONNXRUNTIME, out=out)
    pipeline.build(request)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crops(tmp_path_factory.mktemp("images") / "all", each=10)


def inputs_of(model: Any, images: Path) -> dict[str, Any]:
    return {case.name: case.inputs for case in model.cases_from(images, progress=silent) if isinstance(case, Case)}


def tokens(folder: Path, found: tuple[examples.LabelledImage, ...], inputs: dict[str, Any], *, mean: bool) -> Any:
    """The bundle's own features of images, one image at a time."""
    graph = bundle.read_manifest(folder).graphs[0]
    run = ort.open_graph(folder / graph.file, graph.graph())
    answers = [run(inputs[example.name]) for example in found]
    parts = [
        [a["class_token"][0], a["patch_tokens"][0].mean(axis=0, dtype=np.float64).astype(np.float32)] for a in answers
    ]
    return np.stack([np.concatenate(p[: 1 + mean]) for p in parts]).astype(np.float64)


@pytest.mark.parametrize("kind", classifiers.HEAD_KINDS)
def test_the_graphs_probabilities_are_scikit_learns(
    kind: classifiers.HeadKind, features: Path, images: Path, tmp_path: Path
) -> None:
    made = flow.fit(features, images, kind=kind, out=tmp_path / "fitted")
    manifest = bundle.verify(made.folder)
    assert manifest.verdict == "passed" and manifest.head is not None
    assert manifest.head.classes == tuple(sorted(Path(name).stem for name in CLASSES))
    assert json.loads((made.folder / publishing.LABELS_FILE).read_text()) == list(manifest.head.classes)
    # The backbone's weights are the very bytes.
    of_backbone = {f.name: f.sha256 for f in bundle.read_manifest(features).files}
    assert {f.name: f.sha256 for f in manifest.files}["model.onnx.data"] == of_backbone["model.onnx.data"]
    model = _model(features)
    found = examples.read(model, images, seed=publishing.SEED)
    run = ort.open_graph(made.folder / "model.onnx", manifest.graphs[0].graph())
    inputs = inputs_of(model, images)
    ours = np.concatenate([run(inputs[example.name])["probabilities"] for example in found.held_out])
    theirs = _oracle(kind, features, found, inputs, made.manifest.report["fit"])
    assert np.abs(ours - theirs).max() <= 1e-6
    validation, _ = load_validation("dinov2_heads", beside=None)
    of_heads = validation.limits[manifest.precision].probability_difference_max
    assert reference_file.read(made.folder / bundle.REFERENCE).limits.probability_difference_max == of_heads
    assert made.held.images == len(found.held_out) == 8 and sum(made.held.recall.values()) / 4 == made.held.accuracy
    assert validate_bundle.validate(made.folder).report.passed
    page = (made.folder / bundle.REPORT_HTML).read_text()
    assert f"{made.held.right} of {made.held.images} images that the head was not fitted on" in page
    (limit,) = {found.strip() for found in re.findall(r'"largest difference"><span>\S+\s*<small>([^<]+)<', page)}
    assert float(limit) == of_heads.value, "the limit of probabilities is below their figure"
    assert all(f"{true}, taken for {given}" in page for _, true, given, _ in made.held.confusions)
    assert all(f"{share:.0%}".replace("%", " % of 2") in page for share in made.held.recall.values())


def _model(folder: Path) -> Any:
    from dinoexport import family
    from dinoexport.config.recipe import Recipe, parse

    manifest = bundle.read_manifest(folder)
    return family.find(manifest.family).model(parse(Recipe, manifest.recipe, where="test"))


def _oracle(kind: str, folder: Path, found: examples.Examples, inputs: dict[str, Any], facts: Any) -> Any:
    """scikit-learn's own answer, and of k-NN the official rule written out (dinov2/eval/knn.py) with k normalised."""
    labels = [example.label for example in found.fitted]
    fitted, held = (tokens(folder, part, inputs, mean=kind == "linear") for part in (found.fitted, found.held_out))
    if kind == "knn":
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (fitted, held)]
        cosines = unit[1] @ unit[0].astype(np.float16).astype(np.float64).T
        shares = np.zeros((len(held), len(found.classes)))
        for row, cosine in enumerate(cosines):
            nearest = np.argsort(-cosine)[: facts["neighbours"]]
            votes = np.exp((cosine[nearest] - cosine.max()) / 0.07)
            for vote, of in zip(votes / votes.sum(), nearest, strict=True):
                shares[row, found.classes.index(labels[of])] += vote
        return shares
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    scaler = StandardScaler() if kind == "linear" else FunctionTransformer()
    model = make_pipeline(scaler, LogisticRegression(C=facts["C"], max_iter=1000)).fit(fitted, labels)
    assert list(model.classes_) == list(found.classes)
    return model.predict_proba(held)


def test_another_process_gives_the_same_bytes(features: Path, images: Path, tmp_path: Path) -> None:
    """It computes the features itself, with other counts of threads, and has no torch."""
    flow.fit(features, images, kind="logreg", out=tmp_path / "first")
    code = (
        "import sys\n"
        "from pathlib import Path; from dinoexport.pipeline.fit import flow\n"
        "flow.fit(*map(Path, sys.argv[1:3]), kind='logreg', out=Path(sys.argv[3]))\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {
        "DINOEXPORT_CACHE": str(tmp_path / "another"), "OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "3",
        "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-c", code, str(features), str(images), str(tmp_path / "second")]
    subprocess.run(command, env=environment, check=True)
    manifests = [bundle.verify(tmp_path / name) for name in ("first", "second")]
    assert list((tmp_path / "another" / "features").rglob("*.npz")), "nothing of the first fit's cache was there"
    first, second = ({f.name: f.sha256 for f in manifest.files} for manifest in manifests)
    assert first == second and manifests[0].report["fit"] == manifests[1].report["fit"]


def test_features_are_computed_once(
    features: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another head on the same images runs the backbone for no image; a new image is the one that is run."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    flow.fit(features, folder, kind="logreg", out=tmp_path / "first")
    ran: list[Any] = []
    compute = of_images._of_image
    monkeypatch.setattr(of_images, "_of_image", lambda outputs: ran.append(outputs) or compute(outputs))
    flow.fit(features, folder, kind="knn", out=tmp_path / "second")
    assert not ran
    Image.new("RGB", (30, 30), "red").save(folder / "rocket" / "new.png")
    flow.fit(features, folder, kind="knn", out=tmp_path / "third")
    assert len(ran) == 1
    monkeypatch.setattr(of_images.cpu, "title", lambda runtime: "another version of the runtime")
    flow.fit(features, folder, kind="knn", out=tmp_path / "fourth")
    assert len(ran) > 2, "another version may give other features, so all are computed again"


def example(name: str, label: str, digest: str) -> examples.LabelledImage:
    return examples.LabelledImage(name=name, label=label, digest=digest)


def test_a_planted_leak_is_caught() -> None:
    fitted = [example("a/1.png", "a", "11"), example("b/1.png", "b", "22")]
    examples.refuse_leak(fitted, [example("a/2.png", "a", "33")])
    with pytest.raises(UsageError, match=r"a/copy\.png are both held out and fitted"):
        examples.refuse_leak(fitted, [example("a/copy.png", "a", "11")])


def test_copies_stay_on_one_side() -> None:
    found = [example(f"{label}/{i}.png", label, f"{label}{i // 3}") for label in "ab" for i in range(30)]
    fitted, held_out = examples.split(found, seed=0)
    assert not {e.digest for e in fitted} & {e.digest for e in held_out}
    assert len(fitted) + len(held_out) == 60 and len({e.digest for e in held_out if e.label == "a"}) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("one class", "has one class, 'chelsea'"),
        ("one image", "rocket: a class with one image"),
        ("no class", "stray.png of .* are in no subfolder"),
        ("two classes", "One image in two classes: chelsea/00.png and china/copy.png"),
    ],
)
def test_bad_folders_are_refused(change: str, words: str, features: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    if change == "one class":
        for name in ("china", "coffee", "rocket"):
            shutil.rmtree(folder / name)
    elif change == "one image":
        for path in sorted((folder / "rocket").iterdir())[1:]:
            path.unlink()
    elif change == "no class":
        shutil.copy(folder / "china" / "00.png", folder / "stray.png")
    else:
        shutil.copy(folder / "chelsea" / "00.png", folder / "china" / "copy.png")
    with pytest.raises(UsageError, match=words):
        flow.fit(features, folder, kind="logreg", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_k_nn_cannot_do_is_refused(features: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="knn has no weights of classes to balance"):
        flow.fit(features, images, kind="knn", balanced=True, out=tmp_path / "out")


def test_the_page_has_the_notes(features: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the folder's own path, which is of the machine and not of the images."""
    folder = tmp_path / "own photographs"
    shutil.copytree(images, folder)
    (folder / "china" / "notes.txt").write_text("no image")
    shutil.copy(folder / "china" / "00.png", folder / "china" / "again.png")
    drawn: list[Any] = []
    render = html_report.render
    monkeypatch.setattr(html_report, "render", lambda *args: drawn.append(args[4]) or render(*args))
    made = flow.fit(features, folder, kind="logreg", out=tmp_path / "fitted")
    assert {name for e in drawn[0].expectations for name in e.outputs} == {"probabilities", "class_index"}, (
        "drawn beside the head's own reference, not the backbone's"
    )
    notes = ("skipped: china/notes.txt", "1 file is a copy of another")
    page = (made.folder / bundle.REPORT_HTML).read_text()
    for found in (made.said, made.manifest.report["fit"]["notes"]):
        assert len(found) == 2 and all(line.startswith(note) for line, note in zip(found, notes, strict=True))
    assert all(f"<li>{note}" in page for note in notes)
    assert not any(b"own photographs" in path.read_bytes() for path in made.folder.iterdir())


def test_many_notes_are_shortened_in_the_bundle() -> None:
    notes = [f"skipped: {i}" for i in range(1000)] + ["classes are imbalanced"]
    kept = publishing._shortened(notes)
    assert len(kept) == 51 and kept[0] == notes[0] and kept[-1] == notes[-1] and kept[25] == "and 951 more"
    assert publishing._shortened(notes[:50]) == tuple(notes[:50])


def test_a_bundle_of_other_classes_is_not_replaced_silently(features: Path, images: Path, tmp_path: Path) -> None:
    """The same classes with another image are replaced, and said; other classes and other bundles need --force."""
    folder, out = tmp_path / "images", tmp_path / "fitted"
    shutil.copytree(images, folder)
    assert flow.fit(features, folder, kind="logreg", out=out).said == ()
    assert flow.fit(features, folder, kind="knn", out=out).said == (), "the same images"
    Image.new("RGB", (30, 30), "red").save(folder / "rocket" / "new.png")
    assert flow.fit(features, folder, kind="knn", out=out).said == (
        "replaced the bundle that was fitted on 40 other images",
    )
    (folder / "rocket").rename(folder / "ship")
    before = (out / bundle.MANIFEST).read_bytes()
    with pytest.raises(UsageError, match=r"other classes: chelsea, china, coffee, rocket.*would be replaced") as caught:
        flow.fit(features, folder, kind="knn", out=out)
    assert "--force" in caught.value.next_step and (out / bundle.MANIFEST).read_bytes() == before
    made = flow.fit(features, folder, kind="knn", out=out, force=True)
    assert made.manifest.head is not None and "ship" in made.manifest.head.classes
    shutil.copytree(features, tmp_path / "backbone")
    with pytest.raises(UsageError, match="backbone has no fitted head"):
        flow.fit(features, folder, kind="knn", out=tmp_path / "backbone")


def test_a_folder_that_cannot_do_is_refused_before_the_bundle_is_read(tmp_path: Path) -> None:
    """Hashing a large bundle takes a minute; here there is not even a bundle."""
    (tmp_path / "images" / "only").mkdir(parents=True)
    with pytest.raises(UsageError, match="There is no folder"):
        flow.fit(tmp_path / "nothing", tmp_path / "absent")
    with pytest.raises(UsageError, match="has one class, 'only'"):
        flow.fit(tmp_path / "nothing", tmp_path / "images")


def test_imbalance_copies_and_unreadable_files_are_said(tmp_path: Path) -> None:
    class Source:
        def cases_from(self, folder: Path, *, progress: Any, only: Any = None) -> Any:
            yield "broken.png: not a readable image"
            for path in sorted(folder.rglob("*.txt")):
                name = path.relative_to(folder)
                yield Case(name=name.as_posix(), why="test", inputs={}, label=name.parts[0])

        uses = None

    for label, count in (("a", 5), ("b", 50), ("c", 0), (".hidden", 0)):
        (tmp_path / label).mkdir()
        for i in range(count):
            (tmp_path / label / f"{i}.txt").write_text(f"{label}{i % 40}")
    source: Any = Source()
    said = " ".join(examples.read(source, tmp_path, seed=0).said)
    assert "broken.png" in said and "b has 50 images, a has 5" in said and "10 files are copies" in said
    assert "c: a folder without an image" in said and "hidden" not in said


def test_held_out_images_are_counted_by_class() -> None:
    """Written out by hand: of three dogs one is taken for a cat with 90 %, the one owl for a dog with 60 %."""
    shares = np.array([[0.1, 0.9, 0], [0.9, 0.1, 0], [0.2, 0.8, 0], [1, 0, 0], [0.2, 0.6, 0.2]])
    labels, names = ["dog", "dog", "dog", "cat", "owl"], list("abcde")
    held = classifiers.judge(shares, labels, names, ("cat", "dog", "owl"))
    assert (held.images, held.right, held.accuracy) == (5, 3, 0.6)
    assert held.recall == {"cat": 1.0, "dog": pytest.approx(2 / 3), "owl": 0.0}
    assert held.counts == {"cat": 1, "dog": 3, "owl": 1}
    assert held.confusions == (("b", "dog", "cat", 0.9), ("e", "owl", "dog", 0.6))


def test_wilsons_interval() -> None:
    """Against values of statsmodels' proportion_confint(method='wilson')."""
    assert classifiers.wilson(8, 8) == pytest.approx((0.675592, 1.0), abs=1e-6)
    assert classifiers.wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)


def test_a_headed_bundle_gives_no_features(features: Path, images: Path, tmp_path: Path) -> None:
    made = flow.fit(features, images, kind="logreg", out=tmp_path / "fitted")
    with pytest.raises(UsageError, match="gives no features"):
        flow.fit(made.folder, images, kind="knn", out=tmp_path / "twice")
    assert layouts.published_name("fitted.weight") == "fitted.weight"

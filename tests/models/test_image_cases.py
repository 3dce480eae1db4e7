"""Cases of a DINOv2 made of photographs, noise and folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.config.recipe import Range, parse
from dinoexport.errors import UsageError
from dinoexport.images import ImageError, Preprocessing, load
from dinoexport.models.dinov2 import cases, serving, synthetic
from dinoexport.models.dinov2.cases import CaseTable, from_folder, read_case
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import silent
from tests.image_inputs import taken
from tests.pictures import noise, saved


def case_folder(tmp_path: Path, **pictures: Image.Image) -> Path:
    (tmp_path / "images").mkdir()
    for name, picture in pictures.items():
        saved(tmp_path / "images" / f"{name}.png", picture)
    return tmp_path


def test_photographs_make_a_batch_in_their_order(tmp_path: Path) -> None:
    folder = case_folder(tmp_path, a=noise(300, 225, seed=1), b=noise(225, 300, seed=2))
    table = {"name": "both", "why": "two of the tests' pictures", "photographs": ["b.png", "a.png"]}
    case = read_case(table, folder, taken(as_bytes=True, strict=False))
    assert case.inputs["images"].shape == (2, 224, 224, 3)
    for place, name in enumerate(("b", "a")):
        expected = Preprocessing().prepared(load(folder / "images" / f"{name}.png"))
        assert np.array_equal(case.inputs["images"][place], expected)
    pixels = read_case(table, folder, taken(as_bytes=False, strict=False)).inputs["pixels"]
    assert np.array_equal(pixels, Preprocessing().normalised(case.inputs["images"]))


def test_a_photograph_of_its_own_size(tmp_path: Path) -> None:
    picture = noise(45, 31)
    folder = case_folder(tmp_path, a=picture, tiny=noise(40, 13))
    table = {"name": "own", "why": "one of the tests' pictures", "photographs": ["a.png"], "prepare": "own_size"}
    assert np.array_equal(
        read_case(table, folder, taken(as_bytes=True, strict=False)).inputs["images"][0], np.asarray(picture)
    )
    strict = read_case(table, folder, taken(as_bytes=True, strict=True)).inputs["images"][0]
    assert np.array_equal(strict, np.asarray(picture)[:28, :42])
    with pytest.raises(ImageError, match=r"tiny\.png: smaller than one patch"):
        read_case(table | {"photographs": ["tiny.png"]}, folder, taken(as_bytes=True, strict=False))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_noise_cases(strict: bool, as_bytes: bool, tmp_path: Path) -> None:
    table = {"name": "odd", "why": "noise of the tests", "batch": 3, "height": 28, "width": 43}
    case = read_case(table, tmp_path, taken(as_bytes=as_bytes, strict=strict))
    (array,) = case.inputs.values()
    assert (array.shape, array.dtype) == (((3, 28, 43, 3), np.uint8) if as_bytes else ((3, 3, 28, 43), np.float32))
    assert case.expect_refusal == strict
    assert not read_case(table | {"width": 42}, tmp_path, taken(as_bytes=as_bytes, strict=strict)).expect_refusal
    again = next(iter(read_case(table, tmp_path, taken(as_bytes=as_bytes, strict=strict)).inputs.values()))
    assert np.array_equal(array, again)
    other = next(
        iter(read_case(table | {"seed": 1}, tmp_path, taken(as_bytes=as_bytes, strict=strict)).inputs.values())
    )
    assert not np.array_equal(array, other)
    assert not np.array_equal(array[0], array[1])


@pytest.mark.parametrize("name", ["../secret.png", "/etc/x.png", "a/b.png", "..", ".", "", "a/"])
def test_a_photograph_is_a_name_not_a_path(name: str, tmp_path: Path) -> None:
    case_folder(tmp_path)
    table = {"name": "one", "why": "a picture of the tests", "photographs": [name]}
    with pytest.raises(UsageError, match="not paths"):
        read_case(table, tmp_path, taken(as_bytes=True, strict=False))


@pytest.mark.parametrize(
    ("table", "because"),
    [
        ({}, "give height and width, or photographs"),
        ({"height": 28}, "give height and width, or photographs"),
        ({"height": 28, "width": 0}, "'width"),
        ({"height": 28, "width": 28, "batch": 0}, "'batch'"),
        ({"height": 28, "width": 28, "prepare": "own_size"}, "give height and width, or photographs"),
        ({"photographs": ["a.png"], "height": 28, "width": 28}, "height, width: only for noise"),
        ({"photographs": ["a.png"], "height": 28}, "height: only for noise"),
        ({"photographs": ["a.png"], "batch": 2}, "batch: only for noise"),
        ({"photographs": ["a.png"], "prepare": "evaluations"}, "Did you mean 'evaluation'"),
        ({"photographs": ["a.png", "b.png"], "prepare": "own_size"}, "one per case"),
        ({"photograph": ["a.png"]}, "Did you mean 'photographs'"),
    ],
)
def test_a_case_that_says_too_much_or_too_little_is_refused(table: dict[str, Any], because: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(CaseTable, {"name": "one", "why": "a case of the tests", **table}, where="case one")
    assert because in caught.value.message


def test_a_folder_gives_sorted_cases_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "b" / "c.png").mkdir(parents=True)  # a folder with an image's name
    saved(tmp_path / "z.png", noise(20, 20, seed=1))
    saved(tmp_path / "b" / "y.JPG", noise(30, 20, seed=2), format="JPEG")
    saved(tmp_path / "b" / "c.png" / "x.webp", noise(20, 30, seed=3), lossless=True)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "b" / "broken.jpg").write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    saved(tmp_path / "moving.gif", noise(5, 5))
    saved(tmp_path / "thin.png", noise(1, 1200))
    (tmp_path / "zz.txt").write_text("notes")
    (tmp_path / ".DS_Store").write_text("hidden")
    told: list[tuple[int, int]] = []
    everything = list(
        from_folder(tmp_path, taken(as_bytes=True), progress=lambda doing, done, total: told.append((done, total)))
    )
    found = [case for case in everything if not isinstance(case, str)]
    skipped = [line for line in everything if isinstance(line, str)]
    assert [case.name for case in found] == ["b/c.png/x.webp", "b/y.JPG", "z.png"]
    assert [line.split(": ")[0] for line in skipped] == [
        str(tmp_path / name) for name in ("b/broken.jpg", "broken.jpg", "gone.png", "moving.gif", "thin.png", "zz.txt")
    ]
    assert told == [(i, 9) for i in range(1, 10)]
    picture = Preprocessing().prepared(load(tmp_path / "z.png"))
    assert np.array_equal(found[2].inputs["images"], picture[np.newaxis])
    as_pixels = [
        case for case in from_folder(tmp_path, taken(as_bytes=False), progress=silent) if not isinstance(case, str)
    ]
    assert np.array_equal(as_pixels[2].inputs["pixels"], Preprocessing().normalised(picture[np.newaxis]))


def test_an_empty_folder_gives_nothing(tmp_path: Path) -> None:
    assert list(from_folder(tmp_path, taken(as_bytes=True), progress=silent)) == []


def test_images_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """However many there are, the first is there before the second is opened."""
    for i in range(3):
        saved(tmp_path / f"{i}.png", noise(20, 20, seed=i))
    reading = from_folder(tmp_path, taken(as_bytes=True), progress=silent)
    next(reading)
    (tmp_path / "1.png").write_bytes(b"gone meanwhile")
    assert isinstance(next(reading), str) and not isinstance(next(reading), str)


def test_the_crop_keeps_the_top_left() -> None:
    pictures = np.random.RandomState(0).randint(0, 256, (2, 29, 55, 3), dtype=np.uint8)
    assert np.array_equal(cases.cropped(pictures), pictures[:, :28, :42])
    assert np.array_equal(cases.cropped(pictures[:, :28, :42]), pictures[:, :28, :42])


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"x", "broken.png": b"x"}])
def test_samples_without_one_readable_image_are_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (graph,) = pipeline.build_request("vits14").model.graphs
    with pytest.raises(UsageError, match="holds no image") as caught:
        serving.front_ends(graph, taken(as_bytes=False), tmp_path, progress=silent)
    assert "--samples" in caught.value.next_step


@pytest.mark.parametrize(("batch", "too_many"), [(8, False), (9, True)])
def test_noise_has_a_largest_number_of_values(batch: int, too_many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a milliard: 8 images of 8192 x 4096 in two channels, which are asked for here and not made."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(cases.synthetic, "pixels", lambda *size: asked.append(size))
    of_two = taken(as_bytes=False, in_chans=2, preprocess={"mean": [0.5] * 2, "std": [0.25] * 2})
    if too_many:
        with pytest.raises(UsageError) as refused:
            of_two.noise(batch, 8192, 4096, 3)
        assert refused.value.message == ("9 images of 8192x4096 in 2 channels are more than memory is taken for.")
    else:
        of_two.noise(batch, 8192, 4096, 3)
    assert asked == ([] if too_many else [(8, 8192, 4096, 3, 2)])


@pytest.mark.parametrize(("channels", "repeated"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 0, 1])])
def test_further_channels_repeat_the_colours(channels: int, repeated: list[int]) -> None:
    """Of pictures as wide as there are channels too."""
    pictures = np.random.RandomState(0).randint(0, 256, (2, 4, channels, 3), dtype=np.uint8)
    found = taken(as_bytes=True, in_chans=channels).of(pictures)["images"]
    assert np.array_equal(found, pictures[..., repeated])


def test_photographs_are_shown_and_neighbours_compared_in_a_batch(tmp_path: Path) -> None:
    """One patch is enough for a photograph of its own size."""
    folder = case_folder(tmp_path, a=noise(14, 14), b=noise(30, 20))
    table = {"name": "some", "why": "the tests' pictures", "photographs": ["a.png"]}
    one = read_case(table, folder, taken(as_bytes=True))
    both = read_case(table | {"photographs": ["a.png", "b.png"]}, folder, taken(as_bytes=True))
    assert (one.neighbours, one.shown, both.neighbours, both.shown) == (False, True, True, True)
    own = read_case(table | {"prepare": "own_size"}, folder, taken(as_bytes=True))
    assert own.inputs["images"].shape == (1, 14, 14, 3)


def test_workloads_are_noise_of_seed_0() -> None:
    """At the size of the evaluation and at the native size, within the profile, each once."""
    side = Range(min=14, opt=28, max=56)
    of = taken(as_bytes=True, preprocess={"crop": (28, 42)}, position_side=9)
    found = cases.workloads({"batch": Range(min=1, opt=1, max=2), "height": side, "width": side}, of)
    assert [(work.name, work.items, work.unit) for work in found] == [
        ("1 x 28 x 42", 1, "images"), ("1 x 56 x 56", 1, "images"), ("2 x 28 x 42", 2, "images"),
        ("2 x 56 x 56", 2, "images"),
    ]  # fmt: skip
    for work in found:
        size = [int(number) for number in work.name.split(" x ")]
        assert np.array_equal(work.inputs["images"], synthetic.images(*size, 0))
    narrow = {"batch": Range(min=1, opt=1, max=1), "height": Range(min=56, opt=56, max=56), "width": side}
    assert [work.name for work in cases.workloads(narrow, of)] == ["1 x 56 x 42", "1 x 56 x 56"]


def test_links_in_a_folder(tmp_path: Path) -> None:
    """To an image of the folder they are followed; otherwise the line says where they lead."""
    folder = tmp_path / "photos"
    folder.mkdir()
    saved(folder / "a.png", noise(20, 20))
    saved(tmp_path / "outside.png", noise(20, 20))
    for name, target in (("b", "a.png"), ("c", "nowhere.png"), ("d", "../outside.png"), ("e", "."), ("f", "f.png")):
        (folder / f"{name}.png").symlink_to(target)
    found = list(from_folder(folder, taken(as_bytes=True), progress=silent))
    assert [case.name for case in found if not isinstance(case, str)] == ["a.png", "b.png"]
    assert [line.split(": ", 1)[1] for line in found if isinstance(line, str)] == [
        "a link to nothing.", "a link that leads out of the folder.", "a link to a folder, which is not followed.",
        "a link to nothing.",
    ]  # fmt: skip

"""Photographs in front of a head and its answers behind it: sizes, class names, PNG files."""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoexport.errors import InputRefused, UsageError
from dinoexport.models.dinov2.heads import finishing, pictures
from dinoexport.models.dinov2.heads.finishing import PHOTOGRAPH_SIZE
from dinoexport.models.dinov2.heads.serving import size_of
from dinoexport.spec import silent
from tests.models.test_heads import model_of

CLASSES = {"classes": ("cat", "dog", "owl")}


def encoded(height: int, width: int) -> bytes:
    noise = np.random.RandomState(height).randint(0, 256, (height, width, 3)).astype(np.uint8)
    stored = BytesIO()
    Image.fromarray(noise).save(stored, "PNG")
    return stored.getvalue()


@pytest.mark.parametrize(("size", "to"), [((5, 7), (23, 16)), ((41, 31), (13, 28)), ((1, 6), (4, 6)), ((9, 9), (1, 1))])
@pytest.mark.parametrize("corners", [False, True])
def test_maps_are_resized_as_torch_does(size: tuple[int, int], to: tuple[int, int], corners: bool) -> None:
    depth = np.random.RandomState(0).rand(*size).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(depth)[None, None].double(), size=to, mode="bilinear", align_corners=corners
    )[0, 0].numpy()  # fmt: skip
    np.testing.assert_allclose(finishing.bilinear(depth, *to, corners=corners), theirs, rtol=0, atol=1e-6)
    labels = np.random.RandomState(1).randint(0, 150, size).astype(np.int32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(labels)[None, None].double(), size=to, mode="nearest-exact"
    )[0, 0].numpy()  # fmt: skip
    np.testing.assert_array_equal(finishing.nearest(labels, *to), theirs)


@pytest.mark.parametrize(
    ("photograph", "asked"),
    # By depth_anything_v2/util/transform.py's Resize of 518, lower_bound, multiples of 14.
    [((480, 640), (518, 686)), ((1080, 1920), (518, 924)), ((300, 451), (518, 784)), ((100, 100), (518, 518))],
)
def test_depth_anythings_own_sizes(photograph: tuple[int, int], asked: tuple[int, int]) -> None:
    (end,) = model_of("depth-anything-v2-vits").front_ends(None, progress=silent)
    assert end.name == "images" and size_of(*photograph, end.settings) == asked


def test_depth_as_png_and_at_the_photographs_size() -> None:
    """The graph's depth of a photograph that was resized for it comes back as large as the photograph."""
    model = model_of("depth-anything-v2-metric-hypersim-vits")
    (plain,) = model.front_ends(None, progress=silent)
    ends = {form: model.with_answers(plain, form) for form in model.answer_forms}
    assert [end.name for end in ends.values()] == ["images_png", "images_resized"]
    inputs = model.prepare("images_png", ends["png"].settings, [encoded(60, 90)])
    assert inputs["pixels"].shape == (1, 3, 518, 784)  # 777 is 55.5 patches, and half goes to the even number
    depth = np.random.RandomState(2).uniform(0.2, 19, (1, 518, 784)).astype(np.float32)
    arrays = {"depth": depth, PHOTOGRAPH_SIZE: inputs[PHOTOGRAPH_SIZE]}
    resized = model.finish(ends["resized"].settings, arrays)["photograph_depth"]
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(depth)[None].double(), size=(60, 90), mode="bilinear", align_corners=True
    )[0].numpy()  # fmt: skip
    np.testing.assert_allclose(resized, theirs, rtol=0, atol=1e-5)
    answer = model.finish(ends["png"].settings, arrays)
    stored = np.asarray(Image.open(BytesIO(answer["depth_png"][0, 0]))).astype(np.float64)
    assert stored.shape == (60, 90) and answer["depth_scale"].dtype == np.float32
    np.testing.assert_allclose(stored * answer["depth_scale"][0, 0], theirs[0], rtol=0, atol=20 / 65535)


def test_labels_as_png() -> None:
    model = model_of("vits14", "voc2012_linear")
    end = model.with_answers(model.front_ends(None, progress=silent)[0], "png")
    inputs = model.prepare(end.name, end.settings, [encoded(45, 60)])
    assert inputs["pixels"].shape == (1, 3, 45, 60)
    labels = np.random.RandomState(3).randint(0, 21, (1, 45, 60)).astype(np.int32)
    answer = model.finish(end.settings, {"labels": labels, PHOTOGRAPH_SIZE: inputs[PHOTOGRAPH_SIZE]})
    image = Image.open(BytesIO(answer["labels_png"][0, 0]))
    np.testing.assert_array_equal(np.asarray(image), labels[0])
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pictures.label_image(labels[0], 21))


def test_class_names() -> None:
    model = model_of("tiny_heads", head={"kind": "logreg", **CLASSES})
    end = model.with_answers(model.front_ends(None, progress=silent)[0], "names")
    assert end.name == "images_names" and not end.carried
    assert model.prepare(end.name, end.settings, [encoded(60, 60)])["pixels"].shape == (1, 3, 224, 224)
    shares = np.array([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6]], np.float32)
    answer = model.finish(end.settings, {"probabilities": shares, "class_index": shares.argmax(axis=1)})
    assert answer["class_names"].tolist() == [[b"dog", b"cat", b"owl"], [b"owl", b"dog", b"cat"]]
    np.testing.assert_allclose(answer["class_probabilities"], [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], rtol=1e-6)


def test_photographs_of_different_sizes_are_no_one_array() -> None:
    model = model_of("depth-anything-v2-vits")
    end = model.with_answers(model.front_ends(None, progress=silent)[0], "resized")
    arrays: dict[str, Any] = {
        "depth": np.ones((2, 28, 28), np.float32),
        PHOTOGRAPH_SIZE: np.array([[30, 30], [40, 40]], np.int32),
    }
    with pytest.raises(InputRefused, match="different sizes"):
        model.finish(end.settings, arrays)


def test_no_pixel_that_differs_is_lost_in_a_smaller_picture() -> None:
    """518 pixels are shown in fewer; one that has another label is there, and its neighbours' colours are named."""
    expected = np.zeros((1, 518, 518), np.int32)
    expected[0, :, 300:] = 12
    answer = expected.copy()
    answer[0, 517, 6] = 3
    model = model_of("vits14", "voc2012_linear")
    scores = np.zeros((1, 21, 37, 37), np.float32)
    (row,) = pictures.of_case(
        model.head, np.zeros((1, 3, 518, 518), np.float32), {"labels": expected, "patch_logits": scores},
        {"ours": {"labels": answer, "patch_logits": scores}}, model.backbone.preprocessing,
    )  # fmt: skip
    _, theirs, _, where = row
    assert (np.asarray(Image.open(BytesIO(where.data))) == 255).all(axis=-1).sum() == 1
    assert "1 of 268,324 pixels" in where.caption
    colours = {tuple(colour): f"#{bytes(colour).hex()}" for colour in pictures.label_colours(21)}
    seen = {tuple(colour) for colour in np.asarray(Image.open(BytesIO(theirs.data))).reshape(-1, 3)}
    assert {colour for colour, _ in theirs.legend} == {colours[colour] for colour in seen}
    assert [words for _, words in theirs.legend] == ["background 58%", "dog 42%"]


@pytest.mark.parametrize(
    ("variant", "head", "unit"), [("vits14", "kitti_linear", " m"), ("depth-anything-v2-vits", None, "")]
)
def test_depths_in_pictures_have_their_unit(variant: str, head: str | None, unit: str) -> None:
    """Metres of a metric head; relative depth has none."""
    model = model_of(variant, head)
    depth = np.linspace(1, 3, 28 * 28, dtype=np.float32).reshape(1, 28, 28)
    ((_, theirs, _, difference),) = pictures.of_case(
        model.head, np.zeros((1, 3, 28, 28), np.float32), {"depth": depth}, {"ours": {"depth": depth + 0.5}},
        model.backbone.preprocessing,
    )  # fmt: skip
    assert theirs.caption == f"dark 1.04, bright 2.96{unit}"
    assert difference.caption == f"of ours: dark 0, bright 5.0e-01{unit}, worst 5.0e-01{unit}"


def test_bars_have_no_text_on_them() -> None:
    """Grey text on a blue bar is hard to read: each bar ends above the next line of text, and begins below its own."""
    model = model_of("vits14", "linear")
    answer = {"probabilities": np.full((1, 1000), 1e-3, np.float32)}
    ((_, theirs),) = pictures.of_case(
        model.head, np.zeros((1, 3, 28, 28), np.float32), answer, {}, model.backbone.preprocessing
    )
    tops = [int(y) for y in re.findall(rb'<rect x="0" y="(\d+)"', theirs.data)]
    baselines = [int(y) for y in re.findall(rb'<text x="0" y="(\d+)"', theirs.data)]
    assert len(tops) == 5 and all(top > baseline for top, baseline in zip(tops, baselines, strict=True))
    assert all(baseline - 12 >= top + 3 for top, baseline in zip(tops, baselines[1:], strict=False))


def test_an_output_that_is_no_column_is_not_called_absent() -> None:
    """class_index of a fitted head exists; it is integers."""
    from dinoexport.embed import columns

    graph = model_of("tiny_heads", "logreg", head={"kind": "logreg", **CLASSES}).graphs[0]
    with pytest.raises(UsageError, match="class_index is int32; columns are of floating-point outputs"):
        columns.choose(graph, ["class_index"])
    with pytest.raises(UsageError, match="has no output 'class_indices'"):
        columns.choose(graph, ["class_indices"])


def test_one_number_for_each_item_has_dims() -> None:
    """Triton refuses a model with empty dims: class_index (B,) is served as (B, 1), which the model does not see."""
    from dinoexport.serving.triton import served_models
    from dinoexport.serving.triton.config import to_text

    graph = model_of("tiny_heads", "logreg", head={"kind": "logreg", **CLASSES}).graphs[0]
    (index,) = (tensor for tensor in graph.outputs if tensor.name == "class_index")
    text = " ".join(to_text([served_models._tensor("output", index, graph)]).split())
    assert "dims: [1]" in text and "shape: []" in text
    assert "reshape" not in to_text([served_models._tensor("output", index, graph, ensemble=True)])

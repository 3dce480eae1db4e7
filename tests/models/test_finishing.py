"""What a served head's outputs become: the tensors of each form, PNG files and maps of the photograph's size."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.heads import finishing, pictures
from dinoexport.models.dinov2.heads.kinds import Head, HeadTable
from dinoexport.spec import Tensor

DEPTH_ANYTHING = {"features": 8, "channels": (4, 6, 8, 10)}


def head(kind: str, **more: Any) -> Head:
    arch = Architecture(embed_dim=16, depth=4, num_heads=2, feed_forward="mlp", register_count=0)
    return Head(arch=arch, table=HeadTable(kind=kind, **more))


def form_of(name: str, dtype: str, *shape: int | str) -> tuple[str, str, tuple[int | str, ...]]:
    return name, dtype, shape


HEIGHT_WIDTH = ("batch", "photograph_height", "photograph_width")
DEPTH = {
    "png": [form_of("depth_png", "bytes", "batch", 1), form_of("depth_scale", "float32", "batch", 1)],
    "resized": [form_of("photograph_depth", "float32", *HEIGHT_WIDTH)],
}
LABELS = {
    "png": [form_of("labels_png", "bytes", "batch", 1)],
    "resized": [form_of("photograph_labels", "int32", *HEIGHT_WIDTH)],
}


def names(count: int) -> dict[str, Any]:
    return {
        "names": [
            form_of("class_names", "bytes", "batch", count), form_of("class_probabilities", "float32", "batch", count),
        ]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (head("nyu_linear"), DEPTH),
        (head("nyu_dpt"), DEPTH),
        (head("depth_anything", **DEPTH_ANYTHING), DEPTH),
        (head("ade20k_ms"), LABELS),
        (head("linear"), names(5)),
        (head("logreg", classes=("cat", "dog", "owl")), names(3)),
    ],
    ids=lambda value: value.table.kind if isinstance(value, Head) else "",
)
def test_forms_of_a_heads_answers(of: Head, expected: dict[str, Any]) -> None:
    """Class names are of five classes at most; maps get the photograph's size past the graph."""
    assert finishing.forms(of) == tuple(expected)
    for form, outputs in expected.items():
        tensors = finishing.answers(of, form)
        assert [form_of(tensor.name, tensor.dtype, *tensor.shape) for tensor in tensors] == outputs
        assert all(tensor.meaning for tensor in tensors)
        size = Tensor(
            name="photograph_size", dtype="int32", shape=("batch", 2),
            meaning="height and width of the photograph, upright, pixels",
        )  # fmt: skip
        assert finishing.carried(form) == (() if form == "names" else (size,))


def stored(data: bytes) -> Any:
    return np.asarray(Image.open(BytesIO(data)))


@pytest.mark.parametrize(
    ("depth", "largest", "step", "steps"),
    [
        # The map's largest depth is white, also below one.
        ([0.0, 0.25, 0.5], None, 0.5 / 65535, [0, 32768, 65535]),
        ([0.0, 0.0, 0.0], None, 1 / 65535, [0, 0, 0]),
        # What is no depth is black; what is past the largest one is white.
        ([np.nan, np.inf, 4.0], None, 4 / 65535, [0, 0, 65535]),
        ([-np.inf, -1.0, 9.0], 8.0, 8 / 65535, [0, 0, 65535]),
        ([2.0, 4.0, 8.0], 8.0, 8 / 65535, [16384, 32768, 65535]),
    ],
)
def test_depths_as_grey_steps(depth: list[float], largest: float | None, step: float, steps: list[int]) -> None:
    data, scale = finishing.depth_png(np.array([depth], np.float32), largest)
    assert scale == pytest.approx(step, rel=1e-12) and stored(data).tolist() == [steps]
    assert Image.open(BytesIO(data)).mode == "I;16"


def test_labels_as_palette_indices() -> None:
    data = finishing.labels_png(np.array([[-1, 0, 20, 255, 300]], np.int32), 21)
    image = Image.open(BytesIO(data))
    assert image.mode == "P" and np.asarray(image).tolist() == [[0, 0, 20, 255, 255]]
    assert image.getpalette()[:63] == pictures.label_colours(21).ravel().tolist()


@pytest.mark.parametrize(
    ("to", "corners", "expected"),
    [
        (2, True, [0, 30]),
        (1, True, [0]),
        (3, True, [0, 15, 30]),
        (7, True, [0, 5, 10, 15, 20, 25, 30]),
        (2, False, [5, 25]),
        (1, False, [15]),
        (8, False, [0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30]),
        (4, False, [0, 10, 20, 30]),
    ],
)
def test_a_line_resized(to: int, corners: bool, expected: list[float]) -> None:
    """Between corners, or between the pixels' centres; past them the edge's value."""
    line = np.array([[0, 10, 20, 30]], np.float32)
    assert finishing.bilinear(line, 1, to, corners=corners).tolist() == [expected]
    assert finishing.bilinear(line.T, to, 1, corners=corners).T.tolist() == [expected]


@pytest.mark.parametrize(
    ("to", "expected"),
    [(1, [6]), (2, [5, 7]), (4, [4, 5, 6, 7]), (6, [4, 5, 5, 6, 7, 7]), (8, [4, 4, 5, 5, 6, 6, 7, 7])],
)
def test_a_line_of_labels_resized(to: int, expected: list[int]) -> None:
    """Each pixel's centre decides, as in torch's nearest-exact."""
    line = np.array([[4, 5, 6, 7]], np.int32)
    assert finishing.nearest(line, 1, to).tolist() == [expected]
    assert finishing.nearest(line.T, to, 1).T.tolist() == [expected]


@pytest.mark.parametrize("size", [(5, 64), (1, 3), (37, 7)])
def test_the_last_pixel_is_reached_and_not_passed(size: tuple[int, int]) -> None:
    map_HW = np.arange(size[0] * size[1]).reshape(size)
    for to in ((size[0] * 3, size[1] - 1), (1, size[1] * 7), (101, 5)):
        found = finishing.nearest(map_HW, *to)
        assert found.shape == to and found.min() >= 0 and found.max() <= map_HW[-1, -1]
        for corners in (True, False):
            resized = finishing.bilinear(map_HW, *to, corners=corners)
            assert resized.shape == to and resized.max() <= map_HW[-1, -1] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("of", "white", "middle"),
    [
        (head("nyu_linear"), 10.0, 2.0),
        (head("kitti_dpt"), 80.0, 2.0),
        (head("nyu_dpt", depth_range=(0.5, 20.0)), 20.0, 2.0),
        (head("depth_anything", max_depth=20.0, **DEPTH_ANYTHING), 20.0, 2.0),
        # Relative: the largest of this map. The middle one of three is 2 in both ways of resizing.
        (head("depth_anything", **DEPTH_ANYTHING), 3.0, 2.0),
    ],
    ids=["nyu", "kitti", "own range", "metric", "relative"],
)
def test_a_depth_map_is_finished(of: Head, white: float, middle: float) -> None:
    """Released heads resize between pixels' centres, Depth Anything between corners."""
    arrays = {"depth": np.array([[[1.0, 3.0]]], np.float32), finishing.PHOTOGRAPH_SIZE: np.array([[1, 5]], np.int32)}
    line = [1, 1.5, 2, 2.5, 3] if of.form == "depth_anything" else [1, 1.2, 2, 2.8, 3]
    resized = finishing.finished(of, "resized", arrays)
    assert set(resized) == {"photograph_depth"} and resized["photograph_depth"].shape == (1, 1, 5)
    np.testing.assert_allclose(resized["photograph_depth"][0, 0], line, rtol=1e-6)
    found = finishing.finished(of, "png", arrays)
    assert set(found) == {"depth_png", "depth_scale"}
    assert found["depth_png"].shape == found["depth_scale"].shape == (1, 1)
    assert found["depth_scale"][0, 0] == pytest.approx(white / 65535, rel=1e-6)
    assert stored(found["depth_png"][0, 0])[0, 2] == round(middle / white * 65535)


def test_label_maps_are_finished() -> None:
    """Photographs of two sizes are two files."""
    arrays = {
        "labels": np.array([[[3, 9]], [[0, 20]]], np.int32),
        finishing.PHOTOGRAPH_SIZE: np.array([[1, 4], [2, 2]], np.int32),
    }
    found = finishing.finished(head("voc2012_linear"), "png", arrays)
    assert set(found) == {"labels_png"} and found["labels_png"].shape == (2, 1)
    assert [stored(data).tolist() for (data,) in found["labels_png"]] == [[[3, 3, 9, 9]], [[0, 20], [0, 20]]]
    one = {name: array[:1] for name, array in arrays.items()}
    resized = finishing.finished(head("voc2012_linear"), "resized", one)
    assert resized["photograph_labels"].tolist() == [[[3, 3, 9, 9]]]
    assert set(resized) == {"photograph_labels"}

"""Pictures of a head's outputs in the report: colours, legends, bars, and what is left out."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.images import Preprocessing
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.heads import pictures
from dinoexport.models.dinov2.heads.kinds import Head, HeadTable
from dinoexport.models.dinov2.pictures import viridis
from dinoexport.spec import Array, Picture

ANIMALS = ("cat", "dog", "<owl>", "fox", "bee", "ant")


def head(kind: str, **more: Any) -> Head:
    arch = Architecture(embed_dim=16, depth=4, num_heads=2, feed_forward="mlp", register_count=0)
    return Head(arch=arch, table=HeadTable(kind=kind, **more))


def row_of(of: Head, reference: dict[str, Array], **candidates: dict[str, Array]) -> tuple[Picture, ...]:
    """The pictures of one image, without the photograph."""
    batched = {name: {output: array[None] for output, array in arrays.items()} for name, arrays in candidates.items()}
    ((photograph, *rest),) = pictures.of_case(
        of, np.zeros((1, 3, 4, 6), np.float32), {name: array[None] for name, array in reference.items()}, batched,
        Preprocessing(),
    )  # fmt: skip
    assert photograph.title == "Photograph"
    return tuple(rest)


def drawn(picture: Picture) -> Array:
    return np.asarray(Image.open(BytesIO(picture.data)))


def labelled(counts: Sequence[int]) -> Array:
    """(10, 20) labels: class k in counts[k] pixels."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts).reshape(10, 20)


def test_colours_of_classes() -> None:
    """Hues a golden angle apart; three values and three saturations take turns, so that neighbours differ."""
    golden = (5**0.5 - 1) / 2
    expected = [
        colorsys.hsv_to_rgb(k * golden % 1, (0.45, 0.7, 0.95)[k % 3], (0.55, 0.75, 0.95)[k // 3 % 3]) for k in range(30)
    ]
    found = pictures.label_colours(30)
    assert found.dtype == np.uint8 and found.tolist() == [[round(255 * x) for x in colour] for colour in expected]


def test_a_label_outside_the_classes_is_drawn_as_the_nearest_one() -> None:
    colours = pictures.label_colours(4).tolist()
    found = pictures.label_image(np.array([[-1, 0, 3], [4, 9, 2]]), 4).tolist()
    assert found == [[colours[0], colours[0], colours[3]], [colours[3], colours[3], colours[2]]]


@pytest.mark.parametrize(("low", "high"), [(2.0, 6.0), (0.25, 0.75), (-1.0, 1.0)])
def test_depths_are_dark_to_bright(low: float, high: float) -> None:
    """What is not a number is as bright as the greatest; what is outside the range as its end."""
    middle = (low + high) / 2
    found = pictures.depth_image(np.array([[low, middle, high, np.nan, low - 1, high + 1]]), low, high)
    assert found.tolist() == viridis(np.array([[0.0, 0.5, 1.0, 1.0, 0.0, 1.0]])).tolist()


def test_a_flat_depth_has_a_colour() -> None:
    assert pictures.depth_image(np.full((1, 2), 3.0), 3.0, 3.0).tolist() == [[[68, 1, 84]] * 2]


@pytest.mark.parametrize(
    ("counts", "shares", "caption"),
    [
        ((100, 50, 30, 16, 3, 1), ("50%", "25%", "15%", "8%", "2%", "<1%"), ""),
        ((100, 50, 30, 8, 6, 4, 2), ("50%", "25%", "15%", "4%", "3%", "2%"), "and 1 more class"),
        ((100, 50, 20, 10, 8, 6, 4, 2), ("50%", "25%", "10%", "5%", "4%", "3%"), "and 2 more classes"),
        ((200,), ("100%",), ""),
    ],
)
def test_the_legend_names_the_six_largest_classes(counts: Sequence[int], shares: Sequence[str], caption: str) -> None:
    """A class that has some pixels is never said to have 0 %."""
    of = head("voc2012_linear")
    (shown,) = row_of(of, {"labels": labelled(counts)})
    names = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle")
    colours = [f"#{bytes(colour).hex()}" for colour in pictures.label_colours(21)]
    expected = tuple((colour, f"{name} {share}") for colour, name, share in zip(colours, names, shares, strict=False))
    assert (shown.title, shown.caption, shown.legend) == ("PyTorch", caption, expected)


def test_pixels_with_another_label_are_white() -> None:
    reference = labelled((100, 100))
    answer = reference.copy()
    answer[[0, 4, 9], [3, 3, 19]] = 7
    theirs, ours, where = row_of(head("voc2012_linear"), {"labels": reference}, ours={"labels": answer})
    assert (ours.title, ours.caption) == ("ours", "the same colours")
    assert (where.title, where.caption) == ("Where they differ", "of ours: 3 of 200 pixels have another label")
    expected = np.full((10, 20, 3), 24)
    expected[[0, 4, 9], [3, 3, 19]] = 255
    assert np.array_equal(drawn(where), expected)
    assert np.array_equal(drawn(ours), pictures.label_image(answer, 21))
    assert np.array_equal(drawn(theirs), pictures.label_image(reference, 21))


def test_a_candidate_without_an_output_of_that_shape_is_left_out() -> None:
    labels = labelled((100, 100))
    whole = {"labels": labels, "patch_logits": np.zeros((21, 2, 2), np.float32)}
    row = row_of(
        head("voc2012_linear"), whole,
        smaller=whole | {"labels": labels[:5]}, partly={"labels": labels}, ours=whole,
    )  # fmt: skip
    assert [picture.title for picture in row] == ["PyTorch", "ours", "Where they differ"]


@pytest.mark.parametrize(
    ("shares", "height", "lines"),
    [
        (
            (0.5, 0.125, 1.25, -0.5, np.nan, 0.25),
            110,
            [
                (16, "260.0", 12, "&lt;owl&gt; 125.0%"),
                (38, "130.0", 34, "cat 50.0%"),
                (60, "65.0", 56, "ant 25.0%"),
                (82, "32.5", 78, "dog 12.5%"),
                (104, "0.0", 100, "fox -50.0%"),
            ],
        ),
        ((0.0, 1.0), 44, [(16, "260.0", 12, "dog 100.0%"), (38, "0.0", 34, "cat 0.0%")]),
        ((np.nan, np.inf), 44, [(16, "0.0", 12, "dog inf%"), (38, "0.0", 34, "cat nan%")]),
    ],
)
def test_bars_of_the_five_best_classes(shares: Sequence[float], height: int, lines: Sequence[Any]) -> None:
    of = head("logreg", classes=ANIMALS[: len(shares)])
    probabilities = np.array(shares, np.float32)
    theirs, ours = row_of(of, {"probabilities": probabilities}, ours={"probabilities": probabilities})
    expected = f'<svg xmlns="http://www.w3.org/2000/svg" width="260" height="{height}" viewBox="0 0 260 {height}">'
    for bar_y, width, text_y, text in lines:
        expected += f'<rect x="0" y="{bar_y}" width="{width}" height="3" fill="#5b8dd9"/>'
        expected += f'<text x="0" y="{text_y}" font-size="12" font-family="sans-serif" fill="#777">{text}</text>'
    assert theirs.data.decode() == f"{expected}</svg>"
    assert ours == Picture(
        title="ours", caption="the most probable classes", data=theirs.data, media_type="image/svg+xml"
    )


@pytest.mark.parametrize(("width", "shown"), [(448, 448), (449, 448), (897, 448), (100, 100)])
def test_no_side_of_a_picture_is_longer_than_448_pixels(width: int, shown: int) -> None:
    (picture,) = row_of(head("nyu_linear"), {"depth": np.ones((4, width), np.float32)})
    assert drawn(picture).shape[1] == shown

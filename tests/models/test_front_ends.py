"""Front ends of image models: which there are, what they make of encoded images, and what they refuse."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.errors import InputRefused, UsageError
from dinoexport.family import FrontEnd
from dinoexport.images import ImageError
from dinoexport.models.dinov2 import serving
from dinoexport.models.dinov2.heads.serving import size_of
from dinoexport.spec import Dim, Graph, silent
from tests.image_inputs import taken
from tests.models.test_heads import model_of
from tests.pictures import noise, saved

MEANING = "an image file: JPEG, PNG, WEBP, BMP, TIFF"


def graph(height: tuple[int, int] = (14, 518), width: tuple[int, int] = (14, 518)) -> Graph:
    return Graph(
        name="model",
        inputs=(),
        outputs=(),
        dims=(
            Dim(name="batch", min=1, opt=1, max=8),
            Dim(name="height", min=height[0], opt=height[0], max=height[1], step=14),
            Dim(name="width", min=width[0], opt=width[0], max=width[1], step=14),
        ),
    )


def png(height: int, width: int) -> bytes:
    stored = BytesIO()
    noise(width, height).save(stored, "PNG")
    return stored.getvalue()


@pytest.mark.parametrize(
    ("strict", "sides", "there"),
    [
        # A crop of 230 x 250 pixels, of which whole patches are 224 x 238.
        (False, ((230, 230), (250, 250)), True),
        (False, ((231, 300), (14, 518)), False),
        (False, ((14, 229), (14, 518)), False),
        (False, ((14, 518), (251, 300)), False),
        (False, ((14, 518), (14, 249)), False),
        (True, ((224, 224), (238, 238)), True),
        (True, ((14, 223), (14, 518)), False),
        (True, ((14, 518), (239, 518)), False),
    ],
)
def test_whole_images_are_taken_where_the_graph_takes_the_crop(strict: bool, sides: Any, there: bool) -> None:
    asked = taken(as_bytes=False, strict=strict, preprocess={"crop": (230, 250)})
    ends = serving.front_ends(graph(*sides), asked, None, progress=silent)
    expected = FrontEnd(name="images", graph="model", meaning=MEANING, settings={})
    assert ends == ((expected,) if there else ())


@pytest.mark.parametrize(("channels", "count"), [(1, 0), (3, 1), (4, 0)])
def test_images_have_three_channels(channels: int, count: int) -> None:
    """No encoded image has the channels of another model."""
    asked = taken(as_bytes=True, in_chans=channels)
    assert len(serving.front_ends(graph(), asked, None, progress=silent)) == count


def test_sizes_of_samples(tmp_path: Path) -> None:
    """Of images alone, in their order; neither a folder with an image's name nor other files are counted."""
    saved(tmp_path / "a.png", noise(280, 140))
    (tmp_path / "b.png").mkdir()
    saved(tmp_path / "b.png" / "c.JPEG", noise(280, 140))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "d.jpg").write_bytes(b"no image")
    told: list[tuple[str, int, int]] = []
    ends = serving.front_ends(graph(), taken(as_bytes=False), tmp_path, progress=lambda *what: told.append(what))
    sized = FrontEnd(name="sized_images", graph="model", meaning=MEANING, settings={"sizes": [(140, 280)]})
    assert [end.name for end in ends] == ["images", "sized_images"] and ends[1] == sized
    assert told == [("reading sizes", i, 3) for i in (1, 2, 3)]
    with pytest.raises(UsageError, match="There is no folder"):
        serving.front_ends(graph(), taken(as_bytes=False), tmp_path / "nowhere", progress=silent)


def test_sizes_that_the_user_names() -> None:
    sizes = [{"height": 280, "width": 140}, {"height": 140, "width": 280}, {"height": 280, "width": 140}]
    named = serving.of_sizes(graph(), sizes)
    assert named == FrontEnd(
        name="sized_images", graph="model", meaning=MEANING, settings={"sizes": [(140, 280), (280, 140)]}
    )
    assert model_of("tiny_heads").of_sizes(sizes) == named


SIDE = Dim(name="height", min=14, opt=518, max=518, step=14)


@pytest.mark.parametrize(
    ("others", "sizes"),
    [
        # A tenth in one side costs 0.0953; a size more must save a hundredth for each image.
        (11, [(140, 140)]),
        (12, [(140, 140), (154, 140)]),
        (100, [(140, 140), (154, 140)]),
    ],
)
def test_a_further_size_must_be_worth_it(others: int, sizes: list[tuple[int, int]]) -> None:
    assert serving.sizes_for([(140, 140)] * 100 + [(154, 140)] * others, SIDE, SIDE) == sizes


def test_few_images_far_away_get_no_size_of_their_own() -> None:
    """Eight of a thousand, at a distance of one, save less than a hundredth for each image."""
    real = [(140, 140)] * 1000 + [(140, 378)] * 8 + [(378, 140)] * 8
    assert serving.sizes_for(real, SIDE, SIDE) == [(140, 140)]


def test_eight_sizes_at_most() -> None:
    real = [(28 * i, 28 * i) for i in range(1, 13)]
    assert len(serving.sizes_for(real, SIDE, SIDE)) == 8 and serving.sizes_for([], SIDE, SIDE) == []


@pytest.mark.parametrize(
    ("real", "legal"),
    [
        ((518, 518), (518, 518)),
        ((517, 27), (504, 14)),
        ((5, 300), (14, 294)),
        ((1036, 518), (518, 252)),  # 259 pixels are 18.5 patches
        ((518, 5180), (42, 518)),
    ],
)
def test_a_legal_size(real: tuple[int, int], legal: tuple[int, int]) -> None:
    """Scaled down until it fits, then whole patches, at least one."""
    assert serving.sizes_for([real], SIDE, SIDE) == [legal]


@pytest.mark.parametrize(
    ("size", "sizes", "nearest"),
    [
        ((100, 400), [(100, 300), (400, 400)], (100, 300)),
        ((400, 100), [(300, 100), (400, 400)], (300, 100)),
        ((100, 300), [(100, 330), (250, 300)], (100, 330)),
        ((300, 100), [(330, 100), (300, 250)], (330, 100)),
        # Half as large and twice as large are equally far: the smaller one.
        ((200, 100), [(400, 100), (100, 100)], (100, 100)),
    ],
)
def test_the_size_that_needs_the_least_resizing(size: Any, sizes: Any, nearest: Any) -> None:
    assert serving.nearest(size, sizes) == nearest


def test_images_of_one_request_are_one_batch() -> None:
    """Each is resized to the nearest size; of two sizes, and of what is no image, the request is refused."""
    settings = {"sizes": [[140, 140], [140, 280]]}
    asked = taken(as_bytes=True)
    inputs = serving.prepare("sized_images", settings, [png(150, 150), png(100, 110)], asked)
    assert inputs["images"].shape == (2, 140, 140, 3)
    with pytest.raises(InputRefused) as refused:
        serving.prepare("sized_images", settings, [png(150, 300), png(150, 150)], asked)
    assert (refused.value.message, refused.value.next_step) == (
        "The images of one request go to different sizes: 140x140, 140x280.", "Send each in its own request.",
    )  # fmt: skip
    with pytest.raises(ImageError, match="image 2"):
        serving.prepare("images", {}, [png(30, 30), b"no image"], asked)


def test_whole_patches_of_a_strict_model() -> None:
    asked = taken(as_bytes=True, strict=True, preprocess={"crop": (230, 250)})
    assert serving.prepare("images", {}, [png(300, 300)], asked)["images"].shape == (1, 224, 238, 3)
    loose = taken(as_bytes=True, preprocess={"crop": (230, 250)})
    assert serving.prepare("images", {}, [png(300, 300)], loose)["images"].shape == (1, 230, 250, 3)


@pytest.mark.parametrize(
    ("photograph", "multiple", "shorter", "asked"),
    [
        ((300, 451), 1, None, (300, 451)),
        ((1000, 500), 1, None, (518, 259)),
        ((500, 1000), 1, None, (259, 518)),
        ((1000, 500), 14, None, (518, 252)),  # 259 pixels are 18.5 patches, and no more than fit
        ((300, 301), 14, None, (294, 308)),  # to the nearest multiple, 21.4 and 21.5
        ((490, 492), 14, 490, (490, 490)),  # 35.1 patches: the nearest is exactly long enough
        ((260, 260), 14, 500, (504, 504)),  # 35.7 patches
        ((250, 250), 14, 505, (518, 518)),  # 36.07 patches would be too short
        ((100, 50), 14, 518, (518, 252)),
        ((2, 1036), 1, None, (1, 518)),
        ((14, 14), 14, None, (14, 14)),
    ],
)
def test_sizes_for_depth_and_labels(photograph: Any, multiple: int, shorter: int | None, asked: Any) -> None:
    settings = {"height_max": 518, "width_max": 518, "multiple": multiple, "shorter_side": shorter}
    assert size_of(*photograph, settings) == asked


@pytest.mark.parametrize(("photograph", "multiple"), [((1, 1200), 1), ((13, 518), 28), ((1036, 27), 14)])
def test_a_photograph_without_a_pixel_in_one_side_is_refused(photograph: tuple[int, int], multiple: int) -> None:
    settings = {"height_max": 518, "width_max": 518, "multiple": multiple, "shorter_side": None}
    with pytest.raises(UsageError) as refused:
        size_of(*photograph, settings)
    height, width = photograph
    assert refused.value.message == f"An image of {width}x{height} is too long and thin to resize."


def test_front_ends_of_heads(tmp_path: Path) -> None:
    """Depth and labels keep the photograph's size; a classifier takes what the backbone takes."""
    settings = {"height_max": 518, "width_max": 518, "multiple": 1, "shorter_side": None}
    (end,) = model_of("tiny_heads", "ade20k_ms", head={"kind": "ade20k_ms"}).front_ends(None, progress=silent)
    assert end == FrontEnd(name="images", graph="model", meaning=MEANING, settings=settings)
    (end,) = model_of("depth-anything-v2-vits").front_ends(None, progress=silent)
    assert (end.settings["multiple"], end.settings["shorter_side"]) == (14, 518)
    (end,) = model_of("tiny_heads", head={"kind": "linear"}).front_ends(None, progress=silent)
    assert end.settings == {}


def test_a_head_names_the_image_that_it_cannot_take() -> None:
    model = model_of("tiny_heads", head={"kind": "ade20k_ms"})
    (end,) = model.front_ends(None, progress=silent)
    with pytest.raises(ImageError, match="image 2"):
        model.prepare("images", end.settings, [png(30, 30), b"no image"])
    with pytest.raises(InputRefused) as refused:
        model.prepare("images", end.settings, [png(30, 40), png(30, 30)])
    assert refused.value.message == "The images of one request go to different sizes: 30x30, 30x40."
    inputs = model.prepare("images", end.settings, [png(30, 40), png(30, 40)])
    assert set(inputs) == {"pixels"} and inputs["pixels"].shape == (2, 3, 30, 40)
    carried = model.prepare("images_png", {**end.settings, "answers": "png"}, [png(30, 40)])
    assert carried["photograph_size"].tolist() == [[30, 40]]


def test_a_larger_photograph_is_made_smaller_by_cubic_interpolation() -> None:
    model = model_of("tiny_heads", head={"kind": "ade20k_ms"}, graph={"input": "images"})
    (end,) = model.front_ends(None, progress=silent)
    photograph = png(540, 60)
    (shown,) = model.prepare("images", end.settings, [photograph])["images"]
    expected = Image.open(BytesIO(photograph)).resize((57, 518), Image.Resampling.BICUBIC)
    assert np.array_equal(shown, np.asarray(expected))

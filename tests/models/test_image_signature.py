"""The signature of an image model's graph, what its tables may hold, and how its tokens are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport import family
from dinoexport.config.recipe import Range, Recipe
from dinoexport.errors import UsageError
from dinoexport.family import Example
from dinoexport.models.dinov2.config import Architecture
from dinoexport.models.dinov2.model import Dinov2Model
from dinoexport.models.dinov2.transformers_interface import TransformersModel
from dinoexport.spec import Dim, Precision, Tensor, silent
from tests.models.test_heads import calls_of

MODEL: dict[str, Any] = {"embed_dim": 8, "depth": 3, "num_heads": 2, "feed_forward": "mlp", "register_count": 0}
RGB_PIXELS = "RGB scaled to 0..1, minus mean (0.485, 0.456, 0.406), divided by deviation (0.229, 0.224, 0.225)"
RGB_BYTES = "RGB bytes 0..255; the graph normalises them with ImageNet's mean and deviation"
FP16 = {"precision": Precision.FP16}


def recipe_of(model: dict[str, Any] | None = None, **tables: Any) -> Recipe:
    arch = MODEL | (model or {})
    patch = arch.get("patch_size", 14)
    side = Range(min=patch, opt=2 * patch, max=5 * patch)
    profile = {"batch": Range(min=1, opt=1, max=2), "height": side, "width": side}
    return Recipe(name="tiny", family="dinov2", validation="tiny_cases", model=arch, **({"profile": profile} | tables))


def model_of(model: dict[str, Any] | None = None, **tables: Any) -> Any:
    return family.find("dinov2").model(recipe_of(model, **tables))


def refused(model: dict[str, Any] | None = None, **tables: Any) -> tuple[str, str]:
    with pytest.raises(UsageError) as error:
        model_of(model, **tables)
    return error.value.message, error.value.next_step


def tokens(name: str, meaning: str, *shape: int | str) -> Tensor:
    return Tensor(name=name, dtype="float32", shape=("batch", *shape), meaning=f"{meaning}, after the final norm")


def test_outputs_of_blocks_and_of_the_model() -> None:
    """The last block's have no prefix; registers are those of the last block alone."""
    (graph,) = model_of({"register_count": 4}, graph={"blocks": [1, 0, 1]}).graphs
    assert graph.outputs == (
        tokens("block_0_class_token", "class token of block 0", 8),
        tokens("block_0_patch_tokens", "patch tokens of block 0, row by row", "patches", 8),
        tokens("block_1_class_token", "class token of block 1", 8),
        tokens("block_1_patch_tokens", "patch tokens of block 1, row by row", "patches", 8),
        tokens("class_token", "class token of the last block", 8),
        tokens("register_tokens", "register tokens", 4, 8),
        tokens("patch_tokens", "patch tokens of the last block, row by row", "patches", 8),
    )
    model = model_of({"register_count": 4}, graph={"last_blocks": 2})
    assert model.token_outputs == ((1, "block_1_"), (2, "block_2_"), (2, ""))
    stream = np.arange(2 * 9 * 8, dtype=np.float32).reshape(2, 9, 8)
    named = model.named({1: stream, 2: stream + 1})
    assert {name: array.shape for name, array in named.items()} == {
        "block_1_class_token": (2, 8), "block_1_patch_tokens": (2, 4, 8),
        "block_2_class_token": (2, 8), "block_2_patch_tokens": (2, 4, 8),
        "class_token": (2, 8), "register_tokens": (2, 4, 8), "patch_tokens": (2, 4, 8),
    }  # fmt: skip
    assert np.array_equal(named["block_1_class_token"], stream[:, 0])
    assert np.array_equal(named["register_tokens"], stream[:, 1:5] + 1)
    assert np.array_equal(named["patch_tokens"], stream[:, 5:] + 1)
    assert set(model_of().named({2: stream})) == {"class_token", "patch_tokens"}


@pytest.mark.parametrize(
    ("model", "tables", "image"),
    [
        ({}, {}, Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning=RGB_PIXELS)),
        (
            {"in_chans": 1},
            {"preprocess": {"mean": [0.5], "std": [0.25]}},
            Tensor(
                name="pixels", dtype="float32", shape=("batch", 1, "height", "width"),
                meaning="1 channels scaled to 0..1, minus mean (0.5,), divided by deviation (0.25,)",
            ),
        ),
        (
            {},
            {"graph": {"input": "images"}},
            Tensor(name="images", dtype="uint8", shape=("batch", "height", "width", 3), meaning=RGB_BYTES),
        ),
        (
            {},
            {"graph": {"input": "images"}, "preprocess": {"mean": [0.5, 0.5, 0.5]}},
            Tensor(
                name="images", dtype="uint8", shape=("batch", "height", "width", 3),
                meaning="bytes 0..255; the graph scales them to 0..1, takes mean (0.5, 0.5, 0.5) off and divides by "
                "deviation (0.229, 0.224, 0.225)",
            ),
        ),
    ],
)  # fmt: skip
def test_the_input(model: dict[str, Any], tables: dict[str, Any], image: Tensor) -> None:
    (graph,) = model_of(model, **tables).graphs
    assert graph.inputs == (image,)


def test_further_channels_repeat_imagenets_mean() -> None:
    preprocessing = model_of({"in_chans": 5}).preprocessing
    assert preprocessing.mean == (0.485, 0.456, 0.406, 0.485, 0.456)
    assert preprocessing.std == (0.229, 0.224, 0.225, 0.229, 0.224)
    assert refused({"in_chans": 4}, graph={"input": "images"})[0] == (
        "recipe tiny, [preprocess]: mean and std have 3 channels, [model] in_chans is 4."
    )
    with pytest.raises(UsageError, match="takes images of 5 channels; no image file has them"):
        model_of({"in_chans": 5}).cases_from(Path(), progress=silent)


@pytest.mark.parametrize(("sizes", "multiple"), [("crop", 1), ("strict", 14)])
def test_dimensions(sizes: str, multiple: int) -> None:
    (graph,) = model_of(graph={"sizes": sizes}).graphs
    side = {"min": 14, "opt": 28, "max": 70, "multiple_of": multiple, "step": 14}
    assert graph.dims == (
        Dim(name="batch", min=1, opt=1, max=2), Dim(name="height", **side), Dim(name="width", **side),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "tables", "step"),
    [
        ("ade20k_ms", {}, 1),
        ("nyu_linear", {}, 1),
        ("nyu_linear", {"graph": {"sizes": "strict"}}, 14),
        ("linear", {}, 14),
        ("linear", {"graph": {"sizes": "strict"}}, 14),
    ],
)
def test_every_pixel_of_a_padded_image_has_an_answer(head: str, tables: dict[str, Any], step: int) -> None:
    (graph,) = model_of({"depth": 4}, head={"kind": head}, **tables).graphs
    assert [dim.step for dim in graph.dims] == [1, step, step]


def test_profiles_begin_and_end_at_whole_patches() -> None:
    side = Range(min=16, opt=32, max=90)
    profile = {"batch": Range(min=1, opt=1, max=2), "height": Range(min=16, opt=32, max=80), "width": side}
    assert refused({"patch_size": 16}, profile=profile) == (
        "recipe tiny, [profile]: width 16..90 must begin and end at multiples of 16.",
        "Patches are 16 pixels a side; 16, 256 and 1168 are legal.",
    )
    profile["height"] = Range(min=15, opt=32, max=80)
    assert "height 15..80, width 16..90 must" in refused({"patch_size": 16}, profile=profile)[0]


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"blocks": [3]}, "the model has blocks 0 to 2; there is no [3]"),
        ({"blocks": [0, -1]}, "the model has blocks 0 to 2; there is no [-1]"),
        ({"last_blocks": 4}, "the model has blocks 0 to 2; there is no 4"),
        ({"fp32": ["head"]}, "fp32: there is no part 'head'."),
        ({"fp32": ["blocks.3"]}, "fp32: there is no part 'blocks.3'."),
    ],
)
def test_parts_that_the_model_does_not_have(graph: dict[str, Any], words: str) -> None:
    assert refused(graph=graph, **FP16)[0].startswith(f"recipe tiny, [graph]: {words}")


def test_the_blocks_that_there_are() -> None:
    for graph, blocks in (({"blocks": [2, 0]}, [0, 2, 2]), ({"last_blocks": 3}, [0, 1, 2, 2]), ({}, [2])):
        assert [block for block, _ in model_of(graph=graph).token_outputs] == blocks


def test_a_head_keeps_the_familys_own_interface() -> None:
    transformers = {"interface": "transformers"}
    assert isinstance(model_of(graph=transformers), TransformersModel)
    assert type(model_of(head={"kind": "linear"}, graph=transformers).backbone) is Dinov2Model


@pytest.mark.parametrize(("depth", "kind"), [(3, "ade20k_ms"), (3, "linear4"), (3, "nyu_dpt"), (2, "nyu_linear4")])
def test_a_head_reads_as_many_blocks_as_it_was_trained_on(depth: int, kind: str) -> None:
    message, next_step = refused({"depth": depth}, head={"kind": kind})
    assert message == f"recipe tiny, [head]: {kind} reads 4 blocks, the model has {depth}."
    assert next_step == "Choose a head that reads one block."
    assert model_of({"depth": 4}, head={"kind": kind}).head.kind.layers == 4


@pytest.mark.parametrize(
    ("kind", "tables", "promotable"),
    [
        ("nyu_dpt", FP16, ("head", "residual", "norms", "softmax", *(f"blocks.{i}" for i in range(4)))),
        ("nyu_linear", FP16, ("residual", "norms", "softmax", *(f"blocks.{i}" for i in range(4)))),
        ("nyu_dpt", {}, ()),
        ("nyu_linear", {}, ()),
    ],
)
def test_what_may_go_back_to_fp32(kind: str, tables: dict[str, Any], promotable: tuple[str, ...]) -> None:
    """A DPT head first: it costs least."""
    assert model_of({"depth": 4}, head={"kind": kind}, **tables).promotable == promotable


@pytest.mark.parametrize(
    ("given", "parts", "fp32", "residual"),
    [
        ((), ("head",), ["head"], "fp16"),
        ((), ("norms", "residual"), ["norms"], "fp32"),
        ((), ("blocks.1", "head", "softmax"), ["softmax", "blocks.1", "head"], "fp16"),
        (("head",), ("norms",), ["norms", "head"], "fp16"),
        (("norms",), (), ["norms"], "fp16"),
    ],
)
def test_parts_in_fp32(given: tuple[str, ...], parts: tuple[str, ...], fp32: list[str], residual: str) -> None:
    """In the order of the model, the head at the end; parts that were there stay."""
    model = model_of({"depth": 4}, head={"kind": "nyu_dpt"}, graph={"fp32": given}, **FP16)
    table = model.promoted(parts)
    assert (list(table["fp32"]), table["residual"]) == (fp32, residual)


@pytest.mark.parametrize(
    ("tokens", "scopes"),
    [
        (False, ["pad", "stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]),
        (True, ["pad", "stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "head"]),
    ],
)
def test_the_pieces_of_a_head(tokens: bool, scopes: list[str]) -> None:
    calls = calls_of(model_of({"depth": 4}, head={"kind": "ade20k_ms", "tokens": tokens}))
    assert [call.scope for call in calls] == scopes


@pytest.mark.parametrize(
    ("head", "image", "example"),
    [
        (None, "pixels", Example(dtype="float32", shape=(2, 3, 238, 266))),
        (None, "images", Example(dtype="uint8", shape=(2, 238, 266, 3))),
        # A few pixels smaller where the head pads.
        ("ade20k_ms", "pixels", Example(dtype="float32", shape=(2, 3, 234, 260))),
        ("ade20k_ms", "images", Example(dtype="uint8", shape=(2, 234, 260, 3))),
    ],
)
def test_what_the_first_piece_is_traced_with(head: str | None, image: str, example: Example) -> None:
    """17 x 19 patches: neither native nor square."""
    tables = {"head": {"kind": head}} if head else {}
    first, *_ = calls_of(model_of({"depth": 4}, graph={"input": image}, **tables))
    assert dict(first.piece.example_inputs) == {image: example} and first.inputs == (image,)
    assert first.scope == ("pad" if head else "stem")


def test_names_that_the_family_gives() -> None:
    model = model_of()
    assert [model.fitted_head(kind) for kind in ("linear", "logreg", "knn")] == ["probe", "logreg", "knn"]
    assert dict(model.fits) == {
        "logreg": (("class_token", "as is"),),
        "linear": (("class_token", "as is"), ("patch_tokens", "mean")),
        "knn": (("class_token", "as is"),),
    }
    assert dict(model_of(graph={"interface": "transformers"}).fits) == {}


@pytest.mark.parametrize(("registers", "offset", "antialias", "border"), [(0, 0.1, False, 2), (4, 0.0, True, 0)])
def test_what_published_models_were_trained_with(registers: int, offset: float, antialias: bool, border: int) -> None:
    """Models with one register or more are antialiased, without an offset."""
    for count in {registers, min(registers, 1)}:
        arch = Architecture.model_validate(MODEL | {"register_count": count})
        assert (float(arch.offset), arch.antialias, arch.table_border) == (offset, antialias, border)
        assert (arch.position_side, arch.native_size, arch.in_chans, arch.patch_size) == (37, 518, 3, 14)

"""The traced modules and the reference, which share no code, give the same answers of models of eight channels.

Official numbers pin the reference at real widths in `test_dinov2.py` and `test_heads.py`. Here PyTorch runs both on a
few patches, so that a change of one of them is seen in milliseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinoexport import family
from dinoexport.config.recipe import Range, Recipe
from dinoexport.models.dinov2.heads import reference
from dinoexport.models.dinov2.heads.graph import FittedNeighbours, Pad, Segmentation
from dinoexport.spec import Array, Precision, silent

SEED = 11
LIMIT = 1e-5
MODEL = {
    "embed_dim": 8, "depth": 4, "num_heads": 2, "feed_forward": "mlp", "register_count": 0, "position_side": 3,
}  # fmt: skip
CLASSES = ("cat", "dog", "owl")


# As they are before the quick mode takes a call of one for a whole model, which it skips.
_PRODUCTS = {name: getattr(F, name) for name in ("linear", "scaled_dot_product_attention")}


@pytest.fixture(autouse=True)
def _products_of_eight_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, product in _PRODUCTS.items():
        monkeypatch.setattr(F, name, product)


def model_of(model: Mapping[str, Any], **tables: Any) -> Any:
    side = Range(min=14, opt=28, max=70)
    recipe = Recipe(
        name="tiny", family="dinov2", validation="tiny_cases", model={**MODEL, **model},
        profile={"batch": Range(min=1, opt=1, max=2), "height": side, "width": side}, **tables,
    )  # fmt: skip
    return family.find("dinov2").model(recipe)


def traced(model: Any, read: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The pieces of the graph one after the other, each with its own weights."""
    values = {name: torch.from_numpy(array) for name, array in inputs.items()}
    (graph,) = model.graphs
    with torch.inference_mode():
        for call in model.calls(graph, read):
            module = call.piece.module
            weights = {name: torch.from_numpy(np.ascontiguousarray(w.read())) for name, w in call.weights.items()}
            missing, unexpected = module.load_state_dict(weights, strict=False)
            parameters = dict(module.named_parameters())
            assert not unexpected and not {*missing} & parameters.keys()
            assert not any(weight.requires_grad for weight in parameters.values())
            found = module(*(values[name] for name in call.inputs))
            values |= zip(call.outputs, found if isinstance(found, tuple) else (found,), strict=True)
    return {tensor.name: values[tensor.name].numpy() for tensor in graph.outputs}


def same(model: Any, *inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The reference's answer to the first inputs, after every output of the graph was compared with it for all."""
    read = functools.cache(lambda name: model.synthetic(name, SEED))
    answers: list[dict[str, Array]] = model.reference(read, inputs, precision=Precision.FP32, progress=silent)
    for given, expected in zip(inputs, answers, strict=True):
        for name, array in traced(model, read, given).items():
            theirs = expected[name]
            assert array.shape == theirs.shape and array.dtype == theirs.dtype, name
            if name in ("labels", "class_index"):
                decided = expected[f"{name}/lead"] > LIMIT
                assert decided.mean() > 0.9 and np.array_equal(array[decided], theirs[decided]), name
            else:
                off = np.linalg.norm(array.astype(np.float64) - theirs) / np.linalg.norm(theirs)
                assert off <= LIMIT and np.ptp(theirs) > 0, (name, off)
    return answers[0]


def pixels(height: int, width: int) -> dict[str, Array]:
    return {"pixels": np.random.RandomState(SEED).standard_normal((2, 3, height, width)).astype(np.float32)}


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ({}, (28, 42)),
        ({}, (42, 42)),  # the table's own grid
        ({}, (45, 31)),  # cropped
        ({"feed_forward": "swiglu", "register_count": 2}, (28, 42)),
        ({"interpolate_antialias": True, "interpolate_offset": 0.0}, (28, 14)),
        ({"interpolate_antialias": True, "interpolate_offset": 0.1, "register_count": 1}, (56, 28)),
        # Offsets of two tenths, and of thirds and elevenths, which are no whole number of tenths.
        ({"interpolate_offset": 0.2}, (28, 42)),
        ({"interpolate_offset": 1 / 3}, (28, 42)),
        ({"interpolate_offset": 1 / 11}, (28, 42)),
        ({"qkv_bias": False, "layer_scale": False, "activation": "gelu_tanh"}, (28, 28)),
        ({"activation": "relu", "layer_norm_eps": 1e-3}, (14, 28)),
    ],
)
def test_backbones(model: dict[str, Any], size: tuple[int, int]) -> None:
    made = model_of(model, graph={"blocks": [1]})
    found = same(made, pixels(*size))
    assert found["patch_tokens"].shape == (2, (size[0] // 14) * (size[1] // 14), 8)
    assert not np.allclose(found["block_1_class_token"], found["class_token"])
    assert not {"stem_tokens", "blocks.0_tokens"} & found.keys(), "streams are given where they are asked for only"


def test_a_backbone_of_bytes() -> None:
    images = np.random.RandomState(SEED).randint(0, 256, (2, 28, 42, 3), dtype=np.uint8)
    same(model_of({}, graph={"input": "images"}), {"images": images})


def test_a_backbone_with_transformers_names() -> None:
    model = model_of({"register_count": 2}, graph={"interface": "transformers"})
    found = same(model, {"pixel_values": pixels(28, 42)["pixels"]})
    assert found["last_hidden_state"].shape == (2, 9, 8)


def test_streams_between_the_blocks() -> None:
    """After the stem and after each block; the last one, normalised, is the answer."""
    model = model_of({})
    told: list[tuple[int, int]] = []
    (found,) = model.reference(
        lambda name: model.synthetic(name, SEED), [pixels(28, 42)], precision=Precision.FP32, inside=True,
        progress=lambda _, done, total: told.append((done, total)),
    )  # fmt: skip
    streams = [found[name] for name in ("stem_tokens", *(f"blocks.{i}_tokens" for i in range(4)))]
    assert all(stream.shape == (2, 7, 8) for stream in streams) and told == [(i, 4) for i in range(1, 5)]
    norm = [torch.from_numpy(model.synthetic(f"norm.{part}", SEED)) for part in ("weight", "bias")]
    last = F.layer_norm(torch.from_numpy(streams[-1]), (8,), *norm, 1e-6).numpy()
    np.testing.assert_allclose(found["class_token"], last[:, 0], rtol=1e-5, atol=1e-6)


SHARED: dict[str, Any] = {
    "dim": 2, "prefix_count": 1, "layers": 1, "after_norm": False, "pads": True, "from_bytes": False,
}  # fmt: skip


def test_neighbours_of_a_short_class_token() -> None:
    """Its direction is (0.6, 0.8), so that the cosines differ by 0.2, and e to the 0.2 / T is 3."""
    head = FittedNeighbours(bank=3, neighbours=2, temperature=0.2 / np.log(3), class_count=2, **SHARED)
    bank, votes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).half(), torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    head.load_state_dict({"bank_ND": bank, "votes_NK": votes})
    probabilities, best = head(torch.tensor([[[0.03, 0.04], [7, 7]]]))
    np.testing.assert_allclose(probabilities.numpy(), [[0.25, 0.75]], rtol=1e-5)
    assert best.tolist() == [1] and best.dtype == torch.int32


def test_the_grid_of_a_trace_is_one_reshape(monkeypatch: pytest.MonkeyPatch) -> None:
    """To (0, D, h, w), where 0 copies the batch."""
    asked: list[Any] = []

    def symbolic(operator: str, inputs: Any, *, dtype: torch.dtype, shape: Any, version: int) -> torch.Tensor:
        asked.append((operator, inputs[0].tolist(), inputs[1].tolist(), inputs[1].dtype, dtype, shape, version))
        return inputs[0]

    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.onnx.ops, "symbolic", symbolic)
    tokens = torch.arange(14.0).reshape(1, 7, 2)
    Segmentation(class_count=1, width=2, **SHARED).patch_map(tokens, 2, 3)
    rows = [[[2.0, 4, 6, 8, 10, 12], [3, 5, 7, 9, 11, 13]]]
    assert asked == [("Reshape", rows, [0, 2, 2, 3], torch.int64, torch.float32, (1, 2, 2, 3), 20)]


HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear4": {},
    "nyu_linear": {},
    "kitti_linear4": {},
    "nyu_dpt": {},
    "voc2012_linear": {},
    "voc2012_ms": {"tokens": True},
    "logreg": {"classes": CLASSES},
    "probe": {"classes": CLASSES},
    "knn": {"classes": CLASSES, "bank": 12, "neighbours": 5, "temperature": 0.07},
    "depth_anything": {"features": 8, "channels": (2, 3, 4, 5)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads(kind: str) -> None:
    """A released head for pixels or patches of an image that is padded around; the others of whole patches."""
    strict = kind == "depth_anything"
    model = model_of({}, head={"kind": kind, **HEADS[kind]}, graph={"sizes": "strict"} if strict else {})
    # The DPT head is 256 wide whatever the backbone, so it gets three patches only, and four for even sides.
    size = (11, 37) if kind == "nyu_dpt" else (25, 37) if model.head.pads else (28, 42)
    found = same(model, pixels(*size), *([pixels(28, 28)] if kind == "nyu_dpt" else []))
    assert not {"stem_tokens", "blocks.0_tokens"} & found.keys(), "streams are given where they are asked for only"
    if "labels" in found:
        logits = F.interpolate(torch.from_numpy(found["patch_logits"]), size=size, mode="bilinear").numpy()
        best = np.sort(logits, axis=1)
        np.testing.assert_allclose(found["labels/lead"], best[:, -1] - best[:, -2], atol=1e-5)
    if "class_index" in found:
        best = np.sort(found["probabilities"], axis=1)
        np.testing.assert_allclose(found["class_index/lead"], best[:, -1] - best[:, -2], atol=1e-6)
    if "probabilities" in found:
        np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1, rtol=1e-5)


def test_a_metric_depth_anything() -> None:
    table = {"kind": "depth_anything", "max_depth": 20.0, **HEADS["depth_anything"]}
    depth = same(model_of({}, head=table, graph={"sizes": "strict"}), pixels(14, 28))["depth"]
    assert depth.shape == (2, 14, 28) and depth.min() > 0 and depth.max() < 20


@pytest.mark.parametrize("size", [(15, 27), (29, 14), (27, 41)])
def test_heads_of_images_near_whole_patches(size: tuple[int, int]) -> None:
    """One pixel more or less than patches have, of normalised pixels and of bytes."""
    same(model_of({}, head={"kind": "nyu_linear"}), pixels(*size))
    images = np.random.RandomState(SEED).randint(0, 256, (2, *size, 3), dtype=np.uint8)
    same(model_of({}, head={"kind": "voc2012_linear"}, graph={"input": "images"}), {"images": images})


def test_two_classes_are_enough() -> None:
    same(model_of({}, head={"kind": "logreg", "classes": CLASSES[:2]}), pixels(14, 28))


@pytest.mark.parametrize(("kind", "exact"), [("nyu_linear", False), ("depth_anything", True)])
def test_what_a_head_computes_in_beside_an_fp16_backbone(kind: str, exact: bool) -> None:
    """A DPT head in fp16 too, so that each of its numbers is one of fp16; a linear head in fp32."""
    sizes = {"sizes": "strict"} if kind == "depth_anything" else {}
    model = model_of({}, head={"kind": kind, **HEADS[kind]}, graph=sizes)
    (found,) = model.reference(
        lambda name: model.synthetic(name, SEED), [pixels(14, 28)], precision=Precision.FP16, progress=silent
    )
    assert np.array_equal(found["depth"], found["depth"].astype(np.float16)) == exact


def test_heads_of_backbones_with_registers() -> None:
    for kind in ("linear4", "probe", "knn"):
        same(model_of({"register_count": 2}, head={"kind": kind, **HEADS[kind]}), pixels(28, 42))


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [((28, 42), (0, 0), (0, 0)), ((27, 41), (0, 0), (1, 1)), ((25, 37), (1, 2), (2, 3)), ((15, 14), (6, 0), (7, 0))],
)
def test_padding(size: tuple[int, int], before: tuple[int, int], after: tuple[int, int]) -> None:
    """Zeros around the image, the odd one right and below; of bytes, after normalising."""
    image = torch.from_numpy(pixels(*size)["pixels"])
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), *zip(before, after, strict=True)))
    assert np.array_equal(reference.padded(image).numpy(), expected)
    assert np.array_equal(Pad()(image).numpy(), expected)
    images = np.random.RandomState(SEED).randint(0, 256, (1, *size, 3), dtype=np.uint8)
    shown = (images / 255 - np.array([0.5, 0.25, 0.125])) / np.array([0.25, 0.5, 1.0])
    whole = np.pad(shown.transpose(0, 3, 1, 2), ((0, 0), (0, 0), *zip(before, after, strict=True)))
    found = Pad(mean=(0.5, 0.25, 0.125), std=(0.25, 0.5, 1.0))(torch.from_numpy(images))
    np.testing.assert_allclose(found.numpy(), whole, atol=1e-5)

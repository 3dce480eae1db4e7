"""What the pieces of an image model's graph are made with, by its precision and by the parts that stay in fp32."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport.family import Call, Example
from dinoexport.spec import Precision
from tests.models.test_heads_kinds import DEPTH_ANYTHING
from tests.models.test_image_signature import model_of

FP16 = {"precision": Precision.FP16}
HALF, WHOLE = "float16", "float32"
SIZES = {"depth_anything": "strict"}


def calls_of(model: Any) -> list[Call]:
    (graph,) = model.graphs
    return list(model.calls(graph, pytest.fail))


@pytest.mark.parametrize(
    ("tables", "residual", "first", "second"),
    [
        ({}, WHOLE, (WHOLE,) * 3, (WHOLE,) * 3),
        ({"graph": {"residual": "fp16", "fp32": ["blocks.1"]}}, WHOLE, (WHOLE,) * 3, (WHOLE,) * 3),
        (FP16, HALF, (HALF,) * 3, (HALF,) * 3),
        (FP16 | {"graph": {"residual": "fp32"}}, WHOLE, (HALF, WHOLE, HALF), (HALF, WHOLE, HALF)),
        (FP16 | {"graph": {"fp32": ["norms"]}}, HALF, (HALF, WHOLE, HALF), (HALF, WHOLE, HALF)),
        (FP16 | {"graph": {"fp32": ["softmax", "blocks.1"]}}, HALF, (HALF, HALF, WHOLE), (WHOLE,) * 3),
    ],
)
def test_dtypes_of_blocks(tables: Any, residual: str, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Of products, norms and scores in the first and in the second block, and of the stream between them."""
    calls = {call.scope: call for call in calls_of(model_of(**tables))}
    assert list(calls) == ["stem", "blocks.0", "blocks.1", "blocks.2", "norm"]
    found = [
        tuple(calls[scope].piece.arguments[part] for part in ("body", "norms", "scores"))
        for scope in ("blocks.0", "blocks.1", "blocks.2")
    ]
    assert found == [first, second, first]
    assert calls["stem"].piece.arguments["residual"] == residual
    tokens = Example(dtype=residual, shape=(2, 5, 8))
    for scope in ("blocks.0", "blocks.1", "norm"):
        assert calls[scope].piece.example_inputs == {"tokens": tokens}
        assert calls[scope].piece.dynamic == {"tokens": {0: "batch", 1: "tokens"}}


@pytest.mark.parametrize(
    ("kind", "table", "size", "least"),
    [
        # 17 x 19 patches of 14 pixels; a head that pads takes four rows and six columns less.
        ("voc2012_ms", {}, (234, 260), {}),
        ("depth_anything", DEPTH_ANYTHING, (238, 266), {"height": 14, "width": 14}),
    ],
)
@pytest.mark.parametrize("bytes_in", [False, True])
def test_example_inputs_of_a_head(
    kind: str, table: dict[str, Any], size: tuple[int, int], least: dict[str, int], bytes_in: bool
) -> None:
    name, sides = ("images", {1: "height", 2: "width"}) if bytes_in else ("pixels", {2: "height", 3: "width"})
    example = Example(dtype="uint8", shape=(2, *size, 3)) if bytes_in else Example(dtype=WHOLE, shape=(2, 3, *size))
    model = model_of(
        {"depth": 4}, head={"kind": kind, **table}, graph={"input": name, "sizes": SIZES.get(kind, "crop")}
    )
    piece = calls_of(model)[-1].piece
    streams = {f"tokens_{i}": Example(dtype=WHOLE, shape=(2, 1 + 17 * 19, 8)) for i in range(4)}
    assert piece.example_inputs == {name: example, **streams}
    assert piece.dynamic == {name: {0: "batch", **sides}, **{key: {0: "batch", 1: "tokens"} for key in streams}}
    assert piece.least_sizes == least


def test_example_inputs_of_a_classifier() -> None:
    """The class token, two registers and the patches of four blocks; it needs no size of the image."""
    model = model_of({"register_count": 2, "depth": 4}, head={"kind": "linear4"}, **FP16)
    piece = calls_of(model)[-1].piece
    tokens = Example(dtype=HALF, shape=(2, 3 + 17 * 19, 8))
    assert piece.example_inputs == {f"tokens_{i}": tokens for i in range(4)}
    assert piece.dynamic == {f"tokens_{i}": {0: "batch", 1: "tokens"} for i in range(4)}


@pytest.mark.parametrize(
    ("kind", "tables", "body"),
    [
        ("depth_anything", {}, WHOLE),
        ("depth_anything", FP16, HALF),
        ("nyu_dpt", FP16, HALF),
        ("depth_anything", FP16 | {"graph": {"fp32": ["head"]}}, WHOLE),
        ("depth_anything", FP16 | {"graph": {"fp32": ["blocks.1"]}}, HALF),
    ],
)
def test_a_dpt_head_is_in_the_graph_s_precision(kind: str, tables: Any, body: str) -> None:
    head = {"kind": kind, **(DEPTH_ANYTHING if kind == "depth_anything" else {})}
    graph = {"sizes": SIZES.get(kind, "crop"), **tables.get("graph", {})}
    model = model_of({"depth": 4}, head=head, **{**tables, "graph": graph})
    assert calls_of(model)[-1].piece.arguments["body"] == body


def test_no_other_head_has_a_body() -> None:
    for kind in ("nyu_linear", "voc2012_linear", "linear"):
        assert "body" not in calls_of(model_of(head={"kind": kind}, **FP16))[-1].piece.arguments

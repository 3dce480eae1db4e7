"""Every runtime refuses what its graph does not promise to take, in words that say what would be taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport import family
from dinoexport.config.recipe import load
from dinoexport.errors import InputRefused, UsageError
from dinoexport.runtime import check_inputs
from dinoexport.spec import Dim, Graph, Tensor
from tests.properties import examples


def graph(*, multiple_of: int = 14) -> Graph:
    """An image model: batch of 1 to 4, sides of 14 to 70."""
    return Graph(
        name="model",
        inputs=(Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning="RGB, scaled"),),
        outputs=(),
        dims=(
            Dim(name="batch", min=1, opt=1, max=4),
            Dim(name="height", min=14, opt=28, max=70, multiple_of=multiple_of),
            Dim(name="width", min=14, opt=28, max=70, multiple_of=multiple_of),
        ),
    )


def pixels(*shape: int, dtype: Any = np.float32) -> dict[str, Any]:
    return {"pixels": np.zeros(shape, dtype)}


def refused(wanted: Graph, arrays: dict[str, Any]) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        check_inputs(wanted, arrays)
    assert isinstance(caught.value, UsageError)
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize("shape", [(1, 3, 14, 14), (4, 3, 70, 70), (2, 3, 28, 70), (1, 3, 70, 14)])
def test_what_is_promised_is_taken(shape: tuple[int, ...]) -> None:
    check_inputs(graph(), pixels(*shape))


@pytest.mark.parametrize("names", [(), ("images",), ("pixels", "extra"), ("Pixels",)])
def test_other_names_are_refused(names: tuple[str, ...]) -> None:
    error = refused(graph(), {name: np.zeros((1, 3, 28, 28), np.float32) for name in names})
    assert str(sorted(names)) in error.message
    assert "['pixels']" in error.message


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8", "int32", ">f4", "bool", "object", "complex64"])
def test_another_dtype_is_refused(dtype: str) -> None:
    error = refused(graph(), pixels(1, 3, 28, 28, dtype=dtype))
    assert "needs float32" in error.message
    assert "RGB, scaled" in error.next_step


@pytest.mark.parametrize("shape", [(), (3, 28, 28), (1, 1, 3, 28, 28), (28,)])
def test_another_number_of_axes_is_refused(shape: tuple[int, ...]) -> None:
    assert f"{len(shape)} axes" in refused(graph(), pixels(*shape)).message


@pytest.mark.parametrize("shape", [(1, 4, 28, 28), (1, 1, 28, 28), (1, 28, 28, 3), (1, 0, 28, 28)])
def test_another_fixed_dimension_is_refused(shape: tuple[int, ...]) -> None:
    assert str(shape) in refused(graph(), pixels(*shape)).message


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((0, 3, 28, 28), "batch 0 is outside 1 to 4"),
        ((5, 3, 28, 28), "batch 5 is outside 1 to 4"),
        ((1, 3, 13, 28), "height 13 is outside 14 to 70"),
        ((1, 3, 0, 28), "height 0 is outside 14 to 70"),
        ((1, 3, 28, 71), "width 71 is outside 14 to 70"),
        ((1, 3, 28, 84), "width 84 is outside 14 to 70"),
    ],
)
def test_a_size_out_of_range_is_refused(shape: tuple[int, ...], said: str) -> None:
    assert said in refused(graph(), pixels(*shape)).message
    assert said in refused(graph(multiple_of=1), pixels(*shape)).message


@pytest.mark.parametrize(
    ("size", "nearest"), [(15, "14 and 28"), (27, "14 and 28"), (29, "28 and 42"), (69, "56 and 70")]
)
def test_a_size_that_is_no_multiple_is_refused_with_both_nearest(size: int, nearest: str) -> None:
    for shape, name in (((1, 3, size, 28), "height"), ((1, 3, 28, size), "width")):
        error = refused(graph(), pixels(*shape))
        assert error.message == f"{name} {size} is not a multiple of 14."
        assert error.next_step == f"The nearest legal sizes are {nearest}."
        check_inputs(graph(multiple_of=1), pixels(*shape))


def two_inputs(*, known: bool = True) -> Graph:
    """Two inputs that share the dimension `batch`; `sequence` has no range."""
    return Graph(
        name="pair",
        inputs=(
            Tensor(name="left", dtype="float32", shape=("batch", "sequence"), meaning="left"),
            Tensor(name="right", dtype="int64", shape=("sequence", "batch", 2), meaning="right"),
        ),
        outputs=(),
        dims=(Dim(name="batch", min=1, opt=1, max=4),) if known else (),
    )


@pytest.mark.parametrize("known", [True, False])
def test_inputs_must_agree_on_what_they_share(known: bool) -> None:
    left, right = np.zeros((3, 7), np.float32), np.zeros((7, 3, 2), np.int64)
    check_inputs(two_inputs(known=known), {"right": right, "left": left})
    error = refused(two_inputs(known=known), {"left": left, "right": np.zeros((7, 2, 2), np.int64)})
    assert error.message == "The inputs disagree on batch: 3 and 2."
    error = refused(two_inputs(known=known), {"left": left, "right": np.zeros((6, 3, 2), np.int64)})
    assert error.message == "The inputs disagree on sequence: 7 and 6."


def test_one_dimension_twice_in_one_input_must_agree() -> None:
    square = Graph(
        name="square",
        inputs=(Tensor(name="x", dtype="float32", shape=("side", "side"), meaning="a square"),),
        outputs=(),
        dims=(),
    )
    check_inputs(square, {"x": np.zeros((5, 5), np.float32)})
    assert "disagree on side" in refused(square, {"x": np.zeros((5, 6), np.float32)}).message


@examples(200)
@given(batch=st.integers(0, 6), height=st.integers(0, 90), width=st.integers(0, 90), multiple=st.sampled_from([1, 14]))
def test_a_size_is_taken_exactly_when_it_is_promised(batch: int, height: int, width: int, multiple: int) -> None:
    promised = 1 <= batch <= 4 and all(14 <= side <= 70 and side % multiple == 0 for side in (height, width))
    # Nothing is allocated: only the shape is asked for.
    arrays = {"pixels": np.broadcast_to(np.float32(0), (batch, 3, height, width))}
    wanted = graph(multiple_of=multiple)
    if promised:
        check_inputs(wanted, arrays)
        return
    error = refused(wanted, arrays)
    if "not a multiple" in error.message:
        wrong = next(side for side in (height, width) if side % multiple)
        low, high = (int(word) for word in error.next_step.rstrip(".").split() if word.isdigit())
        assert low < wrong < high == low + multiple
        assert low % multiple == 0
        check_inputs(wanted, pixels(1, 3, low, high))


@pytest.mark.parametrize("variant", ["vits14", "vitg14_reg"])
@pytest.mark.parametrize("sizes", ["crop", "strict"])
def test_the_ends_of_a_shipped_profile_are_taken(variant: str, sizes: str) -> None:
    recipe = load(variant)
    recipe = recipe.model_copy(update={"graph": {**recipe.graph, "sizes": sizes}})
    (wanted,) = family.find("dinov2").model(recipe).graphs

    def asked(batch: int, height: int, width: int) -> dict[str, Any]:
        return {"pixels": np.broadcast_to(np.float32(0), (batch, 3, height, width))}

    for shape in ((1, 14, 14), (16, 1022, 1022), (1, 518, 518), (16, 14, 1022)):
        check_inputs(wanted, asked(*shape))
    for shape in ((17, 14, 14), (1, 13, 14), (1, 14, 1023)):
        refused(wanted, asked(*shape))
    if sizes == "strict":
        assert refused(wanted, asked(1, 500, 518)).next_step == "The nearest legal sizes are 490 and 504."
    else:
        check_inputs(wanted, asked(1, 500, 517))

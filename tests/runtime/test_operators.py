"""Arithmetic of operators as ONNX Runtime ran them, counted by hand."""

from __future__ import annotations

import pytest

from dinoexport.runtime.ort import Operator


def operator(kind: str, *shapes: tuple[int, ...], to: tuple[int, ...], types: tuple[str, ...] = ("float",)) -> Operator:
    return Operator(kind=kind, types=types, shapes=shapes, output_shape=to, written_bytes=0)


@pytest.mark.parametrize(
    ("made", "flops"),
    [
        (operator("MatMul", (2, 3, 5), (5, 7), to=(2, 3, 7)), 2 * 2 * 3 * 7 * 5),
        (operator("FusedGemm", (3, 5), (5, 7), to=(3, 7)), 2 * 3 * 7 * 5),
        (operator("MatMulNBits", (3, 32), (7, 1, 16), to=(3, 7)), 2 * 3 * 7 * 32),
        # Each of 2 x 6 x 4 x 4 numbers is of 3 channels of 5 x 5.
        (operator("Conv", (2, 3, 8, 8), (6, 3, 5, 5), to=(2, 6, 4, 4)), 2 * (2 * 6 * 4 * 4) * (3 * 5 * 5)),
        # 4 heads of 7 queries and 9 keys, 5 wide: queries by keys, and weights by values.
        (operator("Attention", (1, 4, 7, 5), (1, 2, 9, 5), (1, 2, 9, 5), to=(1, 4, 7, 5)), 2 * (2 * 4 * 7 * 9 * 5)),
        (operator("Add", (3, 5), (3, 5), to=(3, 5)), 0),
        (operator("Softmax", (3, 5), to=(3, 5)), 0),
    ],
    ids=lambda made: made.kind if isinstance(made, Operator) else "",
)
def test_products_alone_count(made: Operator, flops: int) -> None:
    assert made.flops == flops and made.is_product == (flops > 0)

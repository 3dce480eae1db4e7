"""One product that becomes several, in graphs of OpenVINO that are written here and computed here: none is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dinoexport.runtime import openvino_products, telemetry

openvino = telemetry.openvino()
ops = openvino.opset13
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.standard_normal((5, 3, 8)).astype(np.float32), RANDOM.standard_normal((12,)).astype(np.float32)
WEIGHT, BIAS = RANDOM.standard_normal((8, 12)).astype(np.float32), RANDOM.standard_normal(12).astype(np.float32)


@pytest.fixture(autouse=True)
def _openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick tests load no runtime to run a model; here it only holds graphs."""
    monkeypatch.setattr(telemetry, "openvino", lambda: openvino)


def added(x: Any, y: Any) -> Any:
    return ops.add(ops.matmul(x, ops.constant(WEIGHT), False, False), ops.constant(BIAS))


def made(
    split: Callable[[Any], Any], product: Callable[[Any, Any], Any] = added, *, shape: Any = X.shape, wide: int = 12
) -> Any:
    """The model of inputs x and y in which `split` splits what `product` gives; each part goes through Relu."""
    x, y = ops.parameter(list(shape), np.float32, name="x"), ops.parameter([wide], np.float32, name="y")
    parts = split(product(x, y)).outputs()
    return openvino.Model([ops.result(ops.relu(part)) for part in parts], [x, y], "made")


def thirds(value: Any) -> Any:
    return ops.split(value, -1, 3)


def answers(model: Any) -> list[Any]:
    """The model's results, computed here operator by operator."""
    values: dict[tuple[str, int], Any] = {}
    results = []
    for node in model.get_ordered_ops():
        sources = [node.input_value(i) for i in range(node.get_input_size())]
        given = [values[source.get_node().get_name(), source.get_index()] for source in sources]
        kind, settings = node.get_type_name(), node.get_attributes()
        if kind == "Result":
            results.append((node.get_name(), given[0]))
            continue
        if kind == "Parameter":
            found = [{"x": X, "y": Y}[node.get_friendly_name()]]
        elif kind == "Constant":
            found = [node.data]
        elif kind == "MatMul":
            assert not any(settings.values())
            found = [given[0] @ given[1]]
        elif kind == "Add":
            found = [given[0] + given[1]]
        elif kind == "Relu":
            found = [np.maximum(given[0], 0)]
        elif kind == "Split":
            found = np.split(given[0], settings["num_splits"], axis=int(given[1]))
        else:
            assert kind == "VariadicSplit"
            found = np.split(given[0], np.cumsum(given[2])[:-1], axis=int(given[1]))
        values |= {(node.get_name(), index): value for index, value in enumerate(found)}
    return [value for _, value in sorted(results)]


def kinds(model: Any, *names: str) -> list[int]:
    found = [node.get_type_name() for node in model.get_ordered_ops()]
    return [found.count(name) for name in names]


def without_bias(x: Any, y: Any) -> Any:
    return ops.matmul(x, ops.constant(WEIGHT), False, False)


@pytest.mark.parametrize(
    ("split", "product", "parts", "sums"),
    [
        (thirds, added, 3, 3),
        (thirds, without_bias, 3, 0),
        (thirds, lambda x, y: ops.add(ops.constant(BIAS), without_bias(x, y)), 3, 3),
        (thirds, lambda x, y: ops.add(without_bias(x, y), ops.constant(BIAS[None, None])), 3, 3),
        (lambda value: ops.split(value, 2, 2), added, 2, 2),
        (lambda value: ops.variadic_split(value, -1, [2, 6, 4]), added, 3, 3),
    ],
    ids=["thirds", "without bias", "bias before", "bias of three axes", "halves of axis 2", "unequal parts"],
)
def test_each_part_has_a_product_of_its_own(split: Any, product: Any, parts: int, sums: int) -> None:
    model = made(split, product)
    before = answers(model)
    assert openvino_products.separate(model) == 1
    assert kinds(model, "MatMul", "Add", "Split", "VariadicSplit") == [parts, sums, 0, 0]
    after = answers(model)
    assert [array.shape for array in after] == [array.shape for array in before]
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_all_products_that_are_split_are_counted() -> None:
    x, y = ops.parameter(list(X.shape), np.float32, name="x"), ops.parameter([12], np.float32, name="y")
    parts = [part for axis in (-1, 2, 0) for part in ops.split(added(x, y), axis, 4 if axis else 5).outputs()]
    model = openvino.Model([ops.result(part) for part in parts], [x, y], "made")
    assert openvino_products.separate(model) == 2
    assert kinds(model, "MatMul", "Split") == [9, 1]


@pytest.mark.parametrize(
    ("split", "product", "settings"),
    [
        (thirds, added, {"shape": (-1, 3, 8)}),
        (lambda value: ops.split(value, 1, 3), added, {}),
        (lambda value: ops.split(value, -2, 3), added, {}),
        (lambda value: ops.variadic_split(value, ops.relu(ops.constant(2)), [4, 4, 4]), added, {}),
        (thirds, lambda x, y: ops.relu(added(x, y)), {}),
        (thirds, lambda x, y: ops.add(ops.relu(without_bias(x, y)), ops.constant(BIAS)), {}),
        (thirds, lambda x, y: ops.matmul(x, ops.relu(ops.constant(WEIGHT)), False, False), {}),
        (thirds, lambda x, y: ops.matmul(x, ops.constant(np.stack([WEIGHT] * 5)), False, False), {}),
        (thirds, lambda x, y: ops.matmul(x, ops.constant(WEIGHT.T), False, True), {}),
        (thirds, lambda x, y: ops.add(without_bias(x, y), y), {}),
        (thirds, lambda x, y: ops.add(ops.constant(WEIGHT), ops.constant(BIAS)), {}),
        (thirds, lambda x, y: ops.add(without_bias(x, y), ops.constant(BIAS[:1])), {}),
        (thirds, lambda x, y: ops.add(without_bias(x, y), ops.constant(np.stack([BIAS] * 3))), {}),
        (lambda value: ops.split(ops.add(value, ops.relu(value)), -1, 3), added, {}),
    ],
    ids=[
        "a size that may vary", "the second axis", "the second axis from behind", "an axis that is computed",
        "no product", "no product before the sum", "weights that are computed", "weights of three axes",
        "transposed weights", "two values added", "two constants added", "one bias for all",
        "a bias for each row", "no constant added",
    ],
)  # fmt: skip
def test_what_is_no_split_product_stays(split: Any, product: Any, settings: Any) -> None:
    model = made(split, product, **settings)
    before = [node.get_name() for node in model.get_ordered_ops()]
    assert openvino_products.separate(model) == 0
    assert [node.get_name() for node in model.get_ordered_ops()] == before


@pytest.mark.parametrize("of", ["the product", "the sum"])
def test_a_product_that_others_read_stays(of: str) -> None:
    x = ops.parameter(list(X.shape), np.float32, name="x")
    product = ops.matmul(x, ops.constant(WEIGHT), False, False)
    total = ops.add(product, ops.constant(BIAS))
    read = product if of == "the product" else total
    results = [ops.result(value) for value in (*ops.split(total, -1, 3).outputs(), ops.relu(read))]
    model = openvino.Model(results, [x], "made")
    assert openvino_products.separate(model) == 0
    assert kinds(model, "MatMul", "Split") == [1, 1]

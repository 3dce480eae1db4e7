"""What the cache of a decoder takes of memory, by hand."""

from __future__ import annotations

import pytest

from dinoexport.runtime import carried_memory
from dinoexport.runtime.carried_memory import CarriedMemory
from dinoexport.spec import Dim, Graph, Tensor


def decoder(dtype: str, *, carried: bool = True, total: int | None = None) -> Graph:
    """Two layers of 3 heads, 5 wide."""
    names = [f"past.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    ids = Tensor(name="input_ids", dtype="int64", shape=("batch", "length"), meaning="")
    dims = [Dim(name="batch", min=1, opt=1, max=4), Dim(name="past", min=0, opt=10, max=99)]
    if total is not None:
        dims.append(Dim(name="total", min=1, opt=10, max=total, sum_of=("past", "length")))
    return Graph(
        name="model",
        inputs=(ids, *(Tensor(name=name, dtype=dtype, shape=("batch", 3, "past", 5), meaning="") for name in names)),
        outputs=(),
        dims=tuple(dims),
        carried={name: f"new.{name}" for name in names} if carried else {},
    )


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_of_a_token(dtype: str, size: int) -> None:
    assert carried_memory.of(decoder(dtype)) == CarriedMemory(a_token=4 * 15 * size, context=99)


def test_the_context_is_what_past_and_new_tokens_may_have() -> None:
    found = carried_memory.of(decoder("float32", total=120))
    assert found is not None and found.context == 120 and found.whole == 240 * 120


def test_a_graph_that_carries_nothing() -> None:
    assert carried_memory.of(decoder("float32", carried=False)) is None


@pytest.mark.parametrize(("memory", "longest"), [(-5, 0), (239, 0), (240, 1), (240 * 98 + 239, 98), (1 << 40, 99)])
def test_how_long_a_sequence_may_get(memory: int, longest: int) -> None:
    assert CarriedMemory(a_token=240, context=99).longest(memory) == longest


def test_in_words() -> None:
    carried = CarriedMemory(a_token=250_000, context=4096)
    shown = dict(carried.facts(7_000_000_000, 7_500_000_000))
    assert shown == {
        "memory of the weights": "7.00 GB", "cache": "250.0 kB a token, 1.02 GB for 4096 tokens",
        "largest context here": "2000 tokens of one sequence in the 7.5 GB that are free",
    }  # fmt: skip
    too_little = carried.facts(7_000_000_000, 6_900_000_000)["largest context here"]
    assert too_little == "none: the weights do not fit the 6.9 GB that are free"
    assert "largest context here" not in carried.facts(7_000_000_000, None)


def test_figures_are_rounded_as_they_are() -> None:
    """Each a byte more than half of the last digit."""
    shown = dict(CarriedMemory(a_token=1_005_000_001, context=1).facts(1_005_000_001, 2_250_000_001))
    assert shown == {
        "memory of the weights": "1.01 GB", "cache": "1005000.0 kB a token, 1.01 GB for 1 tokens",
        "largest context here": "1 tokens of one sequence in the 2.3 GB that are free",
    }  # fmt: skip
    shown = dict(CarriedMemory(a_token=1, context=1).facts(2_250_000_002, 2_250_000_001))
    assert shown["largest context here"] == "none: the weights do not fit the 2.3 GB that are free"

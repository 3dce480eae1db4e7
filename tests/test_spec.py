"""The types that everything shares: what they are when nothing is said, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport import spec
from dinoexport.errors import UsageError
from dinoexport.family import OPSET, registry
from dinoexport.spec import Case, Dim, Precision, Profile, Runtime, Way, Weight


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, True), ({"min": 5}, True), ({"min": 6}, False), ({"multiple_of": 0}, False), ({"step": 0}, False),
        ({"multiple_of": 2, "step": 3}, True), ({"multiple_of": -1, "min": 0}, False),
    ],
)  # fmt: skip
def test_a_range_of_a_dimension(given: dict[str, Any], taken: bool) -> None:
    if not taken:
        with pytest.raises(ValueError, match="width is a multiple of"):
            Dim(**{"name": "width", "min": 1, "opt": 2, "max": 5} | given)
    else:
        Dim(**{"name": "width", "min": 1, "opt": 2, "max": 5} | given)


def test_what_is_not_said() -> None:
    dim = Dim(name="width", min=1, opt=2, max=5)
    assert (dim.multiple_of, dim.step, dim.sum_of) == (1, 1, ())
    weight = Weight(shape=(1,), read=lambda: None)
    assert (weight.bits, weight.block, weight.offsets_of) == (0, 0, "")
    case = Case(name="one", why="a test", inputs={})
    assert (case.expect_refusal, case.neighbours, case.shown, case.label) == (False, False, False, "")
    assert (case.distributions, case.choices) == ((), {})
    way = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32)
    assert (way.threads, way.rest) == (0, None)


def test_runtimes_of_a_graph_itself() -> None:
    assert set(spec.CPU_RUNTIMES) == {Runtime.ONNXRUNTIME, Runtime.OPENVINO}


@pytest.mark.parametrize(
    ("shape", "covered"),
    [((1, 3), True), ((4, 9), True), ((0, 3), False), ((5, 3), False), ((1, 2), False), ((1, 10), False),
     ((1,), False), ((1, 3, 1), False)],
)  # fmt: skip
def test_a_profile_covers_what_is_between_its_ends(shape: tuple[int, ...], covered: bool) -> None:
    profile = Profile(name="p", shapes={"x": ((1, 3), (2, 5), (4, 9)), "y": ((1,), (1,), (1,))})
    assert profile.covers({"x": shape, "y": (1,)}) is covered
    assert profile.covers({"x": (1, 3), "y": (2,)}) is False


@pytest.mark.parametrize(
    ("word", "said"),
    [("VITS", " Did you mean 'vits14'?"), ("vitl15", " Did you mean 'vitl14'?"), ("resnet", ""), ("", "")],
)
def test_the_nearest_word_alone_is_named(word: str, said: str) -> None:
    assert spec.closest(word, ["vitl14", "vits14", "toy"]) == said


def test_families_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are of opset 20, the first whose Gelu is an operator."""
    assert OPSET == 20
    assert registry.installed() == ("dinov2", "llama")
    with pytest.raises(UsageError, match=r"No model family 'dinov' is installed\. Did you mean 'dinov2'\?") as refused:
        registry.find("dinov")
    assert refused.value.next_step == "Installed families: dinov2, llama."
    monkeypatch.setattr(registry, "_entries", lambda _path: ())
    with pytest.raises(UsageError) as refused:
        registry.find("dinov2")
    assert refused.value.next_step == "Installed families: none; reinstall dinoexport."

"""What a configuration says of TensorRT plans, of its batcher, and which inputs of a bundle it is warmed up with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import UsageError
from dinoexport.serving.triton import batching, served_models
from dinoexport.serving.triton.config import to_text
from dinoexport.serving.triton.served_models import TensorRTPlan
from dinoexport.spec import Arrays, Dim, Graph, Tensor

FLAG = "the server needs --backend-config=tensorrt,version-compatible=true"


def plan(capability: str = "8.0", *, compatible: bool = False, profiles: Any = ((1, 4),)) -> TensorRTPlan:
    return TensorRTPlan(
        file=f"sm{capability}.plan", graph="model", tensorrt_version="10.1", compute_capability=capability,
        version_compatible=compatible, stripped=False, profiles=profiles,
    )  # fmt: skip


def text_of(*plans: TensorRTPlan) -> str:
    entries, files = served_models._plan_entries(plans)
    assert files == {plan.file: plan.file for plan in plans}
    return to_text(entries)


def test_one_plan_is_the_model_file() -> None:
    text = text_of(plan())
    assert 'default_model_filename: "sm8.0.plan"' in text and "cc_model_filenames" not in text
    assert "#" not in text and "profile" not in text and "execution_context" not in text and "KIND_GPU" in text


def test_plans_of_several_cards_are_chosen_among() -> None:
    text = text_of(plan("8.0"), plan("9.0"))
    assert "default_model_filename" not in text and text.count("cc_model_filenames") == 2
    assert text.count("TensorRT 10.1") == 2 and 'key: "9.0"' in text and 'value: "sm9.0.plan"' in text


@pytest.mark.parametrize(("first", "second", "said"), [(False, False, False), (True, False, True), (True, True, True)])
def test_what_the_server_must_be_started_with(first: bool, second: bool, said: bool) -> None:
    assert (FLAG in text_of(plan("8.0", compatible=first), plan("9.0", compatible=second))) == said


def test_every_profile_that_all_plans_have() -> None:
    text = text_of(plan("8.0", profiles=((1, 2), (4, 8))), plan("9.0", profiles=((1, 2), (4, 8), (8, 16))))
    assert "every profile the plan has: 2" in text and text.count("profile: ") == 2
    assert 'profile: "0"' in text and 'profile: "1"' in text
    assert "ON_PROFILE_CHANGE" in text and "scratch memory for the largest profile" in text


@pytest.mark.parametrize(
    ("plans", "most", "largest", "tuned"),
    [
        ([plan(profiles=((1, 4), (8, 16)))], 99, 16, (1, 8)),
        ([plan(profiles=((1, 4), (8, 16)))], 10, 10, (1, 8)),
        ([plan(profiles=((2, 4), (8, 16))), plan("9.0", profiles=((2, 8),))], 99, 8, (2, 8)),
    ],
)
def test_batches_that_every_plan_takes(
    plans: list[TensorRTPlan], most: int, largest: int, tuned: tuple[int, ...]
) -> None:
    found, chosen = served_models._plan_batching(plans, most)
    assert found == largest and chosen.preferred == tuned and chosen.queue_size == 8 * largest


@pytest.mark.parametrize("limits", [True, False])
@pytest.mark.parametrize("preferred", [(), (2, 4)])
def test_the_batcher(limits: bool, preferred: tuple[int, ...]) -> None:
    chosen = batching.Batching(preferred=preferred, preferred_why="measured", queue_size=77, queue_delay_us=5)
    text = to_text(served_models._batching_entries(9, chosen, queue_limits=limits))
    assert "max_batch_size: 9" in text and "max_queue_delay_microseconds: 5" in text
    assert ("max_queue_size: 77" in text) == ("REJECT" in text) == limits
    assert ("no limits to the queue" in text) != limits and ("preferred_batch_size" in text) == bool(preferred)


def graph(*outputs: tuple[int | str, ...], image: tuple[int | str, ...] = ("batch", 3, "height")) -> Graph:
    return Graph(
        name="model",
        inputs=(Tensor(name="pixels", dtype="float32", shape=image, meaning=""),),
        outputs=tuple(
            Tensor(name=f"o{i}", dtype="float32", shape=shape, meaning="") for i, shape in enumerate(outputs)
        ),
        dims=(Dim(name="batch", min=1, opt=2, max=5), Dim(name="height", min=2, opt=8, max=64)),
    )


@pytest.mark.parametrize(
    ("outputs", "image", "taken"),
    [
        ([("batch", 4)], ("batch", 3), True), ([("batch", 4), ("batch",)], ("batch", 3), True),
        ([("height", 4)], ("batch", 3), False), ([(1, 4)], (1, 3), False), ([()], ("batch", 3), False),
        ([("batch", 4), (4, "batch")], ("batch", 3), False),
    ],
)  # fmt: skip
def test_a_graph_without_one_batch_is_refused(outputs: Any, image: Any, taken: bool) -> None:
    if taken:
        served_models._refuse_unbatched(graph(*outputs, image=image))
    else:
        with pytest.raises(UsageError):
            served_models._refuse_unbatched(graph(*outputs, image=image))


def cases(*inputs: Arrays) -> Any:
    return SimpleNamespace(expectations=[SimpleNamespace(case=SimpleNamespace(inputs=arrays)) for arrays in inputs])


def test_judged_inputs_are_single_and_smallest_first() -> None:
    """Those of other graphs, and sizes that the graph refuses, are left out."""
    pixels = [np.full((batch, 3, height), i, np.float32) for i, (batch, height) in enumerate([(2, 9), (1, 3), (3, 5)])]
    others = [
        {"pixels": pixels[0], "more": pixels[1]},
        {"other": pixels[0]},
        {"pixels": np.zeros((1, 3, 65), np.float32)},
    ]
    items = served_models.judged_items(graph(), cases(*({"pixels": p} for p in pixels), *others))
    assert [item["pixels"].shape for item in items] == [(1, 3, 3), (1, 3, 5), (1, 3, 9)]
    assert [item["pixels"][0, 0, 0] for item in items] == [1, 2, 0]
    assert served_models.max_batch(graph()) == 5


@pytest.mark.parametrize(
    ("heights", "chosen"), [([2, 8, 64], 8), ([2, 31], 31), ([2, 33], 2), ([3, 20], 20), ([4, 17], 4)]
)
def test_the_input_nearest_to_the_most_likely_size(heights: list[int], chosen: int) -> None:
    """By the ratio of sizes: 31 is less than four times 8, and 33 is more."""
    items = [{"pixels": np.zeros((1, 3, height), np.float32)} for height in heights]
    assert served_models._most_likely(graph(), items)["pixels"].shape[2] == chosen


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("# dinoexport deployed this as tiny_v2\nname: 1", "tiny_v2"), ("name: 1", None), ("", None),
        ("# dinoexport deployed this as two words\n", None), (f"# dinoexport deployed this as {'a' * 64}\n", "a" * 64),
        (f"# dinoexport deployed this as {'a' * 65}\n", None), ("\n# dinoexport deployed this as tiny\n", None),
    ],
)  # fmt: skip
def test_the_name_in_a_configuration(config: str, name: str | None) -> None:
    assert served_models.deployed_name(config) == name

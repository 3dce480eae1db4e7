"""Cases of a decoder as they are read, and the calls by which a graph answers them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import InputRefused, UsageError
from dinoexport.models.llama import cases, driving
from dinoexport.models.llama.config import Architecture
from dinoexport.spec import Arrays
from tests.models.test_llama import model_of

CONTEXT = 64
ARCH: Architecture = model_of("tiny", context=CONTEXT).arch


def read(folder: Path = Path(), **table: Any) -> cases.Case:
    return cases.read_case({"name": "one", "why": "a case of the tests", **table}, folder, ARCH)


def settings(case: cases.Case) -> dict[str, int]:
    return {name: cases.setting(case.inputs, name) for name in ("keep", "chunk", "steps", "first_position")}


def lengths(case: cases.Case) -> list[int]:
    return [int(n) for n in (case.inputs["tokens"] >= 0).sum(axis=1)]


@pytest.mark.parametrize(("given", "first"), [(-64, 0), (-100, 0), (-63, 1), (-4, 60), (0, 0), (7, 7)])
def test_a_first_position_from_the_end(given: int, first: int) -> None:
    assert settings(read(prompts=[3], first_position=given))["first_position"] == first


@pytest.mark.parametrize(
    ("table", "shortened", "first", "keep"),
    [
        ({"prompts": [100, 5], "steps": 4}, [60, 5], 0, 1),
        ({"prompts": [60, 50], "steps": 4, "keep": 55}, [60, 50], 0, 50),
        ({"prompts": [10, 20], "steps": 4, "first_position": 50}, [10, 20], 40, 1),
        ({"prompts": [10], "first_position": -20, "keep": 10}, [10], 44, 10),
    ],
)
def test_cases_fit_a_smaller_context(table: dict[str, Any], shortened: list[int], first: int, keep: int) -> None:
    """Prompts end, and begin, so that the last of them and the steps are within it."""
    case = read(fit=True, **table)
    assert lengths(case) == shortened
    assert settings(case) == {"keep": keep, "chunk": 0, "steps": table.get("steps", 0), "first_position": first}


def test_a_case_s_prompts() -> None:
    """Those of the table, then random ones, each row another; -1 is after the end of the shorter."""
    case = read(tokens=[[0, 319]], prompts=[3, 3], steps=2, chunk=2)
    first, second = (cases.synthetic.prompt(320, 3, 7, row).tolist() for row in (0, 1))
    assert case.inputs["tokens"].tolist() == [[0, 319, -1], first, second] and first != second
    assert settings(case) == {"keep": 1, "chunk": 2, "steps": 2, "first_position": 0}
    assert all(case.inputs[name].shape == (3,) for name in settings(case))
    assert case.distributions == ("logits", "rollout_logits") and case.choices == {"rollout": "rollout_logits"}
    unsteady = read(prompts=[2])
    assert unsteady.distributions == ("logits",) and unsteady.choices == {} and not unsteady.expect_refusal


def test_no_prompts() -> None:
    assert cases.batch_of([]).shape == (0, 0) and cases.batch_of([]).dtype == np.int64
    with pytest.raises(UsageError, match="the shortest prompt has 0 tokens, keep is 1"):
        read()
    assert read(refused=True).expect_refusal


@pytest.mark.parametrize(("keep", "fits"), [(3, True), (4, False)])
def test_no_more_is_kept_than_the_shortest_prompt_has(keep: int, fits: bool) -> None:
    if fits:
        assert settings(read(prompts=[3, 9], keep=keep))["keep"] == keep
    else:
        with pytest.raises(UsageError, match="the shortest prompt has 3 tokens, keep is 4"):
            read(prompts=[3, 9], keep=keep)


def test_token_ids_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[[0, 2147483647], [5]]")
    assert read(tmp_path, file="ids.json").inputs["tokens"].tolist() == [[0, 2**31 - 1], [5, -1]]


@pytest.mark.parametrize("content", ["[[-1]]", "[[2147483648]]", "[[1.5]]", '[["1"]]', "[1]", "{"])
def test_files_without_token_ids(content: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(UsageError, match=r"ids\.json cannot be read"):
        read(tmp_path, file="ids.json")


@pytest.mark.parametrize(
    ("context", "length", "steps"), [(100, 50, 16), (256, 128, 16), (258, 128, 16), (254, 127, 16), (20, 10, 10)]
)
def test_workloads(context: int, length: int, steps: int) -> None:
    written, prompt = cases.workloads(model_of("tiny", context=context).arch)
    assert (written.name, written.items, written.unit) == (f"{steps} tokens after {length}", steps, "tokens")
    assert (prompt.name, prompt.items, prompt.unit) == (f"prompt of {length}", length, "tokens")
    for workload, then in ((written, steps), (prompt, 0)):
        assert workload.inputs["tokens"].shape == (1, length)
        assert settings(workload) == {"keep": 1, "chunk": 0, "steps": then, "first_position": 0}  # type: ignore[arg-type]


class Toy:
    """A graph whose next id after `i` at place `p` of the padded batch is (3 i + p + first) % 320.

    Its logits are -|v - next|. Its cache is as long as the tokens it has read. An inner value is the ids + 1, in fp32.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], list[list[int]], int, int]] = []

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        (keep,), (first,) = inputs["logits_to_keep"], inputs["first_position"]
        self.asked.append((ids.tolist(), mask.tolist(), int(keep), int(first)))
        past = mask.shape[1] - ids.shape[1]
        after = (3 * ids + np.arange(past, mask.shape[1]) + first) % 320
        logits = -np.abs(np.arange(320) - after[..., None]).astype(np.float32)
        grown = {
            name.replace("past_key_values", "present"): np.pad(array, ((0, 0), (0, 0), (0, ids.shape[1]), (0, 0)))
            for name, array in inputs.items()
            if name.startswith("past_key_values")
        }
        return {"logits": logits[:, -keep:], "embedded": (ids[..., None] + 1).astype(np.float32)} | grown


def test_a_prompt_is_read_in_chunks_and_continued() -> None:
    """Five and three tokens, two a call, of which the last three are compared: the first call is needed for none."""
    model, toy = model_of("tiny", context=CONTEXT), Toy()
    inputs = cases.inputs_of(cases.batch_of([[1, 0, 3, 4, 5], [6, 7, 0]]), keep=3, chunk=2, steps=3, first_position=10)
    found = driving.drive({"model": toy}, model.graphs[0], model.arch, inputs)
    assert toy.asked == [
        ([[1, 0], [0, 0]], [[1, 1], [0, 0]], 1, 10),
        ([[3, 4], [6, 7]], [[1] * 4, [0, 0, 1, 1]], 2, 10),
        ([[5], [0]], [[1] * 5, [0, 0, 1, 1, 1]], 1, 10),
        ([[29], [14]], [[1] * 6, [0, 0, 1, 1, 1, 1]], 1, 10),
        ([[102], [57]], [[1] * 7, [0, 0, 1, 1, 1, 1, 1]], 1, 10),
    ]
    assert found["logits"].argmax(axis=2).tolist() == [[21, 25, 29], [30, 34, 14]]
    assert found["rollout"].tolist() == [[29, 102, 2], [14, 57, 187]]
    assert found["rollout_logits"].argmax(axis=2).tolist() == found["rollout"].tolist()
    assert found["embedded"][..., 0].tolist() == [[2, 1, 4, 5, 6], [0, 0, 7, 8, 1]], "nothing where padding is"


@pytest.mark.parametrize(("keep", "calls"), [(1, 1), (5, 1)])
def test_a_prompt_is_read_at_once_and_not_continued(keep: int, calls: int) -> None:
    model, toy = model_of("tiny", context=CONTEXT), Toy()
    inputs = cases.inputs_of(cases.batch_of([[1, 0, 3, 4, 5]]), keep=keep)
    found = driving.drive({"model": toy}, model.graphs[0], model.arch, inputs)
    assert set(found) == {"logits", "embedded"} and len(toy.asked) == calls
    assert found["logits"].argmax(axis=2).tolist() == [[3, 1, 11, 15, 19][-keep:]]


@pytest.mark.parametrize(("steps", "first"), [(20, 4), (19, 5)])
def test_prompts_up_to_the_context(steps: int, first: int) -> None:
    """Of 40 tokens, the first of them the id 0; and no prompt is empty that has only that."""
    tokens = cases.batch_of([[0], [0, *range(39)]])
    driving.check(ARCH, cases.inputs_of(tokens, steps=steps, first_position=first))
    with pytest.raises(InputRefused, match="65 tokens are more than the context of 64"):
        driving.check(ARCH, cases.inputs_of(tokens, steps=steps + 1, first_position=first))
    driving.check(ARCH, cases.inputs_of(cases.batch_of([[319]])))
    with pytest.raises(InputRefused, match="Token id 320 is outside the vocabulary of 320"):
        driving.check(ARCH, cases.inputs_of(cases.batch_of([[320]])))


def test_a_file_of_token_ids_has_at_most_16_mib(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.touch()
    os.truncate(path, 2**24 + 1)
    with pytest.raises(UsageError, match="16,777,217 bytes or more, and no such file has more than 16,777,216"):
        read(tmp_path, file="ids.json")

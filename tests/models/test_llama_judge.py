"""What the judge must catch in a decoder: each defect alone, in an otherwise right graph, misses the fp32 limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.config.limits import load_validation
from dinoexport.models.llama import layouts
from dinoexport.spec import Expectation, Precision, silent
from dinoexport.validation import judge
from tests import conformance
from tests.conftest import DATA
from tests.models.test_llama import model_of, reader

MODEL = model_of("tiny_gqa")


def reading(change: Callable[[str, Any], Any]) -> Any:
    read = reader(MODEL)
    return lambda name: change(name, read)


def swapped(name: str, read: Any) -> Any:
    other = {"w1": "w3", "w3": "w1"}
    parts = name.split(".")
    parts[-2] = other.get(parts[-2], parts[-2])
    return read(".".join(parts))


def other_rotation(name: str, read: Any) -> Any:
    heads = {"wq": MODEL.arch.heads, "wk": MODEL.arch.kv_heads}.get(name.split(".")[-2])
    return read(name) if heads is None else layouts.halves(read(name), heads)


def tiled_heads(name: str, read: Any) -> Any:
    """Query head h takes key-value head h % G, as if those were tiled and not each repeated."""
    order = np.arange(MODEL.arch.heads).reshape(-1, MODEL.arch.kv_heads).T.ravel()
    values, size = read(name), MODEL.arch.head_dim
    if name.endswith("wq.weight"):
        return values.reshape(-1, size, values.shape[1])[order].reshape(values.shape)
    if name.endswith("wo.weight"):
        return values.reshape(values.shape[0], -1, size)[:, order].reshape(values.shape)
    return values


def off_by_one(arrays: Mapping[str, Any]) -> dict[str, Any]:
    past = arrays["past_key_values.0.key"].shape[2]
    return {**arrays, "first_position": arrays["first_position"] + (past > 0)}


def without_padding(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {**arrays, "attention_mask": np.ones_like(arrays["attention_mask"])}


def stale_value(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The newest cached value of one head is lost."""
    values = arrays["past_key_values.1.value"].copy()
    values[:, 0, -1:] = 0
    return {**arrays, "past_key_values.1.value": values}


def exact_angles(calls: Any) -> None:
    """Positions times frequencies in float64: nearer to mathematics, and further from what the model was trained on."""
    stem = calls[0].piece.module
    plain = stem.forward

    def forward(ids: Any, mask: Any, first: Any) -> Any:
        stream, _, _, seen = plain(ids, mask, first)
        padding = (1 - mask).sum(dim=1).reshape(-1, 1)
        new = torch.arange(mask.shape[1] - ids.shape[1], mask.shape[1])
        positions = (new - padding).clamp(min=0) + first
        exponents = torch.arange(0, MODEL.arch.head_dim, 2).double() / MODEL.arch.head_dim
        angles = positions.double().unsqueeze(-1) / MODEL.arch.rope_theta**exponents
        return stream, angles.cos().float(), angles.sin().float(), seen

    stem.forward = forward


def one_head_sees_padding(calls: Any) -> None:
    block = calls[1].piece.module
    plain = block.forward

    def forward(stream: Any, cosines: Any, sines: Any, mask: Any, *pasts: Any) -> Any:
        new, seen = mask.shape[2:]
        wide = mask.expand(-1, MODEL.arch.heads, -1, -1).clone()
        wide[:, 3] = torch.arange(seen) <= torch.arange(seen - new, seen).unsqueeze(1)
        return plain(stream, cosines, sines, wide, *pasts)

    block.forward = forward


def one_mask_for_all(calls: Any) -> None:
    """What OpenVINO's attention in bf16 makes of a mask without an axis for sequences: the first one's is all's."""
    stem = calls[0].piece.module
    plain = stem.forward

    def forward(*arguments: Any) -> Any:
        *rest, mask = plain(*arguments)
        return *rest, mask[:1].expand_as(mask)

    stem.forward = forward


DEFECTS: dict[str, dict[str, Any]] = {
    "none": {},
    "another base": {"model": model_of("tiny_gqa", rope_theta=1e5)},
    "another epsilon": {"model": model_of("tiny_gqa", norm_eps=1e-6)},
    "gate and up swapped": {"read": reading(swapped)},
    "the other rotary layout": {"read": reading(other_rotation)},
    "tiled heads": {"read": reading(tiled_heads)},
    "positions off by one after the first call": {"inputs": off_by_one},
    "padding that is looked at": {"inputs": without_padding},
    "a value lost from the cache": {"inputs": stale_value},
    "angles in float64": {"calls": exact_angles},
    "one head that looks at padding": {"calls": one_head_sees_padding},
    "one mask for all sequences, by bf16's limits": {"calls": one_mask_for_all, "limits": Precision.BF16},
}


@pytest.fixture(scope="module")
def validation() -> Any:
    loaded, folder = load_validation("tiny_llama_cases", beside=DATA)
    asked = [MODEL.case(table, folder) for table in loaded.cases if not table.get("refused")]
    answers = MODEL.reference(reader(MODEL), [case.inputs for case in asked], precision=Precision.FP32, progress=silent)
    return loaded.limits, [
        Expectation(case=case, outputs=outputs) for case, outputs in zip(asked, answers, strict=True)
    ]


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_caught(defect: str, validation: Any) -> None:
    limits, expectations = validation
    limits = limits[DEFECTS[defect].get("limits", Precision.FP32)]
    model = DEFECTS[defect].get("model", MODEL)
    change = DEFECTS[defect].get("inputs", lambda arrays: arrays)
    graph = model.graphs[0]
    calls = model.calls(graph, DEFECTS[defect].get("read", reader(MODEL)))
    DEFECTS[defect].get("calls", lambda _: None)(calls)

    def candidate(inputs: Any) -> Any:
        return model.drive({"model": lambda arrays: conformance.run_calls(calls, graph, change(arrays))}, inputs)

    report = judge.judge(candidate, expectations, (), limits, candidate_name="mutant", reference_name="PyTorch")
    assert report.passed == (defect == "none"), [row for row in report.rows if not row.passed]


def test_a_roll_out_is_compared_up_to_its_first_difference(validation: Any) -> None:
    """Another choice where the reference was sure is a failure; what follows it is no evidence either way."""
    limits, expectations = validation[0][Precision.FP32], validation[1]
    expected = next(e for e in expectations if "rollout" in e.outputs)
    answers = {name: array.copy() for name, array in expected.outputs.items()}
    answers["rollout"][0, 3] = (answers["rollout"][0, 3] + 1) % 320
    answers["rollout_logits"][0, 4:] = 0
    report = judge.judge(lambda _: answers, [expected], (), limits, candidate_name="c", reference_name="r")
    assert {row.output for row in report.failures} == {"rollout"}

"""A decoder's traced modules of a few numbers, run in PyTorch, against the same worked out in NumPy or by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinoexport.models.llama import pieces, synthetic
from dinoexport.models.llama.config import Architecture, GraphChoices
from dinoexport.models.llama.graph import Head, Products, Stem
from dinoexport.models.llama.graph_weights import GraphWeights
from dinoexport.spec import Array, Precision
from tests.models.test_llama_reference import plain

ARCH = Architecture(
    dim=16, layers=2, heads=4, kv_heads=2, hidden_dim=6, vocabulary=20, norm_eps=0.5, rope_theta=100, context=64
)
# As it is before the quick mode takes a call of it for a whole model, which it skips.
_ATTENTION = F.scaled_dot_product_attention


def ran(module: torch.nn.Module, weights: Mapping[str, Array], *inputs: Any) -> list[Array]:
    missing, unexpected = module.load_state_dict(
        {name: torch.from_numpy(np.array(values, np.float32)) for name, values in weights.items()}, strict=False
    )
    assert not unexpected and not {*missing} & dict(module.named_parameters()).keys()
    with torch.inference_mode():
        found = module(*(torch.as_tensor(np.array(x)) for x in inputs))
    return [values.numpy() for values in (found if isinstance(found, tuple) else (found,))]


def test_the_stem() -> None:
    """Two cached tokens and three new ones; the second sequence begins with three paddings, which see themselves."""
    table = [[10.0 * i, 10.0 * i + 1] for i in range(6)]
    stem = Stem(vocabulary=6, dim=2, head_dim=4, rope_theta=100.0, body="float32", residual="float32")
    stream, cosines, sines, mask = ran(
        stem, {"table_VD": table}, [[1, 2, 5], [0, 4, 3]], [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]], [7]
    )
    assert stream.tolist() == [[[10, 11], [20, 21], [50, 51]], [[0, 1], [40, 41], [30, 31]]]
    # The pairs of a head of four turn by 1 and by 100 ** -0.5 = 0.1 a position.
    positions = np.array([[9, 10, 11], [7, 7, 8]])
    angles = positions[..., None] * np.array([1, 0.1])
    np.testing.assert_allclose(cosines, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sines, np.sin(angles), atol=1e-6)
    assert mask.dtype == bool and mask.astype(int).tolist() == [
        [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]],
        [[[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]],
    ]
    narrow = Stem(vocabulary=6, dim=2, head_dim=4, rope_theta=100.0, body="bfloat16", residual="float16")
    assert narrow.table_VD.dtype == torch.bfloat16 and not narrow.table_VD.requires_grad
    assert narrow(*(torch.tensor(x) for x in ([[1]], [[1]], [0])))[0].dtype == torch.float16


def test_offsets_of_blocks_of_rows() -> None:
    """A product whose weight has an offset for each two rows, between two that have none."""
    module = Products(body="float32", offsets=("b",), block=2)
    for name in "abc":
        module.add(name, 4, 3)
    rng = np.random.RandomState(3)
    weights = {f"{name}_IO": rng.standard_normal((4, 3)) for name in "abc"}
    offsets = rng.standard_normal((2, 3))
    x = rng.standard_normal((2, 5, 4)).astype(np.float32)
    state = {**weights, "b_offset_NO": offsets}
    assert {name: tuple(values.shape) for name, values in module.named_parameters()} == {
        name: np.shape(values) for name, values in state.items()
    }
    module.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    wanted = [x @ weights["a_IO"], x @ (weights["b_IO"] + np.repeat(offsets, 2, axis=0)), x @ weights["c_IO"]]
    for found, values in zip(module.products(torch.from_numpy(x), "a", "b", "c"), wanted, strict=True):
        np.testing.assert_allclose(found.numpy(), values, atol=1e-5)
    (alone,) = module.products(torch.from_numpy(x), "c")
    np.testing.assert_allclose(alone.numpy(), wanted[2], atol=1e-5)


@pytest.mark.parametrize(("count", "first"), [(0, 0), (1, 2), (2, 1), (3, 0)])
def test_the_head_answers_for_the_last_tokens(count: int, first: int) -> None:
    """The root of (9 + 16) / 2 + 12.5 is 5."""
    stream = np.array([[[3, 4], [4, 3], [-3, 4]], [[-4, -3], [3, -4], [4, -3]]], np.float32)
    head = Head(dim=2, vocabulary=3, norm_eps=12.5, body="float32")
    output = np.array([[1, 0, 2], [0, 5, -1]], np.float32)
    (logits,) = ran(head, {"norm_D": [2, 10], "output_IO": output}, stream, [count])
    np.testing.assert_allclose(logits, stream[:, first:] / 5 * [2, 10] @ output, rtol=1e-6)
    half = Head(dim=2, vocabulary=3, norm_eps=12.5, body="float16")
    assert half.output_IO.dtype == torch.float16
    assert half(torch.zeros(1, 1, 2), torch.tensor([0])).dtype == torch.float32


def test_the_last_tokens_are_one_slice_of_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """From -count to the largest end along axis 1, as ONNX has it: negative places count from the end, and -0 is 0."""
    asked: list[Any] = []

    def symbolic(operator: str, inputs: Any, *, dtype: torch.dtype, shape: Any, version: int) -> torch.Tensor:
        assert inputs[0] is stream
        asked.append((operator, [(x.dtype, x.tolist()) for x in inputs[1:]], dtype, tuple(shape), version))
        return inputs[0]

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.onnx.ops, "symbolic", symbolic)
    stream = torch.zeros(2, 3, 4)
    Head(dim=4, vocabulary=3, norm_eps=1.0, body="float32")(stream, torch.tensor([2]))
    whole = torch.int64
    assert asked == [("Slice", [(whole, [-2]), (whole, [2**62]), (whole, [1])], torch.float32, (2, 3, 4), 13)]


def decoded(weights: GraphWeights, steps: list[tuple[Array, Array]], first: int) -> list[dict[str, Array]]:
    """The graph's values after each step of (new ids, mask of all), each with the keys and values of those before."""
    arch = weights.arch
    batch = len(steps[0][0])
    cache = {
        f"past_key_values.{i}.{kind}": torch.zeros(batch, arch.kv_heads, 0, arch.head_dim)
        for i in range(arch.layers)
        for kind in ("key", "value")
    }
    found = []
    for ids, mask in steps:
        values: dict[str, torch.Tensor] = {
            "input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
            "first_position": torch.tensor([first]), "logits_to_keep": torch.tensor([0]), **cache,
        }  # fmt: skip
        with torch.inference_mode():
            for call in pieces.calls(weights):
                state = {n: torch.from_numpy(np.ascontiguousarray(w.read())) for n, w in call.weights.items()}
                call.piece.module.load_state_dict(state, strict=False)
                given = call.piece.module(*(values[name] for name in call.inputs))
                values |= zip(call.outputs, given if isinstance(given, tuple) else (given,), strict=True)
        cache = {name: values[name.replace("past_key_values", "present")] for name in cache}
        found.append({name: array.numpy() for name, array in values.items()})
    return found


def test_a_decoder_reads_a_prompt_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, logits and the cache's growth, of a padded batch in three steps; NumPy reads each sequence whole."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", _ATTENTION)
    numbers = {name: synthetic.tensor(name, shape, 7) for name, shape in ARCH.tensors.items()}
    weights = GraphWeights(arch=ARCH, choices=GraphChoices(), precision=Precision.FP32, read=numbers.__getitem__)
    first, sequences = 3, [[1, 5, 7, 2, 19, 4], [11, 8, 3]]
    ids = np.array([sequences[0], [0, 0, 0, *sequences[1]]])
    mask = np.array([[1] * 6, [0, 0, 0, 1, 1, 1]])
    ends = [(0, 4), (4, 5), (5, 6)]
    steps = decoded(weights, [(ids[:, a:b], mask[:, :b]) for a, b in ends], first)
    for j, sequence in enumerate(sequences):
        streams, logits = plain(ARCH, {name: x.astype(np.float64) for name, x in numbers.items()}, sequence, first)
        for name, wanted in {**{f"layers.{i}_stream": streams[i + 1] for i in range(2)}, "logits": logits}.items():
            found = np.concatenate([step[name][j] for step in steps])[-len(sequence) :]
            np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=name)
    for (_, end), step in zip(ends, steps, strict=True):
        assert all(step[f"present.{i}.{kind}"].shape == (2, 2, end, 4) for i in range(2) for kind in ("key", "value"))
        assert math.isfinite(step["logits"].sum()), "nor does a padding give NaN"

"""Parts of the plain formulation against numbers worked out by hand; the whole is held to Meta's in `test_llama.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.models.llama import oracle, reference, synthetic
from dinoexport.models.llama.cases import batch_of, inputs_of
from dinoexport.models.llama.config import Architecture
from dinoexport.spec import Array, Precision, silent
from tests.models.test_llama import model_of

# Heads of four numbers, whose two pairs turn by 1 and by 100 ** -0.5 = 0.1 a position.
ARCH = Architecture(
    dim=8, layers=2, heads=2, kv_heads=1, hidden_dim=3, vocabulary=20, norm_eps=0.5, rope_theta=100, context=64
)


def test_rotation() -> None:
    turns = torch.view_as_real(reference.rotation(ARCH, 5, 2))
    wanted = [[(math.cos(angle), math.sin(angle)) for angle in angles] for angles in ((5, 0.5), (6, 0.6))]
    assert turns.shape == (2, 2, 2) and np.allclose(turns, wanted, atol=1e-6)


def test_rotated_pairs_are_neighbours() -> None:
    """By a quarter and by a half turn: (x, y) becomes (-y, x), and (-x, -y)."""
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[5.0, 6.0, 7.0, 8.0]]]).half()
    found = reference._rotated(heads, torch.tensor([[1j, -1], [-1, 1j]]))
    assert found.dtype == torch.float16
    assert found.tolist() == [[[-2, 1, -3, -4]], [[-5, -6, -8, 7]]]


def test_rms_norm() -> None:
    """The root of (9 + 16) / 2 + 12.5 is 5, that of 0 + 4 is 2; it is rounded before the weight multiplies it."""
    found = reference._norm(torch.tensor([[3.0, 4.0], [-5.0, 5.0]]), torch.tensor([2.0, -1.0]), 12.5)
    assert np.allclose(found, [[1.2, -0.8], [-10 / 37.5**0.5, -5 / 37.5**0.5]])
    half = reference._norm(torch.tensor([[3.0, 4.0]]).half(), torch.tensor([3.0, 1.0]).half(), 12.5)
    assert half.tolist() == (np.array([[0.6, 0.8]], np.float16) * np.array([3, 1], np.float16)).tolist()


def test_attention_sees_no_later_token() -> None:
    """Of four tokens, queries 1 and 2; the scores of query 1 are 0 and 2 log 3, so that it weighs them 1 to 3 of 4."""
    keys = torch.tensor([[[0, 0, 0, 0], [2 * math.log(3), 0, 0, 0], [0, 0, 0, 0], [9, 9, 9, 9]]])
    values = torch.tensor([[[8.0, 0], [4, 4], [0, 16], [99, 99]]])
    queries = torch.tensor([[[1.0, 0, 0, 0], [0, 5, 5, 5]]])
    found = reference._attended(queries, keys, values, first=1)
    assert found.shape == (1, 2, 2) and np.allclose(found, [[[5, 3], [4, 20 / 3]]], atol=1e-5)
    last = reference._attended(queries[:, 1:], keys, values, first=3)
    weighed = np.exp(np.array([0, 0, 0, 13.5])) / (3 + np.exp(13.5))
    assert np.allclose(last, [[weighed @ values[0].numpy()]], rtol=1e-5)


def test_queries_are_taken_1024_at_a_time() -> None:
    found = reference._parts(torch.arange(2050).reshape(1, 2050, 1))
    assert [(at, part[0, 0, 0].item(), part.shape[1]) for at, part in found] == [
        (0, 0, 1024),
        (1024, 1024, 1024),
        (2048, 2048, 2),
    ]


def plain(arch: Architecture, weights: dict[str, Array], ids: list[int], first: int) -> tuple[list[Array], Array]:
    """The whole decoder in NumPy, fp64, token by token and head by head: the streams, and the logits of every token."""

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean() + arch.norm_eps) * weights[f"{name}.weight"]

    def turned(head: Array, position: int) -> Array:
        pairs = head[0::2] + 1j * head[1::2]
        turns = position * arch.rope_theta ** -(np.arange(arch.head_dim // 2) * 2 / arch.head_dim)
        pairs = pairs * np.exp(1j * turns)
        return np.stack((pairs.real, pairs.imag), axis=1).ravel()

    size, groups = arch.head_dim, arch.heads // arch.kv_heads
    stream = weights["tok_embeddings.weight"][ids]
    streams = [stream]
    for i in range(arch.layers):
        of = {name: weights[f"layers.{i}.{name}.weight"] for name in ("attention.wq", "attention.wk", "attention.wv")}
        normed = [norm(x, f"layers.{i}.attention_norm") for x in stream]
        q, k, v = ([(of[name] @ x).reshape(-1, size) for x in normed] for name in of)
        mixed = []
        for t in range(len(ids)):
            heads = []
            for h in range(arch.heads):
                query = turned(q[t][h], first + t)
                scores = [query @ turned(k[s][h // groups], first + s) / np.sqrt(size) for s in range(t + 1)]
                shares = np.exp(scores) / np.exp(scores).sum()
                heads.append(sum(share * v[s][h // groups] for s, share in enumerate(shares)))
            mixed.append(weights[f"layers.{i}.attention.wo.weight"] @ np.concatenate(heads))
        stream = stream + np.array(mixed)
        w1, w2, w3 = (weights[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        fed = [norm(x, f"layers.{i}.ffn_norm") for x in stream]
        stream = stream + np.array([w2 @ (w1 @ x / (1 + np.exp(-(w1 @ x))) * (w3 @ x)) for x in fed])
        streams.append(stream)
    return streams, np.array([weights[arch.output_name] @ norm(x, "norm") for x in stream])


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_of_a_decoder_of_eight_numbers(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt from its own first position, with two query heads to a key head, and its last tokens' logits."""
    arch = Architecture(**ARCH.model_dump() | {"tied": tied, "heads": 4, "dim": 16, "kv_heads": 2})
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: x @ weight.T)
    weights = {name: synthetic.tensor(name, shape, 7).astype(np.float64) for name, shape in arch.tensors.items()}
    prompts, firsts, keep = [[1, 5, 7, 2, 19], [3]], [0, 11], [3, 1]
    streams: dict[tuple[int, int], Array] = {}
    done: list[int] = []
    found = reference.logits_of(
        arch,
        lambda name: torch.from_numpy(weights[name]).float(),
        [torch.tensor(ids) for ids in prompts],
        first_positions=firsts,
        keep=keep,
        block_done=done.append,
        keep_stream=lambda j, blocks, stream: streams.update({(j, blocks): stream.numpy()}),
    )
    assert done == [1, 2] and set(streams) == {(j, blocks) for j in range(2) for blocks in range(3)}
    for j, (ids, first, rows) in enumerate(zip(prompts, firsts, keep, strict=True)):
        wanted, logits = plain(arch, weights, ids, first)
        assert all(np.allclose(streams[j, blocks], wanted[blocks], atol=1e-5) for blocks in range(3))
        assert found[j].dtype == torch.float32 and np.allclose(found[j], logits[-rows:], atol=1e-5)


class Toy:
    """In place of the formulation: the next id after `i` at position `p` is (3 i + p) % 20, as logits -|v - next|.

    The stream after `n` blocks is (id, n) at each token.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], list[int], list[int], bool]] = []

    def __call__(
        self, arch: Architecture, load: Any, prompts: Any, *, first_positions: Any, keep: Any, **watch: Any
    ) -> list[torch.Tensor]:
        keep_stream = watch["keep_stream"]
        self.asked.append(([p.tolist() for p in prompts], first_positions, keep, keep_stream is not None))
        for blocks in range(arch.layers + 1):
            for j, prompt in enumerate(prompts):
                if keep_stream:
                    keep_stream(j, blocks, torch.stack((prompt, torch.full_like(prompt, blocks)), dim=1))
        watch["block_done"](arch.layers)
        found = []
        for prompt, first, rows in zip(prompts, first_positions, keep, strict=True):
            after = (3 * prompt + torch.arange(first, first + len(prompt))) % 20
            found.append(-(torch.arange(20) - after.unsqueeze(1)).abs().float()[len(prompt) - rows :])
        return found


def test_streams_are_given_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "logits_of", Toy())
    model = model_of("tiny", layers=1)
    asked = {"inputs": [inputs_of(batch_of([[4]]))], "precision": Precision.FP32, "progress": silent}
    (plain_answer,) = model.reference(pytest.fail, **asked)
    (inside,) = model.reference(pytest.fail, **asked, inside=True)
    assert set(plain_answer) == {"logits"} and set(inside) == {"logits", *model.probes["model"]}


def test_the_outputs_of_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case's prompts are asked together, the id 0 is a token, and only cases with steps are continued."""
    toy, steps_told = Toy(), list[Any]()
    monkeypatch.setattr(reference, "logits_of", toy)
    inputs = [
        inputs_of(batch_of([[0, 2], [5]]), first_position=10, steps=3),
        inputs_of(batch_of([[7, 0, 1]]), keep=2, steps=1),
        inputs_of(batch_of([[4]])),
        inputs_of(batch_of([[6]]), steps=2),
    ]
    first, second, third, fourth = oracle.of(
        ARCH, pytest.fail, inputs, precision=Precision.FP32, progress=lambda *told: steps_told.append(told), inside=True
    )
    assert toy.asked == [
        ([[0, 2], [5], [7, 0, 1], [4], [6]], [10, 10, 0, 0, 0], [1, 1, 2, 1, 1], True),
        ([[0, 2, 17], [5, 5], [6, 18]], [10, 10, 0], [1, 1, 1], False),
        ([[0, 2, 17, 3], [5, 5, 6]], [10, 10], [1, 1], False),
    ]
    assert steps_told == [("PyTorch fp32", 2, 2)] * 3
    assert set(second) == set(first) == set(third) | {"rollout", "rollout_logits"}
    assert set(third) == {"logits", "embedded", "layers.0_stream", "layers.1_stream"}
    assert first["logits"].argmax(axis=2).tolist() == [[17], [5]] and first["rollout"].tolist() == [
        [17, 3, 2],
        [5, 6, 10],
    ]
    assert first["rollout_logits"].shape == (2, 3, 20) and first["rollout_logits"].max(axis=2).tolist() == [[0] * 3] * 2
    assert second["logits"].argmax(axis=2).tolist() == [[1, 5]] and second["rollout"].tolist() == [[5]]
    assert fourth["rollout"].tolist() == [[18, 15]]
    assert first["embedded"].tolist() == [[[0, 0], [2, 0]], [[0, 0], [5, 0]]], "padded on the left"
    assert second["layers.1_stream"].tolist() == [[[7, 2], [0, 2], [1, 2]]]


@pytest.mark.parametrize(("room", "reads"), [(0, 1), (-1, 2)])
def test_the_tensors_of_a_small_model_are_read_once(room: int, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small is a model of at most as many numbers as are kept."""
    numbers = 2 * 20 * 8 + 8 + 2 * (2 * 8 * 8 + 2 * 4 * 8 + 3 * 3 * 8 + 2 * 8)
    monkeypatch.setattr(oracle, "_KEPT_NUMBERS_MAX", numbers + room)
    seen: list[str] = []

    def read(name: str) -> Array:
        seen.append(name)
        return np.ones(2)

    load = oracle._loader(ARCH, read, torch.bfloat16)
    assert load("norm.weight").dtype == load("norm.weight").dtype == torch.bfloat16 and len(seen) == reads


@pytest.mark.parametrize(("layers", "reads"), [(26, 1), (27, 2)])
def test_a_small_model_has_at_most_two_to_the_28_numbers(layers: int, reads: int) -> None:
    """Blocks of ten million numbers, and some beside them."""
    arch = Architecture(
        dim=1000, layers=layers, heads=1, kv_heads=1, hidden_dim=1999, vocabulary=4000, norm_eps=0.5, rope_theta=10,
        context=9,
    )  # fmt: skip
    assert (sum(map(np.prod, arch.tensors.values())) <= 2**28) == (reads == 1)
    seen: list[str] = []
    load = oracle._loader(arch, lambda name: seen.append(name) or np.ones(2), torch.float32)  # type: ignore[func-returns-value]
    assert load("norm.weight").shape == load("norm.weight").shape and len(seen) == reads


@pytest.mark.parametrize(("positions", "keep"), [([0], [1, 1]), ([0, 0], [1])])
def test_as_many_positions_and_rows_as_prompts(
    positions: list[int], keep: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_block", lambda arch, weights, stream, turns: stream)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: x)
    with pytest.raises(ValueError, match="zip"):
        reference.logits_of(
            ARCH,
            lambda name: torch.ones(20, 8) if name == "tok_embeddings.weight" else torch.ones(8),
            [torch.tensor([1]), torch.tensor([2])],
            first_positions=positions,
            keep=keep,
            block_done=lambda done: silent("", done, done),
        )

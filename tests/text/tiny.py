"""A decoder and a tokenizer small enough to be written down: one attention block in NumPy, one token for each byte.

The decoder has the names and shapes of an exported graph, reads positions off the attention mask, and keeps its cache
as arrays, so whatever is wrong with padding, positions or order changes what it writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinoexport.runtime.decoding import ArrayDecoder
from dinoexport.spec import Arrays, Dim, Graph, Tensor
from dinoexport.text.decoder import SteppedDecoder

HEADS, WIDTH, CONTEXT = 2, 8, 96
CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(CONTROLS)
_CACHE = ("batch", HEADS, "past", WIDTH)
GRAPH = Graph(
    name="model",
    inputs=(
        Tensor(name="input_ids", dtype="int64", shape=("batch", "length"), meaning="token ids"),
        Tensor(name="attention_mask", dtype="int64", shape=("batch", "total"), meaning="1 for tokens, 0 for padding"),
        Tensor(name="logits_to_keep", dtype="int64", shape=(1,), meaning="logits of so many last tokens", default=0),
        Tensor(name="first_position", dtype="int64", shape=(1,), meaning="not looked at", default=0),
        Tensor(name="past_key_values.0.key", dtype="float32", shape=_CACHE, meaning="keys"),
        Tensor(name="past_key_values.0.value", dtype="float32", shape=_CACHE, meaning="values"),
    ),
    outputs=(
        Tensor(name="logits", dtype="float32", shape=("batch", "length", VOCABULARY), meaning="logits"),
        *(Tensor(name=f"present.0.{kind}", dtype="float32", shape=_CACHE, meaning=kind) for kind in ("key", "value")),
    ),
    carried={f"past_key_values.0.{kind}": f"present.0.{kind}" for kind in ("key", "value")},
    dims=(Dim(name="batch", min=1, opt=1, max=4), Dim(name="length", min=1, opt=8, max=CONTEXT)),
)  # fmt: skip


class Tiny:
    """The graph as a runner. calls: (batch, length, past) of each."""

    def __init__(self, seed: int = 0) -> None:
        noise = np.random.RandomState(seed)
        width = HEADS * WIDTH
        self.embedding_VD = noise.standard_normal((VOCABULARY, width)).astype(np.float32)
        self.mixes = [noise.standard_normal((width, width)).astype(np.float32) / width**0.5 for _ in range(4)]
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, arrays: Arrays) -> dict[str, np.ndarray]:
        ids_BT, mask_BP = arrays["input_ids"], arrays["attention_mask"]
        past_BGPK = [arrays[f"past_key_values.0.{kind}"] for kind in ("key", "value")]
        (batch, length), past = ids_BT.shape, past_BGPK[0].shape[2]
        assert mask_BP.shape == (batch, past + length)
        self.calls.append((batch, length, past))
        positions_BP = np.maximum(np.cumsum(mask_BP, axis=1) - 1, 0)
        hidden = self.embedding_VD[ids_BT]
        query, key, value = (
            (hidden @ mix).reshape(batch, length, HEADS, WIDTH).transpose(0, 2, 1, 3) for mix in self.mixes[:3]
        )
        query, key = (_turned(x, positions_BP[:, past:]) for x in (query, key))
        key, value = (np.concatenate(pair, axis=2) for pair in zip(past_BGPK, (key, value), strict=True))
        seen = np.arange(past + length)[None, :] <= np.arange(past, past + length)[:, None]
        seen = seen[None] & (mask_BP[:, None, :] == 1)
        scores = np.where(seen[:, None], query @ key.transpose(0, 1, 3, 2), -1e9)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        hidden = hidden + (shares @ value).transpose(0, 2, 1, 3).reshape(batch, length, -1) @ self.mixes[3] * 3
        hidden = hidden[:, -int(arrays.get("logits_to_keep", [0])[0]) :]
        return {"logits": hidden @ self.embedding_VD.T, "present.0.key": key, "present.0.value": value}


def _turned(x: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
    half = WIDTH // 2
    angles = positions_BT[:, None, :, None] * (0.3 ** np.arange(half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def decoder(seed: int = 0, *, chunk: int = 512) -> SteppedDecoder:
    return decoder_of(Tiny(seed), chunk=chunk)


def decoder_of(run: Tiny, *, chunk: int = 512) -> SteppedDecoder:
    return SteppedDecoder(
        begin_steps=lambda: ArrayDecoder(run, GRAPH),
        vocabulary=VOCABULARY,
        context=CONTEXT,
        token_bytes=2 * 4 * HEADS * WIDTH,
        chunk=chunk,
    )


def tokenizer_json(folder: Path, controls: Sequence[str] = CONTROLS) -> Path:
    """One id for each byte, and the control tokens behind them."""
    from tokenizers import Tokenizer as Maker
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    maker = Maker(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    maker.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    maker.decoder = decoders.ByteLevel()
    maker.add_special_tokens(list(controls))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(maker.to_str())), encoding="utf-8")
    return path


def bundle(folder: Path) -> Path:
    """A judged bundle of a tiny decoder with a tokenizer, from a folder as Hugging Face publishes one."""
    from dinoexport import family
    from dinoexport.config import recipe
    from dinoexport.pipeline import build as pipeline
    from tests import llama_files
    from tests.conftest import DATA

    named = str(DATA / "tiny_text.toml")
    weights = llama_files.write_hf(folder / "weights", family.find("llama").model(recipe.load(named)).arch, seed=5)
    tokenizer_json(weights)
    pipeline.build(pipeline.build_request(named, weights=str(weights), target="cpu", out=folder / "bundle"))
    return folder / "bundle"

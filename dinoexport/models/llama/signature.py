"""The inputs and outputs of a decoder's graph, with the names of Hugging Face's exporters."""

from __future__ import annotations

from collections.abc import Mapping

from dinoexport.config.recipe import Range
from dinoexport.models.llama.config import Architecture
from dinoexport.runtime.decoding import ATTENTION_MASK, FIRST_POSITION, INPUT_IDS, LOGITS, LOGITS_TO_KEEP
from dinoexport.spec import Dim, Graph, Tensor

DIMS = ("batch", "length", "past")


def graph(profile: Mapping[str, Range], arch: Architecture, *, body: str) -> Graph:
    """The one graph, `model`. body: the dtype of its cache."""
    dims = {name: profile[name].dim(name) for name in DIMS}
    length, past = dims["length"], dims["past"]
    total = Dim(
        name="total",
        min=1,
        opt=length.opt + past.opt,
        max=min(length.max + past.max, arch.context),
        sum_of=("past", "length"),
    )
    heads, size = arch.kv_heads, arch.head_dim
    cache_in, cache_out = [], []
    for i in range(arch.layers):
        for kind in ("key", "value"):
            meaning = f"{kind}s of block {i}, heads in Hugging Face's order of rotated halves"
            before = ("batch", heads, "past", size)
            cache_in.append(Tensor(name=f"past_key_values.{i}.{kind}", dtype=body, shape=before, meaning=meaning))
            after = ("batch", heads, "total", size)
            cache_out.append(Tensor(name=f"present.{i}.{kind}", dtype=body, shape=after, meaning=meaning))
    inputs = (
        Tensor(name=INPUT_IDS, dtype="int64", shape=("batch", "length"), meaning="token ids"),
        Tensor(
            name=ATTENTION_MASK,
            dtype="int64",
            shape=("batch", "total"),
            meaning="1 for each token of the past and of input_ids, 0 for padding before a sequence",
        ),
        *cache_in,
        Tensor(
            name=LOGITS_TO_KEEP,
            dtype="int64",
            shape=(1,),
            meaning="logits of so many last tokens are wanted; 0 for all",
            default=0,
        ),
        Tensor(
            name=FIRST_POSITION,
            dtype="int64",
            shape=(1,),
            meaning="the position of each sequence's first token that is not padding",
            default=0,
        ),
    )
    logits = Tensor(
        name=LOGITS,
        dtype="float32",
        shape=("batch", "kept", arch.vocabulary),
        meaning="unnormalised log probabilities of the next token",
    )
    carried = {past.name: present.name for past, present in zip(cache_in, cache_out, strict=True)}
    return Graph(
        name="model",
        inputs=inputs,
        outputs=(logits, *cache_out),
        dims=(*dims.values(), total),
        carried=carried,
    )

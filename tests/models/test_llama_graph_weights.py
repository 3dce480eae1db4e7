"""What a decoder's graph holds, by its precision: shapes, bits and bytes of its weights, its inputs and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dinoexport import family
from dinoexport.config.recipe import Recipe
from dinoexport.errors import UsageError
from dinoexport.models.llama import companions
from dinoexport.models.llama.config import Architecture, GraphChoices
from dinoexport.models.llama.graph_weights import GraphWeights
from dinoexport.spec import Array, Precision
from tests.models.test_llama import model_of

ARCH = Architecture(
    dim=64, layers=2, heads=4, kv_heads=2, hidden_dim=96, vocabulary=10, norm_eps=1e-5, rope_theta=1e4, context=99
)
PRODUCTS = {
    "q": (64, 64), "k": (64, 32), "v": (64, 32), "out": (64, 64), "gate": (64, 96), "up": (64, 96), "down": (96, 64),
}  # fmt: skip


def numbers(name: str) -> Array:
    """Each row holds its own index."""
    shape = ARCH.tensors[name]
    return np.repeat(np.arange(shape[0], dtype=np.float32), shape[1]).reshape(shape)


def weights(precision: Precision, arch: Architecture = ARCH, **choices: Any) -> GraphWeights:
    return GraphWeights(arch=arch, choices=GraphChoices(**choices), precision=precision, read=numbers)


@pytest.mark.parametrize(
    ("precision", "bits", "kept"),
    [(Precision.FP32, 0, ()), (Precision.BF16, 0, ()), (Precision.INT8, 8, ()), (Precision.INT4, 4, ("v", "down"))],
)
def test_a_block_s_weights(precision: Precision, bits: int, kept: tuple[str, ...]) -> None:
    """Those of four bits have offsets, one for each 32 rows of each column; the kept ones are in eight bits."""
    wanted: dict[str, Any] = {f"{norm}_D": ((64,), 0, 0, "") for norm in ("attention_norm", "ffn_norm")}
    for product, shape in PRODUCTS.items():
        own = 8 if product in kept else bits
        wanted[f"{product}_IO"] = (shape, own, 32 if own else 0, "")
        if own == 4:
            wanted[f"{product}_offset_NO"] = ((shape[0] // 32, shape[1]), 0, 0, f"{product}_IO")
    found = {
        name: (weight.shape, weight.bits, weight.block if weight.bits else 0, weight.offsets_of)
        for name, weight in weights(precision).block(1).items()
    }
    assert found == wanted
    assert weights(precision).offsets("q", "v", "up", "down") == (("q", "up") if bits == 4 else ())


def test_all_products_in_four_bits() -> None:
    assert weights(Precision.INT4, int8=()).offsets(*PRODUCTS) == tuple(PRODUCTS)
    head = weights(Precision.INT4, int8=("output",)).head()
    assert {name: weight.bits for name, weight in head.items()} == {"norm_D": 0, "output_IO": 8}


def test_only_rows_of_rotated_heads_are_in_halves() -> None:
    """Heads of 16: rows 0, 2, ... 14, then 1, 3, ... 15."""
    block = weights(Precision.FP32).block(0)
    order = [head + row + odd for head in range(0, 64, 16) for odd in (0, 1) for row in range(0, 16, 2)]
    for product, (rows, columns) in PRODUCTS.items():
        values = block[f"{product}_IO"].read()
        assert values.shape == (rows, columns) and (values == values[0]).all()
        wanted = order[:columns] if product in "qk" else list(range(columns))
        assert values[0].tolist() == wanted, product


@pytest.mark.parametrize(
    ("precision", "choices", "bytes_of_products"),
    [
        # 32768 numbers of q, k, v, out, 36864 of gate, up, down, in two blocks less what kv_heads halve; 640 of output.
        (Precision.FP32, {}, 4 * (2 * 30720 + 640)),
        (Precision.FP16, {}, 2 * (2 * 30720 + 640)),
        (Precision.INT8, {}, 2 * 30720 + 640 + 4 * (2 * 960 + 20)),
        (Precision.INT8, {"body": "fp16"}, 2 * 30720 + 640 + 2 * (2 * 960 + 20)),
        (Precision.INT8, {"block": 16}, 2 * 30720 + 640 + 4 * (2 * 1920 + 40)),
        # Half a byte a number, and as many offsets as scales; `v` and `down` have a byte and none.
        (Precision.INT4, {}, 2 * (11264 + 8192) + 320 + 4 * (2 * (960 + 704) + 2 * 20)),
    ],
)
def test_stored_bytes(precision: Precision, choices: dict[str, Any], bytes_of_products: int) -> None:
    """The products, the embedding table in the body's dtype, and five norms of 64 in fp32."""
    body = 2 if choices.get("body") == "fp16" or precision is Precision.FP16 else 4
    assert weights(precision, **choices).stored_bytes() == bytes_of_products + body * 640 + 4 * 64 * 5


def test_a_tied_model_stores_its_table_twice() -> None:
    tied = Architecture(**ARCH.model_dump() | {"tied": True})
    assert weights(Precision.FP16, tied).stored_bytes() == weights(Precision.FP16).stored_bytes()


def test_the_signature() -> None:
    model = model_of("tiny_gqa", layers=1, context=300)
    graph = model.graphs[0]
    past, present = ("batch", 2, "past", 8), ("batch", 2, "total", 8)
    assert [(tensor.name, tensor.dtype, tensor.shape, tensor.default) for tensor in graph.inputs] == [
        ("input_ids", "int64", ("batch", "length"), None),
        ("attention_mask", "int64", ("batch", "total"), None),
        ("past_key_values.0.key", "float32", past, None),
        ("past_key_values.0.value", "float32", past, None),
        ("logits_to_keep", "int64", (1,), 0),
        ("first_position", "int64", (1,), 0),
    ]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.outputs] == [
        ("logits", "float32", ("batch", "kept", 320)),
        ("present.0.key", "float32", present),
        ("present.0.value", "float32", present),
    ]
    assert [(dim.name, dim.min, dim.opt, dim.max, dim.sum_of) for dim in graph.dims] == [
        ("batch", 1, 1, 4, ()),
        ("length", 1, 1, 300, ()),
        ("past", 0, 150, 299, ()),
        ("total", 1, 151, 300, ("past", "length")),
    ]
    assert graph.carried == {f"past_key_values.0.{kind}": f"present.0.{kind}" for kind in ("key", "value")}


def changed(precision: Precision | None = None, **changes: Any) -> Recipe:
    """A recipe of context 64 in which `table__key__key` has another value."""
    content = model_of("tiny", context=64, precision=precision).recipe.model_dump()
    for path, value in changes.items():
        *tables, key = path.split("__")
        place = content
        for table in tables:
            place = place[table]
        place[key] = value
    return Recipe.model_validate(content)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"profile__past__min": 1}, "past must begin at 0 and length at 1"),
        ({"profile__length": {"min": 2, "opt": 2, "max": 64}}, "past must begin at 0 and length at 1"),
        ({"profile__past__max": 64}, "past up to 64 and length up to 64 leave the context of 64"),
        ({"profile__length__max": 65}, "past up to 63 and length up to 65 leave the context of 64"),
        ({"precision": "int8", "graph__block": 128}, "block 128 does not divide 64 and 192"),
        ({"precision": "int4", "graph__block": 24}, "block 24 does not divide 64 and 192"),
        ({"precision": "int4", "model__hidden_dim": 200}, "block 32 does not divide 64 and 200"),
        ({"quantised": "activations"}, 'quantised = "activations" is not for decoders'),
    ],
)
def test_recipes_that_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        family.find("llama").model(changed(**changes))


@pytest.mark.parametrize("changes", [{}, {"graph__block": 128}, {"precision": "int4"}])
def test_recipes_that_are_taken(changes: dict[str, Any]) -> None:
    model = family.find("llama").model(changed(**changes))
    assert model.arch.context == 64
    narrow = "precision" in changes
    assert model.engine_form().get("body") == ("fp16" if narrow else None)
    assert model.promoted(())["body"] == "fp32"


def test_sizes_that_follow_from_the_others() -> None:
    assert (ARCH.head_dim, ARCH.kv_dim, ARCH.cache_values_a_token, ARCH.output_name) == (16, 32, 128, "output.weight")


def test_a_product_that_there_is_not() -> None:
    with pytest.raises(ValidationError) as refused:
        GraphChoices(int8=("v", "upp", "none"))
    assert "int8: there is no product 'upp'. Did you mean 'up'?" in str(refused.value)


def test_the_configuration_beside_a_graph() -> None:
    """By which Hugging Face's tools load it."""
    (item,) = companions.files(ARCH).items()
    assert item == (
        "config.json",
        b"""{
 "architectures": [
  "LlamaForCausalLM"
 ],
 "model_type": "llama",
 "hidden_act": "silu",
 "hidden_size": 64,
 "intermediate_size": 96,
 "num_hidden_layers": 2,
 "num_attention_heads": 4,
 "num_key_value_heads": 2,
 "vocab_size": 10,
 "max_position_embeddings": 99,
 "rms_norm_eps": 1e-05,
 "rope_theta": 10000.0,
 "tie_word_embeddings": false,
 "use_cache": true
}
""",
    )


def test_axes_of_meta_s_files() -> None:
    """Along which each tensor is split; norms are whole in every file."""
    axes = {name: family.find("llama").split_axis(name) for name in ARCH.tensors}  # type: ignore[attr-defined]
    block = {
        "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1, "feed_forward.w1": 0,
        "feed_forward.w2": 1, "feed_forward.w3": 0, "attention_norm": None, "ffn_norm": None,
    }  # fmt: skip
    wanted = {f"layers.{i}.{part}.weight": axis for i in range(2) for part, axis in block.items()}
    assert axes == wanted | {"tok_embeddings.weight": 1, "norm.weight": None, "output.weight": 0}

"""DINOv2 against numbers nobody here made: the official implementation's, and Hugging Face's where it agrees with that.

`data/goldens/*.npz` hold what the official code (fp32, PyTorch, CPU) answers on checkpoints made by the rule in
`models/dinov2/synthetic.py`, seed 7. Keys are BxHxW/output; patch tokens at 16 rows, `patch_index`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dinoexport import family
from dinoexport.config import recipe
from dinoexport.config.limits import Limits, load_validation
from dinoexport.errors import InputRefused
from dinoexport.models.dinov2 import fold, graph, reference, synthetic
from dinoexport.models.dinov2.config import Architecture
from dinoexport.runtime import check_inputs
from dinoexport.spec import Case, Expectation, Precision
from dinoexport.validation import evaluate, judge
from dinoexport.validation.metrics import distance
from tests import conformance
from tests.conftest import DATA
from tests.properties import examples

SEED = 7
GOLDENS = ("vits14", "vits14_reg", "tiny_swiglu", "tiny_swiglu_reg")
LIMIT = 1e-5


def model_of(name: str, **choices: Any) -> Any:
    """The DINOv2 model of a shipped variant or of a tiny recipe, with other choices for its graph."""
    shipped = name in recipe.variants()
    loaded = recipe.load(name if shipped else str(DATA / f"{name}.toml"))
    return family.find("dinov2").model(loaded.model_copy(update={"graph": {**loaded.graph, **choices}}))


class Golden:
    """One file of official answers, and how to compare with it."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / "goldens" / f"{name}-seed{SEED}.npz") as stored:
            self.arrays = {key: stored[key] for key in stored.files}
        self.sizes = sorted({key.split("/")[0] for key in self.arrays})
        self.layers = max(int(key.split("layer-")[1][0]) for key in self.arrays if "layer-" in key)

    def inputs(self) -> list[dict[str, Any]]:
        """The images the official code was asked about, size by size."""
        return [{"pixels": synthetic.pixels(*map(int, size.split("x")), SEED)} for size in self.sizes]

    def check(self, answers: list[dict[str, Any]], depth: int) -> None:
        """Class and patch tokens of the last blocks, at every size, to 1e-5."""
        for size, answer in zip(self.sizes, answers, strict=True):
            rows = self.arrays[f"{size}/patch_index"]
            assert answer["patch_tokens"].shape[1] == self.arrays[f"{size}/patch_count"]
            pairs = {("", f"{size}/")} | {
                (f"block_{depth - k}_", f"{size}/layer-{k}/") for k in range(1, self.layers + 1)
            }
            for ours, theirs in sorted(pairs):
                for output, picked in (("class_token", slice(None)), ("patch_tokens", (slice(None), rows))):
                    measured = distance(answer[f"{ours}{output}"][picked], self.arrays[f"{theirs}{output}"])
                    assert measured.relative_l2 <= LIMIT, (size, ours, output, measured)
            mean = answer["patch_tokens"].mean(axis=1)
            assert distance(mean, self.arrays[f"{size}/patch_mean"]).relative_l2 <= LIMIT, size


@pytest.mark.parametrize("name", GOLDENS)
def test_official_numbers(name: str, tmp_path: Path) -> None:
    """The reference, the traced modules run by PyTorch, and the ONNX file all give the official tokens."""
    golden = Golden(name)
    model = model_of(name, last_blocks=golden.layers)
    depth = model.arch.depth
    read = conformance.reading(model, SEED)
    golden.check(conformance.reference(model, read, golden.inputs()), depth)
    golden.check(conformance.eagerly(model, read, golden.inputs()), depth)
    golden.check(conformance.exported(model, read, golden.inputs(), tmp_path), depth)


@pytest.mark.parametrize("name", ["tiny_swiglu", "tiny_swiglu_reg"])
def test_official_numbers_catch_a_wrong_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The goldens pin the judge too: it fails them without the native-grid rule, or with the other kind's resize."""
    golden, model = Golden(name), model_of(name, last_blocks=3)
    right = reference.position_embedding
    other_kind = lambda table, h, w, offset, antialias: right(table, h, w, offset=0.1 - offset, antialias=not antialias)  # noqa: E731
    monkeypatch.setattr(reference, "position_embedding", other_kind)
    with pytest.raises(AssertionError):
        golden.check(conformance.reference(model, conformance.reading(model, SEED), golden.inputs()), 3)


@pytest.mark.parametrize("registers", [0, 4])
@examples(40)
@given(h=st.integers(1, 80), w=st.integers(1, 80))
def test_positions_are_interpolates_at_every_size(registers: int, h: int, w: int) -> None:
    """The two float32 matrix products give what F.interpolate gives in float64, on any grid, to 4e-6.

    Measured on all 6400 grids up to 80x80, on a table of noise: ours is at most 2.9e-6 away, PyTorch's float32 3.6e-6.
    """
    grid_1Dhw = position_table(registers)[:, 1:].double().reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    if h == w == 37:
        exact = grid_1Dhw
    elif registers:
        exact = F.interpolate(grid_1Dhw, size=(h, w), mode="bicubic", antialias=True)
    else:
        exact = F.interpolate(grid_1Dhw, scale_factor=((h + 0.1) / 37, (w + 0.1) / 37), mode="bicubic")
    exact_ND = exact.permute(0, 2, 3, 1).flatten(0, 2)
    assert distance(our_positions(h, w, registers).numpy(), exact_ND.numpy()).relative_l2 <= 4e-6


@pytest.mark.parametrize("registers", [0, 4])
def test_native_grid_is_untouched(registers: int) -> None:
    assert torch.equal(our_positions(37, 37, registers), position_table(registers)[0, 1:])


def small(registers: int) -> Architecture:
    return Architecture(embed_dim=8, depth=1, num_heads=1, feed_forward="mlp", register_count=registers)


def position_table(registers: int) -> torch.Tensor:
    return torch.from_numpy(synthetic.tensor("pos_embed", small(registers).tensors["pos_embed"], SEED))


def our_positions(h: int, w: int, registers: int) -> torch.Tensor:
    """The traced stem's resized table (h*w, 8)."""
    arch = small(registers)
    folded = fold.Folded(arch=arch, read=lambda name: synthetic.tensor(name, arch.tensors[name], SEED))
    stem = graph.Stem(**arch.stem_facts, residual="float32")
    for name, weight in folded.stem().items():
        getattr(stem, name).copy_(torch.from_numpy(np.ascontiguousarray(weight.read())))
    return stem._positions(h, w)[0, 1 + registers :]


@pytest.mark.parametrize(("name", "swiglu"), [("vits14", False), ("vits14_reg", False), ("tiny_swiglu", True)])
def test_hugging_face_agrees_on_the_native_grid(name: str, swiglu: bool) -> None:
    """A second oracle: transformers' models on the same weights, at 518x518 where their resize plays no part."""
    import transformers

    model = model_of(name)
    arch = model.arch
    sizes: dict[str, Any] = {
        "hidden_size": arch.embed_dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.num_heads,
        "use_swiglu_ffn": swiglu,
        "image_size": 518,
        "patch_size": 14,
    }
    if arch.register_count:
        theirs: Any = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=arch.register_count)
        )
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    theirs.load_state_dict(_hugging_face_names(arch))
    pixels = synthetic.pixels(1, 518, 518, SEED)
    with torch.inference_mode():
        hidden = theirs.eval()(torch.from_numpy(pixels)).last_hidden_state.numpy()
    ours = conformance.eagerly(model, conformance.reading(model, SEED), [{"pixels": pixels}])[0]
    assert distance(ours["class_token"], hidden[:, 0]).relative_l2 <= LIMIT
    assert distance(ours["patch_tokens"], hidden[:, 1 + arch.register_count :]).relative_l2 <= LIMIT


def _hugging_face_names(arch: Architecture) -> dict[str, torch.Tensor]:
    """The synthetic checkpoint under transformers' names; written by hand, not by the product's own key map."""
    dim, renamed = arch.embed_dim, {}
    pairs = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks.": "encoder.layer.",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    }
    for published, shape in arch.tensors.items():
        tensor = torch.from_numpy(synthetic.tensor(published, shape, SEED))
        name = functools.reduce(lambda text, pair: text.replace(*pair), pairs.items(), published)
        if "attn.qkv" in name:
            for i, part in enumerate(("query", "key", "value")):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = tensor[i * dim : (i + 1) * dim]
        else:
            renamed["layernorm" + name[4:] if name.startswith("norm.") else name] = tensor
    return renamed


@pytest.fixture(scope="module", params=["tiny_swiglu", "tiny_swiglu_reg"])
def judged_model(request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[Expectation], Limits]]:
    """A tiny model, PyTorch's answers to some of the shipped cases, and the shipped limits."""
    model = model_of(request.param)
    validation, folder = load_validation("dinov2", beside=None)
    wanted = ("small_batch", "native", "half_native", "photographs", "cropped")
    cases = [case for case in evaluate.cases_of(model, validation, folder) if case.name in wanted]
    answers = conformance.reference(model, conformance.reading(model, SEED), [case.inputs for case in cases])
    expectations = [Expectation(case=c, outputs=a) for c, a in zip(cases, answers, strict=True)]
    yield model, expectations, validation.limits[Precision.FP32]


def verdict(judged_model: Any, read: Any = None) -> bool:
    """What the judge says of the traced modules as they are at this moment, run by PyTorch."""
    model, expectations, limits = judged_model
    weights = read or (lambda name: model.synthetic(name, SEED))

    def candidate(inputs: Any) -> Any:
        return conformance.eagerly(model, weights, [inputs])[0]

    report = judge.judge(candidate, expectations, [], limits, candidate_name="mutant", reference_name="PyTorch")
    return report.passed


def test_judge_passes_the_graph_as_it_is(judged_model: Any) -> None:
    assert verdict(judged_model)


@pytest.mark.parametrize("mutation", ["resize", "native_grid", "edges"])
def test_judge_fails_a_wrong_resize(judged_model: Any, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    """The offset or the antialias left out; the native-grid rule forgotten; edges not replicated or not normalised."""
    registers = judged_model[0].arch.register_count > 0
    weights = graph.Stem._weights
    if mutation == "edges":
        changed = _unnormalised if registers else _without_edges(weights)
    elif mutation == "native_grid":
        # Without registers: the offset on the native grid too. With registers: an offset, which those never have.
        changed = lambda self, i, tenths: weights(self, i, tenths // 10 * 10 + 1)  # noqa: E731
    elif registers:
        changed = _without_antialias
    else:
        changed = lambda self, i, tenths: weights(self, i, tenths // 10 * 10)  # noqa: E731
    monkeypatch.setattr(graph.Stem, "_weights", changed)
    assert not verdict(judged_model)


def _without_antialias(self: Any, index: torch.Tensor, tenths: torch.Tensor) -> torch.Tensor:
    return graph._cubic(self._distances(index, tenths), a=-0.5)


def _unnormalised(self: Any, index: torch.Tensor, tenths: torch.Tensor) -> torch.Tensor:
    step = (370 / tenths).clamp(min=1)
    return graph._cubic(self._distances(index, tenths) / step, a=-0.5) / step


def _without_edges(weights: Any) -> Any:
    def cut(self: Any, index: torch.Tensor, tenths: torch.Tensor) -> torch.Tensor:
        return weights(self, index, tenths) * ((torch.arange(41) > 1) & (torch.arange(41) < 39))

    return cut


@pytest.mark.parametrize(
    ("changed", "becomes"),
    [
        ("blocks.1.ls1.gamma", "one"),
        ("blocks.2.ls2.gamma", "one"),
        ("blocks.0.", "blocks.1."),
        ("blocks.1.attn.qkv.bias", "zero"),
        ("cls_token", "zero"),
        ("norm.bias", "zero"),
    ],
)
def test_judge_fails_wrong_weights(judged_model: Any, changed: str, becomes: str) -> None:
    """One LayerScale left out, one block in another's place, one bias or token dropped."""
    model = judged_model[0]

    def read(name: str) -> Any:
        value = model.synthetic(name, SEED)
        if not name.startswith(changed):
            return value
        if becomes in ("one", "zero"):
            return np.full_like(value, 1.0 if becomes == "one" else 0.0)
        return model.synthetic(name.replace(changed, becomes), SEED)

    assert not verdict(judged_model, read)


def test_judge_fails_swapped_gate(judged_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SwiGLU's gate and value the other way round."""
    chunk = torch.Tensor.chunk
    monkeypatch.setattr(torch.Tensor, "chunk", lambda self, *args, **kw: tuple(reversed(chunk(self, *args, **kw))))
    assert not verdict(judged_model)


def test_bytes_in_give_the_same_tokens(tmp_path: Path) -> None:
    """uint8 NHWC input, normalised in the graph, against the reference on pixels normalised as torchvision does."""
    model = model_of("tiny_swiglu", input="images")
    cases = [
        model.case({"name": "bytes", "why": "distinct images", "batch": 2, "height": 42, "width": 70}, DATA),
        model.case({"name": "cropped", "why": "no multiple of 14", "height": 45, "width": 59}, DATA),
    ]
    assert cases[0].inputs["images"].dtype == np.uint8
    inputs = [case.inputs for case in cases]
    read = conformance.reading(model, SEED)
    exact = conformance.reference(model, read, inputs)
    for ours, theirs in zip(conformance.exported(model, read, inputs, tmp_path), exact, strict=True):
        assert all(distance(ours[name], theirs[name]).relative_l2 <= LIMIT for name in theirs)


@pytest.mark.parametrize("residual", ["fp16", "fp32"])
def test_fp16_is_typed_where_it_must_be(tmp_path: Path, residual: str) -> None:
    """Blocks in fp16; stem and final norm in fp32; LayerNormalization one op; tokens as close as fp16 can be."""
    import onnx

    base = model_of("tiny_swiglu_reg", residual=residual)
    model = family.find("dinov2").model(base.recipe.model_copy(update={"precision": Precision.FP16}))
    inputs = [{"pixels": synthetic.pixels(2, 42, 70, SEED)}]
    read = conformance.reading(model, SEED)
    exact = conformance.reference(model, read, inputs)[0]
    ours = conformance.exported(model, read, inputs, tmp_path)[0]
    for name in exact:
        assert ours[name].dtype == np.float32
        error = distance(ours[name], exact[name])
        assert 1e-5 < error.relative_l2 < 2e-3, "fp16 rounds, and no more"
    onnx_model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    types = {tensor.name: tensor.data_type for tensor in onnx_model.graph.initializer}
    for name, dtype in types.items():
        if name.startswith(("stem.", "norm.")):
            assert dtype == onnx.TensorProto.FLOAT, name
        if name.startswith("blocks."):
            residual_tensor = ".norm" in name and residual == "fp32"
            assert dtype == (onnx.TensorProto.FLOAT if residual_tensor else onnx.TensorProto.FLOAT16), name
    ops = [node.op_type for node in onnx_model.graph.node]
    assert ops.count("LayerNormalization") == 2 * 3 + 1
    assert not {"Resize", "ReduceMean", "Pow"} & set(ops)


def test_dynamic_dims_keep_their_names(tmp_path: Path) -> None:
    import onnx

    model = model_of("tiny_swiglu")
    conformance.export_to(tmp_path, model, conformance.reading(model, SEED))
    graph_proto = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph

    def dims(value: Any) -> list[Any]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert {v.name: dims(v) for v in graph_proto.input} == {"pixels": ["batch", 3, "height", "width"]}
    assert {v.name: dims(v) for v in graph_proto.output} == {
        "class_token": ["batch", 96],
        "patch_tokens": ["batch", "patches", 96],
    }


def test_strict_sizes_are_refused_with_the_nearest_ones() -> None:
    model = model_of("tiny_swiglu", sizes="strict")
    case = model.case({"name": "odd", "why": "no multiple of 14", "height": 30, "width": 28}, DATA)
    assert isinstance(case, Case) and case.expect_refusal
    with pytest.raises(InputRefused, match="height 30 is not a multiple of 14") as refused:
        check_inputs(model.graphs[0], case.inputs)
    assert "28 and 42" in refused.value.next_step


@pytest.mark.parametrize("name", [v for v in recipe.variants() if recipe.load(v).family == "dinov2"])
def test_every_variant_is_described(name: str) -> None:
    """Parameters as published: 21 M, 86 M, 0.3 B, 1.1 B, registers four; with Depth Anything's head 25, 97, 335 M."""
    model = model_of(name)
    millions = sum(int(np.prod(s)) for n, s in model.tensors.items() if n != "mask_token") / 1e6
    size = name.rsplit("vit", maxsplit=1)[-1][0]
    published = {"s": 22.06, "b": 86.58, "l": 304.37, "g": 1136.48}[size]
    if name.startswith("depth-anything"):
        published = {"s": 24.8, "b": 97.5, "l": 335.3}[size]  # the table of its repository's README
    assert abs(millions - published) < 0.01 * published
    arch = getattr(model, "backbone", model).arch
    assert arch.register_count == (4 if name.endswith("_reg") else 0)
    assert arch.embed_dim // arch.num_heads == 64

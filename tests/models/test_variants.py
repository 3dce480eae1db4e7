"""DINOv2 as people train it: other position tables, offsets, antialiasing, patches, epsilons, channels, activations.

`data/goldens/variants-seed7.npz` holds what the official code (fp32, PyTorch, CPU) answers for models of three blocks,
96 wide, that are not published ones: keys are NAME/BxHxW/output, patch tokens at the rows of NAME/BxHxW/patch_index.
Everything else is held against `F.interpolate`, timm and transformers.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dinoexport import family
from dinoexport.config.recipe import Range, Recipe
from dinoexport.engines import builder, profiles
from dinoexport.errors import UsageError
from dinoexport.models.dinov2 import fold, graph, reference, synthetic
from dinoexport.models.dinov2.config import Architecture
from dinoexport.spec import Precision, Runtime
from dinoexport.validation.metrics import distance
from tests import conformance
from tests.conftest import DATA

SEED, LIMIT = 7, 1e-5
# Position table's side, registers, offset, antialias, patch: those of the models the official code was asked about.
VARIANTS: dict[str, dict[str, Any]] = {
    "trained224": {"position_side": 16, "interpolate_offset": 0.1, "interpolate_antialias": False},
    "trained224_reg": {
        "position_side": 16, "register_count": 4, "interpolate_offset": 0.0, "interpolate_antialias": True,
    },
    "reg_offset": {"register_count": 4, "interpolate_offset": 0.1, "interpolate_antialias": False},
    "plain_antialias": {"interpolate_offset": 0.0, "interpolate_antialias": True},
    "patch16": {"position_side": 32, "patch_size": 16, "interpolate_offset": 0.1, "interpolate_antialias": False},
}  # fmt: skip


def recipe_of(model: dict[str, Any], *, preprocess: dict[str, Any] | None = None, **graph_choices: Any) -> Recipe:
    """Three blocks, 96 wide, with what `model` changes."""
    base = {"embed_dim": 96, "depth": 3, "num_heads": 3, "feed_forward": "mlp", "register_count": 0}
    patch = model.get("patch_size", 14)
    side = Range(min=patch, opt=2 * patch, max=64 * patch)
    return Recipe(
        name="mine",
        family="dinov2",
        validation="tiny_cases",
        model=base | model,
        graph=graph_choices,
        preprocess=preprocess or {},
        profile={"batch": Range(min=1, opt=1, max=4), "height": side, "width": side},
    )


def model_of(model: dict[str, Any], **choices: Any) -> Any:
    return family.find("dinov2").model(recipe_of(model, **choices))


def read_of(model: Any) -> Any:
    return conformance.reading(model, SEED)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(DATA / "goldens" / f"variants-seed{SEED}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def sizes_of(golden: dict[str, Any], name: str) -> list[str]:
    return sorted({key.split("/")[1] for key in golden if key.startswith(f"{name}/")})


def off_by(golden: dict[str, Any], name: str, sizes: list[str], answers: list[dict[str, Any]]) -> float:
    """The largest relative error of any output at any of `sizes`."""
    errors = []
    for size, answer in zip(sizes, answers, strict=True):
        rows = golden[f"{name}/{size}/patch_index"]
        for output, theirs in ((k.split("/")[2], v) for k, v in golden.items() if k.startswith(f"{name}/{size}/")):
            if output != "patch_index":
                ours = answer[output][:, rows] if output == "patch_tokens" else answer[output]
                errors.append(distance(ours, theirs).relative_l2)
    assert len(errors) >= 2 * len(answers)
    return max(errors)


@pytest.mark.parametrize("name", VARIANTS)
def test_official_numbers(golden: dict[str, Any], name: str, tmp_path: Path) -> None:
    """The reference, the traced modules run by PyTorch, and the ONNX file all give the official tokens."""
    model = model_of(VARIANTS[name])
    sizes = sizes_of(golden, name)
    inputs = [{"pixels": synthetic.pixels(*map(int, s.split("x")), SEED)} for s in sizes]
    assert off_by(golden, name, sizes, conformance.reference(model, read_of(model), inputs)) <= LIMIT
    assert off_by(golden, name, sizes, conformance.exported(model, read_of(model), inputs, tmp_path)) <= LIMIT


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("key", ["interpolate_offset", "interpolate_antialias"])
def test_official_numbers_catch_a_wrong_fact(golden: dict[str, Any], name: str, key: str) -> None:
    """With the other offset or the other kind of resize, both graph and reference leave the official numbers."""
    right = VARIANTS[name]
    wrong = right | {key: not right[key] if key == "interpolate_antialias" else 0.1 - right[key]}
    model = model_of(wrong)
    # The smallest: no size here is the table's own.
    sizes = sorted(sizes_of(golden, name), key=lambda size: int(size.split("x")[1]))[:1]
    inputs = [{"pixels": synthetic.pixels(*map(int, s.split("x")), SEED)} for s in sizes]
    for ask in (conformance.reference, conformance.eagerly):
        assert off_by(golden, name, sizes, ask(model, read_of(model), inputs)) > 100 * LIMIT


def arch_of(side: int, offset: float, antialias: bool, patch: int = 14) -> Architecture:
    return Architecture(
        embed_dim=8, depth=1, num_heads=1, feed_forward="mlp", register_count=0, patch_size=patch,
        position_side=side, interpolate_offset=offset, interpolate_antialias=antialias,
    )  # fmt: skip


def table_of(arch: Architecture) -> Any:
    return synthetic.tensor("pos_embed", arch.tensors["pos_embed"], SEED)


def stem_of(arch: Architecture) -> graph.Stem:
    """The traced stem with its table."""
    folded = fold.Folded(arch=arch, read=lambda name: synthetic.tensor(name, arch.tensors[name], SEED))
    stem = graph.Stem(**arch.stem_facts, residual="float32")
    for name, weight in folded.stem().items():
        getattr(stem, name).copy_(torch.from_numpy(np.ascontiguousarray(weight.read())))
    return stem


@given(
    side=st.integers(7, 48),
    h=st.integers(1, 80),
    w=st.integers(1, 80),
    offset=st.sampled_from([0.0, 0.1, 0.05, 0.25, 0.333, 0.5, 0.001]),
    antialias=st.booleans(),
    patch=st.sampled_from([8, 14, 16]),
)
def test_positions_are_interpolates(side: int, h: int, w: int, offset: float, antialias: bool, patch: int) -> None:
    """Graph and reference give what F.interpolate gives in float64, for any table, grid, offset and kind of resize."""
    arch = arch_of(side, offset, antialias, patch)
    table = torch.from_numpy(table_of(arch))
    grid = table[:, 1:].double().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if h == w == side:
        exact = grid
    elif offset:
        scale = ((h + offset) / side, (w + offset) / side)
        exact = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        exact = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=antialias)
    exact_ND = exact.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    assert distance(stem_of(arch)._positions(h, w)[0, 1:].numpy(), exact_ND).relative_l2 <= 6e-6
    judged = reference.position_embedding(table, h, w, offset=offset, antialias=antialias)[0, 1:]
    assert distance(judged.numpy(), exact_ND).relative_l2 <= 6e-6


@given(side=st.integers(7, 48), antialias=st.booleans(), offset=st.sampled_from([0.0, 0.1]))
def test_a_tables_own_grid_is_untouched(side: int, antialias: bool, offset: float) -> None:
    arch = arch_of(side, offset, antialias)
    assert torch.equal(stem_of(arch)._positions(side, side)[0, 1:], torch.from_numpy(table_of(arch)[0, 1:]))


def test_offsets_are_fractions() -> None:
    """An offset that has no small denominator is refused, not rounded to another one."""
    assert arch_of(16, 0.1, False).offset == Fraction(1, 10)
    with pytest.raises(UsageError, match="interpolate_offset"):
        model_of({"interpolate_offset": 0.12345678})
    with pytest.raises(UsageError, match="interpolate_offset"):
        model_of({"interpolate_offset": 1.0})


KINDS: dict[str, dict[str, Any]] = {
    "four channels, patch 8": {"in_chans": 4, "patch_size": 8, "position_side": 28},
    "one channel": {"in_chans": 1},
    "no qkv bias": {"qkv_bias": False},
    "no LayerScale": {"layer_scale": False},
    "epsilon": {"layer_norm_eps": 1e-3},
    "narrow feed-forward": {"mlp_hidden": 100},
    "tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
}


@pytest.mark.parametrize("kind", ["four channels, patch 8", "no qkv bias", "no LayerScale"])
def test_variants_pass_the_kit(kind: str, tmp_path: Path) -> None:
    """Graph, reference and ONNX agree, and every tensor matters."""
    model = model_of(KINDS[kind] | {"depth": 1})
    cases = [
        model.case({"name": "batch", "why": "height unlike width", "batch": 2, "height": 42, "width": 70}, DATA),
        model.case({"name": "native", "why": "its own grid", "height": "native", "width": "native"}, DATA),
    ]
    assert cases[1].inputs["pixels"].shape == (1, model.arch.in_chans, model.arch.native_size, model.arch.native_size)
    conformance.check(model, cases, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_each_fact_reaches_graph_and_reference(kind: str) -> None:
    """They agree with it, and answer otherwise than without it where the weights are the same."""
    model, plain = model_of(KINDS[kind]), model_of({})
    inputs = [{"pixels": synthetic.pixels(2, 48, 80, SEED, model.arch.in_chans)}]
    (expected,) = conformance.reference(model, read_of(model), inputs)
    (ours,) = conformance.eagerly(model, read_of(model), inputs)
    for name in expected:
        assert distance(ours[name], expected[name]).relative_l2 <= LIMIT, name
    if model.tensors == plain.tensors:
        (other,) = conformance.reference(plain, read_of(plain), inputs)
        # The two forms of GELU differ by 5e-4 at most, and reach the tokens as 2e-4: twenty times the limit.
        floor = 10 * LIMIT if kind == "tanh" else 100 * LIMIT
        assert distance(other["class_token"], expected["class_token"]).relative_l2 > floor


def test_absent_parts_are_neutral_ones() -> None:
    """No bias is a bias of zero and no LayerScale one of one: by the formulation the official numbers pin."""
    plain = model_of({})

    def neutral(name: str) -> Any:
        value = plain.synthetic(name, SEED)
        if name.endswith("qkv.bias"):
            return np.zeros_like(value)
        return np.ones_like(value) if name.endswith("gamma") else value

    bare = model_of({"qkv_bias": False, "layer_scale": False})
    inputs = [{"pixels": synthetic.pixels(1, 42, 70, SEED)}]
    (expected,) = conformance.reference(plain, neutral, inputs)
    for ask in (conformance.reference, conformance.eagerly):
        (ours,) = ask(bare, read_of(bare), inputs)
        for name in expected:
            assert distance(ours[name], expected[name]).relative_l2 <= LIMIT, name


@pytest.mark.parametrize("patch", [8, 16])
def test_profile_and_cases_follow_the_patch(patch: int) -> None:
    """Sizes written for patches of 14 become as many of the model's; what was over a multiple stays over one."""
    model = model_of({"patch_size": patch, "position_side": 32}, sizes="strict")
    assert {d.name: (d.multiple_of, d.step) for d in model.graphs[0].dims if d.name != "batch"} == {
        "height": (patch, patch), "width": (patch, patch),
    }  # fmt: skip

    def shape(**sizes: Any) -> tuple[tuple[int, ...], bool]:
        case = model.case({"name": "it", "why": "of another patch", **sizes}, DATA)
        return case.inputs["pixels"].shape[2:], case.expect_refusal

    assert shape(height=14, width=322, patch_size=14) == ((patch, 23 * patch), False)
    for over in (225, 237):
        (height, width), refused = shape(height=over, width=28, patch_size=14)
        assert height // patch == 16 and height % patch and width == 2 * patch and refused
    assert shape(height=4 * patch, width=patch) == ((4 * patch, patch), False), "plain pixels stay what they are"
    assert shape(height="native", width=patch) == ((32 * patch, patch), False)
    with pytest.raises(UsageError, match="smaller than one patch"):
        shape(height=patch - 1, width=patch)
    with pytest.raises(UsageError, match=f"multiples of {patch}"):
        bad = recipe_of({"patch_size": patch})
        side = Range(min=patch, opt=patch, max=patch * 10 + 1)
        family.find("dinov2").model(bad.model_copy(update={"profile": {**bad.profile, "height": side}}))


MEAN, STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)


def test_bytes_are_normalised_as_the_recipe_says(tmp_path: Path) -> None:
    """Own mean and deviation, uint8 in: against torch's arithmetic on the very bytes, in float64."""
    model = model_of({}, preprocess={"mean": MEAN, "std": STD}, input="images")
    case = model.case({"name": "bytes", "why": "distinct images", "batch": 2, "height": 42, "width": 70}, DATA)
    exact = torch.from_numpy(case.inputs["images"]).double().permute(0, 3, 1, 2) / 255
    exact = (exact - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    plain = model_of({})
    (expected,) = conformance.reference(plain, read_of(plain), [{"pixels": exact.float().numpy()}])
    for answers in (
        conformance.reference(model, read_of(model), [case.inputs]),
        conformance.exported(model, read_of(model), [case.inputs], tmp_path),
    ):
        for name in expected:
            assert distance(answers[0][name], expected[name]).relative_l2 <= LIMIT, name
    imagenet = model_of({}, input="images")
    (wrong,) = conformance.reference(imagenet, read_of(imagenet), [case.inputs])
    assert distance(wrong["class_token"], expected["class_token"]).relative_l2 > 1e-2
    assert "0.707223" in model.graphs[0].inputs[0].meaning


def test_channels_need_their_mean() -> None:
    with pytest.raises(UsageError, match="in_chans is 4"):
        model_of({"in_chans": 4}, input="images")
    four = {"mean": [0.5] * 4, "std": [0.25] * 4}
    assert model_of({"in_chans": 4}, input="images", preprocess=four).preprocessing.std == (0.25,) * 4
    with pytest.raises(UsageError, match="std has 3"):
        model_of({}, preprocess={"mean": [0.5], "std": STD})
    with pytest.raises(UsageError, match="greater than 0"):
        model_of({}, preprocess={"mean": MEAN, "std": [0.1, 0.0, 0.1]})
    with pytest.raises(UsageError, match="'means'"):
        model_of({}, preprocess={"means": MEAN})
    assert model_of({"in_chans": 4}).front_ends(None, progress=lambda *_: None) == ()


# Together they hold every form of graph that a published variant has not: an even table, another patch, an offset with
# registers, antialiasing without them, four channels, another feed-forward, absent biases and LayerScale.
COMPILED: dict[str, dict[str, Any]] = {
    "even table": VARIANTS["trained224"] | KINDS["tanh"] | KINDS["narrow feed-forward"],
    "registers with an offset": VARIANTS["reg_offset"] | KINDS["relu"] | KINDS["no LayerScale"],
    "patch 8, antialiased": VARIANTS["plain_antialias"] | KINDS["four channels, patch 8"] | KINDS["no qkv bias"],
}


@pytest.mark.parametrize("form", COMPILED)
def test_every_form_compiles_with_attention_fused(form: str, tmp_path: Path) -> None:
    """TensorRT-RTX compiles it for an A100 over the whole range of sizes, and fuses attention in every block."""
    model = family.find("dinov2").model(
        recipe_of(COMPILED[form] | {"depth": 1}).model_copy(update={"precision": Precision.FP16})
    )
    conformance.export_to(tmp_path, model, read_of(model))
    (graph_spec,) = model.graphs
    engine = builder.build(
        tmp_path / "model.onnx", graph_spec, tmp_path, compute_capabilities=("8.0",),
        runtime=Runtime.TENSORRT_RTX, profiles=[profiles.profile("whole", graph_spec, {})],
    )  # fmt: skip
    assert (engine.fused_attentions, engine.attentions) == (1, 1)

"""Where weights come from, what fits and what is refused; see test_hostile_weights for files that lie."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinoexport.config import recipe
from dinoexport.config.recipe import WeightFile
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.family import find
from dinoexport.spec import silent
from dinoexport.weights import download, formats, mapped_tensors
from dinoexport.weights.checkpoint import _recognised, digest_of
from tests.checkpoint_files import (
    FORMATS,
    TINY,
    Tensors,
    opened,
    refused,
    refused_read,
    save_pth,
    save_safetensors,
    tiny_state,
)


@pytest.fixture
def state() -> Tensors:
    return dict(tiny_state())


# What is taken


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_value_of_a_local_file_arrives(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path], dtype: torch.dtype
) -> None:
    path = save(tmp_path / name, {key: tensor.to(dtype) for key, tensor in state.items()})
    checkpoint = opened(path)
    assert checkpoint.source == path.name, "the path would say who built it"
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for key, tensor in state.items():
        array = checkpoint.read(key)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, tensor.to(dtype).float().numpy(), err_msg=key)


@FORMATS
def test_a_large_file_is_mapped_anew_as_it_is_read(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read does not pile up as memory: no mapping serves much more than the limit, every value is right."""
    total = sum(tensor.nbytes for tensor in state.values())
    monkeypatch.setattr(formats, "_MAPPED_BYTES_MAX", total // 10)
    mapped = []
    original = mapped_tensors.mapped
    monkeypatch.setattr(mapped_tensors, "mapped", lambda *a: mapped.append(1) or original(*a))
    read = opened(save(tmp_path / name, state)).read
    before = len(mapped)
    for key, tensor in state.items():
        assert np.array_equal(read(key), tensor.numpy()), key
    assert len(mapped) - before >= 4


@FORMATS
def test_threads_may_read_at_once(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each maps the file anew whenever it likes, and nobody loses the pages he reads from."""
    monkeypatch.setattr(formats, "_MAPPED_BYTES_MAX", 1)
    read = opened(save(tmp_path / name, state)).read
    names = list(state) * 4
    with ThreadPoolExecutor(8) as pool:
        for key, array in zip(names, pool.map(read, names), strict=True):
            np.testing.assert_array_equal(array, state[key].numpy(), err_msg=key)


def test_parameters_and_strided_tensors_are_read_by_value(tmp_path: Path, state: Tensors) -> None:
    changed = dict(state)
    changed["norm.weight"] = torch.nn.Parameter(state["norm.weight"])
    weight = state["blocks.0.attn.qkv.weight"]
    changed["blocks.0.attn.qkv.weight"] = weight.t().contiguous().t()
    checkpoint = opened(save_pth(tmp_path / "w.pth", changed))
    for key in ("norm.weight", "blocks.0.attn.qkv.weight"):
        np.testing.assert_array_equal(checkpoint.read(key), state[key].numpy())


def test_the_mask_token_may_be_absent(tmp_path: Path, state: Tensors) -> None:
    without = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    opened(save_pth(tmp_path / "w.pth", without))


def test_shards_in_a_folder_are_one_checkpoint(tmp_path: Path, state: Tensors) -> None:
    names = list(state)
    parts = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / f"{part}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    checkpoint = opened(tmp_path)
    for name in names:
        np.testing.assert_array_equal(checkpoint.read(name), state[name].numpy())

    first, last = (hashlib.sha256((tmp_path / f"{part}.safetensors").read_bytes()).hexdigest() for part in parts)
    assert checkpoint.sha256 == hashlib.sha256((first + last).encode()).hexdigest()

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in refused(tmp_path).message


def test_a_folder_with_two_whole_checkpoints_is_refused(tmp_path: Path, state: Tensors) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, tmp_path / name)
    message = refused(tmp_path).message
    assert "a.safetensors" in message
    assert "b.safetensors" in message


def test_the_published_file_is_used_when_none_is_given(tmp_path: Path, state: Tensors) -> None:
    content = save_pth(tmp_path / "w.pth", state).read_bytes()
    file = WeightFile(url="http://127.0.0.1:9/tiny.pth", sha256=hashlib.sha256(content).hexdigest())
    wanted = TINY.model_copy(update={"weights": (file,)})
    path = download.cached_path(file)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    checkpoint = opened(None, wanted)
    assert checkpoint.source == file.url
    assert checkpoint.sha256 == file.sha256
    np.testing.assert_array_equal(checkpoint.read("cls_token"), state["cls_token"].numpy())


def test_a_recipe_without_published_weights_says_so() -> None:
    error = refused(None)
    assert "tiny names no published weights" in error.message
    assert "--weights" in error.next_step


@pytest.mark.parametrize(
    ("package", "name"), [("torch", "w.pth"), ("torch", "w.safetensors"), ("safetensors", "w.safetensors")]
)
def test_a_package_that_is_missing(
    tmp_path: Path, state: Tensors, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    """torch is missed only where a file holds more than plain floating-point tensors."""
    save = save_pth if name.endswith(".pth") else save_safetensors
    path = save(tmp_path / name, state | ({"norm.weight": torch.ones(48).int()} if package == "torch" else {}))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingRequirement, match=f"{package} is not installed") as caught:
        opened(path)
    assert caught.value.exit_code == 4
    assert "dinoexport[export]" in caught.value.next_step


# What does not fit


def test_everything_that_does_not_fit_is_listed(tmp_path: Path, state: Tensors) -> None:
    wrong = dict(state)
    del wrong["cls_token"], wrong["blocks.1.ls2.gamma"]
    wrong["norm.bias"] = torch.zeros(47)
    wrong["mask_token"] = torch.zeros(1, 1, 48)
    wrong["blocks.2.norm1.weight"] = torch.zeros(48)
    wrong["mystery"] = torch.zeros(())
    message = refused(save_pth(tmp_path / "w.pth", wrong)).message
    assert message.splitlines()[1:] == [
        "  missing: cls_token (1, 1, 48)",
        "  missing: blocks.1.ls2.gamma (48,)",
        "  mis-shaped: mask_token is (1, 1, 48), needs (1, 48)",
        "  mis-shaped: norm.bias is (47,), needs (48,)",
        "  unexpected: blocks.2.norm1.weight (48,)",
    ]


def cheaply(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors of these shapes that share one stored number, so that ViT-g takes kilobytes."""
    number = torch.zeros(1)
    return {name: number.expand(shape) for name, shape in shapes.items()}


# A file with a head of its own also holds a whole backbone, which a bare variant takes.
BACKBONES = [v for v in recipe.variants() if recipe.load(v).family == "dinov2" and not recipe.load(v).head]


@pytest.mark.parametrize("variant", BACKBONES)
def test_another_variant_is_named(tmp_path: Path, variant: str) -> None:
    """Each published variant is taken for itself and called by its name when another one was asked for."""
    shapes = find("dinov2").model(recipe.load(variant)).tensors
    path = save_pth(tmp_path / "w.pth", cheaply(shapes))
    opened(path, recipe.load(variant))
    other = recipe.load("vits14" if variant != "vits14" else "vitb14_reg")
    error = refused(path, other)
    assert error.message == f"{path} is not {other.name}: this is {variant}."
    assert error.next_step == f"dinoexport build {variant} --weights {path}"


def test_another_variant_is_named_in_timms_layout_too(tmp_path: Path) -> None:
    shapes = dict(find("dinov2").model(recipe.load("vitb14_reg")).tensors)
    del shapes["mask_token"]
    shapes["reg_token"] = shapes.pop("register_tokens")
    shapes["pos_embed"] = (1, 1369, 768)
    path = save_pth(tmp_path / "w.pth", cheaply(shapes))
    assert "this is vitb14_reg" in refused(path, recipe.load("vitb14")).message


def test_a_variant_nobody_publishes_is_not_named(tmp_path: Path, state: Tensors) -> None:
    message = refused(save_pth(tmp_path / "w.pth", state), recipe.load("vits14")).message
    assert "this is" not in message
    assert "mis-shaped: cls_token is (1, 1, 48), needs (1, 1, 384)" in message
    assert "missing: blocks.11.norm1.weight (384,)" in message


# Values that are not weights


@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_refused(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path], value: float
) -> None:
    spoilt = dict(state)
    spoilt["blocks.1.mlp.fc2.bias"] = state["blocks.1.mlp.fc2.bias"].clone()
    spoilt["blocks.1.mlp.fc2.bias"][47] = value
    path = save(tmp_path / name, spoilt)
    error = refused_read(path, "blocks.1.mlp.fc2.bias")
    assert error.message == f"The tensor blocks.1.mlp.fc2.bias of {path} holds NaN or Inf."
    opened(path).read("blocks.1.mlp.fc2.weight")


@FORMATS
def test_plain_files_are_read_without_torch(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested, as parameters, of three kinds of numbers, several in one storage: every value, and no torch."""
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    saved = {key: tensor.to(kinds[i % 3]) for i, (key, tensor) in enumerate(state.items())}
    if name.endswith(".pth"):
        shared = torch.stack([saved["norm.weight"], saved["norm.bias"].to(saved["norm.weight"].dtype)])
        saved |= {"norm.weight": torch.nn.Parameter(shared[0]), "norm.bias": shared[1]}
        path = save(tmp_path / name, {"teacher": {f"backbone.{key}": tensor for key, tensor in saved.items()}})
    else:
        path = save(tmp_path / name, saved)
    for module in [module for module in sys.modules if module.partition(".")[0] == "torch"]:
        monkeypatch.setitem(sys.modules, module, None)
    checkpoint = opened(path)
    for key, tensor in saved.items():
        np.testing.assert_array_equal(checkpoint.read(key), tensor.detach().float().numpy(), err_msg=key)


def test_a_value_too_large_for_fp32_is_refused(tmp_path: Path, state: Tensors) -> None:
    path = save_pth(tmp_path / "w.pth", state | {"norm.bias": torch.full((48,), 1e300, dtype=torch.float64)})
    assert "norm.bias" in refused_read(path, "norm.bias").message


def test_the_files_own_name_is_given_for_a_value_that_is_not_finite(tmp_path: Path, state: Tensors) -> None:
    spoilt = {f"backbone.{name}": tensor for name, tensor in state.items()}
    spoilt["backbone.norm.bias"] = torch.full((48,), float("nan"))
    path = save_pth(tmp_path / "w.pth", {"teacher": spoilt})
    assert "teacher.backbone.norm.bias" in refused_read(path, "norm.bias").message


@FORMATS
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_a_tensor_that_is_not_floating_point_is_refused(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path], dtype: torch.dtype
) -> None:
    path = save(tmp_path / name, state | {"norm.weight": torch.ones(48).to(dtype)})
    error = refused_read(path, "norm.weight")
    assert "norm.weight" in error.message
    assert str(dtype) in error.message


def _quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(48), scale=0.1, zero_point=0, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch calls quantisation deprecated
@pytest.mark.parametrize(
    "make", [lambda: torch.zeros(48, device="meta"), lambda: torch.ones(48).to_sparse(), _quantised],
    ids=["no values", "sparse", "quantised"],
)  # fmt: skip
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, state: Tensors, make: Callable[[], torch.Tensor]) -> None:
    path = save_pth(tmp_path / "w.pth", state | {"norm.weight": make()})
    assert "norm.weight" in refused_read(path, "norm.weight").message


# Files that are damaged, or not what their name says


@pytest.mark.parametrize("name", ["nowhere.pth", "no/such/folder.safetensors", "n" * 5000])
def test_no_file_there(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path / name)
    assert str(tmp_path / name) in error.message


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "holds no .safetensors file" in refused(tmp_path).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, state: Tensors) -> None:
    path = save_pth(tmp_path / "w.pth", state)
    path.chmod(0)
    assert "Permission denied" in refused(path).message


# Synthetic weights


@pytest.mark.parametrize(
    "source", ["synthetic:", "synthetic:abc", "synthetic:-1", "synthetic:1.5", "synthetic:" + "9" * 5000]
)
def test_a_seed_that_is_none(source: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened(source)
    assert caught.value.exit_code == 2
    assert source in caught.value.message
    assert "synthetic:0" in caught.value.next_step


# First and last value and SHA-256 (first 16 digits, float32 little-endian) of tensors of seed 7, made by the same rule
# outside this repository: RandomState(crc32("7:NAME")).standard_normal, then scaled by what the name ends in.
SEED_7 = {
    "vits14": {
        "cls_token": (-0.07747889, 0.26124695, "95461877053d60b0"),
        "mask_token": (-0.04592649, 0.161081, "6317302f5860900d"),
        "blocks.1.attn.qkv.weight": (-0.008976011, -0.066050716, "7099697878e5ff1d"),
        "blocks.1.mlp.fc2.weight": (-0.0003421412, -0.014057512, "7f1f81430769b9b1"),
        "norm.weight": (0.9429461, 1.0394323, "da76914d0bdf33af"),
    },
    "tiny_swiglu_reg": {
        "pos_embed": (-0.10567709, -0.28726363, "8da0120e7897d01e"),
        "register_tokens": (-0.19385758, -0.27785107, "91fa581686458138"),
        "patch_embed.proj.weight": (0.024887724, 0.027597424, "6ece01f3c846849f"),
        "patch_embed.proj.bias": (-0.07440155, 0.025560766, "f47fcf96bf5a0c58"),
        "blocks.1.norm1.weight": (1.0497329, 0.9720075, "879dec29d1cfe3b9"),
        "blocks.1.norm2.bias": (0.022005893, 0.041525938, "bce7ef93fc9b1771"),
        "blocks.1.ls1.gamma": (0.2143281, 0.3461497, "ad673b9c26d9f6ac"),
        "blocks.1.mlp.w12.weight": (0.077774756, -0.14413542, "e1d5b2044de40484"),
        "blocks.1.mlp.w3.bias": (-0.10715588, -0.007156303, "9fb6e152e90c8764"),
    },
}


@pytest.mark.parametrize(("variant", "name"), [(v, name) for v, tensors in SEED_7.items() for name in tensors])
def test_synthetic_weights_are_the_same_on_every_machine(variant: str, name: str) -> None:
    wanted = recipe.load(
        variant if variant in recipe.variants() else f"{Path(__file__).parents[1]}/data/{variant}.toml"
    )
    array = opened("synthetic:7", wanted).read(name)
    first, last, digest = SEED_7[variant][name]
    assert array.dtype == np.float32
    assert array.shape == find("dinov2").model(wanted).tensors[name]
    assert (array.flat[0], array.flat[-1]) == (np.float32(first), np.float32(last))
    assert hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()[:16] == digest


def test_synthetic_weights_are_told_apart_by_seed_and_shape() -> None:
    assert opened("synthetic:7").sha256 == opened("synthetic:07").sha256
    others = {
        opened("synthetic:7").sha256,
        opened("synthetic:8").sha256,
        opened("synthetic:7", recipe.load("vits14")).sha256,
    }
    assert len(others) == 3
    assert not np.array_equal(opened("synthetic:7").read("cls_token"), opened("synthetic:8").read("cls_token"))
    assert opened("synthetic:7").source == "synthetic:7"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("synthetic:07", "synthetic:7"),
        ("synthetic-stress:7", "synthetic-stress:7:300"),
        ("synthetic-stress:7:40", "synthetic-stress:7:40"),
    ],
)
def test_a_synthetic_source_is_named_in_full(source: str, named: str) -> None:
    found = opened(source)
    assert found.source == named and found.identity == found.sha256
    assert found.sha256 == opened(named).sha256 != opened("synthetic:8").sha256


def test_the_hash_of_several_files_is_that_of_their_hashes(tmp_path: Path, state: Tensors) -> None:
    one = save_safetensors(tmp_path / "model-1.safetensors", state)
    hashes = [hashlib.sha256(one.read_bytes()).hexdigest()]
    assert digest_of(str(one), progress=silent) == digest_of(str(tmp_path), progress=silent) == hashes[0]
    two = save_safetensors(tmp_path / "model-2.safetensors", {"a": torch.zeros(1)})
    hashes.append(hashlib.sha256(two.read_bytes()).hexdigest())
    assert digest_of(str(tmp_path), progress=silent) == hashlib.sha256("".join(hashes).encode()).hexdigest()


def test_a_variant_is_not_told_that_it_is_itself() -> None:
    """Not by its own weights with another recipe, under its own name or as the user's; another with them is told."""
    wanted = recipe.load("vits14")
    shapes = find("dinov2").model(wanted).tensors
    for name, told in (("vits14", []), ("vits14-yours", []), ("mine", ["vits14"])):
        assert _recognised(wanted.changed(name=name), shapes) == told
    assert "vits14" not in _recognised(recipe.load("codellama-7b"), shapes)

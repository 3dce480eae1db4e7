"""`--reference hub`: the repository torch.hub has is the one that answers.

Upstream's repository is not here, so one with its interface is written: the same names, and code of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.config.recipe import Recipe
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.family import find
from dinoexport.models.dinov2 import hub, reference
from dinoexport.models.dinov2.config import Architecture
from dinoexport.spec import Array, silent
from tests.checkpoint_files import Tensors, opened, save_pth, tiny

# What dinov2_*() of the upstream repository return, as far as it is used: its state dict's names,
# _get_intermediate_layers_not_chunked with its assertion, and norm.
HUBCONF = """
dependencies = ["torch"]
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.heads = heads
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ls1, self.ls2, self.mlp = nn.Module(), nn.Module(), nn.Module()
        self.ls1.gamma, self.ls2.gamma = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        weights = (split(q) @ split(k).mT / split(q).shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn.proj((weights @ split(v)).transpose(1, 2).flatten(2)) * self.ls1.gamma
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x)))) * self.ls2.gamma


class Vit(nn.Module):
    def __init__(self, dim=48, depth=3, heads=2, registers=0):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1370, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 14, 14)
        self.drop = nn.Dropout(0.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def _get_intermediate_layers_not_chunked(self, x, n=1):
        assert x.shape[-1] % 14 == 0 and x.shape[-2] % 14 == 0
        x = self.patch_embed.proj(x).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), 1)
        x = self.drop(x)
        output, blocks_to_take = [], range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in blocks_to_take:
                output.append(x)
        assert len(output) == len(blocks_to_take), f"only {len(output)} / {len(blocks_to_take)} blocks found"
        return output


def dinov2_small(*, pretrained=True):
    assert not pretrained
    return Vit()


def dinov2_small_reg(*, pretrained=True):
    assert not pretrained
    return Vit(registers=4)
"""


def small(name: str = "small", **changes: int) -> Recipe:
    wanted = tiny(register_count=4 if name.endswith("_reg") else 0)
    return wanted.model_copy(update={"name": name, "model": wanted.model | {"depth": 3} | changes})


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's own folder, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("XFORMERS_DISABLED", "")  # so that it is as it was after the test
    monkeypatch.delenv("XFORMERS_DISABLED")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = Path(torch.hub.get_dir())
    assert folder.is_relative_to(tmp_path)
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def repository(hub_folder: Path) -> Path:
    """What `torch.hub.load('facebookresearch/dinov2', ...)` leaves behind."""
    folder = hub_folder / "facebookresearch_dinov2_main"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def state_of(wanted: Recipe) -> Tensors:
    model = find("dinov2").model(wanted)
    return {name: torch.from_numpy(model.synthetic(name, 0)) for name in model.tensors}


def noise(*shape: int) -> Array:
    return np.random.RandomState(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["small", "small_reg"])
def test_upstreams_code_answers(tmp_path: Path, repository: Path, name: str) -> None:
    """Two images, a cropped one, blocks asked for out of order and twice: the numbers are those of the plain judge."""
    wanted = small(name)
    arch = Architecture(**wanted.model)
    read = opened(save_pth(tmp_path / "w.pth", state_of(wanted)), wanted).read
    images = [noise(2, 3, 518, 518), noise(1, 3, 531, 519)]
    steps: list[tuple[int, int]] = []
    theirs = hub.tokens_of(name, arch, read, images, [2, 0, 2], lambda _, done, total: steps.append((done, total)))
    ours = reference.tokens_of(
        arch,
        lambda key: torch.from_numpy(read(key)),
        [torch.from_numpy(image) for image in images],
        blocks=[0, 2],
        block_done=lambda _: None,
    )
    assert steps == [(1, 2), (2, 2)]
    for their_tokens, our_tokens in zip(theirs, ours, strict=True):
        assert their_tokens.keys() == our_tokens.keys() == {0, 2}
        for block, tokens in their_tokens.items():
            expected = our_tokens[block].numpy()
            assert tokens.shape == expected.shape
            assert np.linalg.norm(tokens - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_models_outputs_carry_the_graphs_names(tmp_path: Path, repository: Path) -> None:
    wanted = small("small_reg").model_copy(update={"graph": {"last_blocks": 2}})
    model = find("dinov2").model(wanted)
    read = opened(save_pth(tmp_path / "w.pth", state_of(wanted)), wanted).read
    (answer,) = model.upstream(read, [{"pixels": noise(1, 3, 518, 518)}], progress=silent)
    assert {name: array.shape for name, array in answer.items()} == {
        "class_token": (1, 48),
        "register_tokens": (1, 4, 48),
        "patch_tokens": (1, 1369, 48),
        **{f"block_{i}_class_token": (1, 48) for i in (1, 2)},
        **{f"block_{i}_patch_tokens": (1, 1369, 48) for i in (1, 2)},
    }
    np.testing.assert_array_equal(answer["class_token"], answer["block_2_class_token"])


def test_a_checkpoint_without_mask_token_is_judged_too(tmp_path: Path, repository: Path) -> None:
    """timm's files have none."""
    wanted = small()
    arch = Architecture(**wanted.model)
    state = state_of(wanted)
    whole = opened(save_pth(tmp_path / "whole.pth", state), wanted).read
    del state["mask_token"]
    without = opened(save_pth(tmp_path / "without.pth", state), wanted).read
    images = [noise(1, 3, 518, 518)]
    (expected,) = hub.tokens_of("small", arch, whole, images, [2], silent)
    (tokens,) = hub.tokens_of("small", arch, without, images, [2], silent)
    np.testing.assert_array_equal(tokens[2], expected[2])


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"depth": 2}, "blocks.2.norm1.weight"),
        ({"depth": 4}, "blocks.3.norm1.weight"),
        ({"embed_dim": 64}, "cls_token"),
        ({"register_count": 4}, "register_tokens"),
    ],
)
def test_an_architecture_that_is_not_upstreams(repository: Path, changes: dict[str, int], differs: str) -> None:
    wanted = small("small", **changes)
    model = find("dinov2").model(wanted)
    with pytest.raises(UsageError, match="is not the recipe's") as caught:
        model.upstream(opened("synthetic:0", wanted).read, [], progress=silent)
    assert differs in caught.value.message
    assert "--reference plain" in caught.value.next_step


def ask(name: str = "small") -> MissingRequirement:
    """The error that asking for the variant ends in."""
    wanted = small(name)
    with pytest.raises(MissingRequirement) as caught:
        find("dinov2").model(wanted).upstream(opened("synthetic:0", wanted).read, [], progress=silent)
    assert caught.value.exit_code == 4
    return caught.value


@pytest.mark.parametrize("rest", [None, "facebookresearch_dinov2_main", "facebookresearch_dino_main/hubconf.py"])
def test_no_repository(hub_folder: Path, rest: str | None) -> None:
    """Nothing is fetched: the error says how to."""
    if rest:
        (hub_folder / rest).mkdir(parents=True)
    error = ask()
    assert error.message == f"torch.hub has no facebookresearch/dinov2 in {hub_folder}."
    assert "torch.hub.load('facebookresearch/dinov2'" in error.next_step


def test_the_command_in_the_advice_is_python() -> None:
    command = hub._FETCH.removeprefix('python -c "').removesuffix('"')
    compile(command, "advice", "exec")


def test_a_variant_the_repository_does_not_have(repository: Path) -> None:
    error = ask("my_own")
    assert "dinov2_my_own" in error.message
    assert str(repository) in error.message
    assert "--reference plain" in error.next_step


@pytest.mark.parametrize(
    "first_line", ["import a_package_nobody_has", "dependencies = ['a_package_nobody_has']"], ids=["import", "listed"]
)
def test_a_repository_that_needs_a_package(repository: Path, first_line: str) -> None:
    """Torch.hub's own check of `dependencies`, and a plain import that fails."""
    (repository / "hubconf.py").write_text(first_line + "\n" + HUBCONF.replace('dependencies = ["torch"]', ""))
    error = ask()
    assert "a_package_nobody_has" in error.message
    assert "Install" in error.next_step


def test_upstreams_layers_are_kept_from_xformers(repository: Path) -> None:
    """Its attention has no CPU kernel, and the judge runs on the CPU."""
    (repository / "hubconf.py").write_text("import os\nassert os.environ['XFORMERS_DISABLED']\n" + HUBCONF)
    find("dinov2").model(small()).upstream(opened("synthetic:0", small()).read, [], progress=silent)


def test_the_family_does_not_load_the_hub_by_itself() -> None:
    code = "import dinoexport.models.dinov2, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Listening(torch.nn.Module):
    """In place of upstream's model: block i of an image gives i times its sum, one row for each 14 x 14 patch."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.norm = torch.neg
        self.own = {name: torch.zeros(1).expand(shape) for name, shape in arch.tensors.items()}
        self.asked: list[Any] = []

    def state_dict(self) -> Any:  # type: ignore[override]
        return self.own

    def load_state_dict(self, state: Any, strict: bool = True) -> None:  # type: ignore[override]
        self.asked.append((set(state), strict, self.training))

    def _get_intermediate_layers_not_chunked(self, pixels: torch.Tensor, wanted: list[int]) -> list[torch.Tensor]:
        self.asked.append((tuple(pixels.shape), self.training))
        return [i * pixels.sum() for i in wanted]


def test_upstreams_code_gives_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Architecture.model_validate(small().model)
    model = Listening(arch)
    monkeypatch.setattr(model, "_get_intermediate_layers_not_chunked", lambda pixels, wanted: [pixels])
    monkeypatch.setattr(hub, "_load_model", lambda variant: model)
    with pytest.raises(ValueError, match="zip"):
        hub.tokens_of("small", arch, lambda name: noise(2), [np.ones((1, 3, 28, 28), np.float32)], [1, 2], silent)


def test_what_is_asked_of_upstreams_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the mask token is loaded; images are cropped right and below; each block is asked for once."""
    arch = Architecture.model_validate(small().model)
    model = Listening(arch)
    monkeypatch.setattr(hub, "_load_model", lambda variant: model)
    read: list[str] = []
    told: list[Any] = []
    answers = hub.tokens_of(
        "small", arch, lambda name: read.append(name) or noise(2), [np.ones((1, 3, 30, 59), np.float32)] * 2, [2, 1, 2],  # type: ignore[func-returns-value]
        lambda *words: told.append(words),
    )  # fmt: skip
    tensors = set(arch.tensors) - {"mask_token"}
    assert set(read) == tensors and model.asked == [(tensors, False, True), *[((1, 3, 28, 56), False)] * 2]
    pixels = 3 * 28 * 56
    assert answers == [{1: -pixels, 2: -2 * pixels}] * 2
    assert told == [("PyTorch, upstream's code", 1, 2), ("PyTorch, upstream's code", 2, 2)]

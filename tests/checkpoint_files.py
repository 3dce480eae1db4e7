"""A small variant, its weights in files, and how loading them ends: shared by the tests of loading."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinoexport.config.recipe import Range, Recipe
from dinoexport.errors import WeightsError
from dinoexport.family import find
from dinoexport.spec import silent
from dinoexport.weights.checkpoint import Checkpoint, open_checkpoint
from dinoexport.weights.settle import Settled, settle

Tensors = dict[str, torch.Tensor]

_SIDE = Range(min=14, opt=28, max=70)


def tiny(*, feed_forward: str = "mlp", register_count: int = 0) -> Recipe:
    """A variant of two blocks, 48 wide, with the published position table. No published file has this shape."""
    return Recipe(
        name="tiny",
        family="dinov2",
        validation="tiny_cases",
        model={
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 2,
            "feed_forward": feed_forward,
            "register_count": register_count,
        },
        profile={"batch": Range(min=1, opt=1, max=2), "height": _SIDE, "width": _SIDE},
    )


TINY = tiny()


@cache
def tiny_state() -> Tensors:
    """The tensors of TINY, all values different. Not to be changed in place."""
    model = find("dinov2").model(TINY)
    return {name: torch.from_numpy(model.synthetic(name, 0)) for name in model.tensors}


def settled(source: Path | str | None, wanted: Recipe | None = TINY, prefix: str | None = None) -> Settled:
    """The recipe with what the weights at `source` and the files beside them say."""
    return settle(wanted, str(source) if isinstance(source, Path) else source, prefix=prefix, progress=silent)


def opened(source: Path | str | None, wanted: Recipe = TINY, prefix: str | None = None) -> Checkpoint:
    """The checkpoint at `source`, as every verb opens it."""
    source = str(source) if isinstance(source, Path) else source
    recipe = settled(source, wanted, prefix).recipe
    return open_checkpoint(find(recipe.family).model(recipe), recipe, source, prefix=prefix, progress=silent)


def refused(source: Path | str | None, wanted: Recipe = TINY) -> WeightsError:
    """The error that opening `source` ends in."""
    with pytest.raises(WeightsError) as caught:
        opened(source, wanted)
    return _complete(caught.value)


def refused_read(source: Path, name: str) -> WeightsError:
    """The error that reading the tensor `name` ends in."""
    checkpoint = opened(source)
    with pytest.raises(WeightsError) as caught:
        checkpoint.read(name)
    return _complete(caught.value)


def _complete(error: WeightsError) -> WeightsError:
    assert error.exit_code == 3
    assert error.next_step
    return error


def save_pth(path: Path, content: Any) -> Path:
    """`content` as torch.save writes it."""
    torch.save(content, path)
    return path


def save_safetensors(path: Path, state: Tensors) -> Path:
    """`state` as a safetensors file."""
    save_file(state, path)
    return path


FORMATS = pytest.mark.parametrize(
    ("name", "save"), [("w.pth", save_pth), ("w.bin", save_pth), ("w.safetensors", save_safetensors)]
)

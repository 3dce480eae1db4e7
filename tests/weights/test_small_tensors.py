"""NaN and infinity in tensors that are small enough to stand in the graph's own file, not in that of its weights."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from dinoexport import cli
from dinoexport.config.recipe import load
from dinoexport.family import find
from dinoexport.graph.weights_file import INLINE_BYTES
from tests.attack.kit import narrow_recipe


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("verb", ["export", "build"])
def test_one_value_is_refused_as_weights(tmp_path: Path, verb: str, value: float) -> None:
    recipe = narrow_recipe(tmp_path)
    model = find("dinov2").model(load(str(recipe)))
    tensors = {name: np.array(model.synthetic(name, 0)) for name in model.tensors}
    # The graph has no mask token, so nobody reads it.
    small = sorted(name for name, array in tensors.items() if array.nbytes <= INLINE_BYTES and name != "mask_token")
    assert len(small) > 5
    spoilt = random.choice(small)
    tensors[spoilt].reshape(-1)[random.randrange(tensors[spoilt].size)] = value
    weights = tmp_path / "spoilt.safetensors"
    safetensors.numpy.save_file(tensors, weights)
    words = [verb, str(recipe), "--weights", str(weights), "--out", str(tmp_path / "out")]
    ended = CliRunner().invoke(cli.app, words)
    assert ended.exit_code == 3, ended.output
    assert f"error: The tensor {spoilt} of " in ended.stderr and "holds NaN or Inf" in ended.stderr
    assert not (tmp_path / "out").exists()

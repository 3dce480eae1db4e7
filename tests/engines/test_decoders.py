"""A decoder with its cache compiled by the real TensorRT-RTX compiler, ahead of time for two kinds of cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinoexport import family
from dinoexport.engines import builder, profiles
from dinoexport.errors import UsageError
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Precision, Runtime
from tests.conftest import DATA
from tests.models.test_llama import model_of, write

CARDS = ("8.0", "8.9")


def small(precision: Precision) -> Any:
    """Heads of 64, which the fused kernels take, in the form an engine is made of."""
    model = model_of("tiny", precision=precision, dim=128, heads=2, kv_heads=1, layers=2, hidden_dim=256, context=512)
    return family.find("llama").model(model.recipe.changed(graph=model.engine_form()))


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.INT4])
def test_attention_is_fused_in_every_block(precision: Precision, tmp_path: Path) -> None:
    model = small(precision)
    graph = model.graphs[0]
    made = builder.build(
        write(model, tmp_path),
        graph,
        tmp_path,
        runtime=Runtime.TENSORRT_RTX,
        profiles=[profiles.profile("whole", graph, {})],
        compute_capabilities=CARDS,
    )
    assert made.compute_capabilities == CARDS
    assert (made.fused_attentions, made.attentions) == (2, 2)


def test_a_profile_s_whole_is_the_sum_of_its_parts() -> None:
    """The compiler holds the mask to past and new tokens at every end, beyond the context too."""
    graph = small(Precision.FP16).graphs[0]
    shapes = profiles.profile("whole", graph, {}).shapes
    for end in range(3):
        new, past = shapes["input_ids"][end][1], shapes["past_key_values.0.key"][end][2]
        assert shapes["attention_mask"][end][1] == new + past


def test_fp32_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="no kernel for attention over a cache in fp32"):
        pipeline.build_request(
            str(DATA / "tiny_llama.toml"), weights="synthetic:0", target="rtx4090", precision=Precision.FP32
        )

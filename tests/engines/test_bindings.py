"""TensorRT's own bindings, every version that is listed: the table of facts is theirs, our code runs through them.

Under them lies a library that computes nothing (`standin/fake_nvinfer.cpp`) and answers as the stand-ins do, so what is
shown is names, kinds of arguments, overloads and lifetimes; not what TensorRT does. The runtime's half is
`runtime/test_through_bindings.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dinoexport.config.recipe import EngineChoices
from dinoexport.engines import builder, profiles
from dinoexport.spec import Graph, Precision, Runtime
from dinoexport.system import hardware
from dinoexport.system.cache import cache_folder
from tests.engines.test_builder import A100, TINY, exported
from tests.standin import bindings, facts

TABLE: dict[str, Any] = json.loads(bindings.TABLE.read_text())
every_version = pytest.mark.parametrize("version", bindings.VERSIONS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    return exported(TINY, Precision.FP16, tmp_path_factory.mktemp("tiny"))


@pytest.mark.bindings
@every_version
def test_the_table_is_what_the_bindings_say(version: str) -> None:
    """After a new line in `tensorrt_versions.txt`: make tensorrt-facts."""
    assert version in TABLE["versions"], "make tensorrt-facts adds it to the table"
    assert bindings.facts_of(version) == facts.at(TABLE, version)


def test_the_table_is_what_tensorrt_rtx_says() -> None:
    version = hardware.installed_engine_runtime(Runtime.TENSORRT_RTX)
    assert bindings.facts_of("rtx") == facts.at(TABLE, f"rtx-{version}")


@pytest.mark.bindings
@every_version
def test_a_plan_is_built_through_the_bindings(
    version: str, tiny: tuple[Path, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polygraphy, our worker, its progress from eight threads, the timing cache, and the look into what was built."""
    for name, value in bindings.environment(version).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(bindings.HERE / "driven_path")
    path, graph = tiny
    named = [profiles.profile(name, graph, {}) for name in ("one", "two")]
    choices = EngineChoices(preset="max", compatibility="same-cc", strip_weights=True, weight_streaming=True)
    said: list[tuple[str, int, int]] = []
    made = builder.build(
        path,
        graph,
        tmp_path,
        runtime=Runtime.TENSORRT,
        profiles=named,
        compute_capabilities=("8.0",),
        choices=choices,
        gpu=A100,
        progress=lambda *what: said.append(what),
    )
    assert made.runtime_version == version.partition(".post")[0] and not made.not_looked_at
    assert made.scratch_bytes > 10**6 and made.fused_attentions == 2
    assert made.weight_bytes == (None if version.startswith(("10.13", "10.14")) else 4321)
    flags = {name: int(value) for name, value in facts.at(TABLE, version)["BuilderFlag"].items()}
    wanted = sorted(flags[name] for name in ("STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING"))
    log = made.log.read_text()
    assert f"[stand-in] flags {wanted}, level 5" in log, "no TF32"
    assert "raised" not in log and said
    (cache,) = (cache_folder() / "timing").glob("*.cache")
    assert cache.read_bytes() == b"timings"


@pytest.mark.bindings
def test_a_plan_that_cannot_be_opened_is_kept(
    tiny: tuple[Path, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search may have taken hours; what failed after it is said beside the plan."""
    for name, value in bindings.environment(bindings.VERSIONS[-1]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STANDIN_FAILING", "deserialize_cuda_engine")
    monkeypatch.syspath_prepend(bindings.HERE / "driven_path")
    path, graph = tiny
    whole = [profiles.profile("whole", graph, {})]
    made = builder.build(
        path, graph, tmp_path, runtime=Runtime.TENSORRT, profiles=whole, compute_capabilities=("8.0",), gpu=A100
    )
    assert made.path.read_bytes()[:4] == b"ftrt" and made.fused_attentions is None and made.scratch_bytes is None
    assert re.search(
        r"could not be opened .* cannot open model\.plan\. TensorRT said: Serialization", made.not_looked_at
    )
    assert "Serialization assertion" in made.log.read_text()

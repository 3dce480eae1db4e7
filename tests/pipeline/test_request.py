"""What a build request comes to: where the bundle goes, which runtimes compete, and on which GPU an engine is made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport import family
from dinoexport.config.target import Chosen
from dinoexport.engines import profiles
from dinoexport.errors import UsageError
from dinoexport.pipeline import request
from dinoexport.spec import CPU_RUNTIMES, Graph, Precision, Runtime, Tensor
from tests.conftest import DATA

TINY = str(DATA / "tiny_swiglu.toml")


@pytest.mark.parametrize(
    ("precision", "named", "chosen", "auto"),
    [
        (None, "fp32", Precision.FP32, False), (Precision.BF16, "bf16", Precision.BF16, False),
        ("auto", "auto", Precision.FP16, True),
    ],
)  # fmt: skip
def test_the_bundle_is_named_after_what_was_asked_for(
    precision: Any, named: str, chosen: Precision, auto: bool
) -> None:
    made = request.build_request(TINY, precision=precision, target="cpu")
    assert (made.precision, made.auto) == (chosen, auto)
    assert made.out == Path("bundles") / f"{made.recipe.title}-{named}-cpu"
    assert made.cpu_runtimes == CPU_RUNTIMES and made.engine is None


def test_a_runtime_that_is_asked_for_has_no_rivals(tmp_path: Path) -> None:
    made = request.build_request(TINY, target="cpu", runtime=Runtime.OPENVINO, out=tmp_path / "out")
    assert made.cpu_runtimes == (Runtime.OPENVINO,) and made.out == tmp_path / "out" and not made.auto


def graph(carried: bool, dtype: Any) -> Graph:
    cache = Tensor(name="cache", dtype=dtype, shape=("batch", 4), meaning="")
    carries = {"cache": "next_cache"} if carried else {}
    return Graph(name="model", inputs=(cache,), outputs=(), dims=(), carried=carries)


@pytest.mark.parametrize(
    ("runtime", "gpus", "gpu"),
    [
        (Runtime.TENSORRT, ("first", "second"), "first"), (Runtime.TENSORRT, (), None),
        (Runtime.TENSORRT_RTX, ("first",), None), (Runtime.ONNXRUNTIME, ("first",), "no engine"),
    ],
)  # fmt: skip
def test_kernels_are_measured_on_the_first_gpu(
    runtime: Runtime, gpus: tuple[Any, ...], gpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of classic TensorRT alone; the other compiles without one."""
    monkeypatch.setattr(family, "code_of", lambda _: "code")
    monkeypatch.setattr(profiles, "of", lambda recipe, graph: (recipe.engine, graph.name))
    target: Any = SimpleNamespace(name="a100", compute_capabilities=("8.0",))
    chosen = Chosen(target=target, runtime=runtime, precision=Precision.FP16)
    recipe: Any = SimpleNamespace(engine="choices")
    of_model: Any = SimpleNamespace(graphs=(graph(False, "float32"), graph(True, "float16")))
    made = request.engine_request(recipe, of_model, chosen, gpus)
    if gpu == "no engine":
        assert made is None
        return
    assert made is not None and (made.gpu, made.runtime, made.code) == (gpu, runtime, "code")
    assert made.profiles == {"model": ("choices", "model")} and made.choices == "choices"
    of_model.graphs = (graph(True, "float32"),)
    with pytest.raises(UsageError, match="no kernel for attention over a cache in fp32"):
        request.engine_request(recipe, of_model, chosen, gpus)


@pytest.mark.parametrize(("recipe", "beside"), [(TINY, DATA), ("vits14", None), (None, None)])
def test_limits_beside_a_users_own_recipe_count(
    recipe: str | None, beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are looked for nowhere else, such as in the folder in which the command runs."""
    asked: list[Any] = []
    real_settle, real_limits = request.settle, request.load_validation

    def settled(loaded: Any, *given: Any, **more: Any) -> Any:
        return real_settle(loaded or request.load("vits14"), *given, **more)

    def limits(name: str, *, beside: Any) -> Any:
        asked.append(beside)
        return real_limits(name, beside=beside)

    monkeypatch.setattr(request, "settle", settled)
    monkeypatch.setattr(request, "load_validation", limits)
    request.build_request(recipe, target="cpu")
    assert asked == [beside]


@pytest.mark.parametrize(("runtime", "form"), [(Runtime.TENSORRT, {"form": "of an engine"}), (Runtime.ONNXRUNTIME, {})])
def test_an_engine_gets_a_graph_in_its_own_form(runtime: Runtime, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the family has one; the graph that a CPU runs stays as the recipe says."""
    changed: list[Any] = []

    class Recipe(SimpleNamespace):
        def changed(self, **changes: Any) -> Recipe:
            changed.append(changes)
            return Recipe(**vars(self) | changes)

    recipe = Recipe(engine={}, family="toy", graph={}, judged_by="toy", title="toy", sizes=())
    chosen = SimpleNamespace(
        runtime=runtime, precision=Precision.FP32, traced=Precision.FP32, target=SimpleNamespace(name="a100")
    )
    made = SimpleNamespace(graphs=(), engine_form=lambda: {"form": "of an engine"})
    monkeypatch.setattr(request, "HasEngineForm", SimpleNamespace)
    monkeypatch.setattr(request, "settle", lambda *_, **__: SimpleNamespace(recipe=recipe))
    monkeypatch.setattr(request, "parse", lambda _kind, content, where: content)
    monkeypatch.setattr(request.targets, "choose", lambda *_, **__: chosen)
    monkeypatch.setattr(request.family, "find", lambda _name: SimpleNamespace(model=lambda _recipe: made))
    monkeypatch.setattr(request, "load_validation", lambda *_, **__: ("limits", Path()))
    monkeypatch.setattr(request, "engine_request", lambda *given: given[0].graph)
    for name in ("cases_of", "limits_for"):
        monkeypatch.setattr(request.evaluate, name, lambda *_: ())
    found: Any = request.build_request(None, weights="my.gguf")
    assert found.engine == found.recipe.graph == form

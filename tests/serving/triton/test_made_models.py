"""The Triton models of a bundle that is written down here: every configuration to the letter, without a build."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.bundle import GraphFacts
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.family import FrontEnd
from dinoexport.runtime import cpu
from dinoexport.serving.triton import batching, served_models, text_models
from dinoexport.serving.triton.served_models import TritonModel
from dinoexport.serving.triton.signature import Served
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way
from tests.conftest import DATA

GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="pixels", dtype="float32", shape=("batch", 3, "width"), meaning="RGB"),),
    outputs=(
        Tensor(name="tokens", dtype="float16", shape=("batch", "patches", 8), meaning="of each patch"),
        Tensor(name="score", dtype="float32", shape=("batch",), meaning="of the image"),
    ),
    dims=(Dim(name="batch", min=1, opt=2, max=4), Dim(name="width", min=2, opt=9, max=64)),
)
SIZES = Tensor(name="sizes", dtype="int32", shape=("batch", 2), meaning="of the file")
LABELS = Tensor(name="labels", dtype="bytes", shape=("batch",), meaning="a PNG file")
PLAIN = FrontEnd(name="images", graph="model", meaning="a JPEG or PNG file", settings={"side": 9})
FINISHING = FrontEnd(
    name="maps", graph="model", meaning="a file", settings={}, answers=(LABELS,), carried=(SIZES,)
)  # fmt: skip
OF_ANOTHER = FrontEnd(name="other", graph="another", meaning="a file", settings={})
INT8 = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.INT8, threads=3)


def manifest(**changed: Any) -> Any:
    facts = {
        "graphs": (GraphFacts.of(GRAPH, "model.onnx"),), "variant": "tiny", "family": "dinov2", "target": "cpu",
        "precision": Precision.INT8, "recipe": {}, "engines": (), "cpu": SimpleNamespace(chosen=INT8),
        "files": tuple(
            SimpleNamespace(name=name) for name in ("model.onnx", "model.onnx.data", "reference.npz", "model.plan")
        ),
    }  # fmt: skip
    return SimpleNamespace(**(facts | changed))


def engine(runtime: Runtime = Runtime.TENSORRT, **changed: Any) -> Any:
    shapes = {"pixels": ((1, 3, 2), (2, 3, 9), (4, 3, 64))}
    facts = {
        "file": "model.plan", "graph": "model", "runtime": runtime, "runtime_version": "10.1", "stripped": False,
        "compute_capabilities": ("8.0", "8.6"), "version_compatible": True, "profiles": {"p": shapes},
    }  # fmt: skip
    return SimpleNamespace(**(facts | changed))


def reference(*widths: int) -> Any:
    """Cases of these widths, two images each."""
    images = [np.full((2, 3, width), i, np.float32) for i, width in enumerate(widths)]
    return SimpleNamespace(
        expectations=[SimpleNamespace(case=SimpleNamespace(inputs={"pixels": each})) for each in images]
    )


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The ways that graphs are opened in. Latencies are not measured: those of one item are a second."""
    asked: list[Any] = []

    def open_graphs(graphs: Any, way: Way) -> dict[str, Any]:
        asked.append((list(graphs), way))
        return {"model": "the runner"}

    def measure(run: Any, item: Any, largest: int, *, progress: Any) -> dict[int, float]:
        assert run == "the runner" and largest == 4
        asked.append(item["pixels"].shape)
        return {1: 10.0, 2: 18.0, 4: 36.0}

    monkeypatch.setattr(cpu, "open_graphs", open_graphs)
    monkeypatch.setattr(batching, "measure", measure)
    return asked


def models(
    backend: served_models.Backend, *, of: Any = None, cases: Any = None, limits: bool = True, ends: Any = ()
) -> dict[str, TritonModel]:
    made = served_models.of_bundle(
        Path("bundle"), of or manifest(), cases or reference(9, 3, 30), name="tiny", version=7, backend=backend,
        queue_limits=limits, front_ends=ends, progress=lambda *_: None,
    )  # fmt: skip
    return {model.name: model for model in made}


def held_to(model: TritonModel, file: str) -> None:
    """`data/served/made/FILE`, whose long string of facts is cut. UPDATE_GOLDEN=1 writes it anew."""
    written = re.sub(r'string_value: ".*"', 'string_value: "..."', model.config)
    golden = DATA / "served" / "made" / file
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(written)
    assert written == golden.read_text(), golden


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_a_graph_on_the_cpu(backend: served_models.Backend, ways: list[Any]) -> None:
    """Triton's own ONNX Runtime runs it in the plain way, the Python backend as it was judged."""
    (model,) = models(backend).values()
    held_to(model, f"{backend}.pbtxt")
    plain = backend == "onnxruntime"
    assert ways == [
        ([Path("bundle/model.onnx")], cpu.PLAIN if plain else Way(runtime=INT8.runtime, precision=INT8.precision)),
        (1, 3, 9),
    ]
    assert model.files == {
        "model.onnx/model.onnx": "model.onnx",
        "model.onnx/model.onnx.data": "model.onnx.data",
        "reference.npz": "reference.npz",
    }
    served = Served.of_text(model.config)
    assert served is not None and (served.role, served.way.threads, served.way.precision) == (
        "graph",
        0,
        INT8.precision,
    )
    assert model.code == ("" if plain else served_models.backend_code("GraphModel"))
    # The smallest and the largest input, single.
    assert {file: (array.shape, array[0, 0, 0]) for file, array in model.warmup.items()} == {
        "7-0-0": ((1, 3, 3), 1.0),
        "7-1-0": ((1, 3, 30), 2.0),
    }


@pytest.mark.parametrize(("widths", "warmed"), [((), []), ((9,), [9]), ((9, 9), [9, 9]), ((3, 9, 30), [3, 30])])
def test_how_many_inputs_warm_a_model_up(widths: tuple[int, ...], warmed: list[int], ways: list[Any]) -> None:
    (model,) = models("onnxruntime", cases=reference(*widths)).values()
    assert [array.shape[2] for array in model.warmup.values()] == warmed
    assert bool(ways) == bool(widths), "there is nothing to measure with"


def test_without_the_runtime_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, ways: list[Any]) -> None:
    def absent(*_: Any) -> Any:
        raise MissingRequirement("not installed", next_step="install it")

    monkeypatch.setattr(cpu, "open_graphs", absent)
    (model,) = models("onnxruntime", limits=False).values()
    assert ways == [] and "preferred_batch_size" not in model.config
    assert "max_queue_delay_microseconds: 0" in model.config and "no limits to the queue" in model.config


@pytest.mark.parametrize(
    ("target", "backend", "kind"),
    [("cpu", "onnxruntime", "CPU"), ("a100", "onnxruntime", "AUTO"), ("a100", "python", "CPU")],
)
def test_where_an_instance_runs(target: str, backend: served_models.Backend, kind: str, ways: list[Any]) -> None:
    (model,) = models(backend, of=manifest(target=target)).values()
    assert f"kind: KIND_{kind}\n" in model.config


def test_a_plan_on_a_gpu(ways: list[Any]) -> None:
    """A plan of TensorRT for RTX is none, and neither is one of another graph."""
    others = (engine(Runtime.TENSORRT_RTX), engine(graph="another"))
    (model,) = models("tensorrt_plan", of=manifest(engines=(others[0], engine(), others[1]))).values()
    held_to(model, "tensorrt_plan.pbtxt")
    assert model.files == {"model.plan": "model.plan", "reference.npz": "reference.npz"} and ways == []
    with pytest.raises(UsageError, match="The bundle has no plan of its graph model"):
        models("tensorrt_plan", of=manifest(engines=others))


def test_several_graphs_have_names_of_their_own(ways: list[Any]) -> None:
    second = Graph(name="second", inputs=GRAPH.inputs, outputs=GRAPH.outputs, dims=GRAPH.dims)
    graphs = (*manifest().graphs, GraphFacts.of(second, "second.onnx"))
    assert list(models("onnxruntime", of=manifest(graphs=graphs))) == ["tiny_model", "tiny_second"]


def test_files_in_front_of_a_graph(ways: list[Any]) -> None:
    made = models("onnxruntime", ends=(PLAIN, FINISHING, OF_ANOTHER))
    names = ["tiny_images_prepare", "tiny_images", "tiny_maps_prepare", "tiny_maps_finish", "tiny_maps"]
    assert list(made) == ["tiny", *names]
    for name in names:
        held_to(made[name], f"{name}.pbtxt")
    code = {name: model.code.partition("import ")[2].split(" ")[0] for name, model in made.items()}
    assert code == {
        "tiny": "", "tiny_images_prepare": "PrepareModel", "tiny_images": "", "tiny_maps_prepare": "PrepareModel",
        "tiny_maps_finish": "FinishModel", "tiny_maps": "",
    }  # fmt: skip
    facts = {name: Served.of_text(made[name].config) for name in names}
    assert {name: (f.role, f.front_end, f.settings) for name, f in facts.items() if f} == {
        "tiny_images_prepare": ("prepare", "images", {"side": 9}), "tiny_images": ("front_end", "images", {"side": 9}),
        "tiny_maps_prepare": ("prepare", "maps", {}), "tiny_maps_finish": ("finish", "maps", {}),
        "tiny_maps": ("front_end", "maps", {}),
    }  # fmt: skip
    plain, finishing = facts["tiny_images"], facts["tiny_maps"]
    assert plain is not None and plain.answers is None
    assert finishing is not None and finishing.answers is not None
    assert finishing.answers.graph().outputs == (LABELS,) and finishing.answers.graph().inputs == GRAPH.inputs


def test_a_model_of_text() -> None:
    model = text_models.of_bundle(manifest(), "tokenizer.json", name="tiny", version=7)
    held_to(model, "text.pbtxt")
    served = Served.of_text(model.config)
    assert served is not None
    assert (served.role, served.tokenizer, served.way.threads) == ("text", "tokenizer.json", 0)


def test_a_decoder_needs_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = SimpleNamespace(text="it generates")
    assert text_models.tokenizer_of(manifest(), SimpleNamespace(text=None)) is None  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no tokenizer in it"):
        text_models.tokenizer_of(manifest(), decoder)
    monkeypatch.setattr(text_models.text_model, "tokenizer_file", lambda _: "tokenizer.json")
    assert text_models.tokenizer_of(manifest(), decoder) == "tokenizer.json"


@pytest.mark.parametrize("config", ["", 'key: "dinoexport"\n', 'key: "dinoexport"\n value {\n string_value: "{}"\n'])
def test_a_configuration_without_facts(config: str) -> None:
    assert Served.of_text(config) is None

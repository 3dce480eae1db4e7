"""A bundle for a GPU without engines: its graphs run there, by a stand-in of the CUDA provider that runs on the CPU.

What a GPU itself computes is in `test_on_gpu.py` and in `pytest --on-gpu`.
"""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dinoexport
from dinoexport.bundle import read_manifest
from dinoexport.embed import opening
from dinoexport.embed.embedder import model_of
from dinoexport.errors import MissingRequirement
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline import preflight
from dinoexport.runtime import ort, runners, telemetry
from dinoexport.runtime.ort import Operator
from dinoexport.spec import Graph, Precision, Runtime
from dinoexport.system import hardware
from dinoexport.validation import validate_bundle
from tests.conftest import DATA
from tests.engines.test_builder import A100

TINY = str(DATA / "tiny_swiglu_reg.toml")
OPEN, EXECUTED = ort.open_graph, ort.executed


@pytest.fixture
def opened_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A GPU and a CUDA provider, which computes on the CPU; whether each opened graph was opened on it."""
    opened: list[bool] = []

    def open_graph(*words: Any, cuda: bool = False, **named: Any) -> Any:
        opened.append(cuda)
        found = OPEN(*words, **named)
        arithmetic = (lambda arrays: {"f16": 7}) if cuda else found.arithmetic
        return replace(found, arithmetic=arithmetic)

    monkeypatch.setattr(hardware, "gpus", lambda: (A100,))
    monkeypatch.setattr(ort, "has_cuda", lambda: True)
    monkeypatch.setattr(ort, "open_graph", open_graph)
    return opened


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for an A100 whose graph itself runs there, built on a machine without a GPU."""
    out = tmp_path_factory.mktemp("for_gpu") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "gpus", lambda: ())
        request = pipeline.build_request(
            TINY, weights="synthetic:0", target="a100", runtime=Runtime.ONNXRUNTIME, precision=Precision.FP16, out=out
        )
        report = pipeline.build(request).report
    assert report is not None and "on the CPU, fp16" in report.candidate
    return out


def test_a_build_for_a_gpu_is_judged_on_it(opened_on_gpu: list[bool], tmp_path: Path) -> None:
    request = pipeline.build_request(
        TINY, weights="synthetic:0", target="a100", runtime=Runtime.ONNXRUNTIME, out=tmp_path / "bundle"
    )
    report = pipeline.build(request).report
    assert report is not None and report.passed and opened_on_gpu == [True]
    assert f"on {A100.name}, fp16 (7 products in f16)" in report.candidate
    assert report.determinism is not None and report.determinism.one_thread is None
    assert read_manifest(request.out).report["candidate"] == report.candidate


def test_a_build_for_a_cpu_stays_on_it(opened_on_gpu: list[bool], tmp_path: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", target="cpu", out=tmp_path / "bundle")
    report = pipeline.build(request).report
    assert report is not None and "on the CPU" in report.candidate and not any(opened_on_gpu)


def test_a_bundle_is_validated_where_it_will_run(built: Path, opened_on_gpu: list[bool]) -> None:
    there = validate_bundle.validate(built)
    assert there.report.passed and not there.not_run and f"on {A100.name}, fp16 (7" in there.report.candidate
    here = validate_bundle.validate(built, runtime=Runtime.ONNXRUNTIME)
    assert "on the CPU" in here.report.candidate and opened_on_gpu[0] and not any(opened_on_gpu[1:])


def test_without_the_gpu_the_verdict_says_so(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated = validate_bundle.validate(built)
    assert "on the CPU" in validated.report.candidate and "no GPU" in validated.not_run
    monkeypatch.setattr(hardware, "gpus", lambda: (A100,))
    assert "no CUDA provider" in validate_bundle.validate(built).not_run, "the real package of a CPU"


def test_a_loaded_bundle_runs_there(built: Path, opened_on_gpu: list[bool]) -> None:
    pixels = np.zeros((1, 3, 28, 28), np.float32)
    for device, words in ((None, A100.name), ("gpu", A100.name), ("cpu", "the CPU")):
        opened_on_gpu.clear()
        with dinoexport.load(built, device=device) as opened:  # type: ignore[arg-type]
            assert words in opened.runs_on and opened(pixels)["class_token"].shape == (1, 96)
        assert opened_on_gpu == [device != "cpu"]


def test_a_loaded_bundle_without_the_gpu(built: Path) -> None:
    with dinoexport.load(built) as opened:
        assert "on the CPU" in opened.runs_on
    with dinoexport.load(built, device="gpu") as opened:
        with pytest.raises(MissingRequirement, match="no GPU"):
            opened(np.zeros((1, 3, 28, 28), np.float32))
        with pytest.raises(MissingRequirement, match="no GPU"):
            opened.validate()


def test_bf16_for_this_gpu_wants_no_other_runtime(
    opened_on_gpu: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OpenVINO judges bf16's graph only where no GPU can."""
    asked: list[str] = []
    monkeypatch.setattr(preflight, "require", lambda _extra, *packages: asked.extend(packages))
    request = pipeline.build_request(
        TINY, weights="synthetic:0", target="a100", runtime=Runtime.ONNXRUNTIME, precision=Precision.BF16
    )
    preflight.packages(request)
    assert "openvino" not in asked
    monkeypatch.setattr(ort, "has_cuda", lambda: False)
    preflight.packages(request)
    assert "openvino" in asked


class Package(types.ModuleType):
    """`onnxruntime` with a CUDA provider; sessions get the providers in `loads`."""

    GraphOptimizationLevel = types.SimpleNamespace(ORT_DISABLE_ALL=0)

    def __init__(self, loads: list[str]) -> None:
        super().__init__("onnxruntime")
        self.loads, self.asked, self.preloaded = loads, [], False

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        print("Failed to load libcufft.so.12")
        self.preloaded = True

    class SessionOptions:
        def add_session_config_entry(self, *_: str) -> None: ...

    def InferenceSession(self, _path: Path, _options: Any, *, providers: list[Any]) -> Any:  # noqa: N802
        self.asked = providers
        return types.SimpleNamespace(get_providers=lambda: self.loads)


@pytest.fixture
def graph() -> Graph:
    return Graph(name="model", inputs=(), outputs=(), dims=())


@pytest.mark.parametrize("loads", [["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]])
def test_a_provider_that_does_not_load_is_an_error(
    loads: list[str], graph: Graph, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime only logs it, and computes on the CPU."""
    package = Package(loads)
    monkeypatch.setattr(telemetry, "onnxruntime", lambda: package)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if len(loads) == 1:
        with pytest.raises(MissingRequirement, match="does not reach the GPU"):
            ort.open_graph(Path("model.onnx"), graph, cuda=True)
    else:
        ort.open_graph(Path("model.onnx"), graph, cuda=True)
    assert package.preloaded and capsys.readouterr().out == "", "its own prints are kept from the user"
    (name, options), cpu = package.asked
    assert (name, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}


def test_a_cpu_s_session_asks_for_no_gpu(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(["CPUExecutionProvider"])
    monkeypatch.setattr(telemetry, "onnxruntime", lambda: package)
    ort.open_graph(Path("model.onnx"), graph)
    assert package.asked == ["CPUExecutionProvider"] and not package.preloaded


def test_products_left_to_the_cpu_are_told(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(kind: str, *, on_gpu: bool, types: tuple[str, ...] = ("float16",)) -> Operator:
        return Operator(kind=kind, types=types, shapes=(), output_shape=(), written_bytes=0, on_gpu=on_gpu)

    ran = (
        *(product("MatMul", on_gpu=True), product("Gemm", on_gpu=True), product("Conv", on_gpu=False)),
        *(product("Softmax", on_gpu=False), product("MatMulNBits", on_gpu=True)),
    )
    asked: list[bool] = []
    monkeypatch.setattr(ort, "executed", lambda _path, _arrays, cuda=False: (asked.append(cuda), ran)[1])
    monkeypatch.setattr(telemetry, "onnxruntime", lambda: Package(["CUDAExecutionProvider"]))
    told = ort.open_graph(Path("model.onnx"), graph, cuda=True).arithmetic({})
    assert told == {"f16": 3, "f16 on the CPU": 1} and asked == [True]
    on_cpu = ort.open_graph(Path("model.onnx"), graph).arithmetic({})
    assert on_cpu == {"f16": 4} and asked == [True, False]


def test_whether_graphs_have_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "has_cuda", lambda: True)
    assert not runners.has_gpu_for_graphs()
    monkeypatch.setattr(hardware, "gpus", lambda: (A100,))
    assert runners.has_gpu_for_graphs()
    monkeypatch.setattr(ort, "has_cuda", lambda: False)
    assert not runners.has_gpu_for_graphs()


@pytest.mark.parametrize(
    ("target", "engines", "card", "cuda", "for_gpu", "here"),
    [
        ("cpu", 0, True, True, False, False),
        ("a100", 0, True, True, True, True),
        ("a100", 0, True, False, True, False),
        ("a100", 1, True, False, True, True),
        ("cpu", 1, True, False, True, True),
        ("a100", 1, False, True, True, False),
    ],
)
def test_what_of_a_bundle_runs_on_this_gpu(
    target: str, engines: int, card: bool, cuda: bool, for_gpu: bool, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """card: whether this machine has the card of the engines."""

    def for_this_machine(engines: Any, _gpus: Any) -> Any:
        if not card:
            raise MissingRequirement("no engine for this card", next_step="")
        return engines

    monkeypatch.setattr(runners.engine_header, "for_this_machine", for_this_machine)
    monkeypatch.setattr(runners, "has_gpu_for_graphs", lambda: cuda)
    manifest: Any = types.SimpleNamespace(target=target, engines=("an engine",) * engines)
    assert (runners.is_for_gpu(manifest), runners.runs_on_gpu_here(manifest)) == (for_gpu, here)


def test_images_are_embedded_there(built: Path, opened_on_gpu: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(built)
    model = model_of(manifest)
    candidate, name = opening.opened(built, manifest, model, threads=1, forms=())
    assert opened_on_gpu == [True] and A100.name in name
    opening.prove(candidate, built, name)
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    _, name = opening.opened(built, manifest, model, threads=1, forms=())
    assert opened_on_gpu == [True, False] and "on the CPU" in name

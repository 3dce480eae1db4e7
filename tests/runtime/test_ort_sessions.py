"""What ONNX Runtime is asked for when a graph is opened, run and counted: by a package that writes all of it down."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import BuildError, InputRefused, MissingRequirement
from dinoexport.runtime import ort, ort_decoder, telemetry
from dinoexport.runtime.ort import Operator
from dinoexport.spec import Dim, Graph, Tensor
from tests.runtime import toy_decoder

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FILE = Path("folder/model.onnx")
GRAPH = Graph(
    name="model",
    inputs=(
        Tensor(name="x", dtype="float32", shape=("batch", 3, "side"), meaning="values"),
        Tensor(name="keep", dtype="int64", shape=("kept",), meaning="rows", default=0),
    ),
    outputs=(
        Tensor(name="y", dtype="float32", shape=("batch",), meaning="sums"),
        Tensor(name="z", dtype="float32", shape=("batch",), meaning="twice the sums"),
    ),
    dims=(Dim(name="batch", min=1, opt=1, max=4), Dim(name="side", min=1, opt=2, max=4)),
)
X = {"x": np.ones((2, 3, 4), np.float32)}
ENTRIES = {"session.intra_op.allow_spinning": "0", "session.qdq_matmulnbits_accuracy_level": "4"}


class Options:
    """SessionOptions: what was set, and by which call."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value

    def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
        self.sizes[name] = size


@dataclass
class Session:
    """An InferenceSession; answers: its outputs. ran: what each run was asked for."""

    source: Any
    options: Options
    providers: list[Any]
    package: Package
    ran: list[Any] = field(default_factory=list)

    def get_providers(self) -> list[str]:
        return self.package.loads

    def run(self, names: list[str] | None, given: dict[str, Any]) -> list[Any]:
        self.ran.append((names, sorted(given)))
        return [given["x"].sum(axis=(1, 2)), 2 * given["x"].sum(axis=(1, 2)), "inner"][: self.package.outputs]

    def end_profiling(self) -> str:
        path = Path(self.options.profile_file_prefix + "_1.json")  # type: ignore[attr-defined]
        # A name with a byte that is no character.
        path.write_bytes(json.dumps(self.package.events).encode().replace(b"?", b"\xff"))
        return str(path)


class Package:
    """The package `onnxruntime`; loads: the providers that load."""

    __version__ = "1.99.0"
    GraphOptimizationLevel = SimpleNamespace(ORT_DISABLE_ALL="none")
    SessionOptions = Options

    def __init__(self) -> None:
        self.InferenceSession = self._session
        self.sessions: list[Session] = []
        self.available, self.loads, self.outputs = [CPU], [CPU], 2
        self.events: list[Any] = []
        self.refuses = ""

    def get_available_providers(self) -> list[str]:
        return self.available

    def preload_dlls(self) -> None:
        print("libcudart.so is not here")

    def _session(self, source: Any, options: Options, *, providers: list[Any]) -> Session:
        if self.refuses:
            raise ValueError(self.refuses)
        self.sessions.append(Session(source, options, providers, self))
        return self.sessions[-1]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    made = Package()
    monkeypatch.setattr(telemetry, "onnxruntime", lambda: made)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")  # so that it is as before afterwards
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    return made


def settings(session: Session) -> dict[str, Any]:
    return vars(session.options) | {"source": session.source, "providers": session.providers}


PLAIN = {
    "log_severity_level": 4, "intra_op_num_threads": 0, "entries": ENTRIES, "sizes": {}, "source": FILE,
    "providers": [CPU],
}  # fmt: skip


def test_a_graph_is_opened_without_spinning_threads_or_lines_of_its_own(package: Package) -> None:
    opened = ort.open_graph(FILE, GRAPH)
    answers = opened(X)
    assert {name: array.tolist() for name, array in answers.items()} == {"y": [12, 12], "z": [24, 24]}
    ort.open_graph(FILE, GRAPH, threads=3)
    ort.open_graph(FILE, GRAPH, shapes={"x": (2, 3, 4)})
    assert [settings(session) for session in package.sessions] == [
        PLAIN,
        PLAIN | {"intra_op_num_threads": 3},
        PLAIN | {"sizes": {"batch": 2, "side": 4}},
    ]
    assert package.sessions[0].ran == [(["y", "z"], ["x"])]
    assert ort.version() == "1.99.0"


def test_more_outputs_of_an_edited_model_whose_weights_stay_in_its_file(package: Package) -> None:
    package.outputs = 3
    run = ort.open_edited(b"a model", FILE, GRAPH, more_outputs=["inner"])
    assert list(run(X)) == ["y", "z", "inner"]
    beside = {"session.model_external_initializers_file_folder_path": "folder"}
    (session,) = package.sessions
    assert settings(session) == PLAIN | {"source": b"a model", "entries": ENTRIES | beside}


def test_what_fails_is_one_error(package: Package) -> None:
    run = ort.open_graph(FILE, GRAPH)
    with pytest.raises(InputRefused, match="batch 5 is outside"):
        run({"x": np.ones((5, 3, 4), np.float32)})
    package.outputs = 1
    with pytest.raises(
        BuildError, match=r"^ONNX Runtime failed on \{'x': \(2, 3, 4\)\}: zip\(\) argument 2 is shorter"
    ):
        run(X)
    package.refuses = "no protobuf"
    with pytest.raises(BuildError) as caught:
        ort.open_graph(FILE, GRAPH)
    assert caught.value.message == "ONNX Runtime refuses model.onnx: no protobuf"


def test_a_decoder_spins_for_a_while_and_keeps_its_cache_in_place(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except where its attention has another form, and on a GPU."""
    asked: list[Path] = []
    graphs = ort_decoder.DecoderGraphs(model=b"shared", tables=None)
    found = [graphs, None, replace(graphs, tables=b"tables")]

    def with_shared_cache(path: Path, graph: Graph) -> ort_decoder.DecoderGraphs | None:
        asked.append(path)
        return found[len(asked) - 1]

    monkeypatch.setattr(ort_decoder, "with_shared_cache", with_shared_cache)
    shared, plain = (ort.open_graph(FILE, toy_decoder.GRAPH, threads=2) for _ in range(2))
    assert shared.begin is not None and isinstance(shared.begin(), ort_decoder.OrtDecoder) and plain.begin is None
    package.available, package.loads = [CUDA, CPU], [CUDA, CPU]
    assert ort.open_graph(FILE, toy_decoder.GRAPH, cuda=True).begin is None
    monkeypatch.setattr(ort, "_SPINNING_US", 1)
    ort.open_graph(FILE, toy_decoder.GRAPH, threads=2)
    assert asked == [FILE] * 3
    beside = {"session.model_external_initializers_file_folder_path": "folder"}
    in_place = PLAIN | {"source": b"shared"}

    def spinning(microseconds: str) -> dict[str, str]:
        on = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": microseconds}
        return ENTRIES | beside | on

    providers = [(CUDA, {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}), CPU]
    assert [settings(session) for session in package.sessions] == [
        in_place | {"entries": spinning("50"), "intra_op_num_threads": 2},
        PLAIN | {"intra_op_num_threads": 2},
        PLAIN | {"providers": providers},
        in_place | {"entries": spinning("1"), "intra_op_num_threads": 2},
        PLAIN | {"source": b"tables", "entries": ENTRIES | beside, "intra_op_num_threads": 1},
    ]


def kernel(name: str, kind: str, types: list[Any], **more: Any) -> dict[str, Any]:
    facts = {"op_name": kind, "input_type_shape": types, "output_size": "96", "provider": CPU}
    facts["output_type_shape"] = [{"float": [2, 3]}, {"float": [7]}]
    return {"cat": "Node", "name": name, "args": facts | more}


EVENTS = [
    {"cat": "Session", "name": "model_kernel_time", "args": {}},
    {"name": "no category_kernel_time"},
    kernel("product_fence_before", "MatMul", []),
    kernel("product?_kernel_time", "MatMul", [{"float": [2, 5]}, {}, {"float": [5, 3]}]),
    kernel("move_kernel_time", "Transpose", [{"float16": [3, 2]}], output_type_shape=[]),
    kernel("narrow_kernel_time", "Gemm", [{"int64": []}, {"float16": [2, 5]}], provider=CUDA),
    kernel("shape_kernel_time", "Gemm", [{"float16": [2, 5]}]),
]


def test_what_ran_is_read_from_the_profile(package: Package) -> None:
    package.events = EVENTS
    product, move, narrow, shape = ort.executed(FILE, X)
    assert product == Operator(
        kind="MatMul", types=("float", "float"), shapes=((2, 5), (5, 3)), output_shape=(2, 3), written_bytes=96
    )
    assert move == Operator(kind="Transpose", types=("float16",), shapes=((3, 2),), output_shape=(), written_bytes=96)
    assert (narrow.on_gpu, shape.on_gpu, narrow.arithmetic) == (True, False, "f16") and not move.on_gpu
    ort.executed(FILE, X, optimised=False)
    first, second = map(settings, package.sessions)
    prefixes = [Path(taken.pop("profile_file_prefix")) for taken in (first, second)]
    assert [prefix.name for prefix in prefixes] == ["profile"] * 2 and not prefixes[0].parent.exists()
    assert first == PLAIN | {"enable_profiling": True}
    assert second == first | {"graph_optimization_level": "none"}
    assert package.sessions[0].ran == [(None, ["x"])]


def test_products_are_counted_by_their_arithmetic_and_those_that_strayed(package: Package) -> None:
    package.events = EVENTS
    assert ort.open_graph(FILE, GRAPH).arithmetic(X) == {"f32": 1, "f16": 2}
    package.available = package.loads = [CUDA, CPU]
    assert ort.open_graph(FILE, GRAPH, cuda=True).arithmetic(X) == {
        "f32 on the CPU": 1, "f16": 1, "f16 on the CPU": 1
    }  # fmt: skip
    assert [len(session.providers) for session in package.sessions] == [1, 1, 2, 2]


def test_a_gpu_that_is_not_reached_is_named(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    assert not ort.has_cuda()
    with pytest.raises(MissingRequirement, match=r"^This ONNX Runtime has no CUDA provider\.$"):
        ort.open_graph(FILE, GRAPH, cuda=True)
    package.available = [CUDA, CPU]
    assert ort.has_cuda()
    with pytest.raises(MissingRequirement, match=r"^ONNX Runtime does not reach the GPU\.$"):
        ort.open_graph(FILE, GRAPH, cuda=True)
    assert capsys.readouterr().out == "", "what it does not find is not printed"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_an_operator_is_on_the_cpu_unless_it_is_said_to_be_elsewhere() -> None:
    product = Operator(kind="MatMulNBits", types=("float",), shapes=(), output_shape=(), written_bytes=0)
    assert not product.on_gpu and product.arithmetic == "int8"
    assert replace(product, on_gpu=True).arithmetic == "f32"

"""What is asked of the compiling process, and what is made of the engine it leaves: the process is a stand-in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.config.recipe import EngineChoices
from dinoexport.engines import builder
from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.runtime.engine_header import Header
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Graph, Profile, Runtime
from dinoexport.system.hardware import Gpu

GRAPH = Graph(name="model", inputs=(), outputs=(), dims=())
ONE_SIZE = Profile(name="size_4x5", shapes={"x": ((2, 4, 5),) * 3, "ids": ((2, 7),) * 3})
WHOLE = Profile(name="whole", shapes={"x": ((1, 4, 5), (2, 4, 5), (2, 4, 5))})
RTX = Header(
    runtime=Runtime.TENSORRT_RTX,
    version="1.7.0",
    size_bytes=2000,
    compute_capabilities=("8.0", "12.0"),
    weight_bytes=1000,
)
PLAN = Header(runtime=Runtime.TENSORRT, version="11.2.1")
CARD = Gpu(index=0, name="NVIDIA L4/24", uuid="GPU", compute_capability="8.9", memory_bytes=1, driver="580.65 b")


class Process:
    """Leaves an engine with this header and log, and says this. The graph's weights take 1000 bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.header, self.said, self.looked_at = RTX, {"scratch_bytes": 77}, dict[str, Any]()
        self.engine, self.log = b"engine", "building\n"
        self.refuses: Exception | None = None
        self.jobs: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.folder = folder
        (folder / "model.onnx").touch()
        (folder / "model.onnx.data").write_bytes(bytes(1000))
        monkeypatch.setattr(builder, "require", lambda *_: None)
        monkeypatch.setattr(builder.subprocess_job, "run", self.run)
        monkeypatch.setattr(builder.engine_header, "read_header", lambda _path: self.header)
        monkeypatch.setattr(builder.onnx_file, "attention_count", lambda _path: 12)
        monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _facts: "11.2")

    def run(self, module: str, job: dict[str, Any], log: Path, **settings: Any) -> Any:
        self.jobs.append((module, job, settings))
        if module.endswith("inspector"):
            log.write_text("looking\n")
            if self.refuses is not None:
                raise self.refuses
            return SimpleNamespace(said=self.looked_at, peak_memory_bytes=5)
        Path(job["engine"]).write_bytes(self.engine)
        log.write_text(self.log)
        return SimpleNamespace(said=self.said, peak_memory_bytes=4321)

    def build(self, *profiles: Profile, runtime: Runtime = Runtime.TENSORRT_RTX, **settings: Any) -> Any:
        settings = {"compute_capabilities": ("12.0", "8.0")} | settings
        return builder.build(
            self.folder / "model.onnx", GRAPH, self.folder, runtime=runtime, profiles=profiles or (WHOLE,), **settings
        )


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Process:
    return Process(monkeypatch, tmp_path)


def test_an_rtx_engine_and_its_facts(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 112.5))
    monkeypatch.setattr(builder, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    layers = b'[ONNX Layer: a/0]" fmha_batch.. [ONNX Layer: b]" fmha_batch [ONNX Layer: c]" gemm'
    process.engine = layers + b'[ONNX Layer: a weight]" fmha_batch'
    process.header = replace(RTX, size_bytes=1000 + len(layers))
    assert process.build() == builder.BuiltEngine(
        path=process.folder / "model.rtx",
        log=process.folder / "model.rtx.log",
        runtime_version="1.7.0",
        compute_capabilities=("8.0", "12.0"),
        size_bytes=len(process.engine),
        weight_bytes=1000,
        scratch_bytes=77,
        attentions=12,
        fused_attentions=2,
        build_s=12.5,
        peak_memory_bytes=4321,
    )
    ((module, job, settings),) = process.jobs
    assert module == "dinoexport.engines.worker"
    assert job == {
        "onnx": str(process.folder / "model.onnx"),
        "engine": str(process.folder / "model.rtx"),
        "runtime": "tensorrt_rtx",
        "profiles": [{"x": ((1, 4, 5), (2, 4, 5), (2, 4, 5))}],
        "compute_capabilities": [[8, 0], [12, 0]],
        "choices": EngineChoices().model_dump(mode="json"),
        "timing_cache": None,
    }
    assert settings["timeout_s"] == 3 * 60 * 60
    assert settings["environment"] == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "POLYGRAPHY_AUTOINSTALL_DEPS": "0", "POLYGRAPHY_USE_TENSORRT_RTX": "1"
    }  # fmt: skip


def test_a_classic_plan_is_opened_after_it_is_built_and_shares_the_gpus_timings(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOEXPORT_CACHE", str(process.folder / "not" / "yet"))
    process.header = PLAN
    process.looked_at = {
        "weight_bytes": 1001,
        "layers": [
            {"Name": "attention 1", "TacticName": "sm80_MHA_fused"},
            {"Name": "attention 1 [profile 1]", "TacticName": "sm80_mha_fused"},
            {"Name": "product", "TacticName": "gemm"},
            {"Name": "another product", "TacticName": "gemm"},
            "mha, but only a name",
        ],
    }
    process.log = "Total Activation Memory: 5 bytes\nTotal Activation Memory: 90 bytes\n"
    for _ in range(2):  # the folder of the timings is there the second time
        found = process.build(runtime=Runtime.TENSORRT, gpu=CARD)
    assert (found.weight_bytes, found.scratch_bytes, found.fused_attentions) == (1001, 90, 1)
    assert (found.runtime_version, found.not_looked_at) == ("11.2.1", "")
    assert found.log.read_text() == process.log + "looking\n"
    assert not (process.folder / "model.plan.inspector.log").exists()
    (_, job, settings), (inspector, looked, how) = process.jobs[2:]
    cache = Path(job["timing_cache"])
    assert cache.name == "NVIDIA-L4-24-580.65-b-tensorrt-11.2.cache" and cache.parent.is_dir()
    assert settings["environment"]["POLYGRAPHY_USE_TENSORRT_RTX"] == "0"
    assert (inspector, looked) == (
        "dinoexport.engines.inspector", {"engine": str(process.folder / "model.plan"), "host_code": False}
    )  # fmt: skip
    assert how["timeout_s"] == 10 * 60


def test_a_plan_that_cannot_be_opened_is_kept_and_the_log_says_what_it_needs(process: Process) -> None:
    process.header, process.refuses = PLAN, BuildError("it died", next_step="Read the log.")
    found = process.build(runtime=Runtime.TENSORRT)
    assert (found.weight_bytes, found.scratch_bytes, found.fused_attentions) == (None, None, None)
    assert found.not_looked_at == "It could not be opened after it was built, so it was not inspected: it died"


@pytest.mark.parametrize(
    ("runtime", "header", "words"),
    [
        (Runtime.TENSORRT, RTX, "The engine is tensorrt_rtx for SM 8.0, 12.0, not tensorrt for 8.0, 12.0."),
        (
            Runtime.TENSORRT_RTX,
            replace(RTX, compute_capabilities=("8.0",)),
            "The engine is tensorrt_rtx for SM 8.0, not tensorrt_rtx for 8.0, 12.0.",
        ),
    ],
)
def test_another_engine_than_was_asked_for_is_refused(
    runtime: Runtime, header: Header, words: str, process: Process
) -> None:
    process.header = header
    with pytest.raises(BuildError) as caught:
        process.build(runtime=runtime)
    assert caught.value.message == words


@pytest.mark.parametrize(
    ("profile", "weight_bytes", "same"),
    [
        (WHOLE, 979, False), (WHOLE, 980, True), (WHOLE, 1020, True), (WHOLE, 1021, False),
        # With one size alone, an item's twenty numbers and seven more may be folded into constants of four bytes.
        (ONE_SIZE, 979, False), (ONE_SIZE, 1128, True), (ONE_SIZE, 1129, False),
    ],
)  # fmt: skip
def test_an_engine_holds_the_graphs_weights(profile: Profile, weight_bytes: int, same: bool, process: Process) -> None:
    process.header = replace(RTX, weight_bytes=weight_bytes)
    if same:
        assert process.build(profile).weight_bytes == weight_bytes
    else:
        with pytest.raises(BuildError, match=f"^The engine holds {weight_bytes} bytes of weights, the graph 1000: "):
            process.build(profile)
        assert process.build(profile, choices=EngineChoices(strip_weights=True)).weight_bytes == weight_bytes


def test_with_weight_streaming_twice_the_largest_weight_is_on_the_device(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder.profiles, "largest_weight_bytes", lambda _onnx: 10**9)
    monkeypatch.setattr(builder.profiles, "scratch_bytes", lambda *_: 1_250_000_001)
    monkeypatch.setattr(builder.profiles, "fitting", lambda *words: {"batch": words[-1]})

    def check(memory_bytes: int) -> None:
        builder.check_memory(
            process.folder / "model.onnx",
            GRAPH,
            [WHOLE],
            memory_bytes=memory_bytes,
            where="a card",
            choices=EngineChoices(weight_streaming=True),
        )

    check(3_250_000_001)
    with pytest.raises(MissingRequirement):
        check(3_250_000_000)
    with pytest.raises(MissingRequirement) as caught:
        check(2_250_000_001)
    assert caught.value.message == (
        "Profile whole needs about 3.3 GB on the device (1.3 GB beside the weights); a card has 2.3 GB."
    )
    assert caught.value.next_step == "batch up to 250000001 would fit: give that as the profile's max."


def test_fused_kernels_are_named_in_the_code_before_the_weights(tmp_path: Path) -> None:
    """A stripped engine ends with its code."""
    code = (
        b'..[ONNX Layer: attention.0]" gemm [ONNX Layer: attention.1]" fmha_batch [ONNX Layer: attention.2]" fmha_batch'
    )
    weights = b'[ONNX Layer: weights]" fmha_batch'
    path = tmp_path / "model.rtx"
    for more in (b"", weights):
        path.write_bytes(code + more)
        header = replace(RTX, size_bytes=len(code + more), weight_bytes=len(more))
        assert builder._fused_layers(path, header, ()) == {"attention.1", "attention.2"}

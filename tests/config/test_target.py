"""From a target's name to decisions, and every impossible pair refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport.bundle import EngineFacts
from dinoexport.config import resources, target
from dinoexport.config.recipe import EngineChoices, Recipe, load
from dinoexport.config.target import load_target
from dinoexport.errors import BuildError, DinoexportError, MissingRequirement, UsageError
from dinoexport.runtime import engine_header
from dinoexport.runtime.table import TABLE, RuntimeFacts
from dinoexport.spec import Precision, Runtime
from dinoexport.system import hardware
from dinoexport.system.hardware import Gpu


def gpu(name: str, capability: str, index: int = 0) -> Gpu:
    return Gpu(
        index=index,
        name=name,
        uuid=f"GPU-{index}ab",
        compute_capability=capability,
        memory_bytes=4 * 10**10,
        driver="580.1",
    )


A100 = gpu("NVIDIA A100-SXM4-40GB", "8.0")


def recipe(**choices: Any) -> Recipe:
    return load("vits14").model_copy(update={"engine": EngineChoices(**choices)})


def choose(
    name: str | None = None,
    *gpus: Gpu,
    runtime: Runtime | None = None,
    precision: Precision | None = None,
    of: Recipe | None = None,
) -> target.Chosen:
    return target.choose(of or recipe(), target=name, runtime=runtime, precision=precision, gpus=gpus)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        ([], "cpu"),
        ([A100], "a100"),
        ([gpu("NVIDIA A10", "8.6")], "a10"),
        ([gpu("NVIDIA A10G", "8.6")], "a10"),
        ([gpu("NVIDIA GeForce RTX 3090 Ti", "8.6")], "rtx3090"),
        ([gpu("NVIDIA L4", "8.9")], "l4"),
        ([gpu("NVIDIA L40S", "8.9")], "l4"),
        ([gpu("NVIDIA H200", "9.0")], "h200"),
        ([gpu("NVIDIA H100 80GB HBM3", "9.0"), A100], "h100"),
        ([gpu("Tesla T4", "7.5")], "t4"),
    ],
)
def test_without_a_target_it_is_the_gpu_that_is_there(here: list[Gpu], expected: str) -> None:
    """By name, else by compute capability: an A10G is no A10, but has its kernels; an L40S is no L4."""
    assert choose(None, *here).target.name == expected


def test_an_unknown_gpu_is_said() -> None:
    with pytest.raises(UsageError, match=r"No target fits NVIDIA X1 \(SM 42\.0\)"):
        choose(None, gpu("NVIDIA X1", "42.0"))


def test_the_runtime_is_the_first_that_can_be_built_here() -> None:
    assert choose("a100", A100).runtime is Runtime.TENSORRT
    assert choose("a100").runtime is Runtime.TENSORRT_RTX, "compiled ahead of time, where there is no A100"
    assert choose("a100", gpu("NVIDIA L4", "8.9")).runtime is Runtime.TENSORRT_RTX
    assert choose("h100").runtime is Runtime.ONNXRUNTIME, "TensorRT-RTX does not know SM 9.0"
    assert choose("cpu", A100).runtime is Runtime.ONNXRUNTIME
    assert choose("a100", A100, runtime=Runtime.TENSORRT_RTX).runtime is Runtime.TENSORRT_RTX
    wide = recipe(compatibility="ampere+")
    assert choose("a100", gpu("NVIDIA L4", "8.9"), of=wide).runtime is Runtime.TENSORRT
    with pytest.raises(MissingRequirement):
        choose("t4", gpu("NVIDIA L4", "8.9"), of=wide, runtime=Runtime.TENSORRT)


@pytest.mark.parametrize(
    ("name", "asked", "error", "words"),
    [
        (
            "a100",
            {"runtime": Runtime.TENSORRT},
            MissingRequirement,
            r"built on that card itself; this machine has no GPU",
        ),
        ("h100", {"runtime": Runtime.TENSORRT_RTX}, UsageError, r"h100 is not built with tensorrt_rtx"),
        ("cpu", {"runtime": Runtime.TENSORRT}, UsageError, r"cpu is not built with tensorrt"),
        ("t4", {"precision": Precision.BF16}, UsageError, r"t4 has no bf16: the tensor cores of SM 7\.5"),
        ("a100", {"precision": Precision.INT8}, UsageError, r"a100 has no int8"),
        ("a1000", {}, UsageError, "Did you mean 'a100'"),
        ("a100,trton:26.08", {}, UsageError, "not a modifier"),
        ("a100,triton:", {}, UsageError, "not a modifier"),
        ("a100,triton:26.08=11", {}, UsageError, "not a modifier"),
        ("a100,triton:26.80", {}, UsageError, r"image 26\.80.* Did you mean '26\.08'"),
        (
            "a100,triton:26.08",
            {},
            MissingRequirement,
            r"Triton 26\.08 loads only plans of its own TensorRT 11\.2\.1.*machine has none",
        ),
    ],
)
def test_impossible_pairs_say_what_would_work(
    name: str, asked: dict[str, Any], error: type[DinoexportError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        choose(name, **asked)
    assert caught.value.next_step


def test_what_only_classic_tensorrt_has_is_refused_elsewhere() -> None:
    with pytest.raises(UsageError, match="tensorrt_rtx has no preset, version_compatible"):
        choose("a100", of=recipe(preset="max", version_compatible=True))
    assert choose("a100", of=recipe(profiles=("latency",))).runtime is Runtime.TENSORRT_RTX
    assert choose("a100", A100, of=recipe(preset="max", version_compatible=True)).runtime is Runtime.TENSORRT


def test_a_triton_image_wants_its_own_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "installed", {"tensorrt": "11.2.1.2"}.get)
    chosen = choose("a100,triton:26.08", A100)
    assert (chosen.name, chosen.runtime) == ("a100,triton:26.08", Runtime.TENSORRT)
    assert choose("a100,triton:26.12=11.2.1", A100).triton == target.Triton(tag="26.12", tensorrt="11.2.1")
    with pytest.raises(MissingRequirement, match=r"its own TensorRT 11\.1\.0\b.*this machine has 11\.2\.1\.2"):
        choose("a100,triton:26.07", A100)
    with pytest.raises(UsageError, match="onnxruntime builds none"):
        choose("a100,triton:26.08", A100, runtime=Runtime.ONNXRUNTIME)


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_cu12", "tensorrt_cu13"])
def test_whichever_package_brought_tensorrt_counts(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three is enough to run a plan; an environment often has one alone."""
    monkeypatch.setattr(hardware, "installed", {package: "11.2.1.2"}.get)
    assert choose("a100,triton:26.08", A100).triton == target.Triton(tag="26.08", tensorrt="11.2.1")
    assert TABLE[Runtime.TENSORRT].installed_version() == "11.2.1.2"


def test_a_version_compatible_plan_keeps_its_weights() -> None:
    """The lean runtime it is opened by cannot put any in."""
    with pytest.raises(UsageError, match="must hold its weights"):
        choose("a100", A100, of=recipe(version_compatible=True, strip_weights=True))


def test_shipped_targets_agree_with_what_is_known() -> None:
    """A runtime TensorRT-RTX does not compile for is not promised; an engine's GPUs are named; reasons are given."""
    for name in resources.names("recipes/targets"):
        kind = load_target(name)
        if Runtime.TENSORRT_RTX in kind.runtimes:
            assert set(kind.compute_capabilities) <= set(engine_header.RTX_TARGETS)
        assert bool(kind.compute_capabilities) == any(r.has_engine for r in kind.runtimes)
        assert set(kind.cautions) <= set(kind.runtimes)
        assert not set(kind.lacks) & set(kind.precisions)
        assert all(kind.precisions.values()) and all(kind.lacks.values()) and all(kind.runtimes.values())


def test_cuda_visible_devices() -> None:
    """CUDA's rule: indices or UUIDs' beginnings, in the order given, up to the first that is not there."""
    found = [gpu("A", "8.0", 0), gpu("B", "8.6", 1), gpu("C", "9.0", 2)]

    def names(wanted: str | None) -> str:
        return "".join(g.name for g in hardware._visible(found, wanted))

    assert [names(w) for w in (None, "", "2,0", "GPU-1a", "1,7,0", "-1", "GPU-")] == ["ABC", "", "CA", "B", "B", "", ""]


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.undo()  # the real question
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError_LibraryNotFound()))
    assert hardware.gpus() == ()


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for NVML: what is read from where."""
    import pynvml

    monkeypatch.undo()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 0),
        "nvmlDeviceGetName": lambda _: "NVIDIA A100",
        "nvmlDeviceGetUUID": lambda _: "GPU-1",
        "nvmlDeviceGetMemoryInfo": lambda _: type("Memory", (), {"total": 5}),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    expected = Gpu(index=0, name="NVIDIA A100", uuid="GPU-1", compute_capability="8.0", memory_bytes=5, driver="580.65")
    assert hardware.gpus() == (expected,)


def facts(**changes: Any) -> EngineFacts:
    content: dict[str, Any] = {
        "graph": "model", "file": "model.plan", "runtime": "tensorrt", "runtime_version": "11.2.1.2",
        "compute_capabilities": ["8.0"], "device": A100.name, "precision": "fp16",
        "profiles": {"whole": {"x": [[1], [1], [1]]}}, "size_bytes": 1, "weight_bytes": 1, "scratch_bytes": 0,
        "attentions": 0, "fused_attentions": 0, "build_s": 0.0, "peak_memory_bytes": 0, "log": "model.plan.log",
        "log_sha256": "0" * 64,
    }  # fmt: skip
    return EngineFacts.model_validate(content | changes)


@pytest.mark.parametrize(
    ("changes", "here", "installed", "words"),
    [
        ({}, [], "11.2.1.2", "was not run: no GPU here"),
        ({}, [gpu("NVIDIA L4", "8.9")], "11.2.1.2", r"is for SM 8\.0; this machine has NVIDIA L4, SM 8\.9"),
        ({}, [gpu("NVIDIA A100-PCIE-40GB", "8.0")], "11.2.1.2", "runs only on that model"),
        ({"compatibility": "ampere+"}, [gpu("Tesla T4", "7.5")], "11.2.1.2", r"has Tesla T4"),
        ({}, [A100], None, "which is not installed"),
        ({}, [A100], "11.2.0.14", r"built by tensorrt 11\.2\.1\.2; this machine has 11\.2\.0\.14"),
        ({}, [A100], "11.3.0.99", r"machine has 11\.3\.0\.99"),
        ({"version_compatible": True}, [A100], "11.1.0.106", r"machine has 11\.1"),
    ],
)
def test_a_plan_that_cannot_run_here_is_refused_before_tensorrt_sees_it(
    changes: dict[str, Any], here: list[Gpu], installed: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _: installed)
    with pytest.raises(MissingRequirement, match=words) as caught:
        engine_header.check_runs_here(facts(**changes), here)
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("changes", "here", "installed"),
    [
        ({}, A100, "11.2.1.2"),
        ({}, A100, "11.2.1.post1"),
        ({"compatibility": "same-cc"}, gpu("NVIDIA A100-PCIE-40GB", "8.0"), "11.2.1.2"),
        ({"compatibility": "ampere+"}, gpu("NVIDIA B200", "10.0"), "11.2.1.2"),
        ({"version_compatible": True}, A100, "11.10.0.1"),
        ({"device": ""}, gpu("NVIDIA A100-PCIE-40GB", "8.0"), "11.2.1.2"),
    ],
)
def test_a_plan_that_can_run_here(
    changes: dict[str, Any], here: Gpu, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _: installed)
    assert engine_header.check_runs_here(facts(**changes), [here]) is here


def test_headers(tmp_path: Any) -> None:
    path = tmp_path / "model.plan"
    path.write_bytes(b"ftrt" + bytes(20) + bytes((10, 13, 3, 9)) + bytes(100))
    assert engine_header.read_header(path) == engine_header.Header(runtime=Runtime.TENSORRT, version="10.13.3.9")
    path.write_bytes(b"ftrt" + bytes([1]) + bytes(100))
    with pytest.raises(BuildError, match="not known here"):
        engine_header.read_header(path)
    for content in (b"", b"vtrt", b"xtrt" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(BuildError, match="not a TensorRT engine"):
            engine_header.read_header(path)


@pytest.mark.parametrize(
    ("tag", "reads"),
    [
        ("23.08", (19, 9)),
        ("23.12", (19, 9)),
        ("24.02", (0, 0)),
        ("24.04", (20, 9)),
        ("24.05", (21, 10)),
        ("25.02", (21, 10)),
        ("23.03", None),
    ],
)
def test_what_an_images_onnx_runtime_reads(tag: str, reads: tuple[int, int] | None) -> None:
    """ONNX Runtime 1.15.1, 1.16.3, none, 1.17.3, 1.18.0, 1.20.1, as Triton's own lists name them."""
    found = target.triton_reads(tag)
    assert (found and (found.opset, found.ir)) == reads


@pytest.mark.parametrize(
    ("name", "precision", "quantised", "traced"),
    [
        ("cpu", Precision.BF16, "activations", Precision.FP32),
        ("cpu", Precision.INT8, "activations", Precision.FP32),
        ("cpu", Precision.INT8, "weights", Precision.INT8),
        ("cpu", Precision.INT4, "weights", Precision.INT4),
        ("cpu", Precision.FP32, "activations", Precision.FP32),
        ("a100", Precision.BF16, "activations", Precision.BF16),
        ("a100", Precision.INT8, "activations", Precision.INT8),
        ("a100", Precision.FP16, "activations", Precision.FP16),
    ],
)
def test_what_is_traced_is_what_the_graph_itself_computes_in(
    name: str, precision: Precision, quantised: Any, traced: Precision
) -> None:
    chosen = target.Chosen(
        target=load_target(name), runtime=Runtime.ONNXRUNTIME, precision=precision, quantised=quantised
    )
    assert chosen.on_cpu is (name == "cpu") and chosen.traced is traced


@pytest.mark.parametrize("quantised", ["weights", "activations"])
def test_four_bits_hold_weights_only(quantised: Any) -> None:
    of = recipe().model_copy(update={"quantised": quantised})
    if quantised == "weights":
        assert choose("cpu", of=of, precision=Precision.INT4).precision is Precision.INT4
    else:
        with pytest.raises(UsageError, match="recipe vits14 has no int4: only weights are stored in four bits"):
            choose("cpu", of=of, precision=Precision.INT4)

"""TensorRT-RTX really compiles our graphs, without a GPU; what it leaves is checked, what befalls it is one error."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import pytest

from dinoexport import bundle
from dinoexport.cli import formatting
from dinoexport.config.recipe import EngineChoices, Range
from dinoexport.engines import builder, profiles, worker
from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import engine_header
from dinoexport.spec import Graph, Precision, Runtime
from dinoexport.system import files, subprocess_job
from dinoexport.system.cache import cache_folder
from dinoexport.system.hardware import Gpu
from dinoexport.validation import validate_bundle
from tests import conformance
from tests.conftest import DATA, HEARING_SIGINT
from tests.standin import compiler

TINY = str(DATA / "tiny_swiglu_reg.toml")


def exported(recipe: str, precision: Precision, folder: Path) -> tuple[Path, Graph]:
    """The ONNX of a recipe, and its signature."""
    model: Any = pipeline.build_request(recipe, precision=precision).model
    conformance.export_to(folder, model, lambda name: model.synthetic(name, 0))
    return folder / "model.onnx", model.graphs[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    return exported(TINY, Precision.FP16, tmp_path_factory.mktemp("tiny"))


def built(path: Path, graph: Graph, folder: Path, *targets: str, **changes: Any) -> builder.BuiltEngine:
    """The TensorRT-RTX engine for `targets`, over the graph's whole range unless `changes` say otherwise."""
    settings = {"runtime": Runtime.TENSORRT_RTX, "profiles": [profiles.profile("whole", graph, {})]} | changes
    return builder.build(path, graph, folder, compute_capabilities=targets, **settings)


def only(side: int) -> dict[str, Range]:
    """One square image of this size and nothing else."""
    size = Range(min=side, opt=side, max=side)
    return {"batch": Range(min=1, opt=1, max=1), "height": size, "width": size}


@pytest.mark.slow("exports five ViT-S and compiles each with the real TensorRT-RTX compiler")
@pytest.mark.parametrize(
    ("variant", "precision", "targets"),
    [
        ("vits14", Precision.FP16, ("8.0",)),
        ("vits14_reg", Precision.FP16, ("8.0",)),
        ("vits14_reg", Precision.FP16, ("8.6", "8.9", "12.0")),
        ("vits14", Precision.FP32, ("8.0",)),
        ("vits14_reg", Precision.FP32, ("8.0",)),
    ],
)
def test_real_variants_compile(variant: str, precision: Precision, targets: tuple[str, ...], tmp_path: Path) -> None:
    """The engine is for the asked GPUs, holds the graph's weights, and in fp16 fuses attention in every block."""
    path, graph = exported(variant, precision, tmp_path)
    made = built(path, graph, tmp_path, *targets)
    assert made.compute_capabilities == targets
    assert made.size_bytes == made.path.stat().st_size
    assert (made.fused_attentions, made.attentions) == (12 if precision is Precision.FP16 else 0, 12)
    data_bytes = (tmp_path / "model.onnx.data").stat().st_size
    assert data_bytes < made.weight_bytes < 1.02 * data_bytes
    assert made.peak_memory_bytes > 10**8
    log = made.log.read_text()
    assert re.findall(r"Flags +\| \[(.*)\]", log) == ["REQUIRE_USER_ALLOCATION, STRONGLY_TYPED"], "and no TF32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "model.rtx", "model.rtx.log"]


def test_bytes_in_compile_too(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "vits14"\n[graph]\ninput = "images"\n[model]\ndepth = 1\n')
    path, graph = exported(str(tmp_path / "mine.toml"), Precision.FP16, tmp_path)
    assert built(path, graph, tmp_path, "8.9").fused_attentions == 1


def test_positions_folded_for_one_size_are_no_other_model(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    """They are more than the tolerance of a small model's weights."""
    path, graph = tiny
    sizes = [profiles.profile(f"size_{side}", graph, only(side)) for side in (224, 518)]
    made = built(path, graph, tmp_path, "8.0", profiles=[*sizes, profiles.profile("whole", graph, {})])
    stored = path.with_name("model.onnx.data").stat().st_size
    assert made.weight_bytes > 1.02 * stored


def test_a_bundle_says_what_was_compiled_and_that_it_never_ran(tmp_path: Path) -> None:
    request = pipeline.build_request(TINY, weights="synthetic:0", target="a100", out=tmp_path / "bundle")
    assert request.precision is Precision.FP16, "the target's first choice"
    built = pipeline.build(request)
    assert built.reused == ()
    manifest = bundle.verify(request.out)
    (facts,) = manifest.engines
    assert (facts.file, facts.compute_capabilities, facts.executed) == ("model.rtx", ("8.0",), "never")
    assert facts.profiles == {"whole": {"pixels": ((1, 3, 14, 14), (1, 3, 28, 28), (4, 3, 1022, 1022))}}
    assert facts.log_sha256 == files.sha256(request.out / facts.log)
    assert built.engines.not_run == "model.rtx was not run: no GPU here."
    assert engine_header.read_header(request.out / "model.rtx").version == facts.runtime_version
    said = "\n".join(formatting.engine_lines(manifest))
    assert "executed: never" in said and "caution" in said
    assert validate_bundle.validate(request.out).report.passed
    assert pipeline.build(request).reused == ("export", "reference", "engine")
    (request.out / "model.rtx").write_bytes(b"x" + (request.out / "model.rtx").read_bytes()[1:])
    assert pipeline.build(request).reused == ("export", "reference")


def test_bf16_for_a_gpu(tmp_path: Path) -> None:
    """The graph's own tensors are bf16: attention is fused; on the CPU it is judged widened, and said so."""
    request = pipeline.build_request(
        TINY, weights="synthetic:0", precision=Precision.BF16, target="a100", out=tmp_path / "bundle"
    )
    built = pipeline.build(request)
    (facts,) = built.manifest.engines
    assert (facts.precision, facts.fused_attentions, facts.attentions) == (Precision.BF16, 3, 3)
    types = {
        tensor.data_type for tensor in onnx.load(request.out / "model.onnx", load_external_data=False).graph.initializer
    }
    assert onnx.TensorProto.BFLOAT16 in types and onnx.TensorProto.FLOAT16 not in types
    assert built.report is not None and "bf16 widened to fp32" in built.report.candidate
    errors = [row.distance.relative_l2 for row in built.report.rows if row.distance]
    assert min(errors) > 1e-3 and max(errors) < 2e-2, "more than fp16 loses, within bf16's limits"
    assert "bf16 widened to fp32" in validate_bundle.validate(request.out).report.candidate


def test_a_damaged_graph_is_one_error(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny[0].read_bytes()[:5000])
    with pytest.raises(BuildError, match="engine failed"):
        built(tmp_path / "model.onnx", tiny[1], tmp_path, "8.0")
    assert not (tmp_path / "model.rtx").exists()


def test_an_unsupported_op_is_named(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    model = onnx.load(tiny[0], load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.domain = "Softmaxx", "nobody.knows"
    model.opset_import.append(onnx.helper.make_opsetid("nobody.knows", 1))
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes((tiny[0].parent / "model.onnx.data").read_bytes())
    with pytest.raises(BuildError, match="Softmaxx"):
        built(tmp_path / "model.onnx", tiny[1], tmp_path, "8.0")


def test_a_gpu_the_compiler_does_not_know(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="SM90"):
        built(*tiny, tmp_path, "9.0")


def test_too_slow_is_stopped(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="more than 0 s"):
        built(*tiny, tmp_path, "8.0", timeout_s=0.3)
    assert not (tmp_path / "model.rtx").exists()


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("kill -9 $$", MissingRequirement, "memory ran out"),
        ("kill -11 $$", BuildError, "SIGSEGV"),
        (
            "echo '[E] first'; echo '[I] idle'; echo '[E] second'; exit 3",
            BuildError,
            r"failed: \[E\] first \[E\] second",
        ),
    ],
)
def test_a_dying_compiler_is_one_error(
    tiny: tuple[Path, Graph],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    error: type[Exception],
    words: str,
) -> None:
    stand_in = tmp_path / "compiler"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))
    with pytest.raises(error, match=words):
        built(*tiny, tmp_path, "8.0")


def test_an_engine_that_is_not_the_one_asked_for(
    tiny: tuple[Path, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short, for other GPUs, or with other weights: the header gives it away."""
    made = built(*tiny, tmp_path, "8.0")
    right = made.path.read_bytes()
    made.path.write_bytes(right[:-1])
    with pytest.raises(BuildError, match="cut short"):
        engine_header.read_header(made.path)

    def leaves(changed: bytes) -> Any:
        def run(_module: str, job: dict[str, Any], log: Path, **_: Any) -> subprocess_job.Finished:
            Path(job["engine"]).write_bytes(changed)
            log.write_text("[V] Total Activation Memory: 1 bytes\n")
            return subprocess_job.Finished(said={}, peak_memory_bytes=0)

        return run

    ampere_and_ada = right[:32] + struct.pack("<I", 0b1100) + right[36:]
    monkeypatch.setattr(subprocess_job, "run", leaves(ampere_and_ada))
    with pytest.raises(BuildError, match=r"SM 8\.6, 8\.9, not tensorrt_rtx for 8\.0"):
        built(*tiny, tmp_path, "8.0")
    twice_the_weights = right[:56] + struct.pack("<Q", 2 * made.weight_bytes) + right[64:]
    monkeypatch.setattr(subprocess_job, "run", leaves(twice_the_weights))
    for wanted in ({}, only(224)):
        with pytest.raises(BuildError, match="not the same model"):
            built(*tiny, tmp_path, "8.0", profiles=[profiles.profile("one", tiny[1], wanted)])


@pytest.fixture(params=["10.13.3.9.post1", "11.4.0.106"])
def classic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`standin/tensorrt`, which is not TensorRT, where the build and its child process look for that."""
    monkeypatch.setenv("STANDIN_TENSORRT", request.param)
    folder = Path(__file__).parents[1] / "standin"
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return str(request.param).partition(".post")[0]


A100 = Gpu(
    index=0, name="NVIDIA A100-SXM4", uuid="GPU-1", compute_capability="8.0", memory_bytes=4 * 10**10, driver="580.1"
)


def test_the_classic_branch_against_a_stand_in(tiny: tuple[Path, Graph], tmp_path: Path, classic: str) -> None:
    """Polygraphy's classic loader and the worker's classic branch, with TensorRT-RTX's builder under them; no plan."""
    said: list[tuple[str, int, int]] = []
    made = built(*tiny, tmp_path, "8.0", runtime=Runtime.TENSORRT, gpu=A100, progress=lambda *what: said.append(what))
    assert (made.path.name, made.runtime_version) == ("model.plan", classic)
    assert (made.scratch_bytes, made.weight_bytes) == (12345, None), "what the opened plan says"
    assert made.fused_attentions == 2, "of the inspector's layers, each once whatever the profile"
    log = made.log.read_text()
    wanted = "STRONGLY_TYPED" if classic.startswith("11") else "EXPLICIT_BATCH, STRONGLY_TYPED"
    assert re.findall(r"Flags +\| \[(.*)\]", log) == [wanted], "no precision flag, and no TF32"
    (cache,) = (cache_folder() / "timing").glob("*.cache")
    assert cache.name.startswith("NVIDIA-A100-SXM4-580.1-tensorrt-")
    assert "Loading tactic timing cache" not in log
    built(*tiny, tmp_path, "8.0", runtime=Runtime.TENSORRT, gpu=A100)
    assert f"Loading tactic timing cache from {cache}" in made.log.read_text(), "the next build starts from it"
    building = [done for doing, done, total in said if doing == "compiling the engine: Building engine"]
    assert building == sorted(building) and building[-1] == 1000 and len(building) > 3
    assert all(total == 1000 for _, _, total in said)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (EngineChoices(), (3, "NONE", False, False, False)),
        (
            EngineChoices(preset="max", compatibility="ampere+", version_compatible=True),
            (5, "AMPERE_PLUS", True, False, False),
        ),
        (
            EngineChoices(preset="fast", compatibility="same-cc", weight_streaming=True, strip_weights=True),
            (1, "SAME_COMPUTE_CAPABILITY", False, True, True),
        ),
    ],
)
def test_choices_reach_polygraphys_classic_configuration(choices: EngineChoices, expected: Any, classic: str) -> None:
    """In a process of its own, for Polygraphy reads at import which flavour it drives. Against the stand-in."""
    script = (
        "import json, sys; from dinoexport.engines.worker import _classic\n"
        "c = _classic(json.loads(sys.argv[1]), [])\n"
        "print(json.dumps([c.builder_optimization_level, c.hardware_compatibility_level.name, c.version_compatible,"
        " c.weight_streaming, c.strip_plan, c.fp16, c.bf16, c.int8, c.tf32, c.calibrator]))"
    )
    job = json.dumps({"choices": choices.model_dump(mode="json"), "timing_cache": None})
    shown = subprocess.run([sys.executable, "-c", script, job], check=True, capture_output=True, text=True)
    found = json.loads(shown.stdout.splitlines()[-1])
    assert tuple(found[:5]) == expected
    assert found[5:] == [False, False, False, False, None], "nothing that TensorRT 11 removed"


def test_ctrl_c_ends_the_compiler_and_leaves_nothing(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    """The very key press: SIGINT to the process group of a real build while its compiler runs."""
    command = [sys.executable, "-m", "dinoexport", "build", TINY, "--weights", "synthetic:0", "--target", "a100"]
    settings: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command = [*HEARING_SIGINT, *command, "--out", str(tmp_path / "bundle")]
    with subprocess.Popen(command, start_new_session=True, **settings) as build:
        assert build.stderr is not None
        assert any("compiling the engine" in line for line in build.stderr), "the compiler has begun"
        os.killpg(build.pid, signal.SIGINT)
        assert build.wait(timeout=60) == 130
        with pytest.raises(ProcessLookupError):  # nobody of the group is left, the compiler included
            os.killpg(build.pid, 0)
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_is_one_error(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    """/dev/full takes the place of the engine's file: every write to it meets a disk without space."""
    (tmp_path / "model.rtx.partial").symlink_to("/dev/full")
    with pytest.raises(BuildError, match="No space left on device"):
        built(*tiny, tmp_path, "8.0")
    assert not (tmp_path / "model.rtx").exists()


def test_progress_of_phases_inside_phases() -> None:
    """Fractions of fractions; what overlaps, repeats itself or was never begun neither breaks it nor turns it back."""
    said = io.StringIO()
    phases = worker._Phases(said)
    phases.start("Building", None, 4)
    phases.step("Building", 0)
    phases.start("Timing", "Building", 2)
    phases.step("Timing", 0)
    phases.start("Timing reformats", "Timing", 1)
    phases.start("Timing reformats", "Timing reformats", 1)
    phases.step("nobody", 3)
    phases.finish("nobody")
    phases.finish("Timing")
    phases.step("Building", 1)
    phases.start("Timing", "Building", 2)
    phases.finish("Building")
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [line["done"] for line in lines if line["phase"] == "Building"] == [0, 250, 375, 500, 1000]
    assert {line["total"] for line in lines} == {1000}


def test_progress_from_many_threads_never_cancels_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT tells it from several threads, and takes an error or a False for a wish to stop."""
    report = io.StringIO()
    monkeypatch.setattr(worker, "_trt", lambda: types.SimpleNamespace(IProgressMonitor=object))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        assert compiler.progress_from_many_threads(worker._monitor(report), threads=8, steps=300)
    finally:
        sys.setswitchinterval(interval)
    lines = [json.loads(line) for line in report.getvalue().splitlines()]
    done = [line["done"] for line in lines if line["phase"] == "Building"]
    assert done == sorted(done) and done[-1] == 1000


def test_a_report_nobody_reads_never_cancels_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(worker, "_trt", lambda: types.SimpleNamespace(IProgressMonitor=object))
    assert compiler.progress_from_many_threads(worker._monitor(Closed()), threads=1, steps=3)


def test_the_builder_needs_neither_torch_nor_a_checkpoint(tiny: tuple[Path, Graph], tmp_path: Path) -> None:
    """An engine is compiled from what a bundle holds, in a process that cannot import torch."""
    path, _ = tiny
    shutil.copytree(path.parent, tmp_path / "bundle")
    script = (
        "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "from pathlib import Path\n"
        "from dinoexport.engines import builder, profiles\n"
        "from dinoexport.spec import Dim, Graph, Runtime, Tensor\n"
        "dims = (Dim(name='batch', min=1, opt=1, max=4), Dim(name='height', min=14, opt=28, max=56, step=14),\n"
        "        Dim(name='width', min=14, opt=28, max=56, step=14))\n"
        "pixels = Tensor(name='pixels', dtype='float32', shape=('batch', 3, 'height', 'width'), meaning='')\n"
        "graph = Graph(name='model', inputs=(pixels,), outputs=(), dims=dims)\n"
        "folder = Path(sys.argv[1])\n"
        "made = builder.build(folder / 'model.onnx', graph, folder, runtime=Runtime.TENSORRT_RTX,\n"
        "    profiles=[profiles.profile('whole', graph, {})], compute_capabilities=('8.0',))\n"
        "print(made.fused_attentions)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "bundle")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "3"


def test_polygraphy_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own switch, which a user's environment may have on, would run pip in the middle of a build."""
    monkeypatch.setenv("POLYGRAPHY_AUTOINSTALL_DEPS", "1")
    code = "from polygraphy import config; print(config.AUTOINSTALL_DEPS)"
    for environment, shown in ((dict(os.environ), "True"), ({**os.environ, **builder._ENVIRONMENT}, "False")):
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == shown

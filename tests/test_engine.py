"""TensorRT-RTX really compiles our graphs, without a GPU; what it leaves is checked, what befalls it is one error."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import onnx
import pytest

from dinoexport import bundle, child, engine, files, listing, pipeline, plan, profiles, proof
from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.spec import Graph, Precision, Runtime
from tests import conformance
from tests.conftest import DATA

TINY = str(DATA / "tiny_swiglu_reg.toml")


def exported(recipe: str, precision: Precision, folder: Path) -> tuple[Path, Graph]:
    """The ONNX of a recipe, and its signature."""
    model: Any = pipeline.order(recipe, precision=precision).model
    conformance.export_to(folder, model, lambda name: model.synthetic(name, 0))
    return folder / "model.onnx", model.graphs[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    return exported(TINY, Precision.FP16, tmp_path_factory.mktemp("tiny"))


def built(path: Path, graph: Graph, folder: Path, *targets: str, **changes: Any) -> engine.Engine:
    """The TensorRT-RTX engine for `targets`, over the graph's whole range unless `changes` say otherwise."""
    settings = {"runtime": Runtime.TENSORRT_RTX, "profiles": [profiles.profile("whole", graph, {})]} | changes
    return engine.build(path, graph, folder, compute_capabilities=targets, **settings)


@pytest.mark.parametrize(
    ("variant", "precision", "targets"),
    [
        ("vits14", Precision.FP16, ("8.0",)),
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
    assert "STRONGLY_TYPED" in log and "TF32" not in log
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "model.rtx", "model.rtx.log"]


def test_bytes_in_compile_too(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "vits14"\n[graph]\ninput = "images"\n[model]\ndepth = 1\n')
    path, graph = exported(str(tmp_path / "mine.toml"), Precision.FP16, tmp_path)
    assert built(path, graph, tmp_path, "8.9").fused_attentions == 1


def test_a_bundle_says_what_was_compiled_and_that_it_never_ran(tmp_path: Path) -> None:
    order = pipeline.order(TINY, weights="synthetic:0", target="a100", out=tmp_path / "bundle")
    assert order.precision is Precision.FP16, "the target's first choice"
    built = pipeline.build(order)
    assert built.reused == ()
    manifest = bundle.verify(order.out)
    (facts,) = manifest.engines
    assert (facts.file, facts.compute_capabilities, facts.executed) == ("model.rtx", ("8.0",), "never")
    assert facts.profiles == {"whole": {"pixels": ((1, 3, 14, 14), (1, 3, 28, 28), (4, 3, 1022, 1022))}}
    assert facts.log_sha256 == files.sha256(order.out / facts.log)
    assert built.engines.not_run == "model.rtx was not run: no GPU here."
    assert plan.read_header(order.out / "model.rtx").version == facts.runtime_version
    said = "\n".join(listing.engine_lines(manifest))
    assert "executed: never" in said and "caution" in said
    assert proof.validate(order.out).report.passed
    assert pipeline.build(order).reused == ("export", "reference", "engine")
    (order.out / "model.rtx").write_bytes(b"x" + (order.out / "model.rtx").read_bytes()[1:])
    assert pipeline.build(order).reused == ("export", "reference")


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
        ("kill -9 $$", MissingRequirement, "want of memory"),
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
        plan.read_header(made.path)

    def leaves(changed: bytes) -> Any:
        def run(_module: str, job: dict[str, Any], log: Path, **_: Any) -> child.Finished:
            Path(job["engine"]).write_bytes(changed)
            log.write_text("[V] Total Activation Memory: 1 bytes\n")
            return child.Finished(said={}, peak_memory_bytes=0)

        return run

    ampere_and_ada = right[:32] + struct.pack("<I", 0b1100) + right[36:]
    monkeypatch.setattr(child, "run", leaves(ampere_and_ada))
    with pytest.raises(BuildError, match=r"SM 8\.6, 8\.9, not tensorrt_rtx for 8\.0"):
        built(*tiny, tmp_path, "8.0")
    twice_the_weights = right[:56] + struct.pack("<Q", 2 * made.weight_bytes) + right[64:]
    monkeypatch.setattr(child, "run", leaves(twice_the_weights))
    with pytest.raises(BuildError, match="not the same model"):
        built(*tiny, tmp_path, "8.0")

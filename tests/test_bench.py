"""`bench` counts work as others do, times what it says it times, and says what its figures are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from dinoexport import bench, cli
from dinoexport.bundle import Manifest
from dinoexport.config import recipe
from dinoexport.models.dinov2.model import Dinov2Model
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import cpu, runners
from dinoexport.spec import Precision, Workload, silent
from dinoexport.system import timing
from tests.conftest import DATA
from tests.image_inputs import taken

TINY = str(DATA / "tiny_swiglu.toml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle. Unjudged is enough: only rejected ones are not timed."""
    out = tmp_path_factory.mktemp("bench") / "bundle"
    pipeline.export_only(pipeline.build_request(TINY, weights="synthetic:0", out=out))
    return out


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_ROUNDS", 3)
    monkeypatch.setattr(bench, "_GEMM_SIDE", 256)
    monkeypatch.setattr(bench, "GEMM_GFLOP", 2 * 256**3 / 1e9)
    monkeypatch.setattr(Dinov2Model, "workloads", property(lambda self: LOADS))


def load(name: str, batch: int, side: int) -> Workload:
    from dinoexport.models.dinov2 import synthetic

    return Workload(
        name=name, inputs={"pixels": synthetic.pixels(batch, side, side, seed=0)}, items=batch, unit="images"
    )


LOADS = (load("1 x 56 x 56", 1, 56), load("3 x 98 x 98", 3, 98))


def test_work_is_counted_as_pytorch_counts_it(folder: Path) -> None:
    """Within the position table's resize, which is a matrix product only in ours: half a percent of ViT-S at 518."""
    model = pipeline.build_request(TINY).model
    graphs = {folder / "model.onnx": model.graphs[0]}
    opened = cpu.open_graphs(graphs, cpu.PLAIN)
    for asked in LOADS:
        ours = cpu.flops(model, graphs, opened, asked.inputs)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model.reference(
                lambda name: model.synthetic(name, 0), [asked.inputs], precision=Precision.FP32, progress=silent
            )
        side = asked.inputs["pixels"].shape[2] // 14
        resize = 2 * side * 41 * 41 * 96 + 2 * side * side * 41 * 96
        assert ours == counter.get_total_flops() + resize


def test_every_load_is_timed_beside_pytorch(folder: Path) -> None:
    found = bench.bench(folder)
    assert [row.workload.name for row in found.rows] == ["1 x 56 x 56", "3 x 98 x 98"]
    assert all(len(row.ours.samples_ms) == 3 and row.pytorch is not None for row in found.rows)
    assert found.peak_gflop_per_s > 0 and found.candidate.startswith("ONNX Runtime")
    table = found.table()
    assert [row["load"] for row in table] == ["1 x 56 x 56", "3 x 98 x 98"] and "images/s" in table[0]


def test_a_head_that_needs_less_than_pytorch_reads_is_timed(tmp_path: Path) -> None:
    """A depth head reads tokens before the final norm: its graph has no norm, PyTorch's backbone does."""
    out = tmp_path / "bundle"
    recipe = str(DATA / "tiny_heads.toml")
    pipeline.export_only(
        pipeline.build_request(recipe, weights="synthetic:0", head="nyu_linear", head_weights="synthetic:0", out=out)
    )
    found = bench.bench(out)
    assert found.rows and all(row.pytorch is not None for row in found.rows)


def test_figures_follow_from_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GEMM_GFLOP", 0.5)
    row = bench.WorkloadTimes(
        workload=LOADS[1],
        gflop=5.0,
        ours=timing.Latencies(samples_ms=(10.0, 20.0, 30.0)),
        peak=timing.Latencies(samples_ms=(1.0,)),
        pytorch=timing.Latencies(samples_ms=(40.0,)),
    )
    found = bench.Bench(machine="m", usable_cpus=2, candidate="c", peak_gflop_per_s=500.0, rows=(row,), notes=("n",))
    (told,) = found.to_json()["workloads"]
    assert (told["median_ms"], told["items_per_s"], told["gflop_per_s"]) == (20.0, 150.0, 250.0)
    assert (told["share_of_fp32_peak"], told["times_pytorch"], told["noisy"]) == (0.5, 0.5, True)
    (shown,) = found.table()
    assert shown["of fp32 peak"] == "50%" and shown["of PyTorch's time"] == "0.50" and "noisy" in shown["spread"]


def test_what_takes_too_long_is_left_out_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_gflop_per_s", lambda: 1e-4)
    found = bench.bench(folder)
    assert found.rows == () and sum("was left out" in note for note in found.notes) == 2


def test_noise_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.Neighbours, "share", lambda self: 0.4)
    assert any("other processes used 40%" in note for note in bench.bench(folder).notes)


def test_a_gpu_s_bundle_timed_on_the_cpu_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "the bundle is for a GPU, but its graph was timed on this machine's CPU"
    assert said not in bench.bench(folder).notes
    monkeypatch.setattr(runners, "is_for_gpu", lambda manifest: True)
    assert said in bench.bench(folder).notes


def test_a_blas_that_was_told_what_to_do_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in bench.BLAS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert not any("the peak" in note for note in bench.bench(folder).notes)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert any("with OPENBLAS_CORETYPE=Haswell set" in note for note in bench.bench(folder).notes)


def test_without_torch_or_weights_pytorch_is_left_out_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    found = bench.bench(folder)
    assert found.rows and all(row.pytorch is None for row in found.rows)
    assert any("torch is not installed" in note for note in found.notes)
    monkeypatch.undo()
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    elsewhere = manifest.checkpoint.model_copy(update={"source": "https://example.org/weights.pth"})
    absent = manifest.model_copy(update={"checkpoint": elsewhere})
    request = pipeline.build_request(TINY)
    ask, why = bench._pytorch(folder, request.model, request.recipe, absent, (None, None), silent)
    assert ask is None and "--weights" in why
    here = {str(folder): True, str(folder / "manifest.json"): True, "/dev/full": False, str(folder / "none"): False}
    assert {place: bench._is_here(place) for place in here} == here, "weights may be a folder"


@pytest.mark.parametrize("weights", ["/dev/full", "none.pth"])
def test_weights_that_are_named_are_used_or_refused(weights: str, folder: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", str(folder), "--weights", weights])
    assert result.exit_code == 3 and weights in result.stderr


def test_other_weights_are_refused(folder: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", str(folder), "--weights", "synthetic:1"])
    assert result.exit_code == 1 and "not what the bundle was built from" in result.stderr


def test_the_verb(folder: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["bench", str(folder)])
    assert shown.exit_code == 0 and "3 x 98 x 98" in shown.stdout and "GFLOP/s" in shown.stdout
    told = json.loads(CliRunner().invoke(cli.app, ["bench", str(folder), "--json"]).stdout)
    assert set(told) == {"candidate", "machine", "notes", "peak_gflop_per_s", "usable_cpus", "workloads"}
    assert len(told["workloads"]) == 2 and told["workloads"][1]["items"] == 3
    assert CliRunner().invoke(cli.app, ["bench", "absent"]).exit_code == 2


def test_a_wrong_bundle_is_not_timed(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx.data").write_bytes(b"x" * (folder / "model.onnx.data").stat().st_size)
    result = CliRunner().invoke(cli.app, ["bench", str(tmp_path)])
    assert result.exit_code == 1 and "damaged" in result.stderr
    assert manifest.verdict == "unjudged"


def test_shipped_loads_fit_the_profile() -> None:
    from dinoexport.models.dinov2 import cases

    small: Any = {name: recipe.load(TINY).profile[name].model_copy(update={"max": 70}) for name in ("height", "width")}
    names = [found.name for found in cases.workloads(recipe.load(TINY).profile | small, taken(as_bytes=False))]
    assert names == ["1 x 70 x 70", "4 x 70 x 70"]
    shipped = cases.workloads(recipe.load("vits14").profile, taken(as_bytes=True))
    assert [found.name for found in shipped] == ["1 x 224 x 224", "1 x 518 x 518", "8 x 224 x 224", "8 x 518 x 518"]
    assert shipped[3].inputs["images"].shape == (8, 518, 518, 3)

"""The command line as a user meets it: exit codes, one sentence per error, JSON alone on stdout, answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dinoexport
from dinoexport.cli import formatting
from dinoexport.runtime import autotune
from dinoexport.spec import Precision, Runtime
from dinoexport.validation import judge
from tests.command_line import run
from tests.conftest import DATA

TINY = str(DATA / "tiny_swiglu.toml")


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle made by the command itself."""
    out = tmp_path_factory.mktemp("cli") / "bundle"
    result = run("build", TINY, "--weights", "synthetic:0", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout and str(out) in result.stdout and "dinoexport validate" in result.stdout
    return out


def test_help_answers_at_once() -> None:
    """Under 0.3 s at best of five: a machine busy with other tests is no slower program."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "dinoexport", "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - started)
    assert all(verb in result.stdout for verb in ("build", "export", "validate", "inspect", "list", "schema", "report"))
    assert "Exit codes" in result.stdout
    assert min(times) < 0.3, times


def test_version() -> None:
    shown = run("--version")
    assert (shown.exit_code, shown.stdout) == (0, f"{dinoexport.__version__}\n")


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "numpy", "pydantic", "PIL", "rich")
    script = f"import dinoexport.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_list() -> None:
    listed = json.loads(run("list", "--json").stdout)
    plain = [row for row in listed["variants"] if row["variant"].startswith("vit")]
    assert [row["variant"] for row in plain] == [
        "vits14", "vits14_reg", "vitb14", "vitb14_reg", "vitl14", "vitl14_reg", "vitg14", "vitg14_reg",
    ]  # fmt: skip
    assert plain[0]["published_bytes"] == 88283115
    assert all(row["licence"].startswith("Apache-2.0") for row in plain)
    heads = {row["head"]: row["of"] for row in listed["heads"]}
    assert len(heads) == 12 and set(heads["nyu_dpt"]) == {"vits14", "vitb14", "vitl14", "vitg14"}
    assert set(heads["linear4"]) == {row["variant"] for row in plain}
    targets = {row["target"]: row["SM"] for row in listed["targets"]}
    assert targets["cpu"] == [] and targets["a100"] == ["8.0"] and targets["rtx"] == ["8.6", "8.9", "12.0"]
    shown = run("list").stdout
    assert "vitg14_reg" in shown and "1,136,485,376" in shown and "swiglu 4096" in shown


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("build", "vits15"), 2, "Did you mean 'vits14'?"),
        (("build", "vits14", "--precision", "fp61"), 2, "Did you mean 'fp16'?"),
        (("build", "vits14", "--target", "rtx5091"), 2, "Did you mean 'rtx5090'?"),
        (("build", "vits14", "--reference", "hubb"), 2, "Did you mean 'hub'?"),
        (("build", "absent.toml"), 2, "cannot be read"),
        (("build", "vits14", "--weights", "absent.pth"), 3, "There is no file absent.pth"),
        (("build", "vits14", "--weights", "synthetic:x"), 2, "not a synthetic checkpoint"),
        (("export", "vitz14"), 2, "There is no variant"),
        (("validate", "absent"), 2, "not a bundle"),
        (("inspect", "absent"), 2, "not a bundle"),
        (("inspect", "absent.onnx"), 2, "absent.onnx"),
    ],
)
def test_errors_are_one_sentence_and_a_next_step(
    args: tuple[str, ...], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == code
    assert result.stdout == "" and result.stderr.startswith("error: ") and "next: " in result.stderr
    assert words in result.stderr
    as_json = run(*args, "--json")
    assert as_json.exit_code == code
    told = json.loads(as_json.stdout)
    assert words in told["error"] and told["next_step"] and told["exit_code"] == code
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] in ([], ["bundles"])


def test_unknown_recipe_keys_are_all_named(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "vits14"\nprecison = "fp16"\n[profil]\nbatch = 1\n')
    result = run("build", str(recipe))
    assert result.exit_code == 2
    assert (
        "'precison'. Did you mean 'precision'?" in result.stderr
        and "'profil'. Did you mean 'profile'?" in result.stderr
    )


def test_recipe_based_on_a_shipped_one(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "vits14"\nname = "mine"\n[graph]\nlast_blocks = 2\ninput = "images"\n')
    from dinoexport.pipeline import build as pipeline

    (graph,) = pipeline.build_request(str(recipe)).model.graphs
    assert [tensor.name for tensor in graph.inputs] == ["images"]
    assert [tensor.name for tensor in graph.outputs] == [
        "block_10_class_token", "block_10_patch_tokens",
        "block_11_class_token", "block_11_patch_tokens",
        "class_token", "patch_tokens",
    ]  # fmt: skip


def test_json_is_alone_on_stdout(bundle_folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "bundle")
    built = json.loads(run("build", TINY, "--weights", "synthetic:0", "--out", out, "--json").stdout)
    assert built["verdict"] == "passed" and built["bundle"] == out and built["report"]["rows"]
    assert built["report"]["determinism"]["again"] == 0 and built["report"]["determinism"]["cases"] == ["batch"]
    exported = json.loads(run("export", TINY, "--weights", "synthetic:1", "--out", out, "--json").stdout)
    assert exported["verdict"] == "unjudged"
    told = json.loads(run("validate", str(bundle_folder), "--json").stdout)
    assert "the 2 cases the bundle carries" in told["proves"] and "other inputs and sizes" in told["does_not_prove"]
    validated = told["report"]
    assert validated["passed"] and validated["determinism"]["alone"] < 1e-5
    shown = run("validate", str(bundle_folder)).stdout
    assert "Repeatability: same inputs again: bit-identical; alone" in shown
    assert (
        "\nProves: " in shown
        and "\nNot:    other inputs and sizes; that the weights are the authors' own; who" in shown
    )
    assert json.loads(run("inspect", str(bundle_folder), "--json").stdout)["Bundle"]["verdict"] == "passed"
    onnx_facts = json.loads(run("inspect", str(bundle_folder / "model.onnx"), "--json").stdout)
    assert onnx_facts["ONNX"]["external data"] == "model.onnx.data"
    assert json.loads(run("schema", "--json").stdout) == json.loads(run("schema").stdout)


BUILT = {"assumed", "bundle", "cpu", "engines", "not_run", "notes", "recipe", "reused", "verdict"}
DEPLOYED = {"backend", "models", "name", "note", "previous", "repository", "retired", "version"}
KEYS = {
    "build": BUILT | {"report", "signed_by"},
    "export": BUILT,
    "validate": {
        "bundle", "does_not_prove", "not_recorded", "not_run", "proves", "recorded", "report", "signed_by", "skipped",
        "verified",
    },
    "inspect": {"Bundle", "Dimensions", "Files", "Inputs and outputs"},
    "report": {"report"},
    "diff": {"Files", "Operations", "Outputs", "Speed", "What differs"},
    "list": {"heads", "targets", "variants"},
    "doctor": {"findings"},
    "deploy": DEPLOYED,
    "rollback": DEPLOYED,
}  # fmt: skip


def test_the_keys_of_every_json_are_these(bundle_folder: Path, tmp_path: Path) -> None:
    """Scripts read them: a key that goes or comes is a change of the interface, and of CHANGELOG.md."""
    bundle, repository = str(bundle_folder), str(tmp_path / "models")
    deploy = ("deploy", bundle, "--to", repository)
    made = (TINY, "--weights", "synthetic:0", "--out", str(tmp_path / "made"))
    commands = [
        ("build", *made), ("export", *made), ("validate", bundle), ("inspect", bundle), ("report", bundle),
        ("diff", bundle, bundle), ("list",), ("doctor",), deploy, deploy, ("rollback", repository, "tiny_swiglu"),
    ]  # fmt: skip
    for verb, *args in commands:
        shown = run(verb, *args, "--json")
        assert shown.exit_code == 0, (verb, shown.output)
        assert set(json.loads(shown.stdout)) == KEYS[verb], verb


def test_inspect_shows_what_was_measured_where_runtimes_were_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(autotune.RUNTIMES, Precision.FP32, (Runtime.ONNXRUNTIME, Runtime.OPENVINO))
    out = tmp_path / "compared"
    made = run("build", TINY, "--weights", "synthetic:0", "--out", str(out))
    assert made.exit_code == 0, made.output
    shown = json.loads(run("inspect", str(out), "--json").stdout)
    assert set(shown) == KEYS["inspect"] | {"Measured on the CPU that built it"}
    rows = shown["Measured on the CPU that built it"]
    assert {row["runtime"] for row in rows} == {"onnxruntime", "openvino"}
    assert [row[""] for row in rows].count("chosen") == 1


def test_failed_validation_exits_1(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoexport.models.dinov2.model import Dinov2Model

    right = Dinov2Model.drive
    wrong = lambda self, runners, inputs: {n: 1.001 * a for n, a in right(self, runners, inputs).items()}  # noqa: E731
    monkeypatch.setattr(Dinov2Model, "drive", wrong)
    result = run("validate", str(bundle_folder), "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["exit_code"] == 1 and not told["report"]["passed"]
    shown = run("validate", str(bundle_folder))
    assert shown.exit_code == 1 and "FAILED" in shown.stdout and "limit" in shown.stdout


def test_what_a_verdict_leaves_open() -> None:
    report = judge.Report(candidate="c", reference="r", rows=(), not_covered=("wide", "tall"))
    proves, left_open = formatting.proven(report, own_images=True, not_run="no GPU here", verified=True)
    assert "your images" in proves
    assert left_open[2:] == ["2 cases outside the engine's profiles", "a GPU, which did not run it"]


def test_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("validate", str(bundle_folder))
    assert result.exit_code == 4 and "pip install 'dinoexport[cpu]'" in result.stderr
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    result = run("export", TINY, "--weights", "synthetic:5", "--out", str(tmp_path / "bundle"))
    assert result.exit_code == 4 and "pip install 'dinoexport[export]'" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_hostile_name_does_not_reach_the_terminal(tmp_path: Path) -> None:
    import safetensors.numpy

    path = tmp_path / "\x1b[2Jfile.safetensors"
    safetensors.numpy.save_file({"\x1b[2Jgone": np.zeros(3, np.float32)}, path)
    build = ("build", TINY, "--weights", str(path), "--out", str(tmp_path / "bundle"))
    result = run(*build)
    assert result.exit_code == 3 and "\x1b" not in result.stderr and "\\x1b[2Jfile" in result.stderr
    told = run(*build, "--json")
    assert "\x1b" not in told.output and any("\x1b[2Jgone" in line for line in _strings(json.loads(told.stdout)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def test_inspect_shows_what_a_user_needs(bundle_folder: Path) -> None:
    shown = run("inspect", str(bundle_folder)).stdout
    for word in (
        "passed",
        "synthetic:0",
        "pixels",
        "patch_tokens",
        "height",
        "model.onnx.data",
        "intended_use",
        "bias",
    ):
        assert word in shown, word
    assert "LayerNormalization" in run("inspect", str(bundle_folder / "model.onnx")).stdout


@pytest.mark.parametrize(
    "words",
    [
        ("bench",), ("compile", "--target", "a100"), ("deploy", "--to", "models"),
        ("embed", "--images", ".", "--out", "o"), ("fit", "--images", "."), ("inspect",), ("report",), ("validate",),
    ],
)  # fmt: skip
def test_a_bundle_that_is_a_circle_of_links_is_one_error(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    verb, *options = words
    ended = run(verb, "circle", *options)
    assert isinstance(ended.exception, SystemExit) and ended.exit_code in (1, 2, 3), ended.output
    assert ended.stderr.count("error:") == 1 and "Traceback" not in ended.stderr

"""The README is true: its commands are commands, its demo runs and says what it shows, its recipe is a recipe."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dinoexport import cli
from dinoexport.cli import build
from dinoexport.config import recipe, resources
from dinoexport.errors import UsageError
from dinoexport.pipeline import build as pipeline

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.splitlines()
    if line.startswith("dinoexport ")
]


def verbs() -> dict[str, typer.core.TyperCommand]:
    group = typer.main.get_command(cli.app)
    return dict(group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_commands(command: str) -> None:
    """Each parses, and what it builds is known; running all of them would download the published files."""
    _, verb, *args = shlex.split(command)
    context = verbs()[verb].make_context(verb, list(args))
    if "variant" in context.params:
        pipeline.build_request(context.params["variant"], precision=build.precision_of(context.params.get("precision")))


def test_every_verb_and_option_is_documented() -> None:
    for verb, command in verbs().items():
        assert f"`dinoexport {verb}" in README, verb
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert option in README, f"{verb} {option}"
    assert all(f"`{name}`" in README for name in (*recipe.variants(), *resources.names("recipes/targets")))
    assert cli.EXIT_CODES in README


def test_make_demo_does_what_it_shows(tmp_path: Path) -> None:
    """The demo's own command, then the two it names as next."""
    line = re.search(r"^demo:.*\n\t\$\(BIN\)/(dinoexport .*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert line is not None

    def run(command: str) -> str:
        words = [sys.executable, "-m", *shlex.split(command)]
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    shown = run(line[1])
    (pattern,) = [block for kind, block in BLOCKS if kind == "" and block.startswith("PASSED")]
    assert shown.startswith("PASSED: ONNX Runtime") and "\nEngine: model.rtx for SM 8.0" in shown
    assert [row.split()[1] for row in pattern.splitlines() if "│ ok" in row] and "│ photographs" in shown
    next_commands = re.findall(r"dinoexport (?:inspect|validate) \S+", shown)
    assert next_commands == re.findall(r"dinoexport (?:inspect|validate) bundles\S+", pattern)
    assert "passed" in run(next_commands[0])
    assert run(next_commands[1]).startswith("PASSED")


def test_recipe_example(tmp_path: Path) -> None:
    example, _ = [block for kind, block in BLOCKS if kind == "toml"]
    (tmp_path / "mine.toml").write_text(example)
    request = pipeline.build_request(str(tmp_path / "mine.toml"))
    assert request.recipe.name == "vitb14-dense" and request.recipe.precision == "fp16"
    assert len(request.model.graphs[0].outputs) == 10
    assert any(case.expect_refusal for case in request.cases)


def test_engine_example(tmp_path: Path) -> None:
    _, example = [block for kind, block in BLOCKS if kind == "toml"]
    (tmp_path / "mine.toml").write_text(example)
    with pytest.raises(UsageError, match="tensorrt_rtx has no compatibility"):
        pipeline.build_request(
            str(tmp_path / "mine.toml"), target="a100"
        )  # read, and refused for what this machine lacks
    (tmp_path / "mine.toml").write_text(example.replace('"same-cc"', '"this-gpu"'))
    request = pipeline.build_request(str(tmp_path / "mine.toml"), target="a100")
    assert [profile.name for profile in request.profiles["model"]] == ["document", "latency"]


def test_bundle_layout_is_the_documented_one() -> None:
    (layout,) = [block for kind, block in BLOCKS if kind == "" and block.startswith("bundles/")]
    documented = set(re.findall(r"^  (\S+)  ", layout, flags=re.MULTILINE))
    always = {
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "reference.npz",
        "report.json",
        "report.html",
        "sbom.cdx.json",
    }
    assert documented == always | {"model.plan", "precision.json", "model.sig"}


def test_help_of_every_verb() -> None:
    for verb in verbs():
        shown = CliRunner().invoke(cli.app, [verb, "--help"])
        assert shown.exit_code == 0 and "Exit codes" in shown.stdout

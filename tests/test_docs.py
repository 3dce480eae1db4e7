"""README and docs are true: commands parse, links lead somewhere, examples run, generated pages are the code's.

Pages are found, not listed: a new page of docs/ is under these tests the moment it exists.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dinoexport import cli
from dinoexport.cli import build
from dinoexport.config import recipe, resources
from dinoexport.errors import UsageError
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.fit.publishing import HEAD_FILE
from dinoexport.text.tokenizer import SENTENCEPIECE
from scripts import reference_pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
}
EVERYWHERE = PAGES | {"CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
_FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# Text, address: of links and pictures.
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def blocks(page: str, kind: str) -> list[str]:
    """The fenced blocks of one kind on a page."""
    return [block for found, block in _FENCE.findall(EVERYWHERE[page]) if found == kind]


def command_lines(program: str) -> list[Any]:
    """Every line of a shell block that starts with `program`, with its page."""
    return [
        pytest.param(words[1:], id=f"{page}: {' '.join(words)}")
        for page in EVERYWHERE
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        for command in re.split(r"\s&&\s|\s\|\s", line)
        if (words := shlex.split(command, comments=True)) and Path(words[0]).name == program
    ]


@cache
def verbs() -> dict[str, Any]:
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


@pytest.mark.parametrize("words", command_lines("dinoexport"))
def test_commands_are_commands(words: list[str]) -> None:
    """Each parses, and a variant or target it names is known; running all of them would download published files."""
    if words == ["--version"]:
        return
    verb, *args = words
    context = verbs()[verb].make_context(verb, list(args))
    variant = context.params.get("variant")
    if variant is not None and not variant.endswith(".toml") and variant != "VARIANT":
        pipeline.build_request(variant, precision=build.precision_of(context.params.get("precision")))
    for target in filter(None, (context.params.get("target") or "").split(",")):
        assert target.startswith("triton:") or target in resources.names("recipes/targets")


@pytest.mark.parametrize("words", command_lines("make"))
def test_make_targets_exist(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        assert "=" in word or re.search(rf"^{re.escape(word)}:", makefile, flags=re.MULTILINE), word


@pytest.mark.parametrize("words", command_lines("pip"))
def test_pip_installs_extras_that_exist(words: list[str]) -> None:
    """And none asks an index for dinoexport, which is not there: from a clone, or a wheel of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        assert re.fullmatch(r"dinoexport(\[.*)?", word) is None, word
        for extras in re.findall(r"\[([\w,]+)\]", word):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), word


def test_every_extra_is_in_the_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/quickstart.md"].split("## Install")[1], flags=re.MULTILINE)
    assert sorted(rows) == sorted(project["optional-dependencies"])


def _names(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and code hosts make them; not those inside code."""
    headings = re.findall(r"^#+ +(.+)$", _FENCE.sub("", text), flags=re.MULTILINE)
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


@pytest.mark.parametrize("page", list(EVERYWHERE))
def test_links_lead_somewhere(page: str) -> None:
    """Files exist and are the repository's; anchors are headings. Addresses of other servers are https."""
    for _, address in _LINK.findall(_FENCE.sub("", EVERYWHERE[page])):
        if "://" in address:
            assert address.startswith("https://"), address
            continue
        name, _, anchor = address.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), f"{page} links to {address}"
        assert target.resolve().is_relative_to(ROOT)
        if anchor:
            assert anchor in _names(target.read_text()), f"{page} links to {address}"


def test_paths_named_in_code_exist() -> None:
    """`validate/dinov2.toml` in backticks is a promise too."""
    for page, text in EVERYWHERE.items():
        for path in re.findall(r"`((?:dinoexport|recipes|validate|serving|tests|benchmarks|scripts)/[\w./-]+)`", text):
            if not re.search("[A-Z]{4}", path):  # NAME and FAMILY stand for others
                assert (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", list(EVERYWHERE))
def test_python_examples_are_python(page: str) -> None:
    """They compile, and what they import from dinoexport is there; test_api runs the one of ONNX Runtime alone."""
    for block in blocks(page, "python"):
        tree = compile(block, page, "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        for node in imports:
            if node.module and node.module.split(".")[0] == "dinoexport":
                module = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


@pytest.mark.parametrize("page", list(EVERYWHERE))
def test_toml_examples_are_toml(page: str) -> None:
    for block in blocks(page, "toml"):
        tomllib.loads(block)


@pytest.mark.parametrize("name", list(reference_pages.pages()))
def test_generated_pages_are_the_codes(name: str) -> None:
    """Every verb, option, variant and target is documented because the page is made of them."""
    assert (DOCS / name).read_text() == reference_pages.pages()[name], "run `make reference`"


def test_reference_has_every_verb_and_option() -> None:
    """The generator leaves nothing out."""
    page = PAGES["docs/cli.md"]
    for verb, command in verbs().items():
        (section,) = re.findall(rf"^## dinoexport {verb}\n(.*?)(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE)
        for parameter in command.params:
            wanted = [o for o in parameter.opts if o.startswith("--") and o != "--help"]
            assert all(f"`{option}`" in section for option in wanted), f"{verb} {wanted}"
            assert parameter.name == "help" or parameter.help in section.replace("\\|", "|"), f"{verb} {parameter.name}"
    assert cli.EXIT_CODES in page
    variants = PAGES["docs/variants.md"]
    assert all(f"`{name}`" in variants for name in (*recipe.variants(), *resources.names("recipes/targets")))


def test_readme_is_short_and_has_a_picture() -> None:
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 150
    assert "![" in readme and "| I want to" in readme
    rows = [line for line in readme.splitlines() if line.startswith("| ")]
    missing = {page for page in PAGES if page.startswith("docs/")} - {
        a for line in rows for _, a in _LINK.findall(line)
    }
    assert missing <= {"docs/index.md"}, "a page that the table of the README does not lead to"


def test_every_page_is_in_the_readme_or_the_menu_of_the_site(tmp_path: Path) -> None:
    """The site builds in strict mode: links, anchors and pictures are there, every page is in the menu."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    made = subprocess.run(
        words, check=False, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    )
    assert made.returncode == 0, made.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f'href="{page.stem}/"' in home, page
        assert len(re.findall(r"^# ", _FENCE.sub("", page.read_text()), flags=re.MULTILINE)) == 1, f"{page}: one title"
    every = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?://', every), "the site asks no other server"


@pytest.mark.parametrize("path", sorted((DOCS / "images").iterdir()), ids=lambda path: path.name)
def test_pictures_are_small_and_used(path: Path) -> None:
    assert path.stat().st_size < 300_000
    assert any(f"images/{path.name}" in text for text in PAGES.values())


@pytest.mark.slow("builds ViT-S/14, compiles its engine and validates it: the README's first command, as it is")
def test_make_demo_does_what_it_shows(tmp_path: Path) -> None:
    """The demo's own command, then the two it names as next."""
    line = re.search(r"^demo:.*\n\t\$\(BIN\)/(dinoexport .*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert line is not None

    def run(command: str) -> str:
        words = [sys.executable, "-m", *shlex.split(command)]
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    shown = run(line[1])
    (pattern,) = [block for block in blocks("docs/quickstart.md", "text") if block.startswith("PASSED")]
    assert shown.startswith("PASSED: ONNX Runtime") and "\nEngine: model.rtx for SM 8.0" in shown
    assert [row.split()[1] for row in pattern.splitlines() if "│ ok" in row] and "│ photographs" in shown
    # Every line of words is there, figures and versions aside.
    words = {re.split(r"[\d:]", row)[0] for row in pattern.splitlines() if row and row[0].isalpha()}
    assert words <= {re.split(r"[\d:]", row)[0] for row in shown.splitlines()}
    next_commands = re.findall(r"dinoexport (?:inspect|validate) \S+", shown)
    assert next_commands == re.findall(r"dinoexport (?:inspect|validate) bundles\S+", pattern)
    assert "passed" in run(next_commands[0])
    assert run(next_commands[1]).startswith("PASSED")


def test_recipe_example(tmp_path: Path) -> None:
    (example,) = blocks("docs/recipes.md", "toml")
    (tmp_path / "mine.toml").write_text(example)
    request = pipeline.build_request(str(tmp_path / "mine.toml"))
    assert request.recipe.name == "vitb14-dense" and request.recipe.precision == "fp16"
    assert len(request.model.graphs[0].outputs) == 10
    assert any(case.expect_refusal for case in request.cases)


def test_engine_example(tmp_path: Path) -> None:
    (example,) = blocks("docs/gpu-engines.md", "toml")
    (tmp_path / "mine.toml").write_text(example)
    with pytest.raises(UsageError, match="tensorrt_rtx has no compatibility"):
        pipeline.build_request(str(tmp_path / "mine.toml"), target="a100")  # read, and refused for what is lacking here
    (tmp_path / "mine.toml").write_text(example.replace('"same-cc"', '"this-gpu"'))
    request = pipeline.build_request(str(tmp_path / "mine.toml"), target="a100")
    assert [profile.name for profile in request.engine.profiles["model"]] == ["document", "latency"]


def test_bundle_layout_is_the_documented_one() -> None:
    (layout,) = [block for block in blocks("docs/bundle-format.md", "text") if block.startswith("bundles/")]
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
    sometimes = {"model.plan", "precision.json", "model.sig", SENTENCEPIECE, "config.json", HEAD_FILE}
    assert documented == always | sometimes


def test_help_of_every_verb() -> None:
    for verb in verbs():
        shown = CliRunner().invoke(cli.app, [verb, "--help"])
        assert shown.exit_code == 0 and "Exit codes" in shown.stdout


# What the code says, in the pieces between the parts that change; the heading shows those as capitals or an ellipsis.
_MESSAGES = "\n".join(path.read_text() for path in (ROOT / "dinoexport").rglob("*.py"))


@pytest.mark.parametrize("heading", re.findall(r"^## `(.+)`$", PAGES["docs/troubleshooting.md"], flags=re.MULTILINE))
def test_troubleshooting_quotes_real_messages(heading: str) -> None:
    for piece in re.split(r"\b[A-Z][A-Z_]+\b|…", heading):
        known = len(piece.strip(" '.,")) < 3 or piece.strip(" '") in _MESSAGES
        assert known, f"no message has {piece!r}; docs/troubleshooting.md must quote the new words"

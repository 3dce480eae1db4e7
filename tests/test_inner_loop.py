"""CONTRIBUTING names what there is: every package, the slow tests, and the checks that `make` and the hooks run."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_hooks_are_the_checks_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^check: .*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    checks = [re.sub(r" (?:\.|Dockerfile)$", "", line.replace("$(BIN)", ".venv/bin")) for line in recipe.split("\n\t")]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert all(repo["repo"] == "local" for repo in hooks), "no download before a commit"
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    assert sorted(entries) == sorted(re.sub(r" (?:\.|Dockerfile)$", "", check.strip()) for check in checks)


def test_slow_tests_give_a_reason_and_are_listed() -> None:
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert not re.search(r"mark\.slow\b(?!\()", path.read_text()) or path == Path(__file__), path
        marked = r"^@pytest\.mark\.slow\((.*?)\)\n.*?^def (\w+)"
        for reason, name in re.findall(marked, path.read_text(), flags=re.MULTILINE | re.DOTALL):
            assert len(reason) > 20 and f"`{name}`" in listed, f"{path}: {name}"


def test_every_package_and_module_has_its_line() -> None:
    listed = re.findall(r"^\| (`.*`) \| .* \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    named = {name.rstrip("/") for cell in listed for name in re.findall(r"`([\w./]+)`", cell)}
    rooms = {path.name for path in (ROOT / "dinoexport").iterdir() if not path.name.startswith("_")} - {"py.typed"}
    assert not rooms - named

"""What a verb imports, as a whole process: what it uses and nothing else. Counted and not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dinoexport.pipeline import build as pipeline
from tests.conftest import DATA

RUN = """
import json, sys
before = set(sys.modules)
from dinoexport.__main__ import main
sys.argv = ["dinoexport", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
roots = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps(sorted(name for name in roots if not name.startswith("_"))), file=sys.stderr)
"""
COMMAND_LINE = {
    "annotated_doc", "annotated_types", "dinoexport", "pydantic", "pydantic_core", "rich", "shellingham", "typer",
    "typing_extensions", "typing_inspection",
}  # fmt: skip


def imported(*arguments: str) -> set[str]:
    """The packages outside Python's own library that a verb imported."""
    ran = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, capture_output=True, text=True)
    return set(json.loads(ran.stderr.splitlines()[-1]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("startup") / "bundle"
    pipeline.export_only(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=out))
    return out


def test_inspect_needs_the_command_line_alone(exported: Path) -> None:
    assert imported("inspect", str(exported)) <= COMMAND_LINE
    assert imported("inspect", str(exported), "--json") <= COMMAND_LINE


def test_list_needs_the_families_as_well() -> None:
    """Their modules work on arrays; nothing of them is asked for pictures, graphs or weights."""
    assert imported("list") <= COMMAND_LINE | {"numpy"}

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
print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""
COMMAND_LINE = {
    "annotated_doc", "annotated_types", "dinoexport", "pydantic", "pydantic_core", "rich", "shellingham", "typer",
    "typing_extensions", "typing_inspection",
}  # fmt: skip


# Parts of dinoexport that no verb needs which only looks or validates.
BUILDERS = ("engines", "graph", "pipeline", "report", "serving", "embed", "bench", "doctor")


def imported(*arguments: str) -> set[str]:
    """The packages outside Python's own library that a verb imported; of dinoexport's own, each part."""
    ran = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, capture_output=True, text=True)
    names = set(json.loads(ran.stderr.splitlines()[-1]))
    roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    parts = {".".join(name.split(".")[:2]) for name in names if name.startswith("dinoexport.")}
    return {name for name in roots if not name.startswith("_")} | parts


def own(found: set[str]) -> set[str]:
    return {name.partition(".")[2] for name in found if name.startswith("dinoexport.")}


def others(found: set[str]) -> set[str]:
    return {name for name in found if not name.startswith("dinoexport.")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("startup") / "bundle"
    pipeline.export_only(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=out))
    return out


def test_inspect_needs_the_command_line_alone(exported: Path) -> None:
    for more in ((), ("--json",)):
        found = imported("inspect", str(exported), *more)
        assert others(found) <= COMMAND_LINE
        assert not own(found) & {*BUILDERS, "models", "validation"}


def test_list_needs_the_families_as_well() -> None:
    """Nothing of them is asked for arrays, pictures, graphs or weights."""
    found = imported("list")
    assert others(found) <= COMMAND_LINE
    assert not own(found) & set(BUILDERS)


def test_validate_needs_its_runtime_as_well(tiny_bundle: Path) -> None:
    """The CPU's bundle of the tests runs in ONNX Runtime; Cython's names are those of NumPy's random numbers."""
    found = imported("validate", str(tiny_bundle))
    assert others(found) <= COMMAND_LINE | {"numpy", "onnxruntime", "cython_runtime"}
    assert not own(found) & set(BUILDERS)

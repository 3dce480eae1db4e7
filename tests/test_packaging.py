"""The wheel as a user gets it: what is in it, and that it works where nothing else is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "data" / "tiny_swiglu.toml"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_contents(wheel: Path) -> None:
    """The package with its recipes and validations inside it, and no other top-level name."""
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    assert top == {"dinoexport", f"{wheel.name.split('-py3')[0]}.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dinoexport").rglob("*.py")}
    data = {
        f"dinoexport/shipped_data/{path.relative_to(ROOT).as_posix()}"
        for folder in ("recipes", "validate")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    others = {
        "dinoexport/py.typed",
        "dinoexport/graph/shipped_traces.zip",
        *(f"dinoexport/report/templates/{name}.html.jinja" for name in ("report", "mismatches")),
    }
    assert {name for name in names if name.startswith("dinoexport/")} == modules | data | others
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow("installs the wheel and its dependencies, torch among them, in a new environment, and builds there")
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With the serving extra alone a bundle validates; with the export extra it is built. Versions are CI's."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    binary = environment / "bin"

    def install(extras: str) -> None:
        install = [sys.executable, ROOT / "scripts" / "install_packages.py", "--python", binary / "python"]
        wanted = ["--constraint", ROOT / "constraints.txt", f"{wheel}[{extras}]"]
        subprocess.run([*install, *wanted], check=True)

    def dinoexport(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binary / "dinoexport", *args],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"HOME": str(tmp_path)},
        )

    install("cpu")
    without = dinoexport("build", str(TINY), "--weights", "synthetic:0")
    assert without.returncode == 4 and "dinoexport[export]" in without.stderr, without.stderr
    made_here = [
        sys.executable,
        "-m",
        "dinoexport",
        "build",
        TINY,
        "--weights",
        "synthetic:0",
        "--out",
        tmp_path / "here",
    ]
    subprocess.run(made_here, check=True, capture_output=True)
    validated = dinoexport("validate", "here", "--json")
    assert validated.returncode == 0 and json.loads(validated.stdout)["report"]["passed"], validated.stderr
    assert len(json.loads(dinoexport("list", "--json").stdout)["variants"]) == len(
        list((ROOT / "recipes").glob("*.toml"))
    )

    install("export,cpu")
    built = dinoexport("build", str(TINY), "--weights", "synthetic:0", "--out", "there", "--json")
    assert built.returncode == 0 and json.loads(built.stdout)["verdict"] == "passed", built.stderr
    assert (tmp_path / "there" / "model.onnx").read_bytes() == (tmp_path / "here" / "model.onnx").read_bytes()

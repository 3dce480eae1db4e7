"""NVIDIA's bindings of every version in `tensorrt_versions.txt`, as `make .tensorrt-bindings/.ready` fetched them.

The wheels hold the bindings alone; what they link is made here from `fake_nvinfer.cpp`. `python -m
tests.standin.bindings` writes the table of facts anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.standin import facts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FETCHED = ROOT / ".tensorrt-bindings"
TABLE = ROOT / "tests" / "data" / "tensorrt_facts.json"
VERSIONS = tuple(line.rpartition("==")[2] for line in (HERE / "tensorrt_versions.txt").read_text().split())
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def missing() -> str:
    """Why the bindings cannot be loaded here; empty when they can."""
    if shutil.which("g++") is None:
        return "no C++ compiler here"
    absent = [version for version in VERSIONS if not (FETCHED / version / "tensorrt_bindings").is_dir()]
    return f"TensorRT's bindings {absent[0]} were not fetched: make .tensorrt-bindings/.ready" if absent else ""


def library() -> Path:
    """The fake library, compiled when its source is newer, under all the names the bindings look for."""
    source, made = HERE / "fake_nvinfer.cpp", FETCHED / "lib" / "libfake.so"
    if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_name(f"{os.getpid()}.partial")
        subprocess.run(["g++", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", partial, source], check=True)
        for major in {version.partition(".")[0] for version in VERSIONS}:
            for name in _LIBRARIES:
                link = made.with_name(f"lib{name}.so.{major}")
                link.unlink(missing_ok=True)
                link.symlink_to(made.name)
        partial.replace(made)
    return made


def environment(version: str) -> dict[str, str]:
    """What a process needs to import the bindings of that version as `tensorrt`."""
    made = library()
    path = (HERE / "driven_path", FETCHED / version, ROOT)
    return {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "LD_LIBRARY_PATH": str(made.parent),
        "DINOEXPORT_FAKE_NVINFER": str(made),
    }


def facts_of(version: str) -> dict[str, Any]:
    """What the bindings of that version offer; `rtx` is the TensorRT-RTX that is installed."""
    module, changes = ("tensorrt_rtx", {}) if version == "rtx" else ("tensorrt_bindings", environment(version))
    command = [sys.executable, str(HERE / "facts.py"), module]
    shown = subprocess.run(command, env={**os.environ, **changes}, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def main() -> None:
    """Writes the table of all versions' facts, one member a line."""
    import tensorrt_rtx

    found = {version: facts_of(version) for version in VERSIONS}
    found[f"rtx-{tensorrt_rtx.__version__}"] = facts_of("rtx")
    table = facts.merged(found)
    lines = [f'{{"versions": {json.dumps(table["versions"])}, "classes": {{']
    for kind, members in table["classes"].items():
        rows = [f"  {json.dumps(name)}: {json.dumps(said)}" for name, said in members.items()]
        lines.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(rows) + "\n }" + ",")
    lines[-1] = lines[-1].removesuffix(",")
    TABLE.write_text("\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()

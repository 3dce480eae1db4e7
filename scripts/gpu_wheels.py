"""`python -m scripts.gpu_wheels`: the wheels that a GPU run needs, listed and fetched for a machine without a network.

They are for the Python that is named and x86-64 Linux, whatever this machine is. --list only asks the index.
On the machine with the GPU: pip install --no-index --find-links FOLDER --requirement benchmarks/gpu-requirements.txt
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "benchmarks" / "gpu-requirements.txt"
# Newest first: pip takes a wheel for any of these.
PLATFORMS = ("manylinux_2_35_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def command(verb: Sequence[str], python: str) -> list[str]:
    """Pip's words for wheels of another Python and this architecture; sources are never built."""
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", *verb, "--only-binary=:all:"]
    words += ["--python-version", python, "--implementation", "cp"]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    return [*words, "--requirement", str(REQUIREMENTS)]


def listed(report: Any) -> list[tuple[str, str, str]]:
    """(name, version, address) of each wheel in pip's report, by name."""
    found = [(e["metadata"]["name"], e["metadata"]["version"], e["download_info"]["url"]) for e in report["install"]]
    return sorted(found, key=lambda each: each[0].lower())


def _run(words: Sequence[str], stdout: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs pip, which says on stderr what it did not find; ends with its status then."""
    ran = subprocess.run(words, check=False, stdout=stdout)
    if ran.returncode:
        print(f"pip found not every wheel of {REQUIREMENTS.name}.", file=sys.stderr)
        print("TensorRT's are at https://pypi.nvidia.com, which this machine must reach.", file=sys.stderr)
        sys.exit(ran.returncode)
    return ran


def main() -> None:
    """Lists the wheels, and fetches them unless it was asked for the list alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="fetch nothing")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--python", default="3.11", help="of the machine with the GPU")
    wanted = parser.parse_args()
    if wanted.list:
        verb = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "--target", str(wanted.to))
        shown = _run(command(verb, wanted.python), stdout=subprocess.PIPE)
        for name, version, address in listed(json.loads(shown.stdout)):
            print(f"{name}=={version}  {address}")
        return
    _run(command(("download", "--dest", str(wanted.to)), wanted.python))
    wheels = sorted(wanted.to.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:9.1f} MB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 1e9:9.2f} GB in {wanted.to}")


if __name__ == "__main__":
    main()

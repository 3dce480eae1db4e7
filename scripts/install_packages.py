"""Install packages with uv, as pip on this machine would: `install_packages.py ARGUMENTS`, those of `uv pip install`.

uv unpacks many times faster than pip, and an environment made later links what an earlier one downloaded. It does not
read pip's configuration, so a mirror, a folder of wheels or constraints that are set there are passed on. uv itself is
a wheel of the package index, kept in `.uv`; it asks that index only.
"""

from __future__ import annotations

import ast
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".uv"
VERSION = "0.13.8"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# pip's setting -> uv's argument, once for each of its values. The index that pip uses is uv's last.
SETTINGS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}


def settings(listed: str) -> dict[str, str]:
    """What `pip config list` printed, by name. The environment comes before a command's own settings and the global."""
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", listed, re.MULTILINE):
            found[name] = str(ast.literal_eval(value))
    return found


def arguments(found: Mapping[str, str]) -> list[str]:
    """The same for uv, which takes the best version of all indexes, as pip does."""
    given = [
        word for name, option in SETTINGS.items() for value in found.get(name, "").split() for word in (option, value)
    ]
    if found.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        given.append("--no-index")
    return [*given, "--index-strategy", "unsafe-best-match"]


def uv() -> Path:
    """The program, installed by pip when it is first asked for."""
    program = HOME / VERSION / "bin" / "uv"
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            subprocess.run([*PIP, "install", "--quiet", "--target", HOME / VERSION, f"uv=={VERSION}"], check=True)
    return program


def main(wanted: Sequence[str]) -> None:
    """Replaces this process by uv's."""
    listed = subprocess.run([*PIP, "config", "list"], check=True, capture_output=True, text=True).stdout
    found = settings(listed)
    environment = {"SSL_CERT_FILE": found["cert"]} if "cert" in found else {}
    program = uv()
    # A hash pins more than a constraint, and uv takes only exact versions beside hashes.
    passed = {name: value for name, value in found.items() if name != "constraint" or "--require-hashes" not in wanted}
    words = [str(program), "pip", "install", "--quiet", *arguments(passed), *wanted]
    os.execve(program, words, environment | os.environ)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])

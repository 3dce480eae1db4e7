"""No verb sends or stores anything about its use: seen from the kernel, where a library's own sockets show too."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import dinoexport
from dinoexport import family
from dinoexport.bundle import reference_file  # noqa: F401  (what a served model's client loads)
from dinoexport.config import recipe
from dinoexport.pipeline import build as pipeline
from tests import llama_files
from tests.conftest import DATA
from tests.text import tiny

TINY, TEXT = str(DATA / "tiny_swiglu.toml"), str(DATA / "tiny_text.toml")
pytestmark = pytest.mark.traced
PACKAGE = Path(dinoexport.__file__).parent
# What asks for the opposite: the switches are ours, whatever the environment says.
EAGER = {"ORT_DISABLE_TELEMETRY": "0", "CI": "", "OPENVINO_TELEMETRY": "1"}
_NETWORK = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(connect|sendto|sendmsg|sendmmsg)\(.*sa_family=AF_INET")
_RESOLVER = re.compile(r'open(?:at)?\(.*"(/etc/resolv\.conf|/etc/hosts)"')


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the verbs run, with what some of them read: images in two classes, and a text model."""
    folder = tmp_path_factory.mktemp("place")
    photographs = sorted((DATA.parents[1] / "validate" / "images").glob("*.[jp][pn]g"))[:2]
    for photograph in photographs:
        (folder / "classes" / photograph.stem).mkdir(parents=True)
        with Image.open(photograph) as image:
            for i in range(12):
                image.convert("RGB").crop((20 * i, 10 * i, 20 * i + 100, 10 * i + 100)).save(
                    folder / "classes" / photograph.stem / f"{i}.png"
                )
    arch = family.find("llama").model(recipe.load(TEXT)).arch
    weights = llama_files.write_hf(folder / "weights", arch, seed=5)
    tiny.tokenizer_json(weights)
    pipeline.build(pipeline.build_request(TEXT, weights=str(weights), target="cpu", out=folder / "text"))
    return folder


@cache
def own_network() -> tuple[str, ...]:
    """What gives a program a network namespace without a network, where users may have one."""
    prefix = ("unshare", "--user", "--map-root-user", "--net", "--")
    allowed = (
        shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    )
    return prefix if allowed else ()


def traced(arguments: Sequence[str], home: Path, place: Path) -> tuple[int, str, list[str]]:
    """(exit code, words, what it did that it must not) of a program whose system calls are watched."""
    log = place / "trace"
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(PACKAGE.parent), **EAGER}
    ran = subprocess.run(
        [
            *own_network(),
            *("strace", "--follow-forks", "--seccomp-bpf", "--quiet=all", "--signal=none", "-o", str(log)),
            *("-e", "trace=connect,sendto,sendmsg,sendmmsg,open,openat"),
            *(sys.executable, *arguments),
        ],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = log.read_text(errors="replace").splitlines()
    wrong = [line for line in lines if _NETWORK.match(line) or (_RESOLVER.search(line) and "= -1" not in line)]
    return ran.returncode, ran.stdout + ran.stderr, wrong


VERBS = {
    "list": ("list",),
    "doctor": ("doctor",),
    "schema": ("schema",),
    "build": ("build", TINY, "--weights", "synthetic:0", "--out", "bundle", "--precision", "fp32"),
    "validate": ("validate", "bundle"),
    "inspect": ("inspect", "bundle"),
    "report": ("report", "bundle"),
    "diff": ("diff", "bundle", "bundle"),
    "bench": ("bench", "bundle", "--size", "28x42"),
    "deploy": ("deploy", "bundle", "--to", "models"),
    "check": ("check", "http://127.0.0.1:9", "bundle", "--timeout-s", "1"),
    "rollback": ("rollback", "models", "tiny_swiglu"),
    "export": ("export", TINY, "--weights", "synthetic:0", "--out", "exported"),
    "embed": ("embed", "bundle", "--images", "classes", "--out", "embedded"),
    "fit": ("fit", "bundle", "--images", "classes", "--out", "fitted"),
    "compile": ("compile", "bundle", "--target", "a100", "--runtime", "tensorrt_rtx", "--out", "compiled"),
    "merge": ("merge", "compiled", "compiled", "--out", "merged"),
    "push": ("push", "bundle", "127.0.0.1:9/tiny:v1", "--plain-http"),
    "pull": ("pull", "127.0.0.1:9/tiny:v1", "--out", "pulled", "--plain-http"),
    "generate": ("generate", "text", "hello", "--max-tokens", "2"),
    "openai": ("openai", "http://127.0.0.1:9", "--port", "0", "--timeout-s", "1"),
}  # fmt: skip
# One machine's engines twice, an old release and a server at a port that nobody listens at: refused after the work.
CODES = {"check": 4, "rollback": 2, "merge": 2, "openai": 4, "push": 4, "pull": 4}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_sends_and_stores_nothing(home: Path, place: Path, verb: str) -> None:
    code, words, wrong = traced(["-m", "dinoexport", *VERBS[verb]], home, place)
    assert code == CODES.get(verb, 0), words
    if verb in ("check", "openai", "push", "pull"):  # it asks the server it was given, and nobody else
        wrong = [line for line in wrong if 'sin_port=htons(9), sin_addr=inet_addr("127.0.0.1")' not in line]
    assert not wrong, wrong[:3]
    assert set(_files(home)) <= {".cache/dinoexport"}, "only our own cache may be in the home folder"


def _files(home: Path) -> Iterator[str]:
    for path in home.rglob("*"):
        if path.is_file():
            yield "/".join(path.relative_to(home).parts[:2])


def test_every_verb_is_run() -> None:
    from dinoexport.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names <= set(VERBS), "a verb that nobody watched"


def test_the_trace_would_see_it(home: Path, place: Path) -> None:
    """The check itself can fail: a name looked up, and a library that sends what we switch off."""
    code = "import socket\ntry: socket.getaddrinfo('example.com', 80)\nexcept OSError: pass"
    assert traced(["-c", code], home, place)[2]
    if shutil.which("strace"):
        code = "import onnxruntime as o, time; o.get_available_providers(); time.sleep(0.5)"
        traced(["-c", code], home, place)
        sent = list(home.rglob("deviceid"))
        if sent:  # a wheel without telemetry has nothing to find
            shutil.rmtree(home / ".cache" / "Microsoft")


def test_a_program_that_serves_or_asks_sends_nothing(home: Path, place: Path) -> None:
    """What a server's model and a client load: both runtimes, opened and run."""
    code = (
        "from dinoexport.runtime import openvino, ort, telemetry\n"
        "from dinoexport.serving.triton import backend\n"
        "from dinoexport.serving.client import DinoClient\n"
        "telemetry.onnxruntime(); telemetry.openvino()\n"
        "from dinoexport.spec import Precision\n"
        "print(openvino.computes(Precision.FP32), ort.version())\n"
        "from openvino.tools import ovc\n"
        "assert 'stub' in ovc.telemetry_utils.tm.__name__, ovc.telemetry_utils.tm\n"
        "import time; time.sleep(0.5)\n"
    )
    status, words, wrong = traced(["-c", code], home, place)
    assert status == 0, words
    assert not wrong and not list(home.rglob("*Microsoft*")) and not (home / "intel").exists()


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_only_one_place_loads_what_has_telemetry(package: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == package for name in names):
                switched = path.name == "telemetry.py" or f"telemetry.{package}()" in text
                assert switched, f"{path} loads {package} with its telemetry on"


def test_doctor_says_so(home: Path, place: Path) -> None:
    _, words, _ = traced(["-m", "dinoexport", "doctor"], home, place)
    assert "privacy of onnxruntime" in words and "telemetry off" in words

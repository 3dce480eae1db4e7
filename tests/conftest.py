"""What all tests share: where the data is, hypothesis profiles, and a cache of each test's own."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import settings

from dinoexport import bundle
from dinoexport.graph import traces
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import autotune, ort, telemetry
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import hardware
from tests import properties, triton_server
from tests.standin import bindings
from tests.text import vocabulary

# CI repeats the same examples every time, so that a red run is about the change; everywhere else new ones are sought.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("seek", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "seek")
settings.register_profile("quick", settings(), max_examples=properties.FULL // 5)
# As on the command line: PyTorch's threads do not spin against those of the test beside. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DATA = Path(__file__).parent / "data"
# A shell's background jobs are born deaf to Ctrl-C, and so are their children: what follows these words is not.
HEARING_SIGINT = ("env", "--default-signal=INT")


# Files that wait for a server, or whose processes are watched, take minutes though few of their tests are marked slow.
LONG = frozenset({"slow", "triton", "traced"})
# Files that fork come before all others: a forked process may not survive the threads of gRPC and of servers' clients.
FORKING = ("every_moment", "dies_at")
# The files of this folder share one tritonserver, which takes ten seconds to start with its models.
ONE_SERVER = "tests/serving/triton/real_server/"
# What --quick leaves out besides long work: servers, browsers, devices, whole vocabularies, and what is marked slow.
NOT_QUICK = frozenset({"slow", "triton", "browser", "traced", "gpu", "tensorrt", "vocabulary"})


class _Refusing:
    """Skips the test that imports a package whose models are other people's and take seconds to load."""

    def find_spec(self, name: str, *_: object) -> None:
        if name in ("transformers", "timm"):
            pytest.skip(f"loads {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        metavar="MARKER",
        help="Fail, instead of skipping, the tests with this marker when what they need is missing here.",
    )
    parser.addoption(
        "--on-gpu",
        action="store_true",
        help="ONNX Runtime runs every graph on this machine's GPU, in place of the CPU.",
    )
    parser.addoption(
        "--quick", action="store_true", help="Leave out the tests marked slow, and those that run a model or a process."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported, whose decorators read the profile."""
    if config.getoption("--quick"):
        settings.load_profile("quick")


def _unit(node: str) -> str:
    """What one worker runs whole, for the id of a test: its file, or the folder whose files share a server."""
    return ONE_SERVER if node.startswith(ONE_SERVER) else node.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that fork come first, then those with long tests, then those with most: no worker ends with a long file."""
    weights: dict[str, tuple[bool, bool, int]] = {}
    for item in items:
        forks, long, count = weights.get(_unit(item.nodeid), (False, False, 0))
        forks = forks or any(hasattr(item.module, name) for name in FORKING)
        long = long or any(mark.name in LONG for mark in item.iter_markers())
        weights[_unit(item.nodeid)] = (forks, long, count + 1)
    items.sort(key=lambda item: weights[_unit(item.nodeid)], reverse=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As --dist loadfile, but for the files that share a server."""
    from xdist.scheduler import LoadFileScheduling

    class ByUnit(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    return ByUnit(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection() -> None:
    """The tests and the modules they import stay: the garbage collector need not walk them again and again."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def chromium() -> str | None:
    """The machine's own Chromium, where it has one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def _missing(marker: str) -> str:
    """Why tests with this marker cannot run on this machine; empty when they can."""
    if marker in ("gpu", "tensorrt") and not hardware.gpus():
        return "no NVIDIA GPU here"
    if marker == "tensorrt" and hardware.installed_engine_runtime(Runtime.TENSORRT) is None:
        return "tensorrt is not installed"
    if marker == "bindings":
        return bindings.missing()
    if marker == "browser" and chromium() is None:
        return "no Chromium on this machine"
    if marker == "traced":
        return _cannot_trace()
    if marker == "triton":
        return triton_server.missing()
    if marker == "vocabulary" and not vocabulary.ARCHIVE.is_file():
        return f"no Llama 2 vocabulary: make puts it in {vocabulary.FOLDER.name} where npm can be had"
    return ""


@cache
def _cannot_trace() -> str:
    """Why no program's system calls can be traced."""
    if not shutil.which("strace"):
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"strace traces nothing here: {tried.stderr.strip()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--quick"):
        for mark in item.iter_markers():
            if mark.name in NOT_QUICK:
                pytest.skip(f"{mark.name}: {mark.args[0] if mark.args else 'needs more than Python'}")
    for mark in item.iter_markers():
        if reason := _missing(mark.name):
            if mark.name in item.config.getoption("--require"):
                pytest.fail(f"--require {mark.name}: {reason}", pytrace=False)
            pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def _quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --quick, a test that begins long work is skipped there, so no list of such tests is kept.

    Long work is a build, a trace, a model in a runtime, in PyTorch or of another library, and another process.
    """
    if not request.config.getoption("--quick"):
        yield
        return
    import torch

    from dinoexport.graph import tracer

    def skipping(reason: str) -> Callable[..., None]:
        return lambda *_, **__: pytest.skip(reason)

    begin, ours = subprocess.Popen.__init__, str(Path(sys.executable).parent)

    def starting(process: Any, command: Any, *others: Any, **settings: Any) -> None:
        if any(ours in str(part) for part in ([command] if isinstance(command, str) else command)):
            pytest.skip("starts a process of Python")
        begin(process, command, *others, **settings)

    functional = torch.nn.functional
    with pytest.MonkeyPatch.context() as patch:
        for place, name, reason in (
            (pipeline, "build", "needs a whole build"),
            (pipeline, "export_only", "needs a whole build"),
            (tracer, "_as_taken", "traces a model"),
            (torch.export, "export", "traces a model"),
            (os, "fork", "starts a process of Python"),
            (telemetry, "onnxruntime", "opens a runtime"),
            (telemetry, "openvino", "opens a runtime"),
            (functional, "linear", "runs a model in PyTorch"),
            (functional, "scaled_dot_product_attention", "runs a model in PyTorch"),
        ):
            patch.setattr(place, name, skipping(reason))
        patch.setattr(subprocess.Popen, "__init__", starting)
        patch.setattr(sys, "meta_path", [_Refusing(), *sys.meta_path])
        # jsonschema checks formats of addresses by it, which sbom's test in `make test` does; its parsers take 4 s.
        patch.setitem(sys.modules, "rfc3987_syntax", None)
        yield


@pytest.fixture(autouse=True)
def _no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sees a GPU only if it says so: the same tests on every machine."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(hardware, "gpus", lambda: ())


@pytest.fixture(autouse=True, scope="session")
def _on_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --on-gpu the official numbers, and all else that a graph's outputs are compared with, judge the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--on-gpu"):
            patch.setattr(ort, "open_graph", functools.partial(ort.open_graph, cuda=True))
        yield


@pytest.fixture(scope="session")
def all_traces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that all workers of a run share: each piece is traced once, by whoever needs it first.

    A trace is found by all that it depends on (`dinoexport/graph/traces.py`): a changed piece is traced anew, but not
    one that a test changes in memory, whose export is given `tracer.trace`.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "all_traces"
    (folder / "traces").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory, all_traces: Path) -> Iterator[None]:
    """What a module's fixtures build fills no user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINOEXPORT_CACHE", str(tmp_path_factory.mktemp("session_cache")))
        patch.setattr(traces, "cache_folder", lambda: all_traces)
        yield


@pytest.fixture(scope="session")
def _empty_cache(tmp_path_factory: pytest.TempPathFactory, all_traces: Path) -> Callable[[], Path]:
    """A cache folder with nothing but the shared traces: the last one, unless a test wrote to it.

    Most tests write nothing there, and making a folder and a link takes longer than many of them.
    """
    folders: list[Path] = []

    def empty() -> Path:
        if not folders or [path.name for path in folders[-1].iterdir()] != ["traces"]:
            folders.append(tmp_path_factory.mktemp("cache"))
            (folders[-1] / "traces").symlink_to(all_traces / "traces")
        return folders[-1]

    return empty


@pytest.fixture(autouse=True)
def _own_cache(_empty_cache: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache; what other processes of a test trace is shared too."""
    monkeypatch.setenv("DINOEXPORT_CACHE", str(_empty_cache()))


@pytest.fixture(autouse=True, scope="session")
def _one_command_line() -> Iterator[None]:
    """Typer makes its commands of our functions once, as in a process of a user, and not for each call of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_runtime() -> Iterator[None]:
    """Nothing is chosen by the clock, not even for a whole module's bundle: with one runtime there is no choice.

    Tests of the choice take this back.
    """
    with pytest.MonkeyPatch.context() as patch:
        for precision in (Precision.FP32, Precision.INT8):
            patch.setitem(autotune.RUNTIMES, precision, ("onnxruntime",))
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, _one_runtime: None) -> Path:
    """A small bundle that passed, built once for all tests that only read one: copy it to change it."""
    out = tmp_path_factory.mktemp("tiny") / "tiny"
    pipeline.build(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=out))
    return out


def as_if_chosen(built: Path, copy: Path, way: Way) -> Path:
    """A copy of a CPU's bundle that says it ran best in `way`."""
    manifest = bundle.read_manifest(built)
    assert manifest.cpu is not None
    shutil.copytree(built, copy)
    changed = manifest.model_copy(update={"cpu": manifest.cpu.model_copy(update={"chosen": way})})
    (copy / bundle.MANIFEST).write_bytes(changed.to_bytes())
    return copy

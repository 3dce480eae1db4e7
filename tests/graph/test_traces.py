"""Kept traces: found by all they depend on, taken only as they were kept, and those of the package are up to date."""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoexport.family import Example, Piece
from dinoexport.graph import tracer, traces
from dinoexport.system import cache, files, hardware
from scripts.traces import VARIANTS, pieces
from tests.conftest import DATA

GRAPH = """
from typing import TYPE_CHECKING
from {package}.numbers import SIDE
if TYPE_CHECKING:
    import pandas
    from {package}.unread import Anything
class Module:
    '''{comment}'''
"""


@pytest.fixture(autouse=True)
def _own_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests share no traces with others."""
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(traces, "cache_folder", cache.cache_folder)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A family's package: what is traced, what that imports, and what it does not."""
    folder = tmp_path / f"family_{os.urandom(4).hex()}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "graph.py").write_text(GRAPH.format(package=folder.name, comment="one"))
    (folder / "numbers.py").write_text("SIDE = 37\n")
    (folder / "unread.py").write_text("Anything = int\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    traces._sources.cache_clear()
    traces._versions.cache_clear()


def piece_of(package: Path, **changes: Any) -> Piece:
    piece = Piece(
        name="block",
        code=f"{package.name}.graph:Module",
        arguments={"dim": 8, "activation": "gelu", "sizes": (1, 2), "scale": None},
        example_inputs={"tokens": Example(dtype="float32", shape=(2, 5, 8))},
        dynamic={"tokens": {0: "batch", 1: "tokens"}},
        least_sizes={"tokens": 2},
    )
    return replace(piece, **changes)


def key_of(piece: Piece) -> str | None:
    _forget()
    return traces.key_of(piece)


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": {"dim": 9, "activation": "gelu", "sizes": (1, 2), "scale": None}},
        {"arguments": {"dim": 8, "activation": "gelu", "sizes": (1, 2)}},
        {"arguments": {"dim": 8.5, "activation": "gelu", "sizes": (1, 2), "scale": None}},
        {"example_inputs": {"tokens": Example(dtype="float16", shape=(2, 5, 8))}},
        {"example_inputs": {"tokens": Example(dtype="float32", shape=(2, 6, 8))}},
        {"example_inputs": {"pixels": Example(dtype="float32", shape=(2, 5, 8))}},
        {"dynamic": {"tokens": {0: "batch", 1: "patches"}}},
        {"dynamic": {"tokens": {0: "batch"}}},
        {"least_sizes": {}},
        {"opset": 23},
    ],
    ids=str,
)
def test_every_fact_of_a_piece_is_in_its_key(package: Path, change: dict[str, Any]) -> None:
    assert key_of(piece_of(package)) is not None
    assert key_of(piece_of(package, **change)) != key_of(piece_of(package))


def test_the_order_of_inputs_matters_and_a_name_does_not(package: Path) -> None:
    two = {"a": Example(dtype="float32", shape=(2,)), "b": Example(dtype="float32", shape=(2,))}
    assert key_of(piece_of(package, example_inputs=two)) != key_of(
        piece_of(package, example_inputs=dict(reversed(two.items())))
    )
    assert key_of(piece_of(package, name="another")) == key_of(piece_of(package))


@pytest.mark.parametrize("file", ["graph.py", "numbers.py", "unread.py", "__init__.py"])
def test_the_code_that_a_trace_depends_on_is_in_the_key(package: Path, file: str) -> None:
    """What the traced module imports, and nothing that only type checkers read."""
    before = key_of(piece_of(package))
    (package / file).write_text((package / file).read_text() + "CHANGED = 1\n")
    assert (key_of(piece_of(package)) != before) == (file in ("graph.py", "numbers.py"))


def test_the_order_of_arguments_does_not_matter(package: Path) -> None:
    arguments = piece_of(package).arguments
    other = dict(reversed(arguments.items()))
    assert list(other) != list(arguments) and key_of(piece_of(package, arguments=other)) == key_of(piece_of(package))


def test_any_release_of_a_python_traces_alike() -> None:
    _forget()
    assert traces._versions()["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_what_follows_a_docstring_is_code() -> None:
    codes = [traces._code(ast.parse(text)) for text in ('"""a"""\nx = 1', '"""b"""\nx = 1', "x = 1", '"""a"""\nx = 2')]
    assert codes[0] == codes[1] == codes[2] != codes[3]


@pytest.mark.parametrize("more", [0, 1])
def test_a_kept_trace_has_at_most_four_mebibytes(more: int) -> None:
    """With 82 bytes before its content."""
    content = bytes(2**22 - 82 + more)
    traces._keep("0" * 64, content)
    path = traces._place("0" * 64)
    assert path.stat().st_size == 2**22 + more
    assert traces._cached("0" * 64) == (None if more else content)
    path.unlink()


def test_words_may_change(package: Path) -> None:
    before = key_of(piece_of(package))
    (package / "graph.py").write_text("# A comment.\n" + GRAPH.format(package=package.name, comment="another"))
    assert key_of(piece_of(package)) == before is not None


@pytest.mark.parametrize("name", ["torch", "onnx", "onnx-ir", "onnxscript", "numpy"])
def test_versions_are_in_the_key(package: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before, original = key_of(piece_of(package)), hardware.installed

    def as_if(version: str | None) -> str | None:
        monkeypatch.setattr(hardware, "installed", lambda n: version if n == name else original(n))
        return key_of(piece_of(package))

    assert as_if("99.1") not in (before, None)
    assert as_if("99.1+cu130") == as_if("99.1+cpu") == as_if("99.1")
    assert as_if("99.1+mine") != as_if("99.1")
    assert as_if(None) is None


@pytest.mark.parametrize(
    "line",
    [
        "import pandas",
        "from pandas import DataFrame",
        "from . import numbers",
        "from importlib import import_module; import_module('pandas')",
        "eval('1')",
    ],
)
def test_code_that_may_depend_on_anything_is_traced_every_time(package: Path, line: str) -> None:
    (package / "numbers.py").write_text(f"{line}\nSIDE = 37\n")
    assert key_of(piece_of(package)) is None


@pytest.mark.parametrize("code", ["nowhere.graph:Module", "nowhere:Module", "sys:Module", "tests.data:Module"])
def test_code_without_a_file_is_traced_every_time(package: Path, code: str) -> None:
    assert key_of(piece_of(package, code=code)) is None


def test_what_a_family_of_its_own_uses_of_ours_is_in_the_key(package: Path) -> None:
    (package / "numbers.py").write_text("from dinoexport.spec import Precision\nSIDE = 37\n")
    piece = piece_of(package)
    assert key_of(piece) is not None
    assert "dinoexport.spec" in dict(traces._sources(f"{package.name}.graph"))


def test_arguments_that_are_no_plain_data_are_traced_every_time(package: Path) -> None:
    piece, made = piece_of(package, arguments={"anything": object()}), []
    for _ in range(2):
        assert traces.of(piece, trace=lambda p: made.append(p) or b"trace") == b"trace"
    assert len(made) == 2


class Tracer:
    """Counts what it is asked for, and never gives the same twice."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, _piece: Piece) -> bytes:
        self.asked += 1
        return f"trace {self.asked}".encode()


def test_a_trace_is_made_once_and_with_force_again(package: Path) -> None:
    trace, piece = Tracer(), piece_of(package)
    assert [traces.of(piece, trace=trace) for _ in range(3)] == [b"trace 1"] * 3
    assert traces.of(piece, fresh=True, trace=trace) == b"trace 2"
    assert traces.of(piece, trace=trace) == b"trace 2"


@pytest.mark.parametrize("known", [True, False])
def test_no_module_is_left_after_a_trace(package: Path, known: bool) -> None:
    """The weights of a block of Code Llama 34B would be held until the export ends."""
    piece = piece_of(package) if known else piece_of(package, arguments={"width": object})
    assert (traces.key_of(piece) is not None) is known
    left = []

    def trace(piece: Piece) -> bytes:
        module = torch.nn.Linear(1, 1)
        vars(piece)["module"] = module  # as the cached property keeps it
        module.forward_again = module.forward  # a circle, as PyTorch's exporter leaves one
        left.append(weakref.ref(module))
        return b"a trace"

    assert traces.of(piece, fresh=True, trace=trace) == b"a trace"
    assert left[0]() is None and "module" not in vars(piece)


def _another_content(path: Path, _other: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"trace 1", b"trace X"))


def _cut(path: Path, _other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path, _other: Path) -> None:
    path.write_bytes(b"")


def _another_pieces(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def _a_link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def _a_pipe(path: Path, _other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _open_to_all(path: Path, _other: Path) -> None:
    path.chmod(0o666)


def _a_folder(path: Path, _other: Path) -> None:
    path.unlink()
    path.mkdir()


def _too_large(path: Path, _other: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    "spoil",
    [_another_content, _cut, _empty, _another_pieces, _a_link, _a_pipe, _open_to_all, _a_folder, _too_large],
)
def test_what_is_not_as_it_was_kept_is_not_taken(package: Path, spoil: Callable[[Path, Path], None]) -> None:
    trace, piece, other = Tracer(), piece_of(package), piece_of(package, opset=23)
    traces.of(piece, trace=trace), traces.of(other, trace=trace)
    paths = [traces._place(str(traces.key_of(p))) for p in (piece, other)]
    assert trace.asked == 2 and all(path.is_file() for path in paths)
    spoil(*paths)
    assert traces.of(piece, trace=trace) == b"trace 3"


def test_a_cache_that_takes_nothing_stops_nobody(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "file"))
    trace = Tracer()
    assert [traces.of(piece_of(package), trace=trace) for _ in range(2)] == [b"trace 1", b"trace 2"]


# Those of the package


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_package_holds_the_traces_it_should(variant: str) -> None:
    """A key covers the code, so this also fails when what is traced has changed and `make traces` was not run."""
    missing = [piece.name for piece in pieces(variant) if traces.key_of(piece) not in traces.shipped_keys()]
    assert not missing, "run make traces"


def test_the_packages_traces_are_what_is_traced_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one variant and one of its heads here; `python -m scripts.traces --check` compares all."""

    def unexpected(_piece: Piece) -> bytes:
        raise AssertionError("it is not in the package")

    found = list(pieces("vits14_reg"))
    for piece in (*found[:3], found[-1]):
        assert traces.of(piece, trace=unexpected) == tracer.trace(piece), piece.name


def test_a_damaged_package_costs_a_trace(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = piece_of(package)
    content = traces.packed([piece], lambda _p: b"shipped")
    for i, (written, expected) in enumerate(
        [
            (content, b"shipped"),
            (content[:-30], b"trace 1"),
            (b"", b"trace 1"),
            (_with_another_content(content), b"trace 1"),
        ]
    ):
        (tmp_path / f"{i}.zip").write_bytes(written)
        monkeypatch.setattr(traces, "SHIPPED", tmp_path / f"{i}.zip")
        monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / f"cache{i}"))
        traces._index.cache_clear()
        assert traces.of(piece, trace=Tracer()) == expected
    traces._index.cache_clear()


def test_the_package_s_index_can_be_read_and_compared(package: Path) -> None:
    """A key a line, sorted; pieces that are the same are traced once, and their traces come in the order of hashes."""
    pieces = [piece_of(package, opset=opset, name=f"{opset}") for opset in (21, 22, 23, 21)]
    names: list[str] = []
    raw = traces.packed(pieces, lambda piece: names.append(piece.name) or piece.name.encode())
    assert names == ["21", "22", "23"] and raw == traces.packed(pieces, lambda piece: piece.name.encode())
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    keys = {traces.key_of(piece): hashes[piece.name] for piece in pieces[:3]}
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.namelist() == ["index.json", *sorted(hashes.values())]
        lines = archive.read("index.json").decode().splitlines()
        assert all(archive.read(hashes[name]) == name.encode() for name in names)
    assert lines[0] == "{" and lines[-1] == "}"
    assert [line.rstrip(",") for line in lines[1:-1]] == [
        f' "{key}": "{digest}"' for key, digest in sorted(keys.items())
    ]


def _with_another_content(content: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, "w") as changed:
        for entry in source.infolist():
            changed.writestr(entry.filename, source.read(entry) if entry.filename == "index.json" else b"another")
    return made.getvalue()


# An export


EXPORT = """
import json, sys
from pathlib import Path
from dinoexport.pipeline import build as pipeline
variant, weights, out, force = sys.argv[1:]
request = pipeline.build_request(variant, weights=weights, target="cpu", out=Path(out))
pipeline.export_only(request, force=force == "force")
heavy = {"torch", "onnx_ir", "onnxscript", "sympy", "onnxruntime", "openvino", "transformers", "sklearn", "safetensors"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""


def test_an_export_with_kept_traces_needs_no_torch_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """The first traces, the second finds what that kept, the third is forced to trace again."""
    recipe_path, seen, made = str(DATA / "tiny_swiglu.toml"), [], []
    for out, force in (("traced", ""), ("kept", ""), ("forced", "force")):
        ran = subprocess.run(
            [sys.executable, "-c", EXPORT, recipe_path, "synthetic:0", str(tmp_path / out), force],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "DINOEXPORT_CACHE": str(tmp_path / "cache")},
        )
        seen.append("torch" in json.loads(ran.stdout))
        made.append([files.sha256(tmp_path / out / name) for name in ("model.onnx", "model.onnx.data")])
        if out == "kept":
            assert json.loads(ran.stdout) == []
    assert seen == [True, False, True]
    assert made[0] == made[1] == made[2]

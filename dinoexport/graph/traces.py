"""Traced pieces that are kept: those of the shipped recipes come with the package, others lie in the user's cache.

A trace depends on no weights, so an export that finds all of its pieces here needs no torch. It is found by the hash of
everything that it does depend on: the code of the piece's class and of all modules of its package that this imports,
the tracer's code, the data the class is made with, and the versions of the packages that trace. If one of these cannot
be determined, as for a package that is not listed here, the piece is traced every time.

A trace in the cache may be damaged, or stored under another piece's name. It is therefore bound to its key by a hash,
and read only from a regular file that belongs to the user and that nobody else may write.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import io
import json
import os
import platform
import re
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dinoexport.family import Piece
from dinoexport.graph import tracer
from dinoexport.system import hardware, untrusted
from dinoexport.system.cache import cache_folder

SHIPPED = Path(__file__).with_name("shipped_traces.zip")
_INDEX = "index.json"
# Whatever changes the content of a trace without changing a key: what is kept, and how.
_FORMAT = 1
_START = b"dinoexport trace\n"
_MAX_BYTES = 1 << 22
# PyTorch's builds of one release give the same trace on all devices.
_BUILD = re.compile(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$")
_VERSIONED = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
# Packages a traced module may import besides its own and Python's: those whose versions are in the key.
_KNOWN = frozenset({"torch", "numpy", "onnx", "onnx_ir", "onnxscript"})


class _Unknown(Exception):
    """It cannot be determined what a trace depends on."""


def of(piece: Piece, *, fresh: bool = False, trace: Callable[[Piece], bytes] = tracer.trace) -> bytes:
    """The piece's trace: a kept one, or one made now, which is kept. fresh: make it even if one is kept."""
    key = key_of(piece)
    if key is None:
        return _traced(piece, trace)
    if not fresh and (found := _shipped(key) or _cached(key)) is not None:
        return found
    content = _traced(piece, trace)
    # A cache that is full or read-only costs the next export its time, and this one nothing.
    with suppress(OSError):
        _keep(key, content)
    return content


def _traced(piece: Piece, trace: Callable[[Piece], bytes]) -> bytes:
    """A new trace, of which no memory is left: placeholder weights of a block of Code Llama 34B are 2.8 GB in fp32."""
    content = trace(replace(piece))  # a copy, whose module goes with it
    gc.collect()  # PyTorch's exporter leaves the module in a circle of references
    return content


def key_of(piece: Piece) -> str | None:
    """The hash of everything the piece's trace depends on; None where that is not known."""
    try:
        described = {
            "format": _FORMAT,
            "code": piece.code,
            "sources": [_sources(place) for place in (piece.code.partition(":")[0], tracer.__name__)],
            "arguments": _plain(piece.arguments),
            "examples": [[name, e.dtype, list(e.shape)] for name, e in piece.example_inputs.items()],
            "dynamic": {name: sorted(axes.items()) for name, axes in piece.dynamic.items()},
            "least_sizes": dict(piece.least_sizes),
            "opset": piece.opset,
            "versions": _versions(),
        }
    except _Unknown:
        return None
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def packed(pieces: Iterable[Piece], trace: Callable[[Piece], bytes] = tracer.trace) -> bytes:
    """The content of `SHIPPED` for these pieces: the same on every run, each trace once."""
    index: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    for piece in pieces:
        key = key_of(piece)
        assert key is not None, piece.name
        if key not in index:
            content = trace(piece)
            index[key] = digest = hashlib.sha256(content).hexdigest()
            contents[digest] = content
    members = {_INDEX: json.dumps(index, indent=1, sort_keys=True).encode(), **dict(sorted(contents.items()))}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, compresslevel=9)
    return made.getvalue()


def shipped_keys() -> frozenset[str]:
    """The keys of the traces that come with the package."""
    return frozenset(_index())


@cache
def _index() -> Mapping[str, str]:
    try:
        with zipfile.ZipFile(SHIPPED) as archive:
            found: Mapping[str, str] = json.loads(archive.read(_INDEX))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return {}
    return found


def _shipped(key: str) -> bytes | None:
    digest = _index().get(key)
    if digest is None:
        return None
    try:
        with zipfile.ZipFile(SHIPPED) as archive:
            content = archive.read(digest)
    except (OSError, KeyError, zipfile.BadZipFile):
        return None
    return content if hashlib.sha256(content).hexdigest() == digest else None


def _cached(key: str) -> bytes | None:
    path = _place(key)
    try:
        found = path.stat(follow_symlinks=False)
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        raw = untrusted.read_bytes(path, max_bytes=_MAX_BYTES, links=False)
    except (OSError, untrusted.Unreadable):
        return None
    start = _START + _seal(key, content := raw[len(_START) + 65 :])
    return content if content and raw == start + content else None


def _keep(key: str, content: bytes) -> None:
    path = _place(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_START + _seal(key, content) + content)
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)  # noqa: PTH108


def _place(key: str) -> Path:
    return cache_folder() / "traces" / key


def _seal(key: str, content: bytes) -> bytes:
    """The hash that binds content to key, and a line's end."""
    return hashlib.sha256(key.encode() + content).hexdigest().encode() + b"\n"


@cache
def _versions() -> Mapping[str, str]:
    found = {package: _BUILD.sub("", hardware.installed(package) or "") for package in _VERSIONED}
    if not all(found.values()):
        raise _Unknown
    # Constants are folded with this machine's arithmetic.
    return found | {"python": ".".join(platform.python_version_tuple()[:2]), "machine": platform.machine()}


def _plain(value: Any) -> Any:
    """Arguments as JSON has them; for any other kind it is not known what they depend on."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    raise _Unknown


@cache
def _sources(module: str) -> tuple[tuple[str, str], ...]:
    """(module, SHA-256 of its code) for a module and all it imports from its own package or ours, by name."""
    roots = frozenset({module.partition(".")[0], __name__.partition(".")[0]})
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        tree = ast.parse(_source(name))
        found[name] = hashlib.sha256(_code(tree).encode()).hexdigest()
        for imported in _imports(tree):
            root = imported.partition(".")[0]
            if root not in roots and root not in sys.stdlib_module_names and root not in _KNOWN:
                raise _Unknown
            if root in roots and _is_module(imported):
                waiting.append(imported)
    return tuple(sorted(found.items()))


def _source(module: str) -> bytes:
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or not (found.origin or "").endswith(".py"):
        raise _Unknown
    return Path(str(found.origin)).read_bytes()


def _is_module(name: str) -> bool:
    """Whether it is a module, and not something inside one."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _code(tree: ast.Module) -> str:
    """The executed code of a module, as this Python writes it: no comments or docstrings, so that words may change."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _imports(tree: ast.Module) -> Iterator[str]:
    """What a module imports, anywhere in it; a name that is taken from a module may be one itself, so both are given.

    What only type checkers read is left out.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise _Unknown
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "import_module", "exec", "eval"):
            raise _Unknown
        waiting += ast.iter_child_nodes(node)

"""Tracing in a thread, beside whatever the caller does; what is traced is tested with the families' own numbers."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import BuildError
from dinoexport.graph import onnx_writer, tracer, weights_file
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.stages import export as export_stage
from dinoexport.system import files
from tests.conformance import export_to
from tests.conftest import DATA


def calls(*names: str) -> Sequence[Any]:
    return [SimpleNamespace(piece=SimpleNamespace(name=name)) for name in names]


def test_pieces_are_traced_once_while_the_caller_goes_on() -> None:
    threads = []

    def trace(piece: Any) -> str:
        threads.append(threading.current_thread())
        return f"the graph of {piece.name}"

    with onnx_writer.tracing(lambda: calls("stem", "block", "block", "head"), trace=trace) as traced:
        assert traced() == {name: f"the graph of {name}" for name in ("stem", "block", "head")}
        assert traced() is traced()
    assert len(threads) == 3
    assert len({*threads, threading.main_thread()}) == 2


def test_modules_are_imported_before_the_first_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(onnx_writer, "import_module", done.append)
    trace: Any = lambda piece: done.append(piece.name)  # noqa: E731
    with onnx_writer.tracing(lambda: calls("stem"), trace=trace, ahead=("torch", "onnxscript")) as traced:
        traced()
    assert done == ["torch", "onnxscript", "stem"]


def test_what_is_not_begun_by_the_end_is_left_out() -> None:
    """As where the stage was made earlier: nobody waits for a trace that nobody wants."""
    begun, held = threading.Event(), threading.Event()

    def trace(piece: Any) -> str:
        begun.set()
        assert held.wait(10)
        return f"the graph of {piece.name}"

    with onnx_writer.tracing(lambda: calls("stem", "block"), trace=trace) as traced:
        assert begun.wait(10)
        threading.Timer(0.05, held.set).start()
    assert traced() == {"stem": "the graph of stem"}


def test_what_cannot_be_traced_is_said_to_who_asks_for_it() -> None:
    def trace(_piece: Any) -> str:
        raise BuildError("The piece stem cannot be traced.", next_step="Report it.")

    with (
        onnx_writer.tracing(lambda: calls("stem"), trace=trace) as traced,
        pytest.raises(BuildError, match="stem cannot be traced"),
    ):
        traced()
    with onnx_writer.tracing(lambda: calls("stem"), trace=trace):
        pass  # and not to who does not, whose own error would be hidden


def test_a_build_takes_over_what_was_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece once, none of them by the thread that writes, and the bytes are those of an export on its own."""
    threads = []
    original = tracer.trace

    def trace(piece: Any) -> Any:
        threads.append((piece.name.partition(",")[0], threading.current_thread() is threading.main_thread()))
        return original(piece)

    request = pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=tmp_path / "bundle")
    alone = tmp_path / "alone"
    alone.mkdir()
    export_to(alone, request.model, lambda name: request.model.synthetic(name, 0))
    monkeypatch.setattr(export_stage.traces, "of", lambda piece, **_: trace(piece))
    built = pipeline.export_only(request)
    assert threads == [("stem", False), ("block", False), ("head", False)]
    data = "model.onnx.data"
    digest = hashlib.sha256((alone / data).read_bytes()).hexdigest()
    assert files.sha256(request.out / data) == digest
    assert {file.name: file.sha256 for file in built.manifest.files}[data] == digest  # hashed while it was written


def test_a_file_that_takes_a_piece_at_a_time_gets_all_of_it() -> None:
    taken = bytearray()

    def write(content: memoryview) -> int:
        taken.extend(content[:3])
        return min(3, len(content))

    file: Any = SimpleNamespace(write=write)
    weights_file._InTurn(file, threading.Lock()).write(b"0123456789")
    assert taken == b"0123456789"


def test_a_large_file_is_hashed_at_its_pace_beside_a_thread_that_computes(tmp_path: Path) -> None:
    """Each piece costs a turn of the interpreter's lock, so they are few: 5 ms for 4 MB halved the pace once."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(1 << 28)
    said: list[int] = []
    files.sha256(path, progress=lambda _what, done, _total: said.append(done))
    assert said[-1] == 1 << 28
    assert len(said) <= 16


@pytest.mark.parametrize("size", [0, 1, files._HASHED_BYTES - 1, files._HASHED_BYTES, files._HASHED_BYTES + 1])
def test_hashes_are_of_the_whole_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    path.write_bytes(content)
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("opset", range(14, 24))
def test_the_file_format_is_that_of_the_operator_set(opset: int) -> None:
    """By onnx's own table; no older than 8, which every runtime of today reads."""
    from onnx import helper

    needed = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    assert onnx_writer._ir_version(opset) == max(8, needed)
